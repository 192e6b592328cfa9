"""Flax msgpack, read and written."""

import tracemalloc

import pytest

from olmozoo import CheckpointError
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.reader import Checkpoint
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.formats import CONFIGS, copy_of


def test_arrays_of_many_chunks_are_those_of_flax(tmp_path, monkeypatch):
    serialization = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 512)
    source = write_checkpoint(tmp_path / "source", CONFIGS["opt"], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to="flax-msgpack", verify=True)
    data = (tmp_path / "there" / "flax_model.msgpack").read_bytes()
    assert data.count(b"__msgpack_chunked_array__") > 10
    tree_of_arrays = serialization.msgpack_restore(data)
    assert serialization.to_bytes(tree_of_arrays) == data


def packed_array(shape=b"\x92\x02\x03", dtype=b"\xa7float32", values=b"\xc4\x18" + bytes(24)) -> bytes:
    content = b"\x93" + shape + dtype + values
    return b"\xc7" + bytes([len(content)]) + b"\x01" + content


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "1 bytes expected, 0 left"),
        (b"\xdf\xff\xff\xff\xff\xa1a", "1 bytes expected, 0 left"),
        (b"\x81\xdb\xff\xff\xff\xffaaa", "4294967295 bytes expected, 3 left"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "4294967295 bytes expected, 0 left"),
        (b"\x81\xa1a\xc1", "type code 0xc1"),
        (b"\x81\xa1a" * 80, "nested too deeply"),
        (b"\x81\x01\xa1a", "the key 1 is there twice or is no text"),
        (b"\x82\xa1a\x01\xa1a\x01", "the key 'a' is there twice"),
        (b"\x81\xa2\xff\xff\x01", "not UTF-8"),
        (b"\x01\x01", "something other than one map"),
        (b"\x81\xa8a/kernel" + packed_array(values=b"\xc4\x10" + bytes(16)), r"16 bytes for float32 \[2, 3\]"),
        (
            b"\x81\xa8a/kernel" + packed_array(shape=b"\x92\xce\xff\xff\xff\xff\x03"),
            r"24 bytes for .* expected 51539607540",
        ),
        (b"\x81\xa8a/kernel" + packed_array(dtype=b"\xa6object"), "dtype 'object'"),
        (b"\x81\xa8a/kernel" + packed_array(shape=b"\x92\xa1x\x03"), r"shape \('x', 3\)"),
        (b"\x81\xa8a/kernel" + packed_array(values=b"\xc4\x18" + bytes(26)), "2 bytes too many"),
        (b"\x81\xa8a/kernel\xc7\x01\x02\x00", "an extension of type 2"),
        (b"\x81\xa8a/kernel\x01", "a.kernel is no array"),
        (b"\x81\xa8a/secret" + packed_array(), "'secret' is none of"),
        (b"\x82\xa8a/kernel" + packed_array() + b"\xaba/embedding" + packed_array(), "has a.weight twice"),
        (b"\x81\xa8a/kernel\x81\xb9__msgpack_chunked_array__\xc3", "a.kernel is no array"),
    ],
)
def test_a_broken_msgpack_is_refused_and_named(tmp_path, content, problem):
    file = copy_of("flax", tmp_path / "a")
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=problem):
        Checkpoint(tmp_path / "a")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
