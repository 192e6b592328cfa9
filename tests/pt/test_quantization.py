"""Quantized linear layers in PyTorch."""

import copy

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.quantization import Quantization, QuantizedTensor, quantize
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import CONFIGS

torch = pytest.importorskip("torch")

from olmozoo.pt import AutoModelForCausalLM, canonical_state
from olmozoo.pt.quantization import QuantizedLinear

CONFIG = CONFIGS["olmo2"].replace(hidden_size=64, intermediate_size=96, num_hidden_layers=1)


def layer_of(out, width, how, dtype, zeros=False):
    weight = np.random.default_rng(0).standard_normal((out, width)).astype(np.float32)
    tensor = quantize(weight, how)
    if zeros:
        zero = np.random.default_rng(1).integers(-8, 8, tensor.scale.shape).astype(np.int8)
        tensor = QuantizedTensor(tensor.values, tensor.scale, zero, tensor.bits)
    bias = torch.nn.Parameter(torch.linspace(-1, 1, out, dtype=dtype))
    return tensor, QuantizedLinear(tensor, bias, dtype)


KERNELS = {  # shape, quantization, zero points, whether a kernel takes it
    "int8": ((48, 64), Quantization(8), False, True),
    "int8 odd": ((48, 40), Quantization(8), False, False),  # the kernel would read past the end of rows
    "int8 groups": ((48, 64), Quantization(8, 32), False, False),
    "int4": ((80, 256), Quantization(4, 64), False, True),
    "int4 zeros": ((80, 256), Quantization(4, 128), True, True),
    "int4 small groups": ((48, 64), Quantization(4, 16), False, False),
    "int4 odd": ((40, 64), Quantization(4, 32), False, False),
    "int4 odd width": ((3, 13), Quantization(4), False, False),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_and_the_exact_path(name):
    shape, how, zeros, has_kernel = KERNELS[name]
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float32, 2e-6), (torch.float64, 1e-14)):
        tensor, layer = layer_of(*shape, how, dtype, zeros)
        assert np.array_equal(layer.integers().numpy(), tensor.values)
        x = torch.randn(2, 3, shape[1], dtype=dtype, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert layer.uses_kernel(x) == (has_kernel and dtype == torch.bfloat16)
            found = layer(x).double()
        weight = torch.from_numpy(tensor.dequantize(np.float64))
        expected = x.double() @ weight.T + layer.bias.detach().double()
        assert (found - expected).norm() <= bound * expected.norm()
        if dtype != torch.bfloat16 and name != "int4 odd width":  # compiled on a GPU
            vector = layer.multiply_vector(x[:1, 1:2]).double() + layer.bias.double()
            assert vector.shape == (1, 1, shape[0])
            assert (vector - expected[:1, 1:2]).norm() <= bound * expected.norm()
        if dtype == torch.bfloat16:
            assert not layer.float().uses_kernel(x)
            assert layer.to(dtype).uses_kernel(x) == has_kernel
            assert (layer(x).double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("name", KERNELS)
def test_integers_survive_other_dtypes_copies_and_files(name):
    shape, how, zeros, _ = KERNELS[name]
    tensor, layer = layer_of(*shape, how, torch.float32, zeros)
    for step in (lambda m: m.to(torch.bfloat16), copy.deepcopy, lambda m: m.cpu(), lambda m: m.double()):
        layer = step(layer)
        assert np.array_equal(layer.tensor().values, tensor.values)


def test_gradients_reach_the_input_and_not_the_weight():
    tensor, layer = layer_of(48, 64, Quantization(8), torch.bfloat16)
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.from_numpy(tensor.dequantize(np.float32).sum(0))
    torch.testing.assert_close(x.grad[0].float(), expected, rtol=2e-2, atol=2e-1)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, dtype="float32")


def test_the_words_of_transformers(folder):
    """What is done is said."""
    cases = [({"load_in_8bit": True}, "int8"), ({"load_in_4bit": True, "group_size": 32}, "int4, groups of 32")]
    cases.append(({"quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}}, "int8"))
    cases.append(({"quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}}, "int8"))
    for words, expected in cases:
        with pytest.warns(UserWarning, match=f"olmozoo quantizes the linear weights itself .{expected}"):
            model = AutoModelForCausalLM.from_pretrained(folder, **words)
        assert str(model.model.layers[0].mlp.up_proj.scheme).startswith(expected)
        assert not isinstance(model.lm_head, QuantizedLinear)
    with pytest.raises(InputError, match=r"a dict \(gptq\), expected 8 or 4 bits of bitsandbytes"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="quantization is 'int8', and load_in_8bit is given too"):
        AutoModelForCausalLM.from_pretrained(folder, quantization="int8", load_in_8bit=True)


def test_configs_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    settings = [transformers.BitsAndBytesConfig(load_in_8bit=True)]
    if ao := pytest.importorskip("torchao.quantization"):
        settings.append(transformers.TorchAoConfig(ao.Int8WeightOnlyConfig()))
    for config in settings:
        with pytest.warns(UserWarning, match="int8"):
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)


def test_a_quantized_model_compiles_moves_and_counts(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization="int4", group_size=32)
    floats = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == floats.num_parameters()
    assert model.num_parameters(only_trainable=True) < floats.num_parameters()
    state = canonical_state(model)
    assert {name: array.shape for name, array in state.items()} == {
        p.name: p.shape for p in CONFIG.parameters("causal_lm")
    }
    ids, mask = map(torch.from_numpy, left_padded(CONFIG))
    with torch.inference_mode():
        expected = model(ids, mask).logits
        low = model.to(torch.bfloat16)
        assert low.model.layers[0].mlp.up_proj.in_kernel_order
        found = low(ids, mask).logits
    assert (found - expected)[mask.bool()].norm() <= 0.05 * expected[mask.bool()].norm()


def test_lora_trains_on_integers(folder):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization="int8")
    before = model.model.layers[0].mlp.up_proj.values.clone()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    ids, mask = map(torch.from_numpy, left_padded(CONFIG))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = tuned(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.values, before)
    with pytest.raises(InputError, match="integers, to which nothing can be added"):
        tuned.merge_and_unload()


def test_what_needs_floats_is_refused(folder, tmp_path):
    write_checkpoint(tmp_path / "opt", CONFIGS["opt"], dtype="float32")
    with pytest.raises(InputError, match="heads of a quantized model cannot be pruned"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "opt", quantization="int8").prune_heads({0: [1]})
    ao = pytest.importorskip("torchao.quantization")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    with pytest.raises(InputError, match=r"quantized by torchao, such as model\.layers\.0"):
        model.save_pretrained(tmp_path / "new")
