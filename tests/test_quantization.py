"""Integers of linear weights, in NumPy."""

import ml_dtypes
import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.quantization import (
    Quantization,
    QuantizedTensor,
    check_groups,
    from_columns,
    is_quantizable,
    pack,
    quantize,
    to_columns,
    unpack,
)
from tests.helpers.configs import CONFIGS

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 4), (4, None), (4, 12)])
def test_the_largest_value_of_a_group_is_kept_and_others_are_within_half_a_step(bits, group):
    weight = RANDOM.standard_normal((600, 24)).astype(np.float32)  # more rows than are quantized at a time
    found = quantize(weight, Quantization(bits, group))
    least, groups = -(1 << bits - 1), 1 if group is None else 24 // group
    assert found.values.dtype == np.int8
    assert found.scale.shape == (600, groups)
    assert found.scheme == Quantization(bits, group)
    step = np.abs(found.scale).repeat(24 // groups, 1)
    clipped = found.values == -least - 1  # the end of the range that the largest value is not at
    error = np.abs(found.dequantize(np.float64) - weight)
    assert (error <= step * 0.5001)[~clipped].all()
    assert (error <= step * 1.0001).all()
    assert found.values.min() == least
    grouped = np.abs(weight).reshape(600, groups, -1)
    kept = np.abs(found.dequantize(np.float64)).reshape(grouped.shape)
    np.testing.assert_allclose(kept.max(-1), grouped.max(-1), rtol=1e-6)


def test_scales_fit_the_dtype_that_keeps_them():
    weight = RANDOM.standard_normal((8, 16)).astype(ml_dtypes.bfloat16)
    found = quantize(weight, Quantization(8))
    assert found.scale.dtype == ml_dtypes.bfloat16
    exact = weight.astype(np.float64) / found.scale.astype(np.float64)
    assert np.array_equal(found.values, np.clip(np.rint(exact), -128, 127))
    assert quantize(weight.astype(np.float64), Quantization(8)).scale.dtype == np.float32


def test_groups_of_zeros_and_values_that_are_not_finite():
    weight = np.zeros((2, 8), np.float32)
    assert np.array_equal(quantize(weight, Quantization(4, 4)).dequantize(np.float32), weight)
    weight[1, 3] = np.inf
    with pytest.raises(InputError, match="not finite"):
        quantize(weight, Quantization(8))


def test_zero_points_are_subtracted_before_the_scale():
    tensor = QuantizedTensor(np.array([[7, -8]], np.int8), np.array([[0.5]], np.float32), np.array([[-8]], np.int8), 4)
    assert tensor.dequantize(np.float64).tolist() == [[7.5, 0.0]]
    assert not tensor.scheme.symmetric


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 7, 8, 37])
def test_packing_is_undone_and_is_that_of_compressed_tensors(bits, columns):
    values = RANDOM.integers(-(1 << bits - 1), 1 << bits - 1, (5, columns)).astype(np.int8)
    words = pack(values, bits)
    assert words.dtype == np.int32
    assert words.shape == (5, -(-columns * bits // 32))
    assert np.array_equal(unpack(words, bits, columns), values)
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    assert np.array_equal(helpers.pack_to_int32(torch.from_numpy(values), bits).numpy(), words)


def test_the_first_value_is_in_the_lowest_bits():
    assert pack(np.array([[-8, -7, 7]], np.int8), 4).view(np.uint32)[0, 0] == 0xF10
    assert pack(np.array([[-128, -127, 127]], np.int8), 8).view(np.uint32)[0, 0] == 0xFF0100


@pytest.mark.parametrize(
    ("bits", "groups", "dtype"), [(8, 1, np.int8), (4, 1, np.uint8), (4, 4, np.uint8), (4, 8, np.int8)]
)
def test_columns_are_undone(bits, groups, dtype):
    values = RANDOM.integers(-(1 << bits - 1), 1 << bits - 1, (6, 24)).astype(np.int8)
    scale, zero = RANDOM.random((6, groups), np.float32), RANDOM.integers(-8, 8, (6, groups)).astype(np.int8)
    tensor = QuantizedTensor(values, scale, zero, bits)
    columns = to_columns(tensor)
    assert columns.dtype == dtype
    again = from_columns(columns, scale.T, zero.T, bits)
    assert all(np.array_equal(getattr(again, name), getattr(tensor, name)) for name in ("values", "scale", "zero"))


def test_what_is_quantized():
    config = CONFIGS["opt-projected-post-norm"]
    names = [p.name for p in config.parameters("causal_lm") if is_quantizable(p)]
    assert len(names) == 6 * config.num_hidden_layers
    assert not any(word in name for name in names for word in ("project", "embed", "norm", "lm_head", "bias"))


def test_experts_are_quantized_and_their_routers_are_not():
    config = CONFIGS["olmoe"]
    names = [p.name for p in config.parameters("causal_lm") if is_quantizable(p)]
    assert len(names) == config.num_hidden_layers * (4 + 3 * config.num_experts)
    assert not any(name.endswith("mlp.gate.weight") for name in names)


def test_layers_that_no_group_divides_are_named():
    config = CONFIGS["olmo2"]  # 40 and 36 wide
    with pytest.raises(InputError, match="group_size 8 does not divide every layer, 4 does: 2 problem") as caught:
        check_groups(config.parameters(), Quantization(4, 8))
    assert "model.layers.1.mlp.down_proj has rows of 36" in str(caught.value)
    check_groups(config.parameters(), Quantization(4, 4))


@pytest.mark.parametrize(("name", "size"), [("int3", 128), ("int4", 0), ("int4", "128"), ("int8", True)])
def test_unknown_quantizations_are_refused(name, size):
    with pytest.raises(InputError, match=r"quantization is 'int3'|group_size is"):
        Quantization.of(name, size)
