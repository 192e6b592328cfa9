"""`generate` of Keras models."""

import numpy as np
import pytest

from olmozoo.generation.prepare import prepare
from tests.helpers.configs import SMALL_OLMO3
from tests.helpers.keras_models import (
    IDS,
    MASK,
    greedy,
    make,
    olmo2,
)

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")

from olmozoo.tf.generation import from_numpy


def test_generate_traces_once_per_bucket_and_reads_the_weights_as_they_are():
    model = olmo2("float64")
    for length, new in ((4, 5), (9, 12), (1, 1)):
        np.testing.assert_array_equal(model.generate(IDS[3:, -length:], max_new_tokens=new).shape, (1, length + new))
    first = model.generate(IDS[:1], max_new_tokens=12)
    np.testing.assert_array_equal(first, greedy(model, IDS[:1], 12))
    model.generate(IDS[:1], max_new_tokens=3, eos_token_id=[3, 4, 5], pad_token_id=7)
    assert model.trace_count == 2  # the prompt and the answer

    for variable in model.weights:
        variable.assign(variable * 1.5 if "norm" in variable.path else variable + 0.1)
    second = model.generate(IDS[:1], max_new_tokens=12)
    assert np.any(second != first)
    np.testing.assert_array_equal(second, greedy(model, IDS[:1], 12))
    assert model.trace_count == 2  # the prompt and the answer

    stream = np.random.default_rng(0)
    for block in model.model.blocks:
        block.self_attn.v_proj.enable_lora(4)
        for variable in (block.self_attn.v_proj.lora_kernel_a, block.self_attn.v_proj.lora_kernel_b):
            variable.assign(5 * stream.standard_normal(variable.shape))
    third = model.generate(IDS[:1], max_new_tokens=12)
    assert np.any(third != second)
    np.testing.assert_array_equal(third, greedy(model, IDS[:1], 12))


def test_generate_left_padded_and_ending(model):
    answer = greedy(model, IDS, 8, MASK)
    np.testing.assert_array_equal(model.generate(IDS, MASK, max_new_tokens=8), answer)
    np.testing.assert_array_equal(model.generate(tf.constant(IDS), max_new_tokens=8), answer)  # pads are seen as such
    embeds = model.get_input_embeddings()(IDS)
    np.testing.assert_array_equal(model.generate(None, MASK, inputs_embeds=embeds, max_new_tokens=8), answer[:, 9:])

    new = answer[:, 9:]
    ends = [int(new[0, 2]), int(new[1, 4]), int(new[2, 1]), int(new[3, 3])]
    ended = model.generate(IDS, MASK, max_new_tokens=8, eos_token_id=ends, pad_token_id=1).numpy()[:, 9:]
    stops = [next(step for step, token in enumerate(row) if token in ends) for row in new]
    assert ended.shape[1] == max(stops) + 1 < 8
    for row, stop in enumerate(stops):
        np.testing.assert_array_equal(ended[row, : stop + 1], new[row, : stop + 1])
        assert (ended[row, stop + 1 :] == 1).all()


@pytest.mark.parametrize("windows", [False, True])
def test_generate_writes_the_cache_in_place(model, windows):
    if windows:
        model = zoo.TFOlmo3ForCausalLM(SMALL_OLMO3, seed=1, dtype="float64")
    options = {"input_ids": IDS[:1], "attention_mask": MASK[:1], "compiled": True}
    call = prepare(model.generation_config, model.config, {}, **options)
    values, state = tf.nest.map_structure(lambda x: from_numpy(x, "float64"), (call.values, call.state))
    cache = model._empty_cache(*call.mask.shape, call.options, 1)
    arguments = (tf.constant(call.mask), state, cache, values, tf.constant(20))
    answer = model._compiled_decoding(call.options)[1]
    program = answer.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
    loops = [part for part in program.split("\n\n") if "while_body" in part.split("\n")[0] and " dot(" in part]
    assert len(loops) == 1
    for memory in cache.keys:
        assert f"f64[{','.join(map(str, memory.shape))}]" in loops[0]
    assert not [line for line in loops[0].split("\n") if " copy(" in line and "f64[" in line]


def test_generate_from_embeddings():
    model = make("OPT", dtype="float64")  # positions that are learned: a wrong one shows
    table = model.get_input_embeddings()
    for ids, mask in ((IDS, MASK), (IDS[:, 4:], MASK[:, 4:]), (np.tile(IDS[:, 8:], 14), None)):
        given = np.ones_like(ids) if mask is None else mask
        expected = model.generate(ids, given, max_new_tokens=7).numpy()[:, ids.shape[1] :]
        np.testing.assert_array_equal(
            model.generate(inputs_embeds=table(ids), attention_mask=mask, max_new_tokens=7), expected
        )
        np.testing.assert_array_equal(
            model.generate(None, mask, inputs_embeds=np.asarray(table(ids)), max_new_tokens=7), expected
        )
        end, row = int(expected[0, 2]), list(expected[0])
        ended = model.generate(
            inputs_embeds=table(ids), attention_mask=mask, max_new_tokens=7, eos_token_id=end, pad_token_id=3
        )
        stop = row.index(end) + 1
        np.testing.assert_array_equal(ended[0], (row[:stop] + [3] * 7)[: ended.shape[1]])
    assert model.trace_count == 4  # two of ids and two of embeddings
