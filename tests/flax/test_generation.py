"""`generate` of Flax models."""

import copy

import numpy as np
import pytest

from olmozoo import InputError
from tests.helpers.checkpoints import left_padded
from tests.helpers.flax_models import (
    by_hand,
    make,
)

jax = pytest.importorskip("jax")
pytest.importorskip("flax")


from olmozoo import flax
from olmozoo.generation.prepare import BUCKET


def test_generate_writes_the_likeliest_tokens_and_compiles_once_a_bucket(model, batch, caplog):
    ids, mask = batch
    model = copy.copy(model)
    expected = by_hand(model, ids, mask, 9)
    output = model.generate(ids, mask, max_new_tokens=9)
    assert np.array_equal(output.sequences, expected)
    assert model.trace_count == 2  # the prompt and the answer
    assert np.array_equal(model.generate(ids, mask, max_new_tokens=4).sequences, expected[:, :15])
    row = model.generate(ids[1:2, 2:], max_length=16)
    assert model.trace_count == 4  # another number of rows
    assert np.array_equal(np.asarray(row.sequences)[0], expected[1, 2:18])

    def compiled():
        return sum("Compiling" in record.getMessage() for record in caplog.records)

    with jax.log_compiles(True):
        for length in (5, 8):
            model.generate(ids[1:2, -length:], max_new_tokens=3, eos_token_id=[60, 59], pad_token_id=7)
        model.generate(ids[1:2], max_new_tokens=BUCKET)
        assert compiled() == 0
        assert model.trace_count == 4
        model.generate(ids[1:2], max_new_tokens=BUCKET + 1)
    assert compiled() > 0
    assert model.trace_count == 6


def test_generate_stops_pads_and_trims(model, batch):
    ids, mask = batch
    free = np.asarray(model.generate(ids, mask, max_new_tokens=12).sequences)[:, 11:]
    ends = [int(free[0, 2]), int(free[1, 4]), int(free[2, 0])]
    found = np.asarray(model.generate(ids, mask, max_new_tokens=12, eos_token_id=ends, pad_token_id=9).sequences)
    lengths = [next(i for i, token in enumerate(row) if token in ends) + 1 for row in free]
    assert found.shape == (3, 11 + max(lengths))
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        assert np.array_equal(found[row, :11], ids[row])
        assert np.array_equal(found[row, 11 : 11 + length], free[row, :length])
        assert (found[row, 11 + length :] == 9).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"nonsense": 1}, "nonsense"),
        ({"attention_mask": np.ones((3, 2))}, "attention_mask has shape"),
    ],
)
def test_generate_refuses_what_it_cannot_do(model, batch, settings, named):
    with pytest.raises(InputError, match=named):
        model.generate(batch[0], **settings)
    with pytest.raises(InputError, match="outside of jit"):
        jax.jit(model.generate)(batch[0])


def test_generate_continues_prompts_of_embeddings():
    model = make(flax.FlaxOPTForCausalLM)  # positions that are learned: a wrong one shows
    ids, mask = left_padded(model.config)
    expected = by_hand(model, ids.copy(), mask, 6)
    embeds = np.asarray(model.get_input_embeddings()[ids])
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6).sequences
    assert np.array_equal(found, expected[:, 11:])
    assert model.trace_count == 2
    for length in (6, 9):  # no program for each length, nor for each dtype of the prompt
        part = model.generate(inputs_embeds=embeds[:, -length:].astype(np.float64), max_new_tokens=3).sequences
        assert np.array_equal(part, by_hand(model, ids[:, -length:], mask[:, -length:] ** 0, 3)[:, length:])
    assert model.trace_count == 2
    assert np.array_equal(model.generate(ids, mask, max_new_tokens=6).sequences, expected)
    assert model.trace_count == 4  # ids are another program
    answer = expected[0, 11:].tolist()
    stopped = model.generate(inputs_embeds=embeds[:1], max_length=17, eos_token_id=answer[2]).sequences
    assert stopped[0].tolist() == answer[: answer.index(answer[2]) + 1]


def test_prompts_of_embeddings_that_do_not_fit_are_refused():
    model = make(flax.FlaxOlmo2ForCausalLM)
    ids, mask = left_padded(model.config)
    embeds = model.get_input_embeddings()[ids]
    with pytest.raises(InputError, match="one of input_ids and inputs_embeds, not both"):
        model.generate(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(InputError, match="expected input_ids or inputs_embeds, or a bos_token_id"):
        model.generate()
    with pytest.raises(InputError, match=r"inputs_embeds has shape \(11, 40\), expected \(batch, seq, hidden\)"):
        model.generate(inputs_embeds=embeds[0])
    with pytest.raises(InputError, match=r"attention_mask has shape \(3, 10\)"):
        model.generate(inputs_embeds=embeds, attention_mask=mask[:, 1:])
    with pytest.raises(InputError, match="outside of jit"):
        jax.jit(lambda embeds: model.generate(inputs_embeds=embeds))(embeds)
