"""Quantized linear layers in Flax."""

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.quantization import Quantization, QuantizedTensor, quantize
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import CONFIGS

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from olmozoo import flax
from olmozoo.flax.quantization import from_leaves, multiply, to_leaves

CONFIG = CONFIGS["olmo-bias"].replace(num_hidden_layers=1)


@pytest.mark.parametrize(
    ("width", "bits", "group"),
    [(256, 8, None), (13, 8, None), (24, 8, 8), (512, 4, None), (13, 4, None), (48, 4, 12), (15, 4, 5)],
)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_product_is_that_with_the_dequantized_weight(width, bits, group, zeros, platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    random = np.random.default_rng(0)
    tensor = quantize(random.standard_normal((7, width)), Quantization(bits, group))
    if zeros:
        zero = random.integers(-8, 8, tensor.scale.shape).astype(np.int8)
        tensor = QuantizedTensor(tensor.values, tensor.scale, zero, bits)
    leaves = to_leaves(tensor)
    again = from_leaves({("layer", name): leaf for name, leaf in leaves.items()}, ("layer", "kernel"))
    assert np.array_equal(again.values, tensor.values)
    with jax.enable_x64(True):
        x = random.standard_normal((2, 3, width))
        found = jax.jit(lambda *arguments: multiply(*arguments))(
            x, leaves["values"], leaves["scale"], leaves.get("zero")
        )
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, x @ tensor.dequantize(np.float64).T, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, dtype="float32")


def test_the_tree_holds_integers_and_is_checked(folder, tmp_path):
    ids, mask = left_padded(CONFIG)
    model, params = flax.FlaxAutoModelForCausalLM.from_pretrained(
        folder, quantization="int4", group_size=4, _do_init=False
    )
    layer = params["model"]["layers"]["0"]["self_attn"]["q_proj"]
    assert {name: (leaf.dtype.name, leaf.shape) for name, leaf in layer.items()} == {
        "values": ("uint8", (20, 40)),
        "scale": ("float32", (10, 40)),
        "bias": ("float32", (40,)),
    }
    assert "kernel" in params["lm_head"]
    logits = jax.jit(lambda params: model(ids, mask, params=params).logits)(params)
    module = jax.jit(lambda params: model.module.apply({"params": params}, ids, mask).logits)(params)
    assert np.array_equal(module, logits)
    floats = {path: leaf for path, leaf in flatten_dict(params).items() if path[-1] not in ("values", "scale", "bias")}
    with pytest.raises(InputError, match="missing: model/layers/0/self_attn/q_proj/kernel"):
        model.check_parameters(unflatten_dict(floats))
    model.save_pretrained(tmp_path, params=params)
    again = flax.FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, params))


def test_gradients_flow_through_integers_to_what_is_in_floats(folder):
    """As adapters need: the gradient of an embedding is that of the dequantized model."""
    ids, mask = left_padded(CONFIG)
    found = []
    for model in (
        flax.FlaxAutoModelForCausalLM.from_pretrained(folder, quantization="int8"),
        flax.FlaxAutoModelForCausalLM.from_pretrained(folder),
    ):
        leaves = flatten_dict(model.params)
        path = ("model", "embed_tokens", "embedding")

        def loss(embedding, model=model, leaves=leaves, path=path):
            params = unflatten_dict(leaves | {path: embedding})
            return model(ids, mask, params=params, labels=jnp.asarray(ids)).loss

        found.append(np.asarray(jax.jit(jax.grad(loss))(leaves[path])))
    assert 0 < np.linalg.norm(found[0] - found[1]) < 0.05 * np.linalg.norm(found[1])


def test_qwix_quantizes_our_modules(folder):
    qwix = pytest.importorskip("qwix")
    ids, mask = left_padded(CONFIG)
    model = flax.FlaxAutoModelForCausalLM.from_pretrained(folder)
    expected = np.asarray(model(ids, mask).logits)[mask.astype(bool)]
    rules = [qwix.QuantizationRule(module_path=r".*_proj", weight_qtype="int8")]
    module = qwix.quantize_model(model.module, qwix.PtqProvider(rules))
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    params = qwix.quantize_params(model.params, shapes)
    model.module = module
    found = np.asarray(jax.jit(lambda params: model(ids, mask, params=params).logits)(params))[mask.astype(bool)]
    assert 0 < np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
