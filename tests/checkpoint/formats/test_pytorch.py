"""PyTorch's `.bin`, read as tensors alone and written."""

import io
import json
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from olmozoo import CheckpointError
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.tensors import dtype_of
from tests.helpers.checkpoints import random_values, write_checkpoint
from tests.helpers.formats import CONFIGS
from tests.helpers.reading import CONFIG, load


@pytest.mark.parametrize("old_format", [False, True])
def test_bin_files_load_and_execute_nothing(tmp_path, old_format):
    torch = pytest.importorskip("torch")
    tensors = {p.name: torch.from_numpy(random_values(p)).bfloat16() for p in CONFIG.parameters("causal_lm")}
    CONFIG.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=not old_format)
    for parameter in CONFIG.parameters("causal_lm"):
        expected = random_values(parameter).astype(ml_dtypes.bfloat16)
        assert np.array_equal(load(tmp_path, dtype=ml_dtypes.bfloat16)[parameter.name], expected)

    torch.save({"a": Evil(tmp_path / "owned")}, file)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bin_files_whose_records_do_not_lie_where_they_should_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    CONFIG.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({p.name: torch.from_numpy(random_values(p)) for p in CONFIG.parameters("causal_lm")}, file)
    good = file.read_bytes()
    Checkpoint(tmp_path)
    with zipfile.ZipFile(file) as archive:
        first, second = (entry for entry in archive.infolist() if entry.filename.endswith(("/data/1", "/data/2")))
    entry = good.rindex(second.filename.encode()) - 46  # of the archive's directory, at its end
    for place, value, message in (
        (entry + 42, first.header_offset.to_bytes(4, "little"), "data/1"),
        (entry + 10, b"\x08\0", "is compressed, expected it stored"),
    ):
        file.write_bytes(good[:place] + value + good[place + len(value) :])
        with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin is not a readable state dict: .*{message}"):
            Checkpoint(tmp_path)


def test_bin_files_of_parameters_and_negated_views_load(tmp_path):
    torch = pytest.importorskip("torch")
    CONFIG.save_pretrained(tmp_path)
    values = {p.name: random_values(p).astype(np.float32) for p in CONFIG.parameters("causal_lm")}
    for made in (torch.nn.Parameter, lambda tensor: torch._neg_view(-tensor)):
        tensors = {name: made(torch.from_numpy(array)) for name, array in values.items()}
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        for name, array in load(tmp_path, dtype=np.float32).items():
            assert np.array_equal(array, values[name])


def test_bin_files_of_what_is_no_plain_tensor_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "pytorch_model.bin"
    for spoiled in (torch.eye(3).to_sparse(), torch.ones(3, device="meta")):
        torch.save({"a": spoiled}, file)
        with pytest.raises(CheckpointError, match=r"tensors that are not dense: 1 problem\(s\)\n  - a: torch\."):
            Checkpoint(tmp_path)
    torch.save({1: torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match="mapping from names to tensors"):
        Checkpoint(tmp_path)


def test_sharded_bin_files_load(tmp_path):
    torch = pytest.importorskip("torch")
    names = [p.name for p in CONFIG.parameters("causal_lm")]
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        table = {p.name: p for p in CONFIG.parameters("causal_lm")}
        torch.save({name: torch.from_numpy(random_values(table[name])) for name in part}, tmp_path / file)
        weight_map.update(dict.fromkeys(part, file))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for parameter in CONFIG.parameters("causal_lm"):
        assert np.array_equal(load(tmp_path)[parameter.name], random_values(parameter))


def test_torch_maps_what_we_write_and_takes_it_as_tensors_alone(tmp_path):
    torch = pytest.importorskip("torch")
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo"], dtype=dtype_of("bfloat16"))
    convert_checkpoint(source, tmp_path / "there", to="pt-bin")
    state = torch.load(tmp_path / "there" / "pytorch_model.bin", weights_only=True, mmap=True)
    checkpoint = Checkpoint(source)
    assert state.keys() == checkpoint.tensors.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.data_ptr() % 64 == 0
        assert tensor.view(torch.int16).numpy().tobytes() == checkpoint[name].tobytes()


def bin_of(code: bytes, **records: bytes) -> bytes:
    """A `.bin` with this pickle, and these records of values."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        for name, content in {"version": b"3\n", "byteorder": b"little", **records}.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (b"\x80\x02}X\1\0\0\0acbuiltins\nbytearray\nJ\0\0\0\x7f\x85Rs.", "names 'builtins bytearray'"),
        (b"\x80\x02}X\1\0\0\0ac__builtin__\nbytearray\nJ\0\0\0\x7f\x85Rs.", "names '__builtin__ bytearray'"),
        (b"\x80\x02}X\1\0\0\0actorch\nFloatTensor\nJ\0\0\0\x7f\x85Rs.", "names 'torch FloatTensor'"),
        (b"\x80\x02}X\1\0\0\0aJ\0\0\0\x7fs.", "an integer beyond the size of the file"),
        (b"\x80\x02}X\xff\xff\xff\x7fas.", "is not a readable state dict"),
    ],
)
def test_a_pickle_that_would_allocate_more_than_the_file_explains_is_not_run(tmp_path, monkeypatch, code, named):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it was run"))
    for content in (bin_of(code), code):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=named):
            Checkpoint(tmp_path)


def test_tensors_that_are_larger_than_what_is_stored_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(1).expand(40_000, 40_000)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"larger than what is stored of them.*\n.*a: \[40000, 40000\]"):
        Checkpoint(tmp_path)
    whole = torch.zeros(1000, 100)
    torch.save({str(i): whole[:] for i in range(1000)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="they overlap"):
        Checkpoint(tmp_path)
    torch.save({"a": whole, "b": whole}, tmp_path / "pytorch_model.bin")  # tied
    assert list(Checkpoint(tmp_path).tensors) == ["a", "b"]
