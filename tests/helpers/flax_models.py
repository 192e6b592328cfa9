"""Flax models of the tests: one layer a model, random weights in which every mistake shows."""

import numpy as np
import pytest

from tests.helpers.checkpoints import random_values
from tests.helpers.configs import SMALL_OLMO, SMALL_OLMO2, SMALL_OPT

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from flax.traverse_util import flatten_dict

from olmozoo import flax

CAUSAL = {
    flax.FlaxOlmo2ForCausalLM: SMALL_OLMO2.replace(num_hidden_layers=1),
    flax.FlaxOlmoForCausalLM: SMALL_OLMO.replace(num_hidden_layers=1, clip_qkv=1.5, eos_token_id=None),
    flax.FlaxOPTForCausalLM: SMALL_OPT.replace(num_hidden_layers=1, eos_token_id=None, dropout=0.0),
}


HEADED = {
    flax.FlaxOlmoForSequenceClassification: SMALL_OLMO.replace(
        num_hidden_layers=1, num_labels=3, id2label=None, label2id=None
    ),
    flax.FlaxOPTForQuestionAnswering: SMALL_OPT.replace(num_hidden_layers=1, dropout=0.0),
}


ALL = CAUSAL | HEADED


by_name = {"ids": lambda cls: cls.__name__}


each_causal = pytest.mark.parametrize("cls", CAUSAL, **by_name)


each = pytest.mark.parametrize("cls", ALL, **by_name)


def make(cls, config=None, **options):
    """A model with random weights in which every mistake shows."""
    model = cls(config or ALL[cls], _do_init=False, **options)
    model.bind_parameters(
        (parameter, random_values(parameter).astype("float32"))
        for parameter in model.config.parameters(model.head)
        if parameter.tied_to is None
    )
    return model


def ask(model, ids, mask, params=None, dropout_rng=None, **inputs):
    """A compiled call: uncompiled, each operation would be compiled by itself, which takes longer."""
    call = jax.jit(lambda params, key: model(ids, mask, params=params, dropout_rng=key, **inputs))
    return call(model.params if params is None else params, dropout_rng)


def labelled(cls, ids):
    """The labels that a class takes for its loss."""
    rows = np.arange(len(ids)) % 3
    if cls.head == "question_answering":
        return {"start_positions": rows, "end_positions": rows + 4}
    return {"labels": ids if cls.head == "causal_lm" else rows}


def answer(output):
    """What a head says: its logits, for the start of an answer where there are two."""
    return output.start_logits if "start_logits" in output.keys() else output.logits  # noqa: SIM118


def equal(one, other):
    """Whether two trees are alike in form, dtypes and bits."""
    alike = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
    return jax.tree.all(alike)


def close(found, expected, bound=2e-5):
    return np.allclose(np.asarray(found), np.asarray(expected), rtol=bound, atol=bound)


def all_close(found, expected, bound=2e-5):
    return jax.tree.all(jax.tree.map(lambda a, b: close(a, b, bound), found, expected))


def by_hand(model, ids, mask, steps):
    """Greedy decoding, all tokens anew at each step; those still to come are out of sight behind the causal mask."""
    length = ids.shape[1]
    ids, mask = np.pad(ids, ((0, 0), (0, steps))), np.pad(mask, ((0, 0), (0, steps)), constant_values=1)
    predict = jax.jit(lambda ids: model(ids, mask, np.maximum(mask.cumsum(-1) - 1, 0)).logits)
    for end in range(length, length + steps):
        ids[:, end] = np.asarray(predict(ids)[:, end - 1]).argmax(-1)
    return ids


def old_rows(model, params):
    """The token embedding in a tree of parameters of another size."""
    return next(leaf for path, leaf in flatten_dict(params).items() if path[-2:] == ("embed_tokens", "embedding"))
