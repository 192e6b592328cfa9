"""The commands: what they print, on a terminal and into a pipe, and how they refuse."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from olmozoo import Olmo2Config, __version__, cli
from olmozoo.cli import common, in_options
from tests.helpers.checkpoints import random_values, train_tokenizer, write_checkpoint

CONFIG = Olmo2Config(
    vocab_size=320, hidden_size=40, intermediate_size=36, num_hidden_layers=1, num_attention_heads=4, pad_token_id=1
)
LONG = "model.layers.0.post_feedforward_layernorm.weight"  # the longest name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("cli"), CONFIG, dtype="float32")
    train_tokenizer(folder, "The quick brown fox jumps over the lazy dog. " * 20)
    return folder


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `olmozoo` in this process: what it writes, or its error where it fails."""

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["olmozoo", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        assert ended.value.code == code, written.err
        return " ".join(written.err.split()) if code == 2 else written.out

    return run


def test_the_version(command):
    assert command("--version") == f"olmozoo {__version__}\n"


# -- info -------------------------------------------------------------------------------------------------------------


def test_info_of_a_preset(command, tmp_path, monkeypatch):
    text = command("info", "olmo2-7b")
    assert "7,298,617,344" in text
    assert "11008" in text
    monkeypatch.chdir(tmp_path)
    CONFIG.save_pretrained(tmp_path / "olmo2-7b")
    assert "320" in command("info", "olmo2-7b"), "a folder of that name wins"


def test_info_as_json(command, folder):
    found = json.loads(command("info", folder, "--json"))
    assert found["config"] == Olmo2Config.from_pretrained(folder).to_dict()
    total = sum(CONFIG.count_parameters().values())
    assert found["parameters"] == {**CONFIG.count_parameters(), "total": total, "active": total}
    assert found["memory"]["bfloat16"] == {
        "weights": 2 * found["parameters"]["total"],
        "cache_per_token": 2 * 2 * CONFIG.num_hidden_layers * CONFIG.hidden_size,
    }


# -- diff -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path):
    from olmozoo.checkpoint import save_checkpoint

    save_checkpoint(
        tmp_path / "b",
        CONFIG,
        "causal_lm",
        read=lambda p: (random_values(p) + (p.name == LONG)).astype("float32"),
        dtype=lambda p: "float32",
    )
    return tmp_path / "b"


def test_diff_never_cuts_names_and_has_no_columns_of_zeros(command, folder, changed, monkeypatch):
    for width, terminal in ((80, True), (30, True), (80, False)):
        console = Console(width=width, force_terminal=terminal, color_system=None, file=(text := io.StringIO()))
        monkeypatch.setattr(common, "out", console)
        monkeypatch.setattr(common, "Console", lambda width, to=text: Console(width=width, file=to, color_system=None))
        command("diff", folder, changed, code=1)
        assert LONG in text.getvalue(), width
        assert "40 (100.0%)" in " ".join(text.getvalue().split()) or width == 30
        assert "NaN" not in text.getvalue()


def test_diff_counts_nan_where_there_is_one(command, folder, tmp_path):
    import numpy as np

    from olmozoo.checkpoint import save_checkpoint

    values = {p.name: random_values(p).astype("float32") for p in CONFIG.parameters("causal_lm")}
    values[LONG][3] = np.nan
    save_checkpoint(tmp_path / "b", CONFIG, "causal_lm", read=lambda p: values[p.name], dtype=lambda p: "float32")
    text = command("diff", folder, tmp_path / "b", code=1)
    assert "NaN A/B" in text
    assert "0/1" in text
    assert "inf" not in text


# -- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.pt
def test_evaluate_reads_standard_input(command, folder, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    options = ("--backend", "pt", "--device", "cpu", "--json")
    (tmp_path / "a.txt").write_text("The quick brown fox")
    (tmp_path / "a.jsonl").write_text('{"text": "The quick"}\n{"text": "lazy dog"}\n')
    for name, more in (("a.txt", ()), ("a.jsonl", ("--jsonl",))):
        expected = json.loads(command("evaluate", folder, tmp_path / name, *options))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / name).read_bytes())))
        assert json.loads(command("evaluate", folder, "-", *more, *options)) == expected


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.pt
def test_errors_are_in_the_words_of_the_command_line(command, folder):
    pytest.importorskip("torch")
    words = ("generate", folder, "x", "--backend", "pt")
    assert "--top-k is -1" in command(*words, "--top-k", -1, code=2)
    assert "--temperature is -1.0" in command(*words, "--temperature", -1, code=2)
    assert "--device is 'abacus'" in command(*words, "--device", "abacus", code=2)
    assert "--backend is 'torch', expected one of pt, tf, flax" in command(
        "generate", folder, "x", "--backend", "torch", code=2
    )
    assert in_options("no default chat template: give one as chat_template").endswith("give prompts without messages")
    assert in_options("top_p is 2 with do_sample=False") == "--top-p is 2 with --no-sample"


@pytest.mark.pt
def test_a_folder_that_is_not_there_is_said_first(command, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert command("generate", "nope", "x", code=2).startswith("olmozoo: there is no folder 'nope', ")


def test_a_backend_that_is_not_installed_names_its_extra(folder):
    for name in ("jax", "flax"):
        code = (
            f"import sys; sys.modules[{name!r}] = None; sys.argv = ['olmozoo', 'generate', {str(folder)!r}, 'x', "
            "'--backend', 'flax']\nfrom olmozoo.cli import main; main()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 2
        assert "pip install 'olmozoo[flax]'" in done.stderr


# -- standard error ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "words"),
    [
        ("tensorflow", ["convert", "{folder}", "{new}", "--to", "savedmodel"]),
        ("orbax", ["convert", "{folder}", "{new}", "--to", "orbax"]),
        ("torch", ["evaluate", "{folder}", "{text}", "--backend", "pt"]),
    ],
    ids=["savedmodel", "orbax", "evaluate"],
)
def test_frameworks_write_nothing_to_standard_error(folder, tmp_path, framework, words):
    pytest.importorskip(framework)
    (tmp_path / "t.txt").write_text("The quick brown fox")
    words = [word.format(folder=folder, new=tmp_path / "new", text=tmp_path / "t.txt") for word in words]
    done = subprocess.run([sys.executable, "-m", "olmozoo", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_in_panels(command):
    text = command("generate", "--help")
    assert [name for name in ("Model", "Output", "Sampling", "Beam search") if f"─ {name} ─" in text] == [
        "Model", "Output", "Sampling", "Beam search",
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_control_characters_are_escaped_where_a_person_reads_them(monkeypatch):
    text = "a\x1b[2J\x9b\x7f\r\u202e\ud800 é中\tb\n"
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        monkeypatch.setattr(sys, "stdout", stream)
        common.write(text)
    assert terminal.getvalue() == "a\\x1b[2J\\x9b\\x7f\\r\\u202e\\ud800 é中\tb\n"
    assert pipe.getvalue() == text


def test_tables_and_errors_escape_control_characters(command, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({**Olmo2Config().to_dict(), "x\x1b[2J": "y\x1b[2J\n"}))
    written = command("info", tmp_path)
    assert "\x1b" not in written
    assert "x\\x1b[2J" in written
    assert "y\\x1b[2J\\n" in written
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "\x1b[2J"}))
    assert "\x1b" not in command("info", tmp_path, code=2)


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.pt
def test_json_lines_on_standard_input(command, folder, monkeypatch):
    pytest.importorskip("torch")
    lines = '{"prompt": "The quick"}\n\n{"prompt": "lazy dog"}\n'
    for words in (["--jsonl"], ["--file", "-", "--jsonl"], ["-", "--jsonl"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        answers = command("generate", folder, *words, "--json", "--max-new-tokens", 2).splitlines()
        assert [json.loads(answer)["prompt"] for answer in answers] == ["The quick", "lazy dog"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    assert "standard input:1: not JSON" in command("generate", folder, "--jsonl", code=2)
    assert "--jsonl is for --file and standard input" in command("generate", folder, "x", "--jsonl", code=2)


@pytest.mark.pt
@pytest.mark.filterwarnings("ignore:.*max_position_embeddings")
def test_a_text_past_the_trained_positions_is_refused_unless_allowed(command, tmp_path):
    pytest.importorskip("torch")
    write_checkpoint(tmp_path, CONFIG.replace(max_position_embeddings=16), dtype="float32")
    train_tokenizer(tmp_path, "The quick brown fox jumps over the lazy dog. " * 20)
    error = command("generate", tmp_path, "The quick", "--max-new-tokens", 3000, code=2)
    assert "--max-new-tokens 3,000 are more than the 16 positions" in error
    assert "--allow-long" in error
    assert command("generate", tmp_path, "The quick", "--max-new-tokens", 20, "--allow-long").startswith("The quick")


# -- quantization -----------------------------------------------------------------------------------------------------


def test_quantization_is_an_option_of_the_commands(command, folder, tmp_path):
    four = ("--quantization", "int4", "--group-size", "4")
    command("convert", folder, tmp_path / "q", "--to", "safetensors", *four)
    text = tmp_path / "a.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    scores = [
        json.loads(command("evaluate", *words, text, "--json"))["perplexity"]
        for words in ([folder], [folder, *four], [tmp_path / "q"], [tmp_path / "q", "--quantization", "none"])
    ]
    assert scores[0] != scores[1] == pytest.approx(scores[2], rel=1e-6) == pytest.approx(scores[3], rel=1e-6)
    prompt = ("The quick", "--max-new-tokens", "4")
    assert command("generate", folder, *prompt, *four) == command("generate", tmp_path / "q", *prompt)
    found = command("verify", folder, "--against", folder, "--quantization", "int8", "--dtype", "float32", code=1)
    assert "layer 1" in found
    assert "group_size 8 does not divide every layer" in command(
        "generate", folder, *prompt, "--quantization", "int4", "--group-size", "8", code=2
    )
