"""Files and folders that are something else than a checkpoint: recognised, and the way out is named."""

import json
import shutil

import numpy as np
import pytest
import yaml

from olmozoo import CheckpointError, ConfigError, ModelConfig, Tokenizer, foreign
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.formats import safetensors
from olmozoo.checkpoint.matching import load_weights
from olmozoo.checkpoint.reader import Checkpoint, open_checkpoint
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.conversions import FIXTURES

CONFIG = CONFIGS["olmo2"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head></head></html>"
FILES = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "model.keras", "config.json")


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "model", CONFIG, dtype="float32")


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("content", "named"), [(POINTER, "a Git LFS pointer.*git lfs pull"), (PAGE, "a web page")])
def test_pointers_and_web_pages_are_called_so(folder, name, content, named):
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError), match=rf"{name} is {named}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_pointers_of_shards_and_indices(tmp_path, name):
    folder = write_checkpoint(tmp_path, CONFIG, dtype="float32", max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    name = name if (folder / name).exists() else sorted(folder.glob("model-*"))[0].name
    (folder / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="is a Git LFS pointer"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_pointers_in_place_of_tokenizer_files(tmp_path, name):
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_text("{}" if file == "vocab.json" else "#version: 0.2\n")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "settings", "named"),
    [
        ("q_proj.g_idx", None, r"quantized \(GPTQ\)"),
        ("q_proj.qweight", {"quant_method": "awq", "bits": 4}, r"quantized \(awq\)"),
        ("q_proj.SCB", {"quant_method": "bitsandbytes", "load_in_8bit": True}, r"quantized \(bitsandbytes, 8 bits\)"),
        ("q_proj.weight_scale", {"quant_method": "fp8"}, r"quantized \(fp8\)"),
        ("q_proj.weight_scale_inv", None, r"quantized \(fp8\)"),
    ],
)
def test_quantized_checkpoints_name_their_method(folder, suffix, settings, named):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    dtype = np.float32 if "scale" in suffix else np.int32
    save_file({**tensors, f"model.layers.0.self_attn.{suffix}": np.zeros(4, dtype)}, folder / "model.safetensors")
    if settings:
        edit_config(folder, quantization_config=settings)

    def load():
        source = open_checkpoint(folder)
        list(load_weights(source.checkpoint, source.config, "causal_lm", dtype=np.dtype("float32")))

    with pytest.raises(CheckpointError, match=named) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_a_left_over_quantization_config_is_dropped_with_a_warning(folder, tmp_path):
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.warns(UserWarning, match="quantization_config in config.json is ignored"):
        source = open_checkpoint(folder)
    assert "quantization_config" not in source.config.to_dict()
    with pytest.warns(UserWarning, match="quantization_config"):
        convert_checkpoint(folder, tmp_path / "there", to="safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "there" / "config.json").read_text())
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):  # and not called quantized
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    ],
)
def test_prefixes_of_training_programs_are_removed_with_a_warning(folder, rename):
    tensors = Checkpoint(folder).tensors
    safetensors.write(folder / "new.safetensors", [tensor.renamed(rename(name)) for name, tensor in tensors.items()])
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    with pytest.warns(
        UserWarning, match=r"names are read without prefixes of a training program: \S+ as (model|lm_head)\."
    ):
        found = Checkpoint(folder)
    assert found.tensors.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name].read()) for name in tensors)


def test_plain_names_touch_nothing_else():
    assert foreign.plain_names(["model.a", "model.b"]) == {}
    assert foreign.plain_names(["module.a", "b"]) == {}
    assert foreign.plain_names(["module.a", "_orig_mod.module.a"]) == {}, "two would be one"


def test_ai2s_config_names_the_converter():
    config = {"model_type": "olmo", "d_model": 4096, "n_layers": 32, "n_heads": 32}
    for found in (config, config | {"model_type": "hf_olmo"}):
        with pytest.raises(ConfigError, match=r"AI2's own trainer .* python -m conversion\.olmo_native SRC DST"):
            ModelConfig.from_dict(found)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "shards"])
@pytest.mark.parametrize("name", ["olmo1-mha-clip", "olmo1-tied", "olmo2-gqa"])
def test_folders_of_hf_olmo_convert(tmp_path, name, form):
    from conversion import olmo_native
    from olmozoo.checkpoint.formats import pytorch
    from tests.helpers.conversions import tree

    native = FIXTURES / "native" / name
    olmo_native.main(native, tmp_path / "expected")
    tensors = [t.renamed(f"model.{n}") for n, t in olmo_native.read_tensors(native).items()]
    folder = tmp_path / "hf_olmo"
    folder.mkdir()
    model = yaml.safe_load((native / "config.yaml").read_text())["model"]
    (folder / "config.json").write_text(json.dumps({**model, "model_type": "hf_olmo", "architectures": ["OLMo"]}))
    if form == "shards":
        weight_map = {}
        for i, part in enumerate((tensors[:3], tensors[3:]), 1):
            safetensors.write(folder / f"model-0000{i}-of-00002.safetensors", part)
            weight_map |= {tensor.name: f"model-0000{i}-of-00002.safetensors" for tensor in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        (pytorch if form.endswith(".bin") else safetensors).write(folder / form, tensors)
    olmo_native.main(folder, tmp_path / "found")
    assert tree(tmp_path / "found") == tree(tmp_path / "expected")
    shutil.rmtree(tmp_path / "found")
