"""`prepare`: AI2's recipe byte for byte, the same folder for any number of processes, kills, memory, refusals."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from olmozoo import CheckpointError, InputError, OlmozooError, Tokenizer
from olmozoo.training import sources
from olmozoo.training.manifest import read_manifest, tokenizer_hash
from olmozoo.training.prepare import _encode, prepare, preview
from tests.helpers.training import EOS, word_tokenizer, write_bytes, write_lines, write_tokenizer

WORDS = [
    "The",
    "quick",
    "brown",
    "fox",
    "jumps",
    "Größe,",
    "naïve",
    "日本語",
    "\n",
    "user",
    "42",
    "<|endoftext|>",
    "dog.",
]
ROOT = Path(__file__).parents[2]


def some_text(stream, longest=40):
    return " ".join(stream.choice(WORDS, stream.integers(0, longest)).tolist())


def some_chats(count, seed=0):
    """Chats of odd shapes: no assistant, an assistant first, long headers, spaces around, empty contents."""
    stream = np.random.default_rng(seed)
    roles = ["system", "user", "assistant", "tool"]
    chats = []
    for _ in range(count):
        picked = stream.choice(roles, stream.integers(1, 6)).tolist()
        chats.append([{"role": role, "content": f" {some_text(stream)}\n"} for role in picked])
    return chats


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    rows = [{"dataset": "x", "id": str(n), "messages": chat} for n, chat in enumerate(some_chats(300))]
    return write_lines(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


def arrays(folder):
    manifest = read_manifest(folder)
    shape = (manifest.instances, manifest.length)
    return (
        np.memmap(folder / "input_ids.npy", manifest.dtype, "r", shape=shape),
        np.memmap(folder / "label_mask.npy", np.bool_, "r", shape=shape),
        manifest,
    )


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tulu_instance(messages, encode, eos_text, eos, pad, length):
    """One instance as prepare_tulu_data.py makes it, written again from its description; None if it is left out."""
    ids, learned = [eos], [0]
    for message in messages:
        header = encode(f"<|{message['role']}|>\n")
        text = message["content"].strip()
        if message["role"] == "assistant":
            body = encode(text + eos_text + "\n")
            flags = [1] * (len(body) - 1) + [0]
        else:
            body = encode(text + "\n")
            flags = [0] * len(body)
        ids += header + body
        learned += [0] * len(header) + flags
    ids, learned = ids[:length], learned[:length]
    missing = length - len(ids)
    return (ids + missing * [pad], learned + missing * [0]) if any(learned) else None


@pytest.mark.parametrize("length", [32, 257])
def test_tulu_is_what_ai2_writes_byte_for_byte(model, chats, tmp_path, length):
    prepare(chats, tmp_path / "out", tokenizer=model, length=length, template="tulu")
    tokenizer = Tokenizer.from_pretrained(model).backend
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    every = [tulu_instance(chat, encode, EOS, 0, 1, length) for chat in some_chats(300)]
    kept = [pair for pair in every if pair is not None]
    assert len(every) > len(kept) + 30, "some are left out"
    folder = tmp_path / "out"
    assert (folder / "input_ids.npy").read_bytes() == np.array([ids for ids, _ in kept], np.uint16).tobytes()
    assert (folder / "label_mask.npy").read_bytes() == np.array([mask for _, mask in kept], np.bool_).tobytes()
    manifest = read_manifest(folder)
    assert (manifest.dropped, manifest.instances) == (len(every) - len(kept), len(kept))
    assert manifest.targets == sum(sum(mask) for _, mask in kept)
    assert manifest.documents == {"chat": 300}
    assert (manifest.template, manifest.packing, manifest.dtype) == ("tulu", "none", "uint16")


def test_ids_above_65535_are_kept_in_uint32(tmp_path):
    tokenizer = word_tokenizer(70_000)
    rows = [{"text": "w3 w69999"}, {"text": "w65536 w65535"}]
    prepare(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out", tokenizer=tokenizer, length=6)
    ids, mask, manifest = arrays(tmp_path / "out")
    assert ids.tolist() == [[3, 69999, 0, 65536, 65535, 0]]
    assert mask.all()
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_000)
    for size, dtype in ((65_536, "uint16"), (65_537, "uint32")):
        found = prepare(tmp_path / "a.jsonl", tmp_path / dtype, tokenizer=word_tokenizer(size), length=6)
        assert found.dtype == dtype


@pytest.mark.parametrize("packing", ["none", "concat", "best-fit"])
def test_the_folder_is_the_same_for_any_number_of_processes(model, chats, tmp_path, monkeypatch, packing):
    monkeypatch.setattr(sources, "BATCH", 5000)
    monkeypatch.setattr(sources, "PART", 1000)
    stream = np.random.default_rng(3)
    prompts = [{"prompt": some_text(stream), "completion": some_text(stream)} for _ in range(99)]
    data = [
        chats,
        write_lines(tmp_path / "in/a.jsonl.gz", [{"text": some_text(stream, 900)} for _ in range(40)]),
        write_lines(tmp_path / "in/b.json.zst", prompts),
        write_bytes(tmp_path / "in/c.txt", " ".join(stream.choice(WORDS, 3000).tolist()).encode()),
    ]
    found = []
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        prepare(data, out, tokenizer=model, length=48, template="tulu", packing=packing, processes=processes)
        found.append(contents(out))
        if packing != "best-fit":
            break
    assert all(one == found[0] for one in found)
    assert set(map(str, found[0])) > {"input_ids.npy", "label_mask.npy", "manifest.json", "tokenizer/tokenizer.json"}

    # What is learned, packed or not, is what is learned of each document alone.
    ids, mask, manifest = arrays(tmp_path / "1")
    apart = prepare(data, tmp_path / "apart", tokenizer=model, length=20_000, template="tulu", packing="none")
    whole_ids, whole_mask, _ = arrays(tmp_path / "apart")
    assert apart.truncated == 0
    if packing == "concat":
        assert ids[mask].tolist() == whole_ids[whole_mask].tolist()
    if packing != "none":
        assert np.array_equal(np.sort(ids[mask]), np.sort(whole_ids[whole_mask]))
        assert manifest.tokens == apart.tokens
        assert manifest.dropped == apart.dropped
    assert (manifest.targets, manifest.instances) == (int(mask[:, 1:].sum()), len(ids))
    assert manifest.documents == {"chat": 300, "text": 41, "prompt": 99}
    assert not mask[ids == manifest.pad_token_id].any()


def test_texts_are_concatenated_and_chats_are_not(model, chats, tmp_path):
    text = write_bytes(tmp_path / "a.txt", b"The quick brown fox " * 40)
    found = prepare(text, tmp_path / "text", tokenizer=model, length=32)
    assert (found.packing, found.template, found.truncated) == ("concat", None, 0)
    assert (
        found.tokens
        == found.targets + found.instances
        == len(Tokenizer.from_pretrained(model).encode(text.read_text())) + 1
    )
    found = prepare(chats, tmp_path / "chats", tokenizer=model, length=32, template="tulu")
    assert found.packing == "none"
    assert found.truncated > 0
    found = prepare([text, chats], tmp_path / "both", tokenizer=model, length=32, template="tulu")
    assert found.packing == "concat"


def test_the_manifest_and_the_tokenizer_beside_it(model, chats, tmp_path):
    found = prepare(chats, tmp_path / "out", tokenizer=model, length=64, template="tulu", eos=5, pad=7)
    assert read_manifest(tmp_path / "out") == found
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out/tokenizer")
    assert found.tokenizer_sha256 == tokenizer_hash(tokenizer) == tokenizer_hash(Tokenizer.from_pretrained(model))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (found.eos_token_id, found.pad_token_id) == (5, 7)
    assert "assistant" in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False,
                                                        add_generation_prompt=True)  # fmt: skip
    ids, mask, _ = arrays(tmp_path / "out")
    assert (ids[:, 0] == 5).all()
    assert (ids != 7).sum() == found.tokens < ids.size
    assert not mask[ids == 7].any()
    assert found.sources == [{"path": str(chats), "bytes": chats.stat().st_size}]
    assert tokenizer_hash(word_tokenizer(30)) != tokenizer_hash(word_tokenizer(31))


def test_a_manifest_that_does_not_fit(model, chats, tmp_path):
    out = tmp_path / "out"
    prepare(chats, out, tokenizer=model, length=64, template="tulu")
    whole = json.loads((out / "manifest.json").read_text())
    for change, message in (
        ({"format": 2}, "format is 2, expected 1"),
        ({"length": "64"}, "length is '64', expected a number from 0 on"),
        ({"pad_token_id": -1}, "pad_token_id is -1, expected a number"),
        ({"targets": True}, "targets is True, expected a number"),
        ({"template": 3}, "template is 3, expected str or NoneType"),
        ({"dtype": "int64"}, "dtype is 'int64', expected uint16 or uint32"),
        ({"dtype": "uint32"}, r"input_ids.npy has [\d,]+ bytes, expected [\d,]+: manifest.json has"),
        ({"length": 32}, "input_ids.npy has"),
        ({"vocab_size": 65_537}, "dtype is uint16, too small for a vocabulary of 65537"),
    ):
        (out / "manifest.json").write_text(json.dumps(whole | change))
        with pytest.raises(CheckpointError, match=message):
            read_manifest(out)
    (out / "manifest.json").write_text(json.dumps({name: whole[name] for name in whole if name != "packing"}))
    with pytest.raises(CheckpointError, match="has no field packing"):
        read_manifest(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json is not readable JSON"):
        read_manifest(out)
    (out / "manifest.json").write_text(json.dumps(whole))
    np.save(out / "label_mask.npy", np.fromfile(out / "label_mask.npy", np.bool_))  # with the header of NumPy
    with pytest.raises(CheckpointError, match=r"label_mask.npy has"):
        read_manifest(out)
    (out / "label_mask.npy").unlink()
    with pytest.raises(CheckpointError, match=r"has no label_mask.npy"):
        read_manifest(out)
    with pytest.raises(CheckpointError, match=r"has no manifest.json: expected a folder that `olmozoo prepare` wrote"):
        read_manifest(tmp_path)


def test_what_does_not_fit_is_refused_and_nothing_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH", 10)

    def lines(name, *rows):
        return write_lines(tmp_path / name, list(rows))

    text = lines("text.jsonl", {"text": "w3 w4"})
    words = word_tokenizer()
    user = {"role": "user", "content": "hi"}
    late = {"messages": [{"role": "user", "content": "fox " * 50}, {"role": "assistant", "content": "a"}]}
    for options, message in (
        ({"length": 1}, "length is 1, expected at least 2"),
        ({"packing": "tight"}, "packing is 'tight', expected one of none, concat, best-fit"),
        ({"processes": 0}, "processes is 0, expected at least 1"),
        ({"template": "chatml"}, "template is 'chatml', expected 'tulu'"),
        ({"eos": 300}, "eos is 300, and the tokenizer has no such id"),
        ({"pad": -1}, "pad is -1, and the tokenizer has no such id"),
        ({"tokenizer": word_tokenizer(pad_token=None)}, "has no pad token: give an id as pad"),
        ({"tokenizer": word_tokenizer(eos_token=None)}, "has no eos token: give an id as eos"),
        ({"tokenizer": word_tokenizer(pad_token="<eos>")}, r"the tokenizer's pad is its eos, 0 \('<eos>'\)"),
        ({"data": write_bytes(tmp_path / "empty.txt", b"")}, r"nothing to learn in .*empty.txt \(1 of kind text\)"),
        ({"data": write_bytes(tmp_path / "blank.jsonl", b"\n \n")}, "there are no documents in .*blank.jsonl"),
        (
            {"data": lines("a.jsonl", {"messages": [user]}), "tokenizer": model, "template": "tulu"},
            "nothing to learn in",
        ),
        ({"data": lines("b.jsonl", late), "tokenizer": model, "template": "tulu"}, "among the first 8 tokens"),
        (
            {"data": lines("c.jsonl", {"text": "w3"}, {"body": "w3"}), "processes": 2},
            r"c.jsonl:2: an object with 'body'",
        ),
        ({"data": [text, tmp_path / "none.jsonl"]}, "there is no file .*none.jsonl"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(**{"data": text, "out": tmp_path / "out", "tokenizer": words, "length": 8, **options})
        assert not list(tmp_path.glob("*out*")), message
    found = prepare(text, tmp_path / "out", tokenizer=word_tokenizer(pad_token=None), length=8, pad=0)
    assert (found.eos_token_id, found.pad_token_id) == (0, 0)
    ids, mask, _ = arrays(tmp_path / "out")
    assert ids.tolist() == [[3, 4, 0, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[True] * 3 + [False] * 5]


def test_a_folder_that_holds_something_is_replaced_only_if_asked(model, chats, tmp_path):
    out = tmp_path / "out"
    options = {"tokenizer": model, "template": "tulu"}
    prepare(chats, out, length=64, **options)
    (out / "notes.md").write_text("kept")
    before = contents(out)
    with pytest.raises(InputError, match=r"out holds something already: .*force=True"):
        prepare(chats, out, length=32, **options)
    assert contents(out) == before
    with pytest.raises(InputError, match="nothing to learn"):
        prepare(write_bytes(tmp_path / "empty.txt", b""), out, length=32, force=True, **options)
    assert contents(out) == before
    prepare(chats, out, length=32, force=True, **options)
    assert read_manifest(out).length == 32
    assert (out / "notes.md").read_text() == "kept"
    (tmp_path / "new").mkdir()
    prepare(chats, tmp_path / "new", length=32, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "new", "empty.txt"}


def test_the_tokenizer_given_is_not_changed(chats, model, tmp_path):
    tokenizer = Tokenizer.from_pretrained(model)
    prepare(chats, tmp_path / "out", tokenizer=tokenizer, length=32, template="tulu", pad=9)
    assert (tokenizer.pad_token_id, tokenizer.chat_templates) == (1, {})


def test_preview_is_the_beginning_of_what_is_written(model, chats, tmp_path):
    for packing in ("none", "concat", "best-fit"):
        options = {"tokenizer": model, "length": 40, "template": "tulu", "packing": packing}
        found = preview(chats, **options, count=5)
        assert list(tmp_path.glob("*")) == []
        prepare(chats, tmp_path / packing / "out", **options)
        ids, mask, _ = arrays(tmp_path / packing / "out")
        assert [one.ids.tolist() for one in found] == ids[:5].tolist()
        assert [one.mask.tolist() for one in found] == mask[:5].tolist()
        assert all((one.ids[one.tokens :] == 1).all() and one.ids[one.tokens - 1] != 1 for one in found)
        (tmp_path / packing).rename(tmp_path.with_name(f"{tmp_path.name}-{packing}"))
    with pytest.raises(InputError, match="preview is 0, expected at least 1"):
        preview(chats, tokenizer=model, length=8, template="tulu", count=0)
    with pytest.raises(InputError, match="nothing to learn"):
        preview(write_bytes(tmp_path / "a.txt", b""), tokenizer=model, length=8)


def test_progress_ends_at_the_size_of_the_files(model, chats, tmp_path):
    calls = []
    prepare(
        chats, tmp_path / "out", tokenizer=model, length=32, template="tulu", progress=lambda *call: calls.append(call)
    )
    assert calls[-1] == (chats.stat().st_size,) * 2


# ------------------------------------------------------------------------------------------------------------ processes


def test_a_process_that_dies_is_reported():
    dies = functools.partial(eval, "__import__('os')._exit(1)")  # called with the records
    with pytest.raises(OlmozooError, match="a process that tokenizes ended: use fewer processes if memory is short"):
        list(_encode([({}, 0)], dies, 2))


PREPARE = """
import sys
from pathlib import Path
from olmozoo.training.prepare import prepare
from tests.helpers.training import word_tokenizer
def peak():  # ru_maxrss would be that of the process before, if it was larger
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
if __name__ == "__main__":
    small, large, out, packing, processes = sys.argv[1:]
    options = dict(tokenizer=word_tokenizer(), length=64, packing=packing, processes=int(processes))
    try:
        for _ in range(2):
            prepare(small, out, force=True, **options)
        before = peak()
        found = prepare(large, out, force=True, **options)
        print(before, peak(), found.tokens)
    finally:
        Path(out).with_name("peak").write_text(str(peak()))
"""


def start(*words, program=PREPARE, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    file = Path(words[0])
    file.write_text(program)
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment, text=True, stdout=subprocess.PIPE, **options
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "packing"), [("a.jsonl", "concat"), ("a.txt.gz", "none")])
def test_memory_is_bounded(tmp_path, name, packing):
    """100 MB of lines, most of which is in a field that is not read; and a text of 8 MB."""
    lines = name == "a.jsonl"
    line = json.dumps({"text": "w3 " * 100, "html": "x" * 20_000}) + "\n" if lines else "x" * 10_000 + " w3\n"
    small, large = (
        write_bytes(tmp_path / f"{count}-{name}", line.encode() * count)
        for count in ((500, 5000) if lines else (200, 800))
    )
    process = start(tmp_path / "run.py", small, large, tmp_path / "out", packing, 1)
    before, after, tokens = map(int, process.communicate()[0].split())
    print(f"{before} MB, then {after} MB")
    assert tokens == (5000 * 101 if lines else 64)
    assert after - before < (30 if lines else 8)


def test_a_line_that_decompresses_to_far_more_is_not_held(tmp_path):
    bomb = write_bytes(tmp_path / "a.jsonl.zst", b"x" * 300_000_000)
    program = PREPARE.replace(
        "    small,", "    from olmozoo.training import sources; sources.LONGEST_LINE = 10**6\n    small,"
    )
    process = start(
        tmp_path / "run.py", bomb, bomb, tmp_path / "out", "none", 1, stderr=subprocess.PIPE, program=program
    )
    assert "a.jsonl.zst:1: more than 1,000,000 bytes" in process.communicate()[1]
    print(peak := int((tmp_path / "peak").read_text()), "MB")
    assert peak < 150


def working(process, folder):
    """The processes that one has started, once it has written some and they do not answer to Ctrl-C."""
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
        if sum(path.stat().st_size for path in folder.glob(".out.saving-*/input_ids.npy")) == 0:
            continue
        found = [Path(f"/proc/{child}/status") for child in children.read_text().split()]
        ignored = [int(re.search(r"SigIgn:\s*(\w+)", status.read_text())[1], 16) for status in found]
        if len(found) >= 2 and all(mask >> (signal.SIGINT - 1) & 1 for mask in ignored):
            return found


def wait_for(workers):
    """Wait until processes have ended."""
    deadline = time.monotonic() + 60
    while workers:
        assert time.monotonic() < deadline, "the processes that tokenize end with the one that started them"
        time.sleep(0.01)
        workers = [status for status in workers if status.exists() and "State:\tZ" not in status.read_text()]


@pytest.fixture
def interrupted(tmp_path):
    """A process, those that it has started, and the folder that it is writing."""
    row = json.dumps({"text": "w3 " * 3000}).encode() + b"\n"
    large = write_bytes(tmp_path / "large.jsonl", row * 6000)
    options = {"stderr": subprocess.PIPE, "start_new_session": True}
    with start(tmp_path / "run.py", large, large, tmp_path / "out", "concat", 2, **options) as process:
        yield process, working(process, tmp_path), tmp_path / "out"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_kill_leaves_nothing_that_looks_whole_and_no_process(interrupted, tmp_path):
    process, workers, out = interrupted
    process.kill()
    process.wait()
    assert not out.exists()
    wait_for(workers)
    small = write_lines(tmp_path / "small.jsonl", [{"text": "w3 " * 3000}])
    prepare(small, out, tokenizer=word_tokenizer(), length=64)
    assert read_manifest(out).tokens == 3001
    assert list(tmp_path.glob(".out*")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupt_ends_all_and_leaves_nothing(interrupted, tmp_path):
    process, workers, _ = interrupted
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    errors = process.communicate()[1]
    assert process.returncode != 0
    assert errors.count("Traceback") == 1
    assert "KeyboardInterrupt" in errors
    assert not list(tmp_path.glob("*out*"))
    wait_for(workers)
