"""PyTorch models: parameters, dtypes, calls, outputs and what is refused."""

import copy
import inspect
import pickle

import pytest

from olmozoo import ConfigError, InputError, Olmo2Config
from tests.helpers.configs import SMALL_OLMO, SMALL_OLMO2, SMALL_OPT, config_of
from tests.helpers.pt_models import CLASSES

torch = pytest.importorskip("torch")

from olmozoo import pt


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_state_dict_keys_are_the_table(cls):
    config = config_of(cls)
    model = cls(config)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    strip = "" if cls.head else "model."
    assert state == {p.name.removeprefix(strip): p.shape for p in config.parameters(cls.head) if p.tied_to is None}
    assert len(list(model.parameters())) == len(state)
    assert model.num_parameters() == sum(config.count_parameters(cls.head).values())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_state_dict_has_tied_weights_once_and_loads_by_either_name(key, assign):
    config = SMALL_OLMO.replace(tie_word_embeddings=True)
    model, other = (pt.OlmoForCausalLM(config, seed=seed) for seed in (1, 2))
    state = copy.deepcopy(model).state_dict()
    assert "lm_head.weight" not in state
    state[key] = state.pop("model.embed_tokens.weight")
    assert other.load_state_dict(state, assign=assign) == ([], [])
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    wrapped = torch.nn.Sequential(model)
    assert wrapped.load_state_dict(wrapped.state_dict()) == ([], [])

    with pytest.raises(RuntimeError, match="embed_tokens"):
        other.load_state_dict({name: value for name, value in state.items() if name != key})
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    assert "lm_head.weight" in other.state_dict()


def test_the_forward_contract_has_its_arguments():
    wanted = [
        *("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels", "use_cache"),
        *("output_attentions", "output_hidden_states", "return_dict", "cache_position", "logits_to_keep"),
    ]
    assert list(inspect.signature(pt.Olmo2ForCausalLM.forward).parameters)[1 : len(wanted) + 1] == wanted


def test_outputs_unpack_index_and_read_as_dicts(model, batch):
    output = model(*batch, labels=batch[0])
    assert output.keys() == ["loss", "logits", "past_key_values"]
    loss, logits, cache = output
    assert loss is output.loss is output[0] is output["loss"]
    assert output[:2] == (loss, logits)
    assert dict(output)["logits"] is logits
    assert dict(**output).keys() == {"loss", "logits", "past_key_values"}
    assert "hidden_states" not in output
    with pytest.raises(KeyError):
        output["hidden_states"]
    plain = model(*batch, labels=batch[0], return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[1], logits)
    assert len(cache) == 2
    assert cache[0][0].shape == (3, 2, 11, 10)
    assert model(*batch, use_cache=False).past_key_values is None


@pytest.mark.parametrize("config", [SMALL_OLMO2, SMALL_OLMO, SMALL_OPT], ids=lambda config: config.name)
def test_a_mask_of_four_dimensions_may_be_added(config, batch):
    model = pt.AutoModelForCausalLM.from_config(config, seed=1).eval()
    ids = batch[0]
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[:4, :4] = True  # a prefix whose positions all see each other
    seen = seen.expand(3, 1, -1, -1)
    expected = model(ids, seen).logits
    assert (expected - model(ids).logits).abs().max() > 1e-4
    for hidden in (torch.finfo(torch.float32).min, -torch.inf):
        added = torch.zeros(seen.shape).masked_fill(~seen, hidden)
        for attentions in (False, True):
            torch.testing.assert_close(model(ids, added, output_attentions=attentions).logits, expected)
    added = torch.zeros(seen.shape, dtype=torch.float16).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(model(ids, added).logits, expected)
    added[:, :, 2] = -torch.inf  # a query that sees nothing
    assert model.half()(ids, added).logits.isfinite().all()


def test_rotary_frequencies_are_made_once_and_stay_exact(batch, monkeypatch):
    model, ids = pt.Olmo2ForCausalLM(SMALL_OLMO2, seed=1), batch[0]
    with torch.inference_mode():
        first = model(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("frequencies were made again"))
        assert torch.equal(model(ids).logits, first)
    model(ids, labels=ids).loss.backward()  # with frequencies that were made in inference mode
    state = model.double().state_dict()
    exact = pt.Olmo2ForCausalLM(SMALL_OLMO2, dtype="float64")
    exact.load_state_dict(state)
    rounded = pt.Olmo2ForCausalLM(SMALL_OLMO2, seed=1).half().double()
    rounded.load_state_dict(state)
    assert torch.equal(rounded(ids).logits, exact(ids).logits)
    with torch.device("meta"):
        assert pt.Olmo2ForCausalLM(SMALL_OLMO2)(ids.to("meta")).logits.shape == (3, 11, 61)
    assert torch.equal(rounded(ids).logits, exact(ids).logits)


def test_embeddings_positions_and_kept_logits(model, batch):
    ids, mask = batch
    full = model(ids, mask).logits
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(attention_mask=mask, inputs_embeds=embeds).logits, full)
    assert torch.equal(model(ids, mask, position_ids=torch.arange(11)[None]).logits, full)
    shifted = model(ids, mask, cache_position=torch.arange(11) * 2).logits
    assert not torch.allclose(shifted, full)
    assert torch.equal(shifted, model(ids, mask, position_ids=torch.arange(11)[None] * 2).logits)
    torch.testing.assert_close(model(ids, mask, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, mask, num_logits_to_keep=1).logits, full[:, -1:])
    with pytest.raises(InputError, match=r"position_ids has shape \(9,\), expected \(batch or 1, seq\)"):
        pt.Olmo2ForCausalLM(SMALL_OLMO2)(torch.ones(1, 9, dtype=torch.long), position_ids=torch.arange(9))
    torch.testing.assert_close(model(ids, mask, logits_to_keep=torch.tensor([3, 5])).logits, full[:, [3, 5]])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "inputs_embeds": torch.ones(1, 3, 40)}, "exactly one"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 4)}, r"\(2, 4\).*\(2, 3\)"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "past_key_values": ((),)}, "1 layers, expected 2"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "past_key_values": 3}, "int"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, r"shape \(3,\), expected \(batch, seq\)"),
        ({"inputs_embeds": torch.ones(3, 40)}, r"shape \(3, 40\), expected"),
        (
            {"input_ids": torch.ones(1, 3).long(), "labels": torch.ones(1, 3).long(), "logits_to_keep": 1},
            "logits_to_keep",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(model, arguments, named):
    with pytest.raises(InputError, match=named):
        model(**arguments)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_autocast_computes_in_bfloat16_and_stays_near(cls, batch):
    model = cls(config_of(cls), seed=1).eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*batch)[0]
    real = batch[1].bool() if low.ndim == 3 else slice(None)
    torch.testing.assert_close(low.float()[real], model(*batch)[0][real], rtol=0.05, atol=0.05)


def test_copies_pickles_and_casts_answer_the_same(model, batch):
    expected = model(*batch).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*batch).logits, expected)
        assert isinstance(other.config, Olmo2Config)
    assert copy.deepcopy(model).to(torch.float64)(*batch).logits.dtype == torch.float64
    assert copy.deepcopy(model).bfloat16().dtype == torch.bfloat16


def test_it_is_made_without_memory_on_the_meta_device_and_in_any_dtype():
    with torch.device("meta"):
        assert pt.Olmo2ForCausalLM(Olmo2Config.from_preset("olmo2-32b")).device.type == "meta"
    assert pt.Olmo2ForCausalLM(SMALL_OLMO2, seed=None).device.type == "meta"
    assert pt.Olmo2ForCausalLM(SMALL_OLMO2, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="takes a Olmo2Config, not OPTConfig"):
        pt.Olmo2ForCausalLM(SMALL_OPT)


def test_pruned_heads_are_gone_from_weights_caches_and_checkpoints(tmp_path, batch):
    ids, mask = batch
    model = pt.OPTForCausalLM(SMALL_OPT, seed=1).eval()
    head_mask = torch.ones(2, 4)
    head_mask[0, [1, 2]] = 0
    head_mask[1, 3] = 0
    expected = model(ids, mask, head_mask=head_mask).logits
    assert not torch.allclose(expected, model(ids, mask).logits)
    model.prune_heads({0: [2]})
    model.prune_heads({0: [1], 1: [3]})
    assert model.model.decoder.layers[0].self_attn.q_proj.weight.shape == (20, 40)
    torch.testing.assert_close(model(ids, mask).logits, expected)
    tokens = model.generate(ids, mask, max_new_tokens=5)
    model.save_pretrained(tmp_path)
    again = pt.OPTForCausalLM.from_pretrained(tmp_path)
    assert again.config.pruned_heads == {0: [1, 2], 1: [3]}
    assert torch.equal(again.generate(ids, mask, max_new_tokens=5), tokens)
    with pytest.raises(ConfigError, match=r"prunes \[0, 1, 2, 3\] of layer 0"):
        model.prune_heads({0: [0, 3]})
