"""What users of PyTorch models expect beyond the numbers."""

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from olmozoo import ConfigError, InputError, Olmo2Config, OlmoConfig, OPTConfig
from olmozoo.checkpoint.reader import Checkpoint
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.wings import refusal

torch = pytest.importorskip("torch")

from olmozoo import pt
from olmozoo.pt.cache import StaticCache

CONFIG = Olmo2Config(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    eos_token_id=3,
)
OPT = OPTConfig(
    vocab_size=61,
    hidden_size=40,
    ffn_dim=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
    pad_token_id=0,
    word_embed_proj_dim=24,
    do_layer_norm_before=False,
)
OLMO = OlmoConfig(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    attention_bias=True,
    tie_word_embeddings=True,
    pad_token_id=0,
)
CLASSES = [getattr(pt, name) for name in pt.__all__ if hasattr(getattr(pt, name), "config_class")]


def config_of(cls):
    return next(config for config in (CONFIG, OPT, OLMO) if isinstance(config, cls.config_class))


@pytest.fixture
def model(tmp_path):
    return pt.Olmo2ForCausalLM.from_pretrained(write_checkpoint(tmp_path / "m", CONFIG, dtype="float32"))


@pytest.fixture
def batch():
    return tuple(torch.from_numpy(array) for array in left_padded(CONFIG))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_state_dict_keys_are_the_table(cls):
    config = config_of(cls)
    model = cls(config)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    strip = "" if cls.head else "model."
    assert state == {p.name.removeprefix(strip): p.shape for p in config.parameters(cls.head)}
    tied = {p.name for p in config.parameters(cls.head) if p.tied_to}
    assert len(list(model.parameters())) == len(state) - len(tied)
    assert model.num_parameters() == sum(config.count_parameters(cls.head).values())


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


@pytest.mark.parametrize("config", [CONFIG, OLMO, OPT], ids=lambda config: config.name)
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


@pytest.mark.parametrize("config", [CONFIG, OLMO, OPT], ids=lambda config: config.name)
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
    model, ids = pt.Olmo2ForCausalLM(CONFIG, seed=1), batch[0]
    with torch.inference_mode():
        first = model(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("frequencies were made again"))
        assert torch.equal(model(ids).logits, first)
    model(ids, labels=ids).loss.backward()  # with frequencies that were made in inference mode
    state = model.double().state_dict()
    exact = pt.Olmo2ForCausalLM(CONFIG, dtype="float64")
    exact.load_state_dict(state)
    rounded = pt.Olmo2ForCausalLM(CONFIG, seed=1).half().double()
    rounded.load_state_dict(state)
    assert torch.equal(rounded(ids).logits, exact(ids).logits)
    with torch.device("meta"):
        assert pt.Olmo2ForCausalLM(CONFIG)(ids.to("meta")).logits.shape == (3, 11, 61)
    assert torch.equal(rounded(ids).logits, exact(ids).logits)


def test_a_static_cache_is_at_a_static_address():
    cache = StaticCache(pt.Olmo2ForCausalLM(CONFIG).init_cache(2, 8))
    assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in (*cache.keys, *cache.values))


def test_a_config_that_asks_for_tuples_changes_no_generation(batch):
    ids, mask = batch
    model = pt.Olmo2ForCausalLM(CONFIG, seed=1).eval()
    expected = model.generate(ids, mask, max_new_tokens=3)
    for asked in (False, None):
        model.config = model.model.config = CONFIG.replace(extra={"return_dict": asked})
        assert isinstance(model(ids, mask), tuple) == (asked is False)
        assert torch.equal(model.generate(ids, mask, max_new_tokens=3), expected)


def test_a_cache_of_transformers_serves(model, batch):
    transformers = pytest.importorskip("transformers")
    ids, mask = batch
    cache = transformers.DynamicCache()
    model(ids[:, :6], mask[:, :6], past_key_values=cache)
    output = model(ids[:, 6:], mask, past_key_values=cache)
    assert output.past_key_values is cache
    torch.testing.assert_close(output.logits, model(ids, mask).logits[:, 6:], rtol=1e-4, atol=1e-5)


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
        pt.Olmo2ForCausalLM(CONFIG)(torch.ones(1, 9, dtype=torch.long), position_ids=torch.arange(9))
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


def test_labels_that_are_all_ignored_give_no_loss_and_no_nan(model, batch):
    assert model(*batch, labels=torch.full_like(batch[0], -100)).loss.item() == 0.0


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_gradient_checkpointing_changes_no_gradient(cls, batch):
    grads = []
    for enable in (False, True):
        model = cls(
            config_of(cls).replace(**({"dropout": 0.0} if cls.config_class is OPTConfig else {})), seed=1
        ).train()
        if enable:
            model.gradient_checkpointing_enable()
        output = model(*batch, use_cache=True)
        assert ("past_key_values" in output) != enable
        output[0].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("cls", [pt.Olmo2ForCausalLM, pt.OlmoForCausalLM, pt.OPTForCausalLM], ids=lambda c: c.__name__)
def test_it_compiles_without_graph_breaks(cls, batch):
    model = cls(config_of(cls), seed=1).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = batch
    torch.testing.assert_close(compiled(ids, mask).logits, model(ids, mask).logits, rtol=1e-4, atol=1e-5)
    loss = compiled(ids, mask, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    for length in (7, 9, 5, 1):  # without a mask; the second one makes the length a symbol
        torch.testing.assert_close(compiled(ids[:, :length]).logits, model(ids[:, :length]).logits)


@pytest.mark.parametrize("cls", [pt.Olmo2ForCausalLM, pt.OlmoForCausalLM, pt.OPTForCausalLM], ids=lambda c: c.__name__)
def test_it_exports_without_a_mask(cls, batch):
    model, ids = cls(config_of(cls), seed=1).eval(), batch[0]
    length = torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(model, (ids,), dynamic_shapes=({1: length},))
    torch.testing.assert_close(program.module()(ids[:, :5]).logits, model(ids[:, :5]).logits)


@pytest.mark.parametrize("config", [CONFIG, OLMO, OPT], ids=lambda config: config.name)
def test_resizing_the_vocabulary_keeps_rows_and_moves_head_config_and_tie(config, batch):
    model = pt.AutoModelForCausalLM.from_config(config, seed=1).eval()
    ids, mask = batch
    before = model(ids, mask).logits
    embedding = model.resize_token_embeddings(66, pad_to_multiple_of=8)
    assert embedding is model.get_input_embeddings()
    assert embedding.weight.shape[0] == embedding.num_embeddings == model.config.vocab_size == 72
    assert model.model.config.vocab_size == 72
    assert (model.lm_head.weight is embedding.weight) == config.tie_word_embeddings
    after = model(ids, mask).logits
    assert torch.equal(after[..., :61], before)
    model.resize_token_embeddings(50)
    assert model(ids.clamp(max=49), mask).logits.shape[-1] == 50
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(False).resize_token_embeddings(60)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_save_after_resize_loads(tmp_path):
    model = pt.Olmo2ForCausalLM(CONFIG, seed=1)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    assert pt.Olmo2ForCausalLM.from_pretrained(tmp_path).config.vocab_size == 70
    kept = model.lm_head.weight.detach().clone()
    assert model.resize_token_embeddings(pad_to_multiple_of=32).weight.shape[0] == model.config.vocab_size == 96
    assert torch.equal(model.lm_head.weight[:70], kept)


def test_a_new_input_embedding_moves_a_tied_head():
    model = pt.OlmoForCausalLM(OLMO)
    new = torch.nn.Embedding(61, 40)
    model.set_input_embeddings(new)
    assert model.lm_head.weight is new.weight


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
    assert pt.Olmo2ForCausalLM(CONFIG, seed=None).device.type == "meta"
    assert pt.Olmo2ForCausalLM(CONFIG, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="takes a Olmo2Config, not OPTConfig"):
        pt.Olmo2ForCausalLM(OPT)


def test_the_weights_are_the_mapped_file_and_never_change_it(tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIG, dtype="bfloat16")
    before = (folder / "model.safetensors").read_bytes()
    model = pt.Olmo2ForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert np.any(np.asarray(Checkpoint(folder)["lm_head.weight"], np.float32))
    assert pt.Olmo2ForCausalLM.from_pretrained(folder, dtype="float32").dtype == torch.float32


def test_overrides_change_the_config_and_wrong_families_are_refused(tmp_path, batch):
    folder = write_checkpoint(tmp_path / "m", CONFIG, dtype="float32")
    assert pt.AutoModelForCausalLM.from_pretrained(folder, rms_norm_eps=0.5).config.rms_norm_eps == 0.5
    chatty = pt.Olmo2ForCausalLM.from_pretrained(folder, output_hidden_states=True)
    assert len(chatty(*batch).hidden_states) == 3
    with pytest.raises(ConfigError, match="'olmo2', expected 'olmo'"):
        pt.OlmoForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="hiden_size"):
        pt.Olmo2ForCausalLM.from_pretrained(folder, hiden_size=3)


def test_generate_stops_pads_and_keeps_the_mode(model, batch):
    ids, mask = batch
    free = model.generate(ids, mask, max_new_tokens=6, eos_token_id=[])
    assert free.shape == (3, 17)
    assert torch.equal(free, model.generate(ids, mask, max_length=17, eos_token_id=[]))
    ended = model.generate(ids, mask, max_new_tokens=6, eos_token_id=int(free[0, 11]), pad_token_id=9)
    assert ended[0, :12].tolist() == free[0, :12].tolist()
    assert (ended[0, 12:] == 9).all()
    assert model.train().generate(ids, mask, max_new_tokens=1).shape == (3, 12)
    assert model.training


def test_generate_takes_embeddings_and_returns_the_answer(model, batch):
    ids, mask = batch
    embeds = model.get_input_embeddings()(ids)
    tokens = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(tokens, model.generate(ids, mask, max_new_tokens=6)[:, 11:])
    with pytest.raises(InputError, match="one of input_ids and inputs_embeds, not both"):
        model.generate(ids, inputs_embeds=embeds)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_length": 11}, "no room"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temprature": 1.0}, "temprature"),
    ],
)
def test_generate_refuses_what_it_cannot_do(model, batch, settings, named):
    with pytest.raises(InputError, match=named):
        model.generate(*batch, **settings)


def test_pruned_heads_are_gone_from_weights_caches_and_checkpoints(tmp_path, batch):
    ids, mask = batch
    model = pt.OPTForCausalLM(OPT, seed=1).eval()
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


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_it_exports_for_any_batch_and_length(cls, batch):
    model = cls(config_of(cls), seed=1).eval()
    ids, mask = batch
    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(
        model, (ids, mask), {"use_cache": False}, dynamic_shapes=({0: rows, 1: length}, {0: rows, 1: length}, None)
    )
    ids, mask = (torch.cat([tensor, tensor])[:, 2:].contiguous() for tensor in batch)
    exported, own = program.module()(ids, mask, use_cache=False), model(ids, mask, use_cache=False)
    assert type(exported) is type(own)
    torch.testing.assert_close(exported[0], own[0])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_autocast_computes_in_bfloat16_and_stays_near(cls, batch):
    model = cls(config_of(cls), seed=1).eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*batch)[0]
    real = batch[1].bool() if low.ndim == 3 else slice(None)
    torch.testing.assert_close(low.float()[real], model(*batch)[0][real], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_safetensors_library_saves_and_loads_the_model(cls, batch, tmp_path):
    from safetensors.torch import load_model, save_model

    model, other = cls(config_of(cls), seed=1).eval(), cls(config_of(cls), seed=2).eval()
    save_model(model, tmp_path / "model.safetensors")
    assert not torch.equal(other(*batch)[0], model(*batch)[0])
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(*batch)[0], model(*batch)[0])


@pytest.mark.parametrize(
    "cls",
    [pt.Olmo2ForCausalLM, pt.OlmoForCausalLM, pt.OPTForCausalLM, pt.OPTForSequenceClassification],
    ids=lambda cls: cls.__name__,
)
def test_peft_adds_trains_saves_loads_and_merges_adapters(cls, batch, tmp_path):
    peft = pytest.importorskip("peft")
    ids, mask = batch
    causal = cls.head == "causal_lm"
    config = peft.LoraConfig(task_type="CAUSAL_LM" if causal else "SEQ_CLS", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(cls(config_of(cls), seed=1), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    labels = ids if causal else torch.tensor([0, 1, 1])
    for _ in range(3):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = model.eval()(input_ids=ids, attention_mask=mask).logits
    plain = cls(config_of(cls), seed=1).eval()
    assert not torch.allclose(plain(ids, mask).logits, tuned)
    with pytest.raises(InputError, match=r"unexpected: model.*q_proj.lora_A.default.weight \(8, "):
        model.get_base_model().save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, tuned)
    if causal:
        tokens = again.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
        assert torch.equal(tokens, again.merge_and_unload().generate(ids, mask, max_new_tokens=4))


@pytest.mark.parametrize("keep", ["save", "pt"])
def test_parameters_that_the_config_does_not_know_are_named_and_not_lost(keep, tmp_path):
    tied = pt.OlmoForCausalLM(OLMO)
    tied.lm_head = torch.nn.Linear(tied.config.hidden_size, tied.config.vocab_size, bias=False)
    assert f"unexpected: lm_head.weight {tuple(tied.lm_head.weight.shape)}" in refusal(tied, keep, tmp_path)

    transposed = pt.Olmo2ForCausalLM(CONFIG)
    shape = tuple(transposed.lm_head.weight.shape)
    transposed.lm_head = torch.nn.Linear(*shape, bias=False)
    assert f"wrong shape: lm_head.weight is {shape[::-1]}, expected {shape}" in refusal(transposed, keep, tmp_path)

    empty = refusal(pt.Olmo2Model(CONFIG, seed=None), keep, tmp_path)
    assert "without values, on the meta device: norm.weight" in empty


def test_two_processes_under_torchrun_get_the_gradient_of_the_whole_batch(tmp_path):
    program = tmp_path / "train.py"
    program.write_text(f"""
import sys
import torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.pt.test_pt import CONFIG, OLMO, OPT, left_padded, pt
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
ids, mask = (torch.from_numpy(array) for array in left_padded(CONFIG, batch=4))
mine = slice(2 * rank, 2 * rank + 2)
for config in (CONFIG, OLMO, OPT.replace(dropout=0.0)):
    model = torch.nn.parallel.DistributedDataParallel(pt.AutoModelForCausalLM.from_config(config, seed=1))
    model(input_ids=ids[mine], attention_mask=mask[mine], labels=ids[mine]).loss.backward()
    whole = pt.AutoModelForCausalLM.from_config(config, seed=1)
    sum(whole(ids[i : i + 2], mask[i : i + 2], labels=ids[i : i + 2]).loss / 2 for i in (0, 2)).backward()
    for ours, expected in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(ours.grad, expected.grad)
print("agreed")
""")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("agreed") == 2, done.stderr


def test_dropout_is_alive_in_training_and_dead_in_inference(batch):
    model = pt.OPTModel(OPT.replace(dropout=0.5), seed=1)
    torch.manual_seed(0)
    calls = [model.train()(*batch)[0] for _ in range(2)]
    assert not torch.equal(*calls)
    calls = [model.eval()(*batch)[0] for _ in range(2)]
    assert torch.equal(*calls)
    quiet = pt.OPTModel(OPT.replace(dropout=0.0), seed=1).train()
    torch.testing.assert_close(quiet(*batch)[0], calls[0])
    attentive = pt.OPTModel(OPT.replace(dropout=0.0, attention_dropout=0.5), seed=1).train()
    assert not torch.equal(attentive(*batch)[0], attentive(*batch)[0])


def test_dropout_keeps_the_mean_and_drops_its_share(batch):
    block = pt.OPTModel(OPT.replace(dropout=0.25), seed=1).decoder.layers[0].train()
    block.self_attn.forward = lambda x, *rest: (torch.ones_like(x), None)
    block.self_attn_layer_norm.forward = lambda x: x
    block.fc2.forward = lambda x: torch.zeros(*x.shape[:-1], 40)
    block.final_layer_norm.forward = lambda x: x
    torch.manual_seed(0)
    out = torch.cat([block(torch.zeros(3, 11, 40), None, None, None, False)[0].flatten() for _ in range(40)])
    assert abs((out == 0).float().mean().item() - 0.25) < 0.01
    assert abs(out.mean().item() - 1) < 0.01


def test_layerdrop_skips_its_share_of_blocks_in_training_alone(batch):
    config = OPT.replace(dropout=0.0, num_hidden_layers=1, layerdrop=0.3, word_embed_proj_dim=40)
    model = pt.OPTModel(config, seed=1).train()
    torch.manual_seed(0)
    skipped = 0
    for _ in range(300):
        states = model(*batch, output_hidden_states=True, use_cache=False).hidden_states
        skipped += torch.equal(states[0], states[1])
    assert abs(skipped / 300 - 0.3) < 0.08
    states = model.eval()(*batch, output_hidden_states=True).hidden_states
    assert not torch.equal(states[0], states[1])
