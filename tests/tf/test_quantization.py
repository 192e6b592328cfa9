"""Keras's own quantization of its models, and ours."""

import numpy as np
import pytest

from olmozoo import InputError
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
