"""Keras models of the tests, with inputs, labels and comparisons."""

import numpy as np
import pytest

from olmozoo import Olmo2Config, OlmoConfig, OlmoeConfig, OPTConfig
from tests.helpers.checkpoints import left_padded, random_values

pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")

BIASED_OLMO2 = Olmo2Config(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    pad_token_id=1,
    eos_token_id=None,
    initializer_range=0.2,
)
COMMON = {"vocab_size": 53, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "num_labels": 3}
ROTARY = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 1, "eos_token_id": None}
CONFIGS = {
    "Olmo2": Olmo2Config(**ROTARY),
    "Olmo": OlmoConfig(**ROTARY, clip_qkv=2.0, tie_word_embeddings=True),
    "OPT": OPTConfig(**COMMON, ffn_dim=24, max_position_embeddings=64, dropout=0.0, eos_token_id=None),
}
OLMOE = OlmoeConfig(**ROTARY, num_experts=3, num_experts_per_tok=2)
HEADS = {
    "Model": None,
    "ForCausalLM": "causal_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForQuestionAnswering": "question_answering",
}
FAMILIES = list(CONFIGS)
EVERY = [
    *((family, head) for head in ("Model", "ForCausalLM", "ForSequenceClassification") for family in FAMILIES),
    ("OPT", "ForQuestionAnswering"),
]
ONE_EACH = [("Olmo2", "ForCausalLM"), ("Olmo", "ForSequenceClassification"), ("OPT", "ForQuestionAnswering")]
ANSWERS = ("last_hidden_state", "logits", "start_logits", "end_logits")
IDS, MASK = left_padded(CONFIGS["Olmo2"], batch=4, length=9)
REAL = MASK.astype(bool)
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
LABELS = {
    "ForCausalLM": {"labels": np.where(MASK, IDS, -100)},
    "ForSequenceClassification": {"labels": np.array([2, 0, 1, 1])},
    "ForQuestionAnswering": {"start_positions": np.array([1, 3, 5, 7]), "end_positions": np.array([2, 6, 8, 8])},
}


def make(family, head="ForCausalLM", config=None, **options):
    """A model whose every parameter matters: norms away from 1, biases away from 0."""
    config = config or CONFIGS[family]
    model = getattr(zoo, f"TF{family}{head}")(config, seed=None, **options)
    model.bind_parameters(
        (parameter, random_values(parameter).astype(model.variable_dtype))
        for parameter in config.parameters(HEADS[head])
        if parameter.tied_to is None
    )
    return model


def olmo2(dtype="float32", config=BIASED_OLMO2):
    """An OLMo 2 of two layers with biases; its vocabulary is larger than the ids of `IDS`."""
    return make("Olmo2", config=config, dtype=dtype)


def dataset(*parts):
    """Batches of dicts, or of (dict, labels)."""
    return tf.data.Dataset.from_tensor_slices(parts[0] if len(parts) == 1 else parts).batch(4)


def own_labels(head):
    """The labels as they are given beside the inputs: an array, or a tuple of two."""
    labels = tuple(LABELS[head].values())
    return labels if len(labels) > 1 else labels[0]


def logits_of(output):
    """The fields of an output, or of the answer of a served model, that hold answers."""
    return {name: np.asarray(value) for name, value in output.items() if name in ANSWERS}


def same_logits(found, expected, atol=0.0):
    """Whether two outputs are equal, leaving out what a language model says at padding."""
    found, expected = logits_of(found), logits_of(expected)
    assert found.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        where = REAL if value.shape[:2] == REAL.shape else ...
        np.testing.assert_allclose(found[name][where], value[where], rtol=0, atol=atol)


def total_change(before, variables):
    return [float(np.abs(old - variable.numpy()).max()) for old, variable in zip(before, variables, strict=True)]


def greedy(model, ids, steps, mask=None):
    """Ids of the likeliest next tokens, by whole forward calls without a cache."""
    mask = np.ones_like(ids) if mask is None else mask
    for _ in range(steps):
        positions = np.where(mask, mask.cumsum(1) - 1, 0)
        token = np.argmax(model(ids, mask, positions).logits[:, -1], -1)[:, None]
        ids, mask = np.concatenate([ids, token], 1), np.concatenate([mask, np.ones_like(token)], 1)
    return ids
