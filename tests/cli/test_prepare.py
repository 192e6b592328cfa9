"""`olmozoo prepare`: what it prints, on a terminal and into a pipe, and how it refuses."""

import io
import re
import sys

import numpy as np
import pytest
from rich.console import Console

from olmozoo import cli
from olmozoo.cli import instances
from olmozoo.training.manifest import read_manifest
from tests.helpers.training import write_lines, write_tokenizer

CHAT = [{"role": "user", "content": "The quick\x1b[31m\\n [日本]"}, {"role": "assistant", "content": "Größe\nfox"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def chats(tmp_path):
    return write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 5)


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `olmozoo prepare` in this process: what it writes, or its error where it fails."""

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["olmozoo", "prepare", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        assert ended.value.code == code, written.err
        return " ".join(written.err.split()) if code == 2 else written.out

    return run


@pytest.fixture
def console(monkeypatch):
    """Gives `out` colours or none; returns the text that is written to it."""

    def replace(colors):
        text = io.StringIO()
        options = {"force_terminal": True, "color_system": "standard"} if colors else {}
        monkeypatch.setattr(instances, "out", Console(file=text, width=80, **options))
        return text

    return replace


def test_it_writes_the_folder_and_says_what_it_has(command, model, chats, tmp_path):
    (tmp_path / "more").mkdir()
    write_lines(tmp_path / "more/a.jsonl.gz", [{"text": "fox"}])
    out = tmp_path / "out"
    words = (chats, tmp_path / "more", out, "--tokenizer", model, "--length", 48, "--template", "tulu")
    text = command(*words, "--packing", "none", "--processes", 1)
    manifest = read_manifest(out)
    assert manifest.instances == 6
    for part in (
        "5 chat, 1 text",
        "6 of 48 tokens",
        "uint16",
        "0 <|endoftext|>",
        "1 <|padding|>",
        f"{manifest.targets}",
    ):
        assert part in text, part
    assert text.endswith(f"{out}\n")
    ids = np.fromfile(out / "input_ids.npy", np.uint16).reshape(6, 48)
    text = command(*words, "--packing", "best-fit", "--eos", 5, "--pad", 6, "--force", "--processes", 2)
    again = np.fromfile(out / "input_ids.npy", np.uint16).reshape(-1, 48)
    assert ids[0, 0] == 0
    assert again[0, 0] == 5
    assert again[-1, -1] == 6


def test_a_preview_in_a_pipe_marks_what_is_learned(command, console, model, chats, tmp_path):
    text = console(colors=False)
    words = ("--tokenizer", model, "--length", 70, "--template", "tulu", "--preview", 2)
    command(chats, tmp_path / "out", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"], "nothing is written"
    heading, first, *lines = text.getvalue().splitlines()
    assert "⟦learned⟧" in heading
    assert first.startswith("instance 0: ")
    body = [
        r"<|endoftext|><|user|>\n",
        r"The quick\x1b[31m\n [日本]\n",
        r"<|assistant|>\n",
        r"⟦Größe\n",
        r"fox<|endoftext|>⟧\n",
    ]
    assert lines[:5] == body
    assert lines[5].startswith("<|padding|> x ")
    assert int(lines[5].split()[-1]) == int(first.split()[-3])
    assert lines[6].startswith("instance 1: ")
    assert lines[7:12] == body
    assert len(lines) == 13


def test_a_preview_on_a_terminal_is_in_colours(command, console, model, chats, tmp_path):
    text = console(colors=True)
    command(chats, tmp_path / "out", "--tokenizer", model, "--length", 70, "--template", "tulu", "--preview", 1)
    found = text.getvalue()
    styled = {}
    for style, content in re.findall("\x1b\\[([0-9;]*)m(.*?)\x1b\\[0m", found):
        styled.setdefault(style, []).append(content)
    green = re.findall("\x1b\\[(?:4;)?32m(.*?)\x1b\\[0m", found)
    assert "".join(green) == r"learnedGröße\nfox<|endoftext|>"
    assert set(styled) == {"1", "2", "2;4", "32", "4;32", "2;31"}, "every other token is underlined"
    assert abs(len(styled["32"]) - len(styled["4;32"])) <= 2
    assert r"\x1b" in "".join(styled["2"] + styled["2;4"])
    assert styled["2;31"][-1].startswith("<|padding|> x ")
    assert "⟦" not in found


def test_errors_speak_of_options(command, model, chats, tmp_path):
    out = tmp_path / "out"
    options = ("--tokenizer", model, "--length", 48)
    assert command(chats, out, *options, code=2).endswith(
        "chats.jsonl:1: a chat, and the tokenizer has no chat template of its own: use --template tulu"
    )
    tulu = (*options, "--template", "tulu")
    assert "olmozoo: --length is 1, expected" in command(chats, out, *options[:2], "--length", 1, code=2)
    assert "olmozoo: --packing is 'x', expected" in command(chats, out, *tulu, "--packing", "x", code=2)
    assert "olmozoo: --pad is 999, and" in command(chats, out, *tulu, "--pad", 999, code=2)
    assert "Give another id with --pad" in command(chats, out, *tulu, "--eos", 1, code=2)
    assert not out.exists()
    command(chats, out, *tulu, "--processes", 1)
    assert "or replace it with --force" in command(chats, out, *tulu, code=2)
    write_lines(tmp_path / "bad.jsonl", [{"\x1b[31m": 1}])
    assert r"bad.jsonl:1: an object with '\x1b[31m', expected text" in command(tmp_path / "bad.jsonl", out, *options,
                                                                                "--force", code=2)  # fmt: skip
