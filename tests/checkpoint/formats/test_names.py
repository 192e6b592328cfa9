"""What Transformers 4 wrote: its names become canonical ones, its answers ours."""

import json
import shutil
import warnings

import numpy as np
import pytest

from olmozoo import CheckpointError
from olmozoo.backends import load
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.tensors import dtype_of
from olmozoo.hub import resolve
from tests.helpers.formats import FIXTURES, tree
from tests.helpers.hub_server import HubServer
from tests.helpers.wings import WINGS


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize(
    ("name", "bound"),
    [(n, 1e-5) for n in ("tf", "tf-base", "tf-shard", "tf-safetensors", "flax", "flax-base", "flax-shard")]
    + [(n, 1e-5) for n in ("flax-bf16", "flax-untied", "flax-safetensors")]
    + [("tf-fp16", 2e-2)],  # computed in float16 there
)
def test_files_of_transformers_4_give_its_answers(wing, name, bound):
    if name.startswith("tf"):
        pytest.importorskip("h5py")
    folder, expected = FIXTURES / name, np.load(FIXTURES / name / "expected.npz")
    ids = expected["input_ids"]
    backend = load(folder, wing, "float32")
    found = backend.forward(ids, np.ones_like(ids), output_hidden_states=True)
    if name.endswith("base"):
        assert np.abs(found["hidden_states"][-1] - expected["out"]).max() < bound
    else:
        assert np.abs(found["logits"] - expected[expected.files[-1]]).max() < bound
    own = {"tf-fp16": "float16", "flax-bf16": "bfloat16"}.get(name, "float32")
    assert Checkpoint(folder).dtype == dtype_of(own)


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_files_of_transformers_4_become_a_canonical_folder(tmp_path, name):
    if name.startswith("tf"):
        pytest.importorskip("h5py")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_checkpoint(FIXTURES / name, tmp_path / "there", to="safetensors", verify=True)
    old, new = Checkpoint(FIXTURES / name), Checkpoint(tmp_path / "there")
    base = name.endswith("base")
    for tensor in new.tensors:
        source = f"model.{tensor}" if base and name.startswith("tf") else tensor
        assert new[tensor].tobytes() == old[source].tobytes()


def test_names_that_no_weight_has_are_refused_with_their_file(tmp_path):
    shutil.copytree(FIXTURES / "flax-shard", tmp_path / "a")
    index = tmp_path / "a" / "flax_model.msgpack.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["model/decoder/secret"] = next(iter(entries["weight_map"].values()))
    index.write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack\.index\.json: model\.decoder: 'secret' is none of"):
        Checkpoint(tmp_path / "a")
    shutil.copytree(FIXTURES / "flax-safetensors", tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"project_in.kernel", b"project_in.secret"))
    with pytest.raises(CheckpointError, match=r"b/model\.safetensors: model\.decoder\.project_in: 'secret' is none of"):
        Checkpoint(tmp_path / "b")


@pytest.mark.parametrize("name", ["tf", "tf-shard", "flax", "flax-shard"])
def test_a_repository_with_old_files_alone_is_downloaded(monkeypatch, tmp_path, name):
    from huggingface_hub.utils import close_session

    old = tree(FIXTURES / name)
    with HubServer() as server:
        server.attach(monkeypatch, tmp_path)
        close_session()
        server.add_repo("org/old", {"main": {**old, "README.md": b"#", "tf_model.h5.bak": b""}})
        found = tree(resolve("org/old", need="weights"))
        assert found == {file: data for file, data in old.items() if file != "expected.npz"}
        close_session()
