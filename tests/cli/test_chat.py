"""`olmozoo chat` in a real terminal: a pseudo-terminal with a small model behind it."""

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from olmozoo import Olmo2Config, cli
from olmozoo.cli.common import printable
from olmozoo.cli.generate import _answer
from olmozoo.text.pipeline import pipeline
from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.wings import WINGS

TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve, 日本語. " * 20
CONFIG = Olmo2Config(
    vocab_size=320, hidden_size=40, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1
)  # and no token that ends an answer
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
WAIT = 90  # seconds, for frameworks to be imported and compiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("chat"), CONFIG, dtype="float32")
    train_tokenizer(folder, TEXT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


# The program takes the terminal as its own, so that control characters become signals, and then runs.
RUN = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in what a shell runs in its background, and inherited
os.execv(sys.executable, [sys.executable, "-m", "olmozoo", "chat", *sys.argv[1:]])
"""


class Terminal:
    """The program at the other end of a pseudo-terminal."""

    def __init__(self, *words):
        self.end, other = pty.openpty()
        self.program = subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, words)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), other),
            env={**os.environ, "TERM": "dumb"},  # no colours, no escape codes
            start_new_session=True,
        )
        os.close(other)
        self.text = ""

    def send(self, text):
        self.text = ""
        os.write(self.end, text.encode())

    def read(self, until, least=0, wait=WAIT):
        """All that is written from the last `send` until a pattern comes, and so many characters at least."""
        deadline = time.monotonic() + wait
        while not (re.search(until, self.text) and len(self.text) >= least):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no {until!r} in {self.text[-2000:]!r}")
            if select.select([self.end], [], [], left)[0]:
                try:
                    self.text += os.read(self.end, 65536).decode("utf-8", "replace").replace("\r\n", "\n")
                except OSError as error:  # the program is gone
                    raise AssertionError(f"no {until!r} in {self.text[-2000:]!r}, and the program ended") from error
        return self.text

    def interrupt(self, until):
        """Press Ctrl-C until a pattern comes: readline misses one that comes while it is about to wait for keys."""
        for _ in range(20):
            os.write(self.end, b"\x03")
            with contextlib.suppress(TimeoutError):
                return self.read(until, wait=2)
        raise AssertionError(f"no {until!r} in {self.text[-2000:]!r}")

    def close(self):
        self.program.kill()
        self.program.wait()
        os.close(self.end)


@pytest.fixture
def terminal():
    opened = []
    yield lambda *words: opened.append(Terminal(*words)) or opened[-1]
    for one in opened:
        one.close()


def plain(text):
    """A text as a terminal shows it, control characters escaped, by its letters alone: readline moves the cursor."""
    return re.sub(r"[^\w ]|\d", "", printable(text, "\n\t"))


@pytest.mark.parametrize("wing", WINGS)
def test_a_chat_in_a_terminal(folder, terminal, wing):
    write = pipeline("text-generation", folder, backend=wing)
    user = {"role": "user", "content": "The quick fox?"}
    first = write([user], max_new_tokens=8)
    more = {"role": "user", "content": "dog"}
    second = write([user, {"role": "assistant", "content": first}, more], max_new_tokens=8)
    alone = write([more], max_new_tokens=8)
    assert plain(second) != plain(alone)  # so that it shows whether the chat is remembered

    chat = terminal(folder, "--backend", wing, "--max-new-tokens", 8)
    assert "Ctrl-D leaves" in chat.read("> $")
    chat.send("The quick fox?\n")
    assert plain(first) in plain(chat.read("\n> $"))
    chat.send("dog\n")
    assert plain(second) in plain(chat.read("\n> $"))
    chat.send("/reset\n")
    assert "forgotten" in chat.read("\n> $")
    chat.send("dog\n")
    assert plain(alone) in plain(chat.read("\n> $"))
    chat.send("\n")
    chat.read("\n> $")
    chat.send("/help me\n")
    assert "there is no /help: /reset or /exit" in chat.read("\n> $")
    chat.send("/exit\n")
    assert chat.program.wait(WAIT) == 0


@pytest.mark.parametrize("wing", WINGS)
def test_control_c_stops_the_answer_and_control_d_leaves(folder, terminal, wing):
    chat = terminal(folder, "--backend", wing, "--max-new-tokens", 30_000, "--allow-long")
    chat.read("> $")
    chat.send("The quick fox?\n")
    chat.read("fox", least=60)  # in the middle of its answer
    started = time.monotonic()
    chat.send("")
    assert "[stopped]" in chat.interrupt(r"\n> $")
    assert time.monotonic() - started < 10  # 30,000 tokens take minutes
    chat.send("half a line")
    chat.read("half a line")  # Ctrl-C throws away keys that nobody has read yet, and readline would wait on for those
    chat.interrupt(r"\n> $")  # at the prompt it leaves the line, and the program stays
    chat.send("/reset\n")
    assert "forgotten" in chat.read(r"\n> $")
    chat.send("dog\n")
    chat.read("dog", least=60)
    chat.send("")
    chat.interrupt(r"\n> $")
    chat.send("\x04")
    assert chat.program.wait(WAIT) == 0


@pytest.mark.pt
def test_an_error_in_an_answer_leaves_the_chat_as_it_was(folder, tmp_path, terminal):
    pytest.importorskip("torch")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    strict = "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text(strict)
    chat = terminal(tmp_path, "--backend", "pt", "--system", "Be brief.")
    chat.read("> $")
    for _ in range(2):
        chat.send("dog\n")
        assert "olmozoo: the chat template failed: TemplateError: one message" in chat.read("\n> $")
    chat.send("\x04")
    assert chat.program.wait(WAIT) == 0


@pytest.mark.pt
def test_a_model_without_a_chat_template_is_refused(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(sys, "argv", ["olmozoo", "chat", str(tmp_path), "--backend", "pt"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "has no chat template, so it is no chat model" in " ".join(capsys.readouterr().err.split())


@pytest.mark.pt
def test_an_answer_keeps_the_thought_that_the_template_opens(folder, tmp_path, capsys):
    pytest.importorskip("torch")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("<a>", "<a><think>"))
    pipe = pipeline("text-generation", tmp_path, backend="pt")
    question = [{"role": "user", "content": "dog"}]
    answer = pipe(question, max_new_tokens=5)
    chat = _answer(pipe, question, 0, {"max_new_tokens": 5}, False)
    assert chat == [*question, {"role": "assistant", "content": f"<think>{answer}"}]
    assert capsys.readouterr().out == f"<think>{printable(answer, chr(10))}\n"


@pytest.mark.pt
def test_an_answer_ends_by_itself_at_the_last_position(folder, tmp_path, capsys):
    pytest.importorskip("torch")
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 24, "eos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pipe = pipeline("text-generation", tmp_path, backend="pt")
    question = [{"role": "user", "content": "dog"}]
    free = 24 - len(pipe.encode(question))
    expected = pipe(question, max_new_tokens=free)
    assert _answer(pipe, question, 0, {}, False) == [*question, {"role": "assistant", "content": expected}]
    longer = [{"role": "user", "content": "dog " * 30}]
    assert _answer(pipe, longer, 0, {}, False) == []
    assert "more than the 24 positions" in capsys.readouterr().out
