"""Key/value caches of PyTorch models."""

import pytest

from olmozoo import InputError
from tests.helpers.configs import SMALL_OLMO, SMALL_OLMO2, SMALL_OLMO3, SMALL_OPT

torch = pytest.importorskip("torch")

from olmozoo import pt
from olmozoo.pt.cache import KVCache, StaticCache


def test_what_cache_goes_in_comes_out(model, batch):
    ids, mask = batch
    first = model(ids[:, :6], mask[:, :6])
    assert isinstance(first.past_key_values, tuple)
    assert isinstance(model(ids[:, 6:], mask, past_key_values=first.past_key_values).past_key_values, tuple)
    cache = model.init_cache(3, 11)
    assert model(ids[:, :6], mask[:, :6], past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 6
    model(ids[:, 6:], mask, past_key_values=cache)
    with pytest.raises(InputError, match="11 positions, 12"):
        model(ids[:, :1], torch.ones(3, 12), past_key_values=cache)


@pytest.mark.parametrize("config", [SMALL_OLMO2, SMALL_OLMO, SMALL_OPT], ids=lambda config: config.name)
def test_a_narrower_cache_serves_and_one_of_another_shape_is_named(config, batch):
    model = pt.AutoModelForCausalLM.from_config(config, seed=1).eval()
    ids, mask = batch
    cache = model.init_cache(3, 11, dtype=torch.bfloat16)
    logits = torch.cat([model(ids[:, :6], mask[:, :6], past_key_values=cache).logits[:, -1:]], dim=1)
    logits = torch.cat([logits, model(ids[:, 6:], mask, past_key_values=cache).logits], dim=1)
    assert cache.keys[0].dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    expected = model(ids, mask).logits[:, 5:]
    assert 0 < (logits - expected).abs().max() < 0.02 * expected.abs().max()
    small = pt.AutoModelForCausalLM.from_config(config.replace(num_hidden_layers=1))
    rows = rf"has \(2, {cache.keys[0].shape[1]}\) rows and heads, expected \(3, "
    for other, named in ((model.init_cache(2, 11), rows), (small.init_cache(3, 11), "has 1 layers, expected 2")):
        with pytest.raises(InputError, match=named):
            model(ids, mask, past_key_values=other)


def test_a_static_cache_is_at_a_static_address():
    cache = StaticCache(KVCache([torch.randn(2, 1, 8, 4) for _ in range(2)], torch.randn(2, 2, 1, 8, 4), length=8))
    assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in (*cache.keys, *cache.values))
    old, places = cache.keys[1].clone(), [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)]
    cache.reorder(torch.tensor([1, 1]))
    assert torch.equal(cache.keys[1], old[[1, 1]])
    assert [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)] == places


def test_a_cache_of_transformers_serves(model, batch):
    transformers = pytest.importorskip("transformers")
    ids, mask = batch
    cache = transformers.DynamicCache()
    model(ids[:, :6], mask[:, :6], past_key_values=cache)
    output = model(ids[:, 6:], mask, past_key_values=cache)
    assert output.past_key_values is cache
    torch.testing.assert_close(output.logits, model(ids, mask).logits[:, 6:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_a_cache_of_transformers_that_keeps_windows_alone_serves(batch, masked):
    transformers = pytest.importorskip("transformers")
    config = SMALL_OLMO3
    model = pt.Olmo3ForCausalLM(config, seed=1).double().eval()
    ids, mask = batch
    mask = mask if masked else torch.ones_like(mask)
    cache = transformers.DynamicCache(config=transformers.Olmo3Config.from_dict(config.to_dict()))
    logits = [
        model(ids[:, start:end], mask[:, :end] if masked else None, past_key_values=cache).logits
        for start, end in ((0, 5), (5, 6), (6, 11))
    ]
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, 11, 3]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], model(ids, mask).logits[real], rtol=1e-9, atol=1e-9)
