"""Keras's own quantization of its models."""

import numpy as np
import pytest

from tests.helpers.keras_models import (
    FAMILIES,
    INPUTS,
    REAL,
    make,
)

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_makes_the_kernels_integers_and_keeps_them(family, tmp_path):
    model = make(family, "ForCausalLM")
    before = model(INPUTS).logits.numpy()[REAL]
    model.quantize("int8", filters="proj" if family == "Olmo2" else None)
    kernels = [weight for weight in model.weights if weight.path.endswith("/kernel")]
    assert len(kernels) > 3
    assert {kernel.dtype for kernel in kernels} == ({"int8", "float32"} if family == "Olmo2" else {"int8"})
    after = model(INPUTS).logits.numpy()[REAL]
    assert 0 < abs(after - before).max() < 0.1 * abs(before).max()
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(again(INPUTS).logits.numpy()[REAL], after)
