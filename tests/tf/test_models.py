"""Keras models: variables, dtypes, calls, outputs and what is refused."""

import re
import subprocess
import sys

import numpy as np
import pytest

from olmozoo import InputError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.keras_models import (
    BIASED_OLMO2,
    IDS,
    LABELS,
    MASK,
    REAL,
    olmo2,
)

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [None, "causal_lm"])
def test_variables_and_table_are_in_bijection(tied, head):
    config = BIASED_OLMO2.replace(tie_word_embeddings=tied)
    cls = zoo.TFOlmo2ForCausalLM if head else zoo.TFOlmo2Model
    model = cls(config, name="zoo")
    table = [parameter for parameter in config.parameters(head) if parameter.tied_to is None]
    leaves = {"linear": "kernel", "embedding": "embeddings", "norm": "scale", "bias": "bias"}
    expected = {}
    for parameter in table:
        modules = parameter.name.removeprefix("" if head else "model.").split(".")[:-1]
        shape = parameter.shape[::-1] if parameter.kind == "linear" else parameter.shape
        expected["/".join(["zoo", *modules, leaves[parameter.kind]])] = shape
    assert {variable.path: tuple(variable.shape) for variable in model.weights} == expected
    assert len(model.weights) == len(table)
    assert model.num_parameters() == sum(parameter.size for parameter in table)


def test_initial_values_are_those_of_the_table():
    model = zoo.TFOlmo2ForCausalLM(BIASED_OLMO2, seed=3, dtype="bfloat16")
    state = zoo.canonical_state(model)
    for parameter in BIASED_OLMO2.parameters("causal_lm"):
        np.testing.assert_array_equal(state[parameter.name], parameter.initial(3, "bfloat16"))


def test_copies_are_whole_and_aligned():
    from olmozoo.checkpoint.tensors import aligned_copy as copied

    for shape in ((1, 1), (3, 5), (517, 1031), (1031, 517)):  # the last two are copied in parts
        array = np.random.default_rng(0).standard_normal(shape)
        for transposed in (False, True):
            result = copied(array, transposed)
            assert result.flags.c_contiguous
            assert result.ctypes.data % 64 == 0
            np.testing.assert_array_equal(result, array.T if transposed else array)


def test_mixed_policies_load_wide_variables(tmp_path):
    folder = write_checkpoint(tmp_path / "a", BIASED_OLMO2, dtype="bfloat16")
    model = zoo.TFOlmo2ForCausalLM.from_pretrained(folder, dtype="mixed_bfloat16")
    assert {variable.dtype for variable in model.weights} == {"float32"}
    output = model(IDS, MASK, labels=LABELS["ForCausalLM"]["labels"], output_hidden_states=True)
    assert output.logits.dtype == tf.bfloat16
    assert output.loss.dtype == tf.float32
    assert {state.dtype for state in output.hidden_states} == {tf.bfloat16}


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16", "bfloat16"])
def test_low_precision_is_finite_at_pads_and_near_at_tokens(model, dtype):
    logits = tf.cast(olmo2(dtype)(IDS, MASK).logits, "float64").numpy()
    assert np.isfinite(logits).all()
    expected = model(IDS, MASK).logits.numpy()
    error = np.sqrt(np.square(logits - expected)[REAL].mean()) / expected[REAL].std()
    assert error < (0.05 if dtype == "bfloat16" else 0.006)


def test_norm_scales_stay_wide_under_a_mixed_policy():
    # 1 + 2**-10 is 1 in bfloat16: a scale that was cast would leave the input as it is, times 1.
    norm = olmo2("mixed_bfloat16").model.norm
    norm.scale.assign(np.full(32, 1 + 2.0**-8 + 2.0**-10))
    x = tf.cast(np.random.default_rng(0).standard_normal((1, 64, 32)), tf.bfloat16)
    wide = tf.cast(x, tf.float32)
    wide = wide * tf.math.rsqrt(tf.reduce_mean(wide**2, -1, keepdims=True) + norm.eps)
    np.testing.assert_array_equal(norm(x), tf.cast(wide * norm.scale, tf.bfloat16))
    assert np.any(norm(x) != tf.cast(wide, tf.bfloat16) * tf.cast(norm.scale, tf.bfloat16))


def test_summary_counts_every_parameter(model):
    lines = []
    model.summary(print_fn=lambda text, **_: lines.append(text))
    assert f"{model.num_parameters():,}" in "\n".join(lines)
    model.summary(print_fn=lambda text, **_: lines.append(text), expand_nested=True, line_length=120)
    width = model.config.hidden_size
    for layer in (r"layers\.1 \(Olmo2Block\)", r"norm \(RMSNorm\)", r"embed_tokens \(Embedding\)"):
        assert re.search(rf"{layer} .*\(None, None, {width}\)", lines[-1]), layer


def test_keras_on_another_framework_is_named():
    code = (
        "import sys, types\n"
        "keras, backend = types.ModuleType('keras'), types.ModuleType('keras.backend')\n"
        "backend.backend, keras.backend = lambda: 'jax', backend\n"
        "sys.modules.update({'keras': keras, 'tensorflow': types.ModuleType('tensorflow')})\n"
        "import olmozoo.tf"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "MissingBackendError: olmozoo.tf needs Keras on TensorFlow, and here Keras runs on jax" in done.stderr


def test_all_input_forms_are_one(model):
    expected = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
    tensors = tf.constant(IDS), tf.constant(MASK)
    for output in (
        model(IDS, MASK),
        model(*tensors),
        model([IDS, MASK]),
        model(tensors),
        model({"input_ids": IDS, "attention_mask": MASK}),
        model({"input_ids": IDS, "attention_mask": MASK}, use_cache=False),
        model({"inputs_embeds": model.get_input_embeddings()(IDS), "attention_mask": MASK}),
    ):
        np.testing.assert_array_equal(output.logits, expected)
    np.testing.assert_array_equal(model([IDS]).logits, model(IDS).logits)
    assert np.any(model(IDS).logits != expected)
    logits, past = model(IDS, MASK, return_dict=False)
    np.testing.assert_array_equal(logits, expected)
    assert len(past) == 2
    with pytest.raises(InputError, match="arguments, expected at most"):
        model([IDS] * 20)


def test_functional_models_take_it_as_a_layer(model):
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in ("input_ids", "attention_mask")}
    functional = keras.Model(inputs, model(inputs).logits)
    np.testing.assert_array_equal(functional({"input_ids": IDS, "attention_mask": MASK}), model(IDS, MASK).logits)


@pytest.mark.parametrize("jit", [False, True])
def test_one_graph_serves_all_shapes_and_returns_the_output(model, jit):
    spec = tf.TensorSpec((None, None), tf.int64)
    function = tf.function(lambda ids, mask: model(ids, mask), input_signature=[spec, spec], jit_compile=jit)
    for rows, length in ((1, 1), (3, 5), (4, 9)):
        ids, mask = IDS[:rows, -length:], MASK[:rows, -length:]
        output, expected = function(ids, mask), model(ids, mask)
        assert type(output) is type(expected)
        assert output.keys() == expected.keys()
        real = mask.astype(bool)
        np.testing.assert_allclose(output.logits.numpy()[real], expected.logits.numpy()[real], atol=1e-12)
    assert function.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("tied", [False, True])
def test_logits_to_keep(tied):
    model = olmo2(config=BIASED_OLMO2.replace(tie_word_embeddings=tied))
    logits = model(IDS, MASK).logits
    np.testing.assert_allclose(model(IDS, MASK, logits_to_keep=2).logits, logits[:, -2:], atol=1e-5)
    np.testing.assert_allclose(model(IDS, MASK, logits_to_keep=np.int64(2)).logits, logits[:, -2:], atol=1e-5)
    kept = model(IDS, MASK, num_logits_to_keep=np.array([8, 3])).logits
    np.testing.assert_allclose(kept, tf.gather(logits, [8, 3], axis=1), atol=1e-5)


def test_arguments_that_do_not_fit_are_named(model):
    with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds"):
        model(attention_mask=MASK)
    with pytest.raises(InputError, match=r"attention_mask has shape \(4, 8\), expected \(4, 9\): 0 cached and 9 new"):
        model(IDS, MASK[:, 1:])
    with pytest.raises(InputError, match=r"position_ids has shape \(9,\), expected \(batch or 1, seq\)"):
        model(IDS, position_ids=np.arange(9))
    with pytest.raises(InputError, match=r"attention_mask has shape \(3, 9\)"):
        model(IDS, MASK[1:])
    with pytest.raises(InputError, match="the cache has room for 8 positions, 9 are needed"):
        model(IDS, past_key_values=model.init_cache(4, 8))
    with pytest.raises(InputError, match="the cache has 6 rows times heads, expected 4 times 2"):
        model(IDS, past_key_values=model.init_cache(3, 12))
    with pytest.raises(InputError, match="past_key_values has 1 layers, expected 2"):
        model(IDS, past_key_values=model(IDS).past_key_values[:1])
    with pytest.raises(InputError, match="past_key_values is a str"):
        model(IDS, past_key_values="cache")
    with pytest.raises(InputError, match="labels need the logits at every position"):
        model(IDS, labels=IDS, logits_to_keep=1)
    with pytest.raises(InputError, match=r"shape \(9,\), expected \(batch, seq\)"):
        model(IDS[0])
    with pytest.raises(InputError, match=r"shape \(4, 9, 1\), expected \(batch, seq\)"):
        model(IDS[..., None])
