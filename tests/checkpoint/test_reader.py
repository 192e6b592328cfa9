"""Reading checkpoint folders."""

import pytest

from olmozoo import CheckpointError
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.tensors import dtype_of
from tests.helpers.checkpoints import random_values, write_checkpoint
from tests.helpers.reading import CONFIG, load


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, dtype, shard):
    write_checkpoint(tmp_path / "a", CONFIG, dtype=dtype, max_shard_size=shard)
    found = load(tmp_path / "a", dtype=dtype_of(dtype))
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
