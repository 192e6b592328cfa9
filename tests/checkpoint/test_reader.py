"""Reading checkpoint folders."""

import json
import os
import shutil

import numpy as np
import pytest

from olmozoo import CheckpointError, OlmozooError
from olmozoo.backends import load
from olmozoo.checkpoint.diff import diff
from olmozoo.checkpoint.reader import Checkpoint, open_checkpoint
from olmozoo.checkpoint.tensors import dtype_of
from tests.helpers.checkpoints import random_values, write_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.reading import CONFIG, rewrite
from tests.helpers.reading import load as load_tensors
from tests.helpers.wings import WINGS


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, dtype, shard):
    write_checkpoint(tmp_path / "a", CONFIG, dtype=dtype, max_shard_size=shard)
    found = load_tensors(tmp_path / "a", dtype=dtype_of(dtype))
    assert sorted(found) == sorted(p.name for p in CONFIG.parameters("causal_lm"))
    assert next(iter(found)) in ("model.embed_tokens.weight", "lm_head.weight")  # the largest first
    for parameter in CONFIG.parameters("causal_lm"):
        expected = random_values(parameter).astype(dtype_of(dtype))
        assert found[parameter.name].dtype == dtype_of(dtype)
        assert found[parameter.name].tobytes() == expected.tobytes()
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() == (shard == "3KB")


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "tf_model.h5", "model.keras"])
def test_what_cannot_be_opened_is_named(tmp_path, name):
    if name == "tf_model.h5":
        pytest.importorskip("h5py")
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"is broken: 1 problem\(s\)\n.*{name}"):
        Checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes of a name here")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "model.weights.h5"])
@pytest.mark.parametrize("device", [False, True])
def test_pipes_and_devices_are_refused_and_not_read(tmp_path, name, device):
    write_checkpoint(tmp_path, CONFIG)
    if name.startswith("model."):
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/zero") if device else os.mkfifo(tmp_path / name)
    with pytest.raises(OlmozooError, match=f"{name} is not a regular file"):
        open_checkpoint(tmp_path)


def test_a_config_beyond_the_bound_is_refused_and_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(1 << 40)  # which takes no room on the disk
    with pytest.raises(OlmozooError, match="has 1,099,511,627,776 bytes, expected at most"):
        open_checkpoint(tmp_path)


def test_values_nested_too_deep_are_refused_by_the_file(tmp_path):
    write_checkpoint(tmp_path, CONFIG)
    data = json.loads((tmp_path / "config.json").read_text())
    data["deep"] = json.loads("[" * 900 + "]" * 900)
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(OlmozooError, match=r"config\.json is nested deeper than 100 levels"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("name", ["opt", "olmo2-mqa-bias-tied"])
def test_a_tied_head_is_read_as_the_embedding_that_is_not_there(tmp_path, name, wing):
    config = CONFIGS[name]
    folder = write_checkpoint(tmp_path / "a", config, dtype="float32")
    alias = tmp_path / "alias"
    shutil.copytree(folder, alias)
    rewrite(alias, lambda t: t.update({"lm_head.weight": t.pop(config.embedding.name)}))
    ids, mask = np.array([[5, 9, 11]]), np.ones((1, 3), int)
    expected, found = (load(source, wing).forward(ids, mask)["logits"] for source in (folder, alias))
    np.testing.assert_array_equal(found, expected)
    assert diff(folder, alias).same
    assert "lm_head.weight" in open_checkpoint(alias, tie_word_embeddings=False).checkpoint.tensors
