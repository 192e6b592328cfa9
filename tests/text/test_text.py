"""Tokenizer, pipeline and the command line, on a checkpoint folder with a tokenizer trained here."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from olmozoo import CheckpointError, InputError, Olmo2Config
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.text.pipeline import pipeline
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.verify.compare import plot, verify
from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.wings import PRESENT, WINGS, several

TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve, 日本語. " * 20
CONFIG = Olmo2Config(
    vocab_size=320,  # more rows than the tokenizer has tokens, as in the published models
    hidden_size=40,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=1,
    eos_token_id=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("text"), CONFIG, dtype="float32")
    train_tokenizer(folder, TEXT)
    return folder


def command(*words, check=True):
    done = subprocess.run([sys.executable, "-m", "olmozoo", *map(str, words)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_texts_survive_and_batches_are_padded_on_the_left(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    for text in ("The quick", "naïve 日本語 Größe", "unseen: žluťoučký"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids, mask = tokenizer.batch(["The quick brown fox", "dog"])
    short = tokenizer.encode("dog")
    assert ids[1, -len(short) :].tolist() == short
    assert (ids[1, : -len(short)] == 1).all()
    assert mask.sum(1).tolist() == [ids.shape[1], len(short)]
    assert tokenizer.decode([*short, 310, 319]) == "dog"
    assert tokenizer.decode([*short, 0]) == "dog"
    assert tokenizer.decode([*short, 0], skip_special_tokens=False) == "dog<|endoftext|>"
    with pytest.raises(InputError, match="at least one text"):
        tokenizer.batch(["dog", ""])


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    write_checkpoint(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("wing", WINGS)
def test_the_pipeline_gives_the_same_text_alone_and_in_a_batch(folder, wing):
    write = pipeline("text-generation", folder, backend=wing)
    texts = ["The quick brown fox jumps over", "lazy dog"]
    together = write(texts, max_new_tokens=12)
    assert together == [write(text, max_new_tokens=12) for text in texts]
    assert all(together)
    assert not together[0].startswith(texts[0])


def test_unknown_tasks_and_backends_are_named(folder):
    with pytest.raises(InputError, match="'translation'"):
        pipeline("translation", folder)
    with pytest.raises(InputError, match=r"'mxnet'.*pt, tf, flax"):
        pipeline("text-generation", folder, backend="mxnet")


@pytest.mark.parametrize("wing", WINGS)
def test_the_command_continues_a_prompt(folder, wing):
    done = command("generate", folder, "The quick", "--backend", wing, "--max-new-tokens", 8)
    assert done.stdout.startswith("The quick")
    expected = pipeline("text-generation", folder, backend=wing)("The quick", max_new_tokens=8)
    assert done.stdout == f"The quick{expected}\n"


def test_info_needs_the_config_alone(tmp_path):
    Olmo2Config.from_preset("olmo2-32b").save_pretrained(tmp_path)
    text = command("info", tmp_path).stdout
    for part in ("32,234,279,936", "rms_norm_eps", "attention", "64.47 GB", "128.94 GB", "262.14 kB"):
        assert part in text, part


def test_help_is_quick_and_imports_no_framework():
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    bare = time.perf_counter() - started
    started = time.perf_counter()
    text = command("--help").stdout
    assert time.perf_counter() - started < 20 * bare  # a framework alone takes a hundred times as long
    assert all(name in text for name in ("generate", "info", "verify"))


def test_errors_are_one_message_and_an_exit_code(tmp_path):
    done = command("info", tmp_path, check=False)
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


@several
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_verify_agrees_in_every_dtype(folder, dtype, tmp_path):
    report = verify(folder, backends=PRESENT, dtype=dtype)
    assert report.ok
    names = ["embeddings", "layer 1", "layer 2", "logits"]
    assert [(row.backend, row.name) for row in report.rows] == [(b, n) for b in PRESENT[1:] for n in names]
    assert list(report.agreement) == PRESENT[1:]
    if dtype == "float64":
        assert all(share == 1.0 for share in report.agreement.values())
        assert 0 < max(row.largest for row in report.rows) < 1e-9
    pytest.importorskip("matplotlib")
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@several
def test_verify_sees_a_wing_that_is_wrong(folder, monkeypatch):
    from olmozoo.backends import BACKENDS

    wrong = BACKENDS[PRESENT[1]]
    forward = wrong.forward

    def off(self, *args, **options):
        output = forward(self, *args, **options)
        states = output["hidden_states"]
        return {**output, "hidden_states": (*states[:-1], states[-1] + 1e-6)}

    monkeypatch.setattr(wrong, "forward", off)
    report = verify(folder, backends=PRESENT[:2])
    assert not report.ok
    assert [row.name for row in report.rows if not row.ok] == ["layer 2"]


@several
def test_verify_runs_without_a_tokenizer_and_finds_nan_weights(tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIG, dtype="float32")
    done = command("verify", folder, "--backends", ",".join(PRESENT[:2]), "--plot", tmp_path / "p.png")
    assert "all backends agree" in done.stdout
    assert (tmp_path / "p.png").exists()
    values = Checkpoint(folder)
    from safetensors.numpy import save_file

    tensors = {name: values[name].copy() for name in values.tensors}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors")
    done = command("verify", folder, "--backends", ",".join(PRESENT[:2]), check=False)
    assert done.returncode == 1
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in " ".join(done.stdout.split())


def test_verify_refuses_what_it_cannot_compare(folder):
    with pytest.raises(InputError, match="at least two"):
        verify(folder, backends=["pt"])
    with pytest.raises(InputError, match="caffe"):
        verify(folder, backends=["pt", "caffe"])
    with pytest.raises(InputError, match="float8"):
        verify(folder, dtype="float8")


def test_a_generation_config_is_read_and_written_with_fields_it_does_not_know(folder, tmp_path):
    from olmozoo.generation.config import GenerationConfig

    data = {
        "eos_token_id": [0, 5],
        "pad_token_id": 1,
        "max_new_tokens": 7,
        "temperature": 0.6,
        "transformers_version": "5",
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(data))
    assert GenerationConfig.from_folder(tmp_path, CONFIG).to_dict() == data
