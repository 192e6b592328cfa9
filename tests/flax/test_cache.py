"""Key/value caches of Flax models."""

import numpy as np
import pytest

from olmozoo import InputError
from tests.helpers.flax_models import (
    close,
)

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp

from olmozoo import flax


@pytest.mark.parametrize(("cache", "compiled"), [("tuple", True), ("object", True), ("object", False)])
def test_the_cache_that_goes_in_comes_out_and_answers_alike(model, batch, cache, compiled):
    ids, mask = batch
    expected = model(ids, mask).logits
    past = None if cache == "tuple" else model.init_cache(3, 14)
    wide = np.pad(mask, ((0, 0), (0, 3)), constant_values=1)  # as long as the cache: its end is not written yet

    def step(ids, mask, past):
        return model(ids, mask, past_key_values=past)

    run, start = jax.jit(step) if compiled else step, 0
    for end in (4, 5, 6, 11) if compiled else (10, 11):
        seen = wide if cache == "object" and compiled else mask[:, :end]
        output = run(ids[:, start:end], seen, past)
        past = output.past_key_values
        assert close(output.logits[mask[:, start:end] == 1], expected[:, start:end][mask[:, start:end] == 1])
        start = end
    if cache == "tuple":
        assert isinstance(past, tuple)
        assert past[1][0].shape == (3, 2, 11, 10)
        assert isinstance(model(ids[:, :1], past_key_values=list(past), use_cache=False).past_key_values, tuple)
    else:
        assert isinstance(past, flax.KVCache)
        assert past.max_length == 14
        assert past.get_seq_length() == 11
        assert not past.keys[1][:, :, 11:].any()
        with pytest.raises(InputError, match="room for 14 positions, 15"):
            model(ids[:, :4], past_key_values=past)
    assert model(ids, use_cache=False).past_key_values is None


def test_a_cache_of_other_rows_is_refused(model):
    with pytest.raises(InputError, match=r"the cache has \(3, \d+\) rows and heads, expected \(2, "):
        model(np.ones((2, 3), int), past_key_values=model.init_cache(3, 8))


def test_a_mask_shorter_than_what_is_cached_is_refused(model):
    ids, past = np.ones((2, 3), int), model.init_cache(2, 8).replace(length=jnp.int32(3))
    for length in (5, 9):
        with pytest.raises(InputError, match=rf"attention_mask has shape \(2, {length}\), expected \(2, 6 to 8\)"):
            model(ids, np.ones((2, length), int), past_key_values=past)
