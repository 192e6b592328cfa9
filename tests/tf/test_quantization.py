"""Keras's own quantization of its models, and ours."""

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.quantization import Quantization, QuantizedTensor
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.keras_models import (
    FAMILIES,
    INPUTS,
    REAL,
    make,
)

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")
module = pytest.importorskip("olmozoo.tf.quantization", reason="olmozoo[tf] is not installed")


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_makes_the_kernels_integers_and_keeps_them(family, tmp_path):
    model = make(family, "ForCausalLM")
    before = model(INPUTS).logits.numpy()[REAL]
    model.quantize("int8", filters="proj" if family == "Olmo2" else None)
    kernels = [weight for weight in model.weights if weight.path.endswith("/kernel")]
    assert len(kernels) > 3
    assert {kernel.dtype for kernel in kernels} == ({"int8", "float32"} if family == "Olmo2" else {"int8"})
    with pytest.raises(InputError, match=r"quantized by Keras.*save\('model.keras'\)"):
        model.save_pretrained(tmp_path / "new")
    after = model(INPUTS).logits.numpy()[REAL]
    assert 0 < abs(after - before).max() < 0.1 * abs(before).max()
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(again(INPUTS).logits.numpy()[REAL], after)


@pytest.mark.parametrize("family", ["olmo-bias", "olmoe"])
@pytest.mark.parametrize("quantization", [{"quantization": "int8"}, {"quantization": "int4", "group_size": 4}])
def test_integers_of_the_core_survive_a_keras_file(quantization, family, tmp_path):
    write_checkpoint(tmp_path / "model", CONFIGS[family].replace(num_hidden_layers=1), dtype="float32")
    model = zoo.TFAutoModelForCausalLM.from_pretrained(tmp_path / "model", **quantization)
    inputs = dict(zip(("input_ids", "attention_mask"), left_padded(model.config), strict=True))
    layer = model.model.blocks[0].self_attn.q_proj
    assert layer.values.dtype == ("int8" if quantization["quantization"] == "int8" else "uint8")
    assert not any("values" in variable.path or "/scale" in variable.path for variable in layer.trainable_weights)
    assert type(model.lm_head).__name__ == "Dense"
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert [v.path.split("/")[1:] for v in again.weights] == [v.path.split("/")[1:] for v in model.weights]
    np.testing.assert_array_equal(again(inputs).logits.numpy(), model(inputs).logits.numpy())
    shapes = {name: array.shape for name, array in zoo.canonical_state(again).items()}
    assert shapes == {p.name: p.shape for p in model.config.parameters("causal_lm")}


@pytest.mark.parametrize(
    ("bits", "width", "group", "is_symmetric"),
    [
        (8, 310, None, True),  # blocks of 31
        (8, 21, 7, False),  # groups that have no halves
        (4, 48, 24, False),  # two values in a byte
        (4, 320, 160, True),  # two blocks in a group
        (4, 45, 9, True),  # a value in a byte
    ],
)
def test_programs_multiply_block_by_block(bits, width, group, is_symmetric):
    stream, scheme = np.random.default_rng(0), Quantization(bits, group, is_symmetric)
    shape, most = (5, scheme.groups(width)), 2 ** (bits - 1)
    values = stream.integers(-most, most, (5, width)).astype("int8")
    zero = None if is_symmetric else stream.integers(-most, most, shape).astype("int8")
    tensor = QuantizedTensor(values, stream.uniform(0.5, 1.5, shape).astype("float32"), zero, bits)
    layer = module.QuantizedDense(5, width, scheme, "float32", False, "layer")
    layer.dtype_policy = keras.DTypePolicy("float64")
    layer.build()
    layer.assign(tensor)
    weight = tensor.dequantize(np.float64)

    @tf.function(jit_compile=True, autograph=False)
    def compute(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = layer(x)
        return out, tape.gradient(out, x, out)

    for rows in ((1, 1), (2, 3)):  # a vector is multiplied in another way
        x = stream.normal(size=(*rows, width))
        out, gradient = compute(tf.constant(x))
        np.testing.assert_allclose(out, x @ weight.T, rtol=0, atol=1e-12 * abs(x @ weight.T).max())
        np.testing.assert_allclose(gradient, x @ weight.T @ weight, rtol=1e-10)
        np.testing.assert_allclose(out, layer(x), rtol=0, atol=1e-12 * abs(x @ weight.T).max())
