"""Quantized folders, of ours and of others."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from olmozoo import CheckpointError, InputError, Olmo2Config, OPTConfig
from olmozoo.checkpoint.adapters import Source, open_merged
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.reader import open_checkpoint
from olmozoo.quantization import Quantization, QuantizedTensor, pack, quantize
from tests.helpers.checkpoints import left_padded, random_values, write_checkpoint
from tests.helpers.configs import CONFIGS

CONFIG = Olmo2Config(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    eos_token_id=3,
)
LAYER = "model.layers.0.mlp.down_proj"  # (64, 128)
WEIGHT = next(random_values(p).astype("float32") for p in CONFIG.parameters() if p.name == f"{LAYER}.weight")


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "model", CONFIG, dtype="float32")


def store(folder, parts, settings=None):
    """Store a layer as these parts, in place of its weight."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{LAYER}.weight"]
    tensors |= {f"{LAYER}.{name}": np.array(array, order="C") for name, array in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings or {}}))


def tensor(bits, group, zeros=False):
    found = quantize(WEIGHT, Quantization(bits, group))
    zero = np.random.default_rng(1).integers(-8, 8, found.scale.shape).astype(np.int8) if zeros else None
    return QuantizedTensor(found.values, found.scale, zero, bits)


def packed(found):
    parts = {"weight_packed": pack(found.values, found.bits), "weight_scale": found.scale}
    if found.zero is not None:
        parts["weight_zero_point"] = pack(found.zero.T, found.bits).T
    return parts | {"weight_shape": np.array(found.shape)}


def test_folders_of_others_give_their_integers(folder):
    eight, four, shifted = tensor(8, None), tensor(4, 32), tensor(4, 16, zeros=True)
    largest = np.abs(WEIGHT).max(1)
    bnb = QuantizedTensor(np.rint(WEIGHT / largest[:, None] * 127).astype(np.int8), largest[:, None] / 127, None, 8)
    zeros = np.zeros((64, 1), np.int8)
    cases = [
        (packed(eight), eight),
        (packed(four), four),
        (packed(shifted), shifted),
        ({"weight": shifted.values, "weight_scale": shifted.scale, "weight_zero_point": shifted.zero}, shifted),
        (
            {
                "_weight_qdata": eight.values,
                "_weight_scale": eight.scale,
                "_weight_zero_point": zeros,
            },
            eight,
        ),
        ({"weight": bnb.values, "SCB": largest, "weight_format": np.array(0, np.uint8)}, bnb),
    ]
    for parts, expected in cases:
        write_checkpoint(folder, CONFIG, dtype="float32")
        store(folder, parts)
        source = open_checkpoint(folder)
        assert "quantization_config" not in source.config.to_dict()
        found = source.checkpoint.tensors[f"{LAYER}.weight"]
        assert found.shape == WEIGHT.shape
        assert found.dtype == np.float32
        integers = found.integers.read()
        assert np.array_equal(integers.values, expected.values), parts.keys()
        assert np.array_equal(found.read(), expected.dequantize(np.float32)), parts.keys()
        assert (integers.zero is None) == (expected.zero is None)


def test_nf4_is_read_as_floats(folder):
    """Two values a byte, the first in the high bits; scales of 64 values, themselves in 8 bits for `nested`."""
    table = np.linspace(-1, 1, 16, dtype=np.float32)
    indices = np.random.default_rng(0).integers(0, 16, WEIGHT.size)
    pairs = (indices[::2] << 4 | indices[1::2]).astype(np.uint8)[:, None]
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]}
    blocks = WEIGHT.size // 64
    scales = np.random.default_rng(1).random(blocks).astype(np.float32)
    nested_table = np.linspace(-1, 1, 256, dtype=np.float32)
    codes = np.random.default_rng(2).integers(0, 256, blocks).astype(np.uint8)
    nested = {"nested_blocksize": 72, "nested_offset": 1.5}
    both = [
        ({"absmax": scales}, {}, scales),
        (
            {"absmax": codes, "nested_absmax": np.array([0.5, 0.25], np.float32), "nested_quant_map": nested_table},
            nested,
            nested_table[codes] * np.repeat([0.5, 0.25], 72)[:blocks] + 1.5,
        ),
    ]
    for parts, more, expected in both:
        write_checkpoint(folder, CONFIG, dtype="float32")
        head = np.frombuffer(json.dumps(state | more).encode(), np.uint8)
        named = {f"weight.{name}": array for name, array in parts.items()}
        store(
            folder, {"weight": pairs, "weight.quant_map": table, "weight.quant_state.bitsandbytes__nf4": head, **named}
        )
        found = open_checkpoint(folder).checkpoint.tensors[f"{LAYER}.weight"]
        assert found.integers is None
        values = (table[indices].reshape(blocks, 64) * expected[:, None]).reshape(64, 128)
        np.testing.assert_allclose(found.read(), values, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_scale": None}, "weight_packed is without .*weight_scale"),
        ({"weight_shape": None}, "weight_packed is without .*weight_shape"),
        (
            {"weight_shape": np.array([64, 40])},
            r"weight_packed is \[64, 16\], expected \[64, 40\] in words of 4 or 8 bits",
        ),
        ({"weight_shape": np.array([64, -1])}, "in words of 4 or 8 bits"),
        ({"weight_scale": np.ones((64, 5), np.float32)}, r"weight_scale is \[64, 5\], expected scales of groups"),
        ({"weight_scale": np.ones((7, 1), np.float32)}, r"weight_scale is \[7, 1\]"),
        ({"weight_scale": np.ones((64, 1), np.int32)}, "weight_scale"),
        ({"weight_zero_point": np.zeros((64, 3), np.int32)}, r"weight_zero_point is \[64, 3\], expected \[8, 4\]"),
        ({"weight_shape": np.array([np.nan, 128])}, r"weight_shape is F64 \[2\], expected two integers"),
        ({"weight": WEIGHT}, "weight_packed is a part of .*weight, which is there in another form too"),
        ({"other": np.zeros(3, np.int32)}, "other has dtype I32, expected one of F64"),
    ],
)
def test_parts_that_do_not_fit_are_named(folder, change, named):
    parts = {name: array for name, array in (packed(tensor(4, 32)) | change).items() if array is not None}
    store(folder, parts)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(folder)


def test_zero_points_outside_the_integers_are_refused(folder):
    four, eight = tensor(4, 32), tensor(8, 32)
    for parts, zero in [
        (packed(four), np.full((64, 4), 9, np.int8)),
        ({"weight": eight.values, "weight_scale": eight.scale}, np.full((64, 4), 300, np.int64)),
        ({"weight": eight.values, "weight_scale": eight.scale}, np.full((64, 4), 0.5, np.float32)),
        ({"weight": eight.values, "weight_scale": eight.scale}, np.full((64, 4), np.nan, np.float32)),
    ]:
        write_checkpoint(folder, CONFIG, dtype="float32")
        store(folder, parts | {"weight_zero_point": zero})
        found = open_checkpoint(folder).checkpoint.tensors[f"{LAYER}.weight"]
        with pytest.raises(CheckpointError, match="weight_zero_point has values that are no integers of"):
            found.read()


def test_a_scale_for_all_rows_of_bitsandbytes_is_refused(folder):
    store(folder, {"weight": tensor(8, None).values, "SCB": np.array(1, np.float32)})
    with pytest.raises(CheckpointError, match=r"SCB is \[\], expected a value for each row"):
        open_checkpoint(folder)


def nf4(state, **parts):
    """The parts of a weight of zeros in 4 bits, with changes to its state and to its parts."""
    good = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]}
    state = state if isinstance(state, bytes) else json.dumps(good | state).encode()
    tensors = {
        "": np.zeros((4096, 1), np.uint8),
        ".absmax": np.ones(128, np.float32),
        ".quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        ".quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    }
    return {f"weight{name}": array for name, array in (tensors | parts).items()}


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (nf4(b"[" * 100_000), "nf4 is no state of bitsandbytes: RecursionError"),
        (nf4({"blocksize": float("inf")}), "nf4 is no state of bitsandbytes: OverflowError"),
        (nf4({"nested_offset": 10**400}), "nf4 is no state of bitsandbytes: OverflowError"),
        (nf4({"shape": [-64, -128]}), r"does not fit its shape \[-64, -128\]"),
        (nf4({"shape": [1] * 70 + [64, 128]}), "does not fit its shape"),
        (nf4({}, **{"": np.zeros((4096, 1), np.float32)}), "weight in nf4 is F32, expected two values a byte"),
        (nf4({}, **{".absmax": np.ones(128, np.int16)}), "absmax is I16, expected floats"),
    ],
    ids=["deep", "infinite", "offset", "negative", "dimensions", "float", "absmax"],
)
def test_states_of_bitsandbytes_that_do_not_fit_are_refused(folder, parts, named):
    store(folder, parts)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(folder)


def test_blocks_larger_than_a_weight_ask_for_no_memory(folder):
    nested = {
        ".absmax": np.zeros(1, np.uint8),
        ".nested_absmax": np.ones(1, np.float32),
        ".nested_quant_map": np.full(256, 3, np.float32),
    }
    state = {"blocksize": 2**62, "nested_blocksize": 2**62}
    for parts, expected in [({".absmax": np.full(1, 2, np.float32)}, -2), (nested, -3)]:
        write_checkpoint(folder, CONFIG, dtype="float32")
        store(folder, nf4(state, **parts))
        assert (open_checkpoint(folder).checkpoint[f"{LAYER}.weight"] == expected).all()


def test_another_number_of_bits_is_refused_and_floats_are_given(folder):
    store(folder, packed(tensor(4, 32)))
    with pytest.raises(InputError, match=rf"int8, and {LAYER}.weight has 4 bits.*quantization='none'"):
        open_merged(Source(folder, None), quantization=Quantization(8))
    opened = open_merged(Source(folder, None), quantization="none")
    assert all(found.integers is None for found in opened.checkpoint.tensors.values())


@pytest.mark.parametrize("head", ["causal_lm", None])
@pytest.mark.parametrize(("name", "size"), [("int8", 128), ("int4", 32)])
def test_conversion_to_integers_and_back(folder, tmp_path, name, size, head):
    write_checkpoint(folder, CONFIG, head, dtype="float32")
    convert_checkpoint(folder, tmp_path / "q", to="safetensors", quantization=name, group_size=size, verify=True)
    settings = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == (["lm_head"] if head else [])
    assert settings["config_groups"]["group_0"]["format"] == "pack-quantized"
    assert settings["config_groups"]["group_0"]["weights"]["group_size"] == (None if name == "int8" else 32)
    convert_checkpoint(tmp_path / "q", tmp_path / "again", to="safetensors", verify=True)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "q" / file).read_bytes()
    convert_checkpoint(tmp_path / "q", tmp_path / "floats", to="safetensors", quantization="none")
    floats = load_file(tmp_path / "floats" / "model.safetensors")
    layer = LAYER if head else LAYER.removeprefix("model.")
    expected = quantize(WEIGHT, Quantization.of(name, size)).dequantize(np.float32)
    assert np.array_equal(floats[f"{layer}.weight"], expected)
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())


def test_experts_that_are_not_quantized_alike_are_refused(tmp_path):
    config = CONFIGS["olmoe"].replace(num_hidden_layers=1)
    source = write_checkpoint(tmp_path / "source", config, dtype="float32")
    convert_checkpoint(source, tmp_path / "q", to="safetensors", quantization="int8")
    tensors = load_file(tmp_path / "q/model.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    for part in ("packed", "scale", "shape"):
        del tensors[f"{name}_{part}"]
    tensors[name] = load_file(source / "model.safetensors")[name]
    save_file(tensors, tmp_path / "q/model.safetensors")
    with pytest.raises(InputError, match=r"(?s)in several ways: .*experts.up_proj.weight: floats; int8, a scale a row"):
        open_merged(Source(tmp_path / "q", None))
    assert open_merged(Source(tmp_path / "q", None), quantization="none").config.num_experts == 5


def test_other_formats_have_floats_alone(folder, tmp_path):
    with pytest.raises(InputError, match="only safetensors have quantized weights, not flax-msgpack"):
        convert_checkpoint(folder, tmp_path / "q", to="flax-msgpack", quantization="int8")


# -- with the libraries of others ---------------------------------------------------------------------------------

OPT = OPTConfig(
    vocab_size=61,
    hidden_size=64,
    ffn_dim=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    word_embed_proj_dim=32,
    max_position_embeddings=40,
    pad_token_id=0,
)


MIXTURE = CONFIGS["olmoe"].replace(hidden_size=64, intermediate_size=96, num_hidden_layers=1)


@pytest.mark.pt
@pytest.mark.parametrize("config", [CONFIG, OPT, MIXTURE], ids=["olmo2", "opt", "olmoe"])
@pytest.mark.parametrize(("name", "size"), [("int8", 128), ("int4", 32)])
def test_transformers_loads_what_is_written(tmp_path, config, name, size):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    from olmozoo.pt import AutoModelForCausalLM

    write_checkpoint(tmp_path / "model", config, dtype="float32")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization=name, group_size=size)
    ours.save_pretrained(tmp_path / "q")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not any(report.values())
    ids, mask = map(torch.from_numpy, left_padded(config))
    with torch.inference_mode():
        expected, found = (model(ids, mask).logits[mask.bool()] for model in (theirs, ours))
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.pt
@pytest.mark.parametrize("method", ["torchao", "bitsandbytes", "nf4", "nf4 nested", "fp4"])
def test_folders_of_transformers_with_other_libraries(folder, tmp_path, method):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from olmozoo.pt import AutoModelForCausalLM

    if method == "torchao":
        settings = transformers.TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    else:
        library = pytest.importorskip("bitsandbytes")
        four = {"load_in_4bit": True, "bnb_4bit_use_double_quant": "nested" in method}
        four["bnb_4bit_quant_type"] = method.split()[0]
        settings = transformers.BitsAndBytesConfig(**({"load_in_8bit": True} if method == "bitsandbytes" else four))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    theirs.save_pretrained(tmp_path / "q")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    layer = theirs.model.layers[0].mlp.down_proj
    if method == "torchao":
        expected = layer.weight.dequantize()
    elif method == "bitsandbytes":
        expected = layer.weight.data * layer.weight.SCB[:, None] / 127
    else:
        expected = library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    module = ours.model.layers[0].mlp.down_proj
    found = module.dequantize(torch.float32) if hasattr(module, "dequantize") else module.weight
    torch.testing.assert_close(found, expected.reshape(found.shape).to(found.dtype), rtol=1e-6, atol=1e-7)
