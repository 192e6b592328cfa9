"""The linear layer: oneDNN's product equals PyTorch's, gradients too; tracers and transforms do not meet it."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from olmozoo.pt import layers
from olmozoo.pt.layers import Linear
from tests.helpers.checkpoints import left_padded
from tests.helpers.configs import CONFIGS
from tests.helpers.wings import model_class

pytestmark = pytest.mark.pt


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """Use oneDNN's product, whatever the processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(layers, "onednn_is_faster", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    """The shapes that oneDNN's product is called with."""
    shapes = []

    def product(x, weight, bias=None, original=layers.product):
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return original(x, weight, bias)

    monkeypatch.setattr(layers, "product", product)
    return shapes


def pair(bias):
    torch.manual_seed(0)
    ours, plain = Linear(37, 53, bias=bias), nn.Linear(37, 53, bias=bias)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(37,), (1, 37), (3, 5, 37), (2, 1, 4, 37)])
def test_values_and_gradients_are_those_of_nn_linear(calls, bias, shape):
    ours, plain = pair(bias)
    x, y = torch.randn(shape, requires_grad=True), torch.randn((*shape[:-1], 53))
    twin = x.detach().clone().requires_grad_()
    (ours(x) * y).sum().backward()
    (plain(twin) * y).sum().backward()
    with torch.no_grad():
        assert torch.allclose(ours(x), plain(x), atol=2e-6)
    assert len(calls) == 4  # forward, the gradients of the input and of the weight, forward
    assert torch.allclose(x.grad, twin.grad, atol=2e-6)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_strides_frozen_weights_and_second_derivatives(calls):
    ours, plain = pair(True)
    for layer in (ours, plain):
        layer.weight.requires_grad_(False)
    x = torch.randn(37, 6).t().requires_grad_()
    assert torch.allclose(ours(x), plain(x), atol=2e-6)
    second = [
        torch.autograd.grad(torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0].square().sum(), x)[0]
        for layer in (ours, plain)
    ]
    assert torch.allclose(*second, rtol=1e-5)
    assert calls


def test_other_dtypes_empty_inputs_and_subclasses_are_left_to_pytorch(calls):
    ours, _ = pair(True)
    assert ours(torch.empty(0, 37)).shape == (0, 53)
    ours.double()(torch.randn(2, 37, dtype=torch.float64))
    ours.bfloat16()(torch.randn(2, 37, dtype=torch.bfloat16))
    ours.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(2, 37)).dtype == torch.bfloat16

    class Mine(torch.Tensor):
        pass

    assert type(ours(torch.randn(2, 37).as_subclass(Mine))) is Mine
    assert calls == []


def test_transforms_compile_and_export_do_not_meet_it(calls):
    ours, plain = pair(True)
    x = torch.randn(4, 37)
    parameters = dict(ours.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(ours, parameters, (x,)).sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert torch.allclose(grads["weight"], x[:, None, :].expand(4, 53, 37), atol=1e-6)
    assert torch.allclose(torch.func.jvp(ours, (x,), (x,))[1], x @ ours.weight.t(), atol=1e-5)
    exported = torch.export.export(ours, (x,))
    assert "mkldnn" not in str(exported.graph)
    assert calls == []
    traced = torch.jit.trace(ours, x, check_trace=False)
    assert "mkldnn" not in str(traced.graph)
    assert torch.allclose(exported.module()(x), plain(x), atol=2e-6)


@pytest.mark.parametrize("name", ["olmo2", "olmo-bias", "opt-projected-post-norm", "olmo2-mqa-bias-tied"])
def test_a_models_logits_and_gradients_are_the_same(calls, monkeypatch, name):
    config = CONFIGS[name]
    ids, mask = (torch.from_numpy(array) for array in left_padded(config))
    found = {}
    for uses in (True, False):
        monkeypatch.setattr(layers, "onednn_is_faster", lambda uses=uses: uses)
        model = model_class("pt", config.name, "ForCausalLM")(config, seed=1, dtype=torch.float32)
        output = model.eval()(ids, mask, labels=torch.where(mask == 1, ids, -100))
        output.loss.backward()
        found[uses] = output.logits, {name: p.grad for name, p in model.named_parameters()}
        assert bool(calls) is True
    assert torch.allclose(found[True][0][mask == 1], found[False][0][mask == 1], atol=2e-5)
    for name, grad in found[True][1].items():
        other = found[False][1][name]
        assert (grad - other).norm() <= 1e-5 * other.norm() + 1e-7, name


def test_it_is_an_ordinary_linear_layer_for_tools():
    layer = Linear(3, 5)
    assert isinstance(layer, nn.Linear)
    assert repr(layer) == "Linear(in_features=3, out_features=5, bias=True)"
    assert list(layer.state_dict()) == ["weight", "bias"]
