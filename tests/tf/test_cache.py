"""Key/value caches of Keras models."""

import numpy as np
import pytest

from tests.helpers.keras_models import (
    IDS,
    MASK,
    REAL,
)

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")


def test_a_narrower_cache_serves(model):
    cache = model.init_cache(len(IDS), 12, dtype="bfloat16")
    first = model(IDS[:, :5], MASK[:, :5], past_key_values=cache)
    assert first.past_key_values.keys[0].dtype == tf.bfloat16
    logits = model(IDS[:, 5:], MASK, past_key_values=first.past_key_values).logits.numpy()
    expected = model(IDS, MASK).logits.numpy()[:, 5:]
    assert logits.dtype == expected.dtype
    assert 0 < abs(logits - expected).max() < 0.02 * abs(expected).max()


@pytest.mark.parametrize("kind", ["tuple", "object"])
@pytest.mark.parametrize("compiled", [False, True])
def test_cached_decoding_equals_the_whole_call(model, kind, compiled):
    expected = model(IDS, MASK).logits.numpy()
    past = None if kind == "tuple" else model.init_cache(len(IDS), 12)
    step = tf.function(lambda ids, mask, past: model(ids, mask, past_key_values=past)) if compiled else model
    logits = []
    for start, end in [(0, 5), *((i, i + 1) for i in range(5, IDS.shape[1]))]:
        mask = tf.constant(MASK[:, :end])
        if compiled and kind == "object":  # of one shape at every step
            mask = tf.pad(mask, [[0, 0], [0, 12 - end]])
        ids = tf.constant(IDS[:, start:end])
        output = step(ids, mask, past) if compiled else model(ids, mask, past_key_values=past)
        past = output.past_key_values
        assert isinstance(past, zoo.KVCache) == (kind == "object")
        assert isinstance(past, tuple)
        logits.append(output.logits.numpy())
    np.testing.assert_allclose(np.concatenate(logits, 1)[REAL], expected[REAL], atol=1e-12)
    if kind == "object":
        assert past.length == IDS.shape[1]
        assert not compiled or step.experimental_get_tracing_count() == 2  # one for the prefill, one for all steps
    else:
        assert past[0][0].shape == (4, 2, 9, 8)
