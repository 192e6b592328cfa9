"""Quantized models: the same integers in the three wings, and the answers of the dequantized model in float64."""

import json

import numpy as np
import pytest

from olmozoo import convert
from olmozoo.backends import load
from olmozoo.checkpoint import save_checkpoint
from olmozoo.quantization import QuantizedTensor, is_quantizable
from olmozoo.verify import compare
from tests.helpers.checkpoints import left_padded, random_values, write_checkpoint
from tests.helpers.configs import BOUND, CONFIGS, OTHERS, REFERENCE
from tests.helpers.wings import WINGS, several

QUANTIZATIONS = {"int8": {"quantization": "int8"}, "int4": {"quantization": "int4", "group_size": 4}}
SMALL = {name: CONFIGS[name].replace(num_hidden_layers=1) for name in ("olmo2", "opt-projected-post-norm", "olmoe")}
EXACT = {"output_hidden_states": True}


@pytest.fixture(scope="module", params=SMALL)
def folder(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param), SMALL[request.param])


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def quantized(folder, request, tmp_path_factory):
    """The reference's quantized model, a folder that it saved, and its answer."""
    backend = load(folder, REFERENCE, **QUANTIZATIONS[request.param])
    saved = tmp_path_factory.mktemp("quantized")
    backend.model.save_pretrained(saved)
    ids, mask = left_padded(backend.config)
    return request.param, backend, saved, backend.forward(ids, mask, **EXACT)


def integers(model):
    return {p.name: v for p, v in model.read_parameters() if isinstance(v, QuantizedTensor)}


def apart(one, other, real):
    pairs = zip((*one["hidden_states"], one["logits"]), (*other["hidden_states"], other["logits"]), strict=True)
    return max(float(np.abs(a - b)[real].max()) for a, b in pairs)


@pytest.mark.parametrize("wing", WINGS)
def test_it_is_the_dequantized_model(quantized, wing):
    """The float weights are read from the quantized folder, so that they are the reference's integers."""
    _, backend, saved, expected = quantized
    ids, mask = left_padded(backend.config)
    floats = load(saved, wing, "float64", quantization="none")
    assert not integers(floats.model)
    found = floats.forward(ids, mask, **EXACT)
    assert found["logits"].dtype == expected["logits"].dtype == np.float64
    assert apart(found, expected, mask.astype(bool)) <= BOUND


@pytest.mark.parametrize("wing", OTHERS)
def test_integers_answers_and_files_are_those_of_the_reference(folder, quantized, wing, tmp_path):
    name, backend, saved, expected = quantized
    other = load(folder, wing, **QUANTIZATIONS[name])
    ours, theirs = integers(other.model), integers(backend.model)
    assert ours.keys() == theirs.keys() == {p.name for p in backend.config.parameters() if is_quantizable(p)}
    for key, tensor in ours.items():
        assert np.array_equal(tensor.values, theirs[key].values), key
        assert np.array_equal(tensor.scale, theirs[key].scale), key
    ids, mask = left_padded(backend.config)
    assert apart(other.forward(ids, mask, **EXACT), expected, mask.astype(bool)) <= BOUND
    other.model.save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (saved / file).read_bytes(), file
    assert other.model.num_parameters() == backend.model.num_parameters()


@pytest.mark.parametrize("wing", OTHERS)
def test_generation_agrees(tmp_path, wing):
    write_checkpoint(tmp_path, SMALL["olmo2"], dtype="float32")
    ids, mask = left_padded(SMALL["olmo2"], length=7)
    settings = {"max_new_tokens": 6, "eos_token_id": None}
    models = [load(tmp_path, w, quantization="int4", group_size=4) for w in (REFERENCE, wing)]
    expected, found = (model.generate(ids, mask, **settings) for model in models)
    assert np.array_equal(found, expected)


@several
def test_a_live_model_keeps_its_integers_in_another_framework(quantized):
    _, backend, _, _ = quantized
    for wing in ("pt", "tf"):
        if wing != REFERENCE and wing in {param.values[0] for param in OTHERS}:
            made = convert(backend.model, to=wing)
            assert integers(made).keys() == integers(backend.model).keys()
            assert all(np.array_equal(v.values, integers(backend.model)[k].values) for k, v in integers(made).items())


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_of_experts_integers_are_all_that_is_held(tmp_path, name, wing):
    config = SMALL["olmoe"]
    write_checkpoint(tmp_path, config, dtype="float32")
    model = load(tmp_path, wing, **QUANTIZATIONS[name]).model
    if wing == "pt":
        held = {path: x for path, x in (*model.named_parameters(), *model.named_buffers()) if ".experts." in path}
    elif wing == "tf":
        held = {v.path: v.numpy() for v in model.weights if "/experts/" in v.path}
    else:
        from flax.traverse_util import flatten_dict

        held = {path: x for path, x in flatten_dict(model.params).items() if "experts" in path}
    weights = 3 * config.num_experts * config.hidden_size * config.intermediate_size
    rows = config.num_experts * (2 * config.intermediate_size + config.hidden_size)
    expected = weights + 4 * rows if name == "int8" else weights / 2 + weights  # a scale of 4 bytes for 4 values
    # In PyTorch, rows of 4 bits end at a word: those of 36 values have 2 bytes more.
    assert expected <= sum(x.nbytes for x in held.values()) <= 1.02 * expected
    gate = next(p for p in config.parameters() if p.name.endswith("mlp.gate.weight"))
    assert dict(model.read_parameters())[gate].dtype == np.float32  # the router is in floats


@pytest.mark.parametrize("wing", WINGS)
def test_opt_with_outlier_channels(tmp_path, wing):
    """A few inputs of a layer may be a hundred times the others (arXiv:2208.07339): activations stay in floats."""
    config = CONFIGS["opt"].replace(num_hidden_layers=1)

    def values(parameter):
        array = random_values(parameter).astype("float32")
        if parameter.name.endswith("layers.0.final_layer_norm.weight"):
            array[[3, 17]] *= 100  # what goes into fc1
        return array

    save_checkpoint(tmp_path, config, "causal_lm", values, lambda parameter: "float32")
    ids, mask = left_padded(config)
    real = mask.astype(bool)
    expected = load(tmp_path, wing).forward(ids, mask)["logits"][real]
    for how, bound in ((QUANTIZATIONS["int8"], 0.02), (QUANTIZATIONS["int4"], 0.15)):
        found = load(tmp_path, wing, **how).forward(ids, mask)["logits"][real]
        assert 0 < np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected), how


@pytest.mark.parametrize("wing", WINGS)
def test_bfloat16_is_near_its_float32_answer(tmp_path, wing):
    config = SMALL["olmo2"].replace(hidden_size=64, intermediate_size=96)
    write_checkpoint(tmp_path, config, dtype="bfloat16")
    ids, mask = left_padded(config)
    real = mask.astype(bool)
    for how in ({"quantization": "int8"}, {"quantization": "int4", "group_size": 32}):
        exact, found = (load(tmp_path, wing, d, **how).forward(ids, mask)["logits"][real] for d in ("float32", None))
        assert 0 < np.linalg.norm(found - exact) <= 0.03 * np.linalg.norm(exact), how


def test_verify_shows_what_quantization_does_to_each_layer(tmp_path):
    write_checkpoint(tmp_path, CONFIGS["olmo2"])
    report = compare.verify(tmp_path, against=tmp_path, backends=[REFERENCE], quantization="int8")
    layers = {row.name: row.relative for row in report.rows}
    assert layers["embeddings"] == 0
    assert all(1e-6 < layers[name] < 0.05 for name in ("layer 1", "layer 2", "logits"))
    assert not report.ok
    assert report.weights is not None
    assert {found.name for found in report.weights.differing} == {
        p.name for p in CONFIGS["olmo2"].parameters() if is_quantizable(p)
    }


@several
def test_verify_compares_the_wings_of_a_quantized_model(quantized):
    _, _, saved, _ = quantized
    assert json.loads((saved / "config.json").read_text())["quantization_config"]
    names = [REFERENCE, OTHERS[0].values[0]]
    assert compare.verify(saved, backends=names).ok
