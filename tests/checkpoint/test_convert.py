"""Checkpoint folders from any format to any other."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import olmozoo
from olmozoo import CheckpointError, InputError
from olmozoo.checkpoint.convert import convert_checkpoint, head_of
from olmozoo.checkpoint.formats import WRITABLE, safetensors
from olmozoo.checkpoint.formats.orbax import AT_ONCE
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.tensors import PART, dtype_of
from olmozoo.checkpoint.writer import save_checkpoint
from tests.helpers.checkpoints import left_padded, random_values, write_checkpoint
from tests.helpers.formats import CONFIGS, MODELS, answer, copy_of, model_of, needs, tree


@pytest.mark.parametrize("to", [name for name in WRITABLE if name != "savedmodel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_format_and_back_is_byte_identical(tmp_path, to, dtype):
    needs(to)
    there = tmp_path / "a %41 #?é"
    for family, head in MODELS:
        source = write_checkpoint(tmp_path / "source", CONFIGS[family], head, dtype=dtype_of(dtype))
        convert_checkpoint(source, there, to=to, verify=True, force=True)
        assert (there / "model.safetensors").exists() == (to == "safetensors")
        assert head_of(CONFIGS[family], Checkpoint(there)) == head
        convert_checkpoint(there, tmp_path / "back", to="safetensors", force=True)
        assert tree(tmp_path / "back") == tree(source)


def test_a_mixture_of_half_dtypes_keeps_each_where_it_can(tmp_path):
    pytest.importorskip("h5py")
    source = tmp_path / "source"
    config = CONFIGS["olmo2"]
    kinds = {"norm": dtype_of("float16"), "linear": dtype_of("bfloat16")}
    save_checkpoint(
        source,
        config,
        "causal_lm",
        read=lambda p: random_values(p).astype(kinds.get(p.kind, kinds["linear"])),
        dtype=lambda p: kinds.get(p.kind, kinds["linear"]),
    )
    assert json.loads((source / "config.json").read_text())["dtype"] == "float32"
    convert_checkpoint(source, tmp_path / "there", to="flax-msgpack", verify=True)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
    assert tree(tmp_path / "back") == tree(source)
    convert_checkpoint(source, tmp_path / "keras", to="keras-weights", verify=True)
    there = Checkpoint(tmp_path / "keras")
    assert {tensor.dtype.name for tensor in there.tensors.values()} == {"float32"}
    for name in there.tensors:
        assert np.array_equal(there[name], Checkpoint(source)[name].astype(np.float32))


@pytest.mark.parametrize("architectures", [["Olmo2Model"], 7, None])
def test_a_head_that_the_config_does_not_name_is_not_lost(tmp_path, architectures):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    convert_checkpoint(source, tmp_path / "there", to="safetensors")
    assert set(Checkpoint(tmp_path / "there").tensors) == set(Checkpoint(source).tensors)


@pytest.mark.parametrize("to", ["safetensors", "pt-bin", "flax-msgpack"])
def test_shards(tmp_path, to):
    needs(to)
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to=to, max_shard_size="9KB", verify=True)
    shards = [path for path in (tmp_path / "there").iterdir() if "-of-" in path.name]
    assert len(shards) > 2
    assert all(shard.stat().st_size < 9000 + 4096 for shard in shards)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
    assert tree(tmp_path / "back") == tree(source)


def test_settings_and_tokenizer_come_along_and_old_ones_go(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    target = write_checkpoint(tmp_path / "target", CONFIGS["opt"], dtype="float32", max_shard_size="4KB")
    (target / "generation_config.json").write_text('{"top_k": 7}')
    (target / "notes.txt").write_text("kept")
    (source / "tokenizer.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    convert_checkpoint(source, target, to="flax-msgpack", force=True)
    assert sorted(tree(target)) == [
        "additional_chat_templates/tools.jinja",
        "config.json",
        "flax_model.msgpack",
        "notes.txt",
        "tokenizer.json",
    ]
    (source / "generation_config.json").write_text('{"top_k": 9}')
    (source / "tokenizer.json").rename(source / "vocab.json")  # of another kind: what stays of the old would be read
    convert_checkpoint(source, target, to="safetensors", force=True)
    assert sorted(set(tree(target)) & {"tokenizer.json", "vocab.json", "notes.txt"}) == ["notes.txt", "vocab.json"]
    assert json.loads((target / "generation_config.json").read_text()) == {"top_k": 9}


@pytest.mark.parametrize("held", ["model.safetensors", "flax_model-00001-of-00002.msgpack", "model.keras", "orbax"])
def test_weights_are_replaced_only_where_that_is_asked_for(tmp_path, held):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    before = tree(source)
    for target in (source, tmp_path, tmp_path / "x" / ".." / "source"):
        for force in (False, True):
            with pytest.raises(InputError, match="is or contains the source"):
                convert_checkpoint(source, target, to="safetensors", dtype="bfloat16", force=force)
    assert tree(source) == before
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("kept")
    convert_checkpoint(source, target, to="safetensors")
    (target / "model.safetensors").unlink()
    (target / held).write_bytes(b"precious")
    with pytest.raises(InputError, match=f"has weights already: {held}; .* force=True"):
        convert_checkpoint(source, target, to="pt-bin")
    assert (target / held).read_bytes() == b"precious"
    done = run(source, target, "--to", "pt-bin")
    assert done.returncode == 2
    assert "has weights already" in done.stderr
    assert done.stderr.strip().endswith("--force")
    assert run(source, target, "--to", "pt-bin", "--force").returncode == 0
    assert not (target / held).exists()
    assert (target / "notes.txt").exists()


def test_a_cast_is_named_in_the_config_and_never_overflows(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    convert_checkpoint(source, tmp_path / "half", to="safetensors", dtype="bfloat16", verify=True)
    assert Checkpoint(tmp_path / "half").dtype == dtype_of("bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    for parameter in CONFIGS["olmo2"].parameters("causal_lm"):
        expected = random_values(parameter).astype(np.float32).astype(dtype_of("bfloat16"))
        assert Checkpoint(tmp_path / "half")[parameter.name].tobytes() == expected.tobytes()
    big = tmp_path / "big"
    olmozoo.checkpoint.save_checkpoint(
        big,
        CONFIGS["olmo2"],
        "causal_lm",
        read=lambda p: np.full(p.shape, 1e6, np.float32),
        dtype=lambda p: "float32",
    )
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight has 1224 value\(s\) too large for float16"):
        convert_checkpoint(big, tmp_path / "never", to="safetensors", dtype="float16")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("back", [1, 3_000_000])
def test_what_was_written_wrong_is_found_and_not_renamed_into_place(tmp_path, monkeypatch, back):
    config = CONFIGS["olmo2"].replace(vocab_size=40_000)
    source = write_checkpoint(tmp_path / "source", config, dtype="float32")
    assert config.vocab_size * config.hidden_size * 4 > 3_000_000 > 2 * PART, "compared in several parts"
    target = write_checkpoint(tmp_path / "target", CONFIGS["opt"], dtype="float32")
    before = tree(target)

    def spoil(path, tensors):
        safetensors.write(path, tensors)
        with path.open("r+b") as stream:
            stream.seek(-1 if back == 1 else -back, os.SEEK_END)
            stream.write(b"\x77")

    monkeypatch.setitem(WRITABLE, "safetensors", dataclasses.replace(WRITABLE["safetensors"], write=spoil))
    with pytest.raises(CheckpointError, match=r"differs from what was read: 1 problem\(s\)\n  - .* differs"):
        convert_checkpoint(source, target, to="safetensors", verify=True, force=True)
    assert tree(target) == before


@pytest.mark.parametrize("to", ["safetensors", "pt-bin"])
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_loads_it(tmp_path, family, to):
    transformers = pytest.importorskip("transformers")
    import torch

    source = write_checkpoint(tmp_path / "source", CONFIGS[family], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to=to, max_shard_size="9KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there").eval()
    ids, mask = left_padded(CONFIGS[family])
    with torch.inference_mode():
        logits = theirs(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    expected = answer("pt", model_of("pt", family, "causal_lm", source), CONFIGS[family])
    assert np.abs(logits[mask.astype(bool)] - expected).max() < 2e-5


PEAK = """
import os, re, sys
from olmozoo.checkpoint.convert import convert_checkpoint
peaks = []
for source in sys.argv[4:]:
    there = os.path.join(sys.argv[3], os.path.basename(source))
    convert_checkpoint(source, there, to=sys.argv[1], max_shard_size="25MB", dtype=sys.argv[2])
    with open("/proc/self/status") as status:  # ru_maxrss would be that of the parent process at least
        peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) * 1024)
print(peaks[1] - peaks[0])
"""


LARGE = CONFIGS["olmo2"].replace(hidden_size=768, intermediate_size=4096, num_hidden_layers=8, vocab_size=64)


@pytest.fixture(scope="module")
def small_and_large(tmp_path_factory):
    """A folder with a small and a large checkpoint of bfloat16."""
    root = tmp_path_factory.mktemp("sizes")
    for name, config in (("small", CONFIGS["olmo2"]), ("large", LARGE)):
        write_checkpoint(root / name, config, dtype="bfloat16")
    yield root
    shutil.rmtree(root)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("to", ["safetensors", "pt-bin", "flax-msgpack", "orbax"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])  # that of the source, and a cast
def test_memory_is_bounded_by_a_shard_or_a_few_tensors(small_and_large, tmp_path, to, dtype):
    needs(to)
    arguments = (to, dtype, tmp_path, small_and_large / "small", small_and_large / "large")
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    sizes = [parameter.size * dtype_of(dtype).itemsize for parameter in LARGE.parameters("causal_lm")]
    # Orbax keeps each of the arrays that are written together, and what it encodes and buffers of them.
    arrays = 4 * AT_ONCE * max(sizes) if to == "orbax" else 25_000_000 + 2 * max(sizes)
    bound = arrays + 30_000_000  # for what libraries allocate
    assert int(done.stdout) < bound < 0.75 * sum(sizes)


@pytest.mark.parametrize("to", ["safetensors", "pt-bin", "keras", "keras-weights", "flax-msgpack", "orbax"])
def test_a_disk_that_takes_no_more_leaves_the_old_folder(tmp_path, to):
    needs(to)
    config = CONFIGS["olmo2"].replace(vocab_size=5000)
    source = write_checkpoint(tmp_path / "source", config, dtype="float32")
    target = write_checkpoint(tmp_path / "target", CONFIGS["opt"], dtype="float32")
    before = tree(target)
    code = (
        "import resource, signal, sys\n"
        "from olmozoo.checkpoint.convert import convert_checkpoint\n"
        "from olmozoo import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try: convert_checkpoint(sys.argv[1], sys.argv[2], to=sys.argv[3], force=True)\n"
        "except CheckpointError as error: print('told:', error)"
    )
    done = subprocess.run([sys.executable, "-c", code, source, target, to], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("told:"), done.stderr
    assert tree(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("to", ["safetensors", "pt-bin", "flax-msgpack"])
def test_a_full_disk_is_called_so(tmp_path, to):
    needs(to)
    source = write_checkpoint(tmp_path / "source", CONFIGS["opt"], dtype="float32")
    code = (
        "import resource, signal, sys\n"
        "from olmozoo import CheckpointError\n"
        "from olmozoo.checkpoint import atomic\n"
        "from olmozoo.checkpoint.convert import convert_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))\n"
        "atomic.FULL = (*atomic.FULL, 27)  # EFBIG, since a test cannot fill a disk\n"
        "try: convert_checkpoint(sys.argv[1], sys.argv[2], to=sys.argv[3], force=True)\n"
        "except CheckpointError as error: print(error)"
    )
    command = [sys.executable, "-c", code, source, tmp_path / "there", to]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "was not saved and is unchanged: the disk is full" in done.stdout, done.stderr
    assert not (tmp_path / "there").exists()


def test_a_conversion_that_is_killed_leaves_the_old_folder_and_the_next_one_clears_up(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    target = write_checkpoint(tmp_path / "target", CONFIGS["opt"], dtype="float32")
    before = tree(target)
    code = (
        "import sys, time\n"
        "from olmozoo.checkpoint.convert import convert_checkpoint\n"
        "def stop(done, total):\n    if done > total / 2: print('half', flush=True); time.sleep(60)\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2], to='flax-msgpack', progress=stop, force=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, source, target], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    assert tree(target) == before
    convert_checkpoint(source, target, to="flax-msgpack", verify=True, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert sorted(tree(target)) == ["config.json", "flax_model.msgpack"]


@pytest.mark.parametrize("name", ["flax", "tf"])
def test_a_truncated_or_altered_file_raises_our_errors_alone(tmp_path, name):
    if name == "tf":
        pytest.importorskip("h5py")
    file = copy_of(name, tmp_path / "a")
    data = file.read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for number in range(120):
        spoiled = bytearray(data)
        if number % 2:
            spoiled = spoiled[: int(draw.integers(len(data)))]
        else:
            for place in draw.integers(0, 3000, 4):
                spoiled[place] = draw.integers(256)
        file.write_bytes(spoiled)
        try:
            checkpoint = Checkpoint(tmp_path / "a")
            for tensor in checkpoint.tensors:
                assert checkpoint[tensor].shape == checkpoint.tensors[tensor].shape
        except CheckpointError as error:
            refused += str(tmp_path / "a") in str(error)
    assert refused >= 60


@pytest.mark.parametrize("to", ["orbax", "savedmodel"])
def test_broken_folders_raise_our_errors_alone(tmp_path, to):
    needs(to)
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"].replace(num_hidden_layers=1), dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to=to)
    inner = next(path for path in (tmp_path / "there").iterdir() if path.is_dir())
    for path in sorted(path for path in inner.rglob("*") if path.is_file()):
        data = path.read_bytes()
        places = range(0, len(data), len(data) // 9 + 1)
        flipped = [data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :] for at in places]
        for spoiled in (b"", data[: len(data) // 2], bytes(len(data)), data + b"\0", *flipped):
            path.write_bytes(spoiled)
            with contextlib.suppress(CheckpointError):
                checkpoint = Checkpoint(tmp_path / "there")
                for name in checkpoint.tensors:
                    checkpoint[name]
        path.write_bytes(data)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")  # all whole again
    shutil.rmtree(inner)
    inner.mkdir()
    with pytest.raises(CheckpointError, match=inner.name):
        Checkpoint(tmp_path / "there")


@pytest.mark.parametrize(
    ("missing", "to", "named"),
    [
        ("h5py", "keras-weights", "h5py"),
        ("tensorstore", "orbax", "orbax-checkpoint"),
        ("tensorflow", "savedmodel", "tensorflow"),
        ("torch", "pt-bin", "torch"),
    ],
)
def test_an_absent_library_is_named(tmp_path, monkeypatch, missing, to, named):
    needs(to)
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    convert_checkpoint(source, tmp_path / "there", to=to)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(CheckpointError, match=rf"reading .* needs {named}: pip install {named}, or 'olmozoo\["):
        Checkpoint(tmp_path / "there")


@pytest.mark.parametrize(
    ("missing", "to"), [("flax.serialization", "flax-msgpack"), ("orbax.checkpoint", "orbax"), ("torch", "pt-bin")]
)
def test_an_absent_library_of_a_writer_is_named(tmp_path, monkeypatch, missing, to):
    needs(to)
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(CheckpointError, match=r"writing .* needs .*: pip install"):
        convert_checkpoint(source, tmp_path / "there", to=to)
    assert not (tmp_path / "there").exists()


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "olmozoo", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    done = run(source, tmp_path / "there", "--to", "flax-msgpack", "--dtype", "bfloat16", "--verify")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'there'}\n"), done.stderr
    assert Checkpoint(tmp_path / "there").dtype == dtype_of("bfloat16")
    done = run(tmp_path / "there", tmp_path / "never", "--to", "gguf")
    assert done.returncode == 2
    assert done.stderr.strip() == f"olmozoo: --to is 'gguf', expected one of {', '.join(WRITABLE)}"
    (tmp_path / "there" / "flax_model.msgpack").write_bytes(b"\x81")
    done = run(tmp_path / "there", tmp_path / "never", "--to", "safetensors")
    assert done.returncode == 2
    assert "flax_model.msgpack: 1 bytes expected" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "never").exists()


def test_importing_the_room_imports_no_framework():
    heavy = "{'torch', 'tensorflow', 'keras', 'jax', 'h5py'}"
    code = f"import sys, olmozoo.checkpoint; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
