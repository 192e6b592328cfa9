"""Calls outside of jit are padded to a few lengths, and answer as calls that are not."""

import numpy as np
import pytest

from olmozoo import InputError
from tests.helpers.checkpoints import left_padded
from tests.helpers.configs import CONFIGS

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
from flax import linen

from olmozoo import flax
from olmozoo.flax import base
from olmozoo.flax.buckets import pad_call
from tests.helpers.flax_models import ALL, ask, make

LONG = CONFIGS["olmo2-longrope"].replace(num_hidden_layers=1)  # other frequencies from position 12 on
MODELS = {
    "longrope": (flax.FlaxOlmo2ForCausalLM, LONG),
    "opt": (flax.FlaxOPTForCausalLM, ALL[flax.FlaxOPTForCausalLM]),
    "classifier": (flax.FlaxOlmoForSequenceClassification, ALL[flax.FlaxOlmoForSequenceClassification]),
    "answerer": (flax.FlaxOPTForQuestionAnswering, ALL[flax.FlaxOPTForQuestionAnswering]),
    "decoder": (flax.FlaxOlmo2Model, LONG),
}


@pytest.fixture
def calls(monkeypatch):
    """The lengths of the calls of a module: of a compiled one, when it is traced."""
    lengths, apply = [], linen.Module.apply

    def counted(self, variables, *args, **inputs):
        tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        lengths.append(np.shape(tokens)[1])
        return apply(self, variables, *args, **inputs)

    monkeypatch.setattr(linen.Module, "apply", counted)
    return lengths


def various_inputs(ids, mask, cls, width):
    seen = np.tril(np.ones((ids.shape[1],) * 2, bool))[None, None]
    labels = {"labels": np.where(mask, ids, -100)} if cls.head == "causal_lm" else {}
    yield {"input_ids": ids, "use_cache": False, "return_dict": False}
    yield {
        "input_ids": jnp.asarray(ids),
        "attention_mask": mask,
        "output_hidden_states": True,
        "output_attentions": True,
        **labels,
    }
    yield {"input_ids": ids, "cache_position": np.arange(ids.shape[1]) + 1, "attention_mask": seen, "use_cache": False}
    if cls.head != "sequence_classification":
        embeds = np.random.default_rng(0).normal(size=(*ids.shape, width))
        yield {"inputs_embeds": embeds, "attention_mask": np.where(seen, 0.0, -np.inf), "use_cache": False}
    if cls.head == "causal_lm":
        positions = np.maximum(mask.cumsum(-1) - 1, 0)
        yield {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": 2}
        yield {"input_ids": ids, "logits_to_keep": np.array([0, -2]), "use_cache": False}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_call_answers_as_one_that_is_not(name, monkeypatch):
    padded = []
    monkeypatch.setattr(base, "pad_call", lambda *call: padded.append(pad_call(*call)) or padded[-1])
    cls, config = MODELS[name]
    model = make(cls, config, dtype="float64")
    ids, mask = left_padded(config)
    for number, inputs in enumerate(various_inputs(ids, mask, cls, config.embedding.shape[1])):
        found = model(**inputs)
        expected = jax.jit(lambda params, inputs=inputs: model(**inputs, params=params))(model.params)
        assert jax.tree.structure(found) == jax.tree.structure(expected), number
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert isinstance(one, jax.Array)
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, atol=1e-12, rtol=0)
    assert len(padded) == number + 1
    assert None not in padded


def test_one_program_serves_many_lengths(model, calls):
    calls.clear()
    for length in (3, 16, 34, 64, 65, 100):
        logits = model(np.full((1, length), 5)).logits
        assert logits.shape == (1, length, model.config.vocab_size)
    assert calls == [16, 64, 128]


def test_calls_that_padding_would_change_are_left_alone(model, batch, monkeypatch):
    ids, mask = batch
    length = ids.shape[1]
    cache = model(ids, mask).past_key_values
    assert cache[0][0].shape[2] == length
    traced = jax.make_jaxpr(lambda: model(ids, mask).logits)()
    assert "name=forward" not in str(traced)
    jax.eval_shape(jax.grad(lambda params: model(ids, mask, params=params, labels=ids).loss), model.params)
    with pytest.raises(InputError, match=rf"attention_mask has shape \(3, 4\), expected \(3, {length}\)"):
        model(ids, mask[:, :4])

    class Called(Exception):
        pass

    def called(self, variables, **inputs):
        raise Called(type(inputs["input_ids"]), inputs["input_ids"].shape)

    monkeypatch.setattr(linen.Module, "apply", called)
    for inputs in ({"past_key_values": cache}, {"deterministic": False}):
        with pytest.raises(Called) as found:
            model(ids, **inputs)
        assert found.value.args == (np.ndarray, ids.shape)


def test_a_setting_of_the_config_is_obeyed_after_it_has_changed(batch):
    model = make(flax.FlaxOlmoForSequenceClassification)
    ids = batch[0]
    before = model(ids)
    assert before.past_key_values is not None
    model.config.pad_token_id = int(ids[0, -1])
    after = model(ids)
    assert not np.allclose(before.logits[0], after.logits[0])
    np.testing.assert_allclose(after.logits, ask(model, ids, None).logits, atol=1e-5)
    model.config.use_cache = False
    assert model(ids).past_key_values is None
