"""Files that were made to do harm, or were damaged: nothing in them runs, and each is refused for what is wrong."""

import base64
import io
import pickle
import shutil
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests.helpers.conversions import FIXTURES, Attack

pytest.importorskip("yaml")

import contextlib

from conversion import archives, olmo_core, olmo_native, pickles, sharded
from olmozoo.checkpoint.files import FileSlice
from olmozoo.checkpoint.formats.safetensors import write as write_safetensors
from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import CheckpointError, ConfigError

NATIVE = FIXTURES / "native/olmo2-gqa"
CORE = FIXTURES / "olmo_core"
RANK = FIXTURES / "trainer/rank"
FLOAT = np.dtype(np.float32)


@pytest.fixture
def native(tmp_path):
    return shutil.copytree(NATIVE, tmp_path / "native")


@pytest.fixture
def core(tmp_path):
    return shutil.copytree(CORE, tmp_path / "core")


def archive(file, data, records=(), compression=zipfile.ZIP_STORED):
    """A torch.save archive with a pickle and records of our own."""
    with zipfile.ZipFile(file, "w", compression) as parts:
        parts.writestr("archive/data.pkl", data)
        for name, content in records:
            parts.writestr(f"archive/data/{name}", content)


class Name:
    """Pickles as a reference to a class or function, which need not exist."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Pid:
    """Pickles as a persistent id."""

    def __init__(self, *parts) -> None:
        self.parts = parts


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments


def dumps(value) -> bytes:
    """A pickle with `Name`, `Pid` and `Call` as said there, put together by hand."""

    def dump(value) -> bytes:
        if isinstance(value, Name):
            return f"c{value.module}\n{value.name}\n".encode()
        if isinstance(value, Pid):
            return dump(value.parts) + b"Q"
        if isinstance(value, Call):
            return dump(value.function) + dump(value.arguments) + b"R"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(dump, value)) + b"t"
        if isinstance(value, dict):
            return b"}(" + b"".join(dump(key) + dump(item) for key, item in value.items()) + b"u"
        return pickle.dumps(value, protocol=2)[2:-1]

    return b"\x80\x02" + dump(value) + b"."


def tensor(size=4, offset=0, shape=(4,), strides=(1,), kind="FloatStorage", key="0"):
    storage = Pid("storage", Name("torch", kind), key, "cpu", size)
    hooks = Call(Name("collections", "OrderedDict"))
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, hooks)


def read(file):
    return {name: archives.as_tensor(value, name).read() for name, value in archives.read_archive(file).items()}


def test_the_archives_made_here_can_be_read(tmp_path):
    values = np.arange(4, dtype=FLOAT)
    archive(tmp_path / "x.pt", dumps({"a": tensor()}), [("0", values.tobytes())])
    assert np.array_equal(read(tmp_path / "x.pt")["a"], values)


def test_records_begin_where_the_directory_says_whatever_their_names(tmp_path):
    file = tmp_path / "x.pt"
    for root, utf8 in (("модель", True), ("mod\u00e8le", False)):
        data = dumps({"a": tensor(), "b": tensor(key="1")})
        with zipfile.ZipFile(file, "w") as parts:
            for name, content in (("data.pkl", data), ("data/0", bytes(16)), ("data/1", bytes(range(16)))):
                parts.writestr(f"{root}/{name}", content)
        if not utf8:  # as writers that know nothing of that flag have it: the same bytes, read as cp437
            good = file.read_bytes()
            for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
                at = -1
                while (at := good.find(signature, at + 1)) >= 0:
                    good = good[: at + place] + b"\0\0" + good[at + place + 2 :]
            file.write_bytes(good)
        assert read(file)["b"].any()
    with zipfile.ZipFile(file) as parts:
        first, second = (parts.infolist()[i] for i in (1, 2))
    entry = good.rindex(b"/data/1") - len("modèle".encode()) - 46  # of the archive's directory
    assert good[entry + 42 :][:4] == second.header_offset.to_bytes(4, "little")
    file.write_bytes(good[: entry + 42] + first.header_offset.to_bytes(4, "little") + good[entry + 46 :])
    with pytest.raises(CheckpointError, match="data/1 does not begin where the directory says"):
        read(file)


# -- code -------------------------------------------------------------------------------------------------------------


def attack(tmp_path) -> bytes:
    data = pickle.dumps(Attack(tmp_path / "trace"), protocol=2)
    pickle.loads(data)
    assert (tmp_path / "trace").exists(), "the attack must be able to work"
    (tmp_path / "trace").unlink()
    return data


def test_model_pt_runs_nothing(tmp_path, native):
    archive(native / "model.pt", attack(tmp_path))
    with pytest.raises(CheckpointError):
        olmo_native.main(native, tmp_path / "out")
    assert not (tmp_path / "trace").exists()


def test_rank_files_run_nothing(tmp_path):
    src = shutil.copytree(RANK, tmp_path / "src")
    archive(src / "rank1.pt", attack(tmp_path))
    with pytest.raises(CheckpointError):
        olmo_native.main(src, tmp_path / "out")
    assert not (tmp_path / "trace").exists()


def test_metadata_runs_nothing(tmp_path, core):
    (core / "model_and_optim/.metadata").write_bytes(attack(tmp_path))
    with pytest.raises(CheckpointError, match="metadata"):
        olmo_core.main(core, tmp_path / "out")
    assert not (tmp_path / "trace").exists()


def test_chunks_run_nothing(tmp_path, core):
    data = attack(tmp_path)
    for chunk in (core / "model_and_optim").glob("*.distcp"):
        size = chunk.stat().st_size
        archive(chunk, data)
        chunk.write_bytes(chunk.read_bytes().ljust(size, b"\0"))
    with pytest.raises(CheckpointError):
        olmo_core.main(core, tmp_path / "out")
    assert not (tmp_path / "trace").exists()


def test_encoded_keys_run_nothing(tmp_path, native):
    import base64

    (native / "model.pt").unlink()
    for data in (attack(tmp_path), pickle.dumps((("a", 1), False)), pickle.dumps((("a",), True)), b"not a pickle"):
        key = base64.urlsafe_b64encode(data).decode()
        output = LazyTensor(key, FLOAT, (1,), lambda: np.zeros(1, FLOAT))
        (native / "model.safetensors").unlink(missing_ok=True)
        write_safetensors(native / "model.safetensors", [output])
        with pytest.raises(CheckpointError, match="the key"):
            olmo_native.main(native, tmp_path / "out")
        assert not (tmp_path / "trace").exists()


def test_config_yaml_runs_nothing(tmp_path, native):
    (native / "config.yaml").write_text(f"model: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'trace'}]")
    with pytest.raises(ConfigError, match="not readable YAML"):
        olmo_native.main(native, tmp_path / "out")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "name", [("os", "system"), ("builtins", "eval"), ("builtins", "exec"), ("subprocess", "Popen"), ("posix", "system")]
)
def test_names_from_elsewhere_are_refused(name):
    with pytest.raises(CheckpointError, match=rf"it names {name[0]}\.{name[1]}"):
        pickles.unpickle(dumps(Call(Name(*name), "true")), "x")


@pytest.mark.parametrize(
    "value",
    [
        Call(Name("torch.hub", "load"), "somebody/repo"),
        Call(Name("numpy", "load"), "file"),
        Call(Name("builtins", "bytearray"), 1 << 50),
        Call(Name("torch", "empty"), 1 << 50),
    ],
)
def test_names_from_the_packages_are_records_and_not_called(value):
    found = pickles.unpickle(dumps(value), "x")
    assert type(found).__mro__[1] is pickles.Record


def test_getattr_reaches_nested_classes_alone():
    nested = Call(Name("builtins", "getattr"), Name("torch.a", "B"), "C")
    assert pickles.unpickle(dumps(nested), "x").kind == "B.C"
    for owner in ("text", Call(Name("torch", "Size"), (1,))):
        with pytest.raises(CheckpointError, match="getattr"):
            pickles.unpickle(dumps(Call(Name("builtins", "getattr"), owner, "__class__")), "x")


def test_tuples_that_hold_each_other_are_refused(tmp_path, native):
    pairs = b"\x80\x04\x8c\x01x\x94" + b"".join(b"h" + bytes([level]) + b"\x86\x94" for level in range(60))
    for data in (pairs + b".", pairs + b"}h" + bytes([60]) + b"K\x01s."):  # and as a key, which would be hashed
        with pytest.raises(CheckpointError, match="more than 1,000,000 values"):
            pickles.unpickle(data, "x")
    pairs = pairs.replace(b"h" + bytes([13]) + b"\x86\x94", b".", 1)
    with pytest.raises(CheckpointError, match=r"is \(\(.*, expected \(\(name,\), False\)") as told:
        pickles.decode_key(base64.urlsafe_b64encode(pairs).decode(), "x")
    assert len(str(told.value)) < 3000
    lists = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    lists += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    (native / "config.yaml").write_text(f"{lists}model:\n  d_model: *a9\n  n_heads: 4\n")
    with pytest.raises(ConfigError, match=r"model\.d_model is \[\["):
        olmo_native.read_config(native)


def test_a_pickle_cannot_ask_for_memory():
    claims = [
        b"\x80\x02K\x01r\xff\xff\xff\x00.",  # an entry of the memo with sixteen million before it
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 27) + b"x.",  # text, bytes and a number, longer than the file
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 27) + b"x.",
        b"\x80\x02\x8b" + struct.pack("<i", 1 << 27) + b"x.",
    ]
    tracemalloc.start()
    for data in claims:
        with contextlib.suppress(CheckpointError):
            assert pickles.unpickle(data, "x") == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "", "."])
def test_a_relative_path_that_leads_outside_is_refused(tmp_path, core, path):
    pytest.importorskip("torch")
    folder = core / "model_and_optim"
    shutil.copy(folder / "__0_0.distcp", core / "secret")
    shutil.rmtree(folder)
    sharded.write_distributed(folder, [LazyTensor("a", FLOAT, (2,), lambda: np.zeros(2, FLOAT))], "model")
    assert sharded.read_distributed(folder, "model.").keys() == {"a"}
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="expected a path inside"):
        sharded.read_distributed(folder, "model.")


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, -1])
def test_a_truncated_model_pt_is_refused(tmp_path, native, keep):
    data = (native / "model.pt").read_bytes()
    (native / "model.pt").write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        olmo_native.main(native, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_an_error_of_ours_or_nothing(tmp_path, native, core, seed):
    stream = np.random.default_rng(seed)
    for module, src, name in (
        (olmo_native, native, "model.pt"),
        (olmo_core, core, "model_and_optim/.metadata"),
        (olmo_native, shutil.copytree(RANK, tmp_path / "rank"), "rank0.pt"),
    ):
        data = bytearray((src / name).read_bytes())
        # the pickle and the directory are what is parsed; the rest is numbers
        begin = max(data.find(b"data.pkl"), 0) if seed % 2 else max(len(data) - 3000, 0)
        for _ in range(8):
            data[min(begin + int(stream.integers(3000)), len(data) - 1)] = int(stream.integers(256))
        (src / name).write_bytes(data)
        with contextlib.suppress(CheckpointError, ConfigError):
            module.main(src, tmp_path / "out")


def test_a_compressed_record_is_refused(tmp_path):
    archive(tmp_path / "x.pt", dumps({"a": tensor()}), [("0", bytes(16))], zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1 << 40}, "has 16 bytes, expected"),
        ({"size": -1}, "expected a storage"),
        ({"key": "1"}, "has no record"),
        ({"key": "../0"}, "has no record"),
        ({"shape": (5,)}, "reaches value 4"),
        ({"offset": 1}, "reaches value 4"),
        ({"strides": (2,)}, "reaches value 6"),
        ({"shape": (1 << 61,)}, "reaches value"),
        ({"shape": (-4,)}, "cannot be"),
        ({"strides": (-1,)}, "cannot be"),
        ({"offset": -1}, "cannot be"),
        ({"shape": (2, 2)}, "cannot be"),
        ({"shape": (1 << 70,)}, "cannot be"),
        ({"kind": "QInt8Storage"}, "is a QInt8Storage"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path, arguments, message):
    archive(tmp_path / "x.pt", dumps({"a": tensor(**arguments)}), [("0", bytes(16))])
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize("value", [1, "text", {}, {"a": 1}, {1: tensor()}, {"a": Call(Name("torch", "load"), "x")}])
def test_what_is_no_state_dict_is_refused(tmp_path, native, value):
    archive(native / "model.pt", dumps(value), [("0", bytes(16))])
    with pytest.raises(CheckpointError):
        olmo_native.main(native, tmp_path / "out")


def test_chunks_out_of_bounds_are_refused(tmp_path, core):
    shard = max((core / "model_and_optim").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"the file at \d+: truncated"):
        olmo_core.main(core, tmp_path / "out")
    shard.unlink()
    with pytest.raises(CheckpointError, match="which is not there") as error:
        olmo_core.main(core, tmp_path / "out")
    assert str(error.value).count(shard.name) > 1, "every tensor in the missing file is named"


def test_a_slice_reads_as_a_file_of_its_own(tmp_path):
    (tmp_path / "x").write_bytes(b"abcdefghij")
    with FileSlice(tmp_path / "x", 2, 5) as window:
        assert window.read() == b"cdefg"
        assert window.seek(-2, io.SEEK_END) == 3
        assert window.read(100) == b"fg"
        assert window.read(1) == b""
        with pytest.raises(OSError, match="a position of"):
            window.seek(-1)
