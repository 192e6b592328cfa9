"""The configs in configs/, each run for two steps on a tiny model and tiny data."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from olmozoo import Tokenizer
from olmozoo.training import load_config, loop
from olmozoo.training.manifest import FORMAT, IDS, MASK, TOKENIZER, Manifest, tokenizer_hash
from tests.helpers.checkpoints import write_text_checkpoint
from tests.helpers.wings import needs

pytest.importorskip("omegaconf")
CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))
LENGTH, ROWS = 16, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and data prepared with its tokenizer."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "model").mkdir()
    write_text_checkpoint(folder / "model")
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    data = folder / "data"
    tokenizer.save_pretrained(data / TOKENIZER)
    stream = np.random.default_rng(0)
    mask = stream.random((ROWS, LENGTH)) < 0.5
    stream.integers(2, 300, mask.shape, dtype=np.uint16).tofile(data / IDS)
    mask.tofile(data / MASK)
    Manifest(
        format=FORMAT,
        length=LENGTH,
        dtype="uint16",
        vocab_size=len(tokenizer),
        eos_token_id=0,
        pad_token_id=1,
        tokenizer="model",
        tokenizer_sha256=tokenizer_hash(tokenizer),
        template="tulu",
        template_sha256=hashlib.sha256(b"").hexdigest(),
        packing="none",
        documents={"chat": ROWS},
        dropped=0,
        truncated=0,
        instances=ROWS,
        tokens=mask.size,
        targets=int(mask[:, 1:].sum()),
        sources=[],
    ).save(data)
    return folder


def tiny(file: Path, folder: Path, run: Path) -> list[str]:
    """Overrides that make a config tiny."""
    shared = [f"--save_folder={run}", "--max_duration=2", "--global_train_batch_size=2", "--scheduler.t_warmup=1"]
    if file.stem == "toy":
        return [*shared, "--model={hidden_size: 36, intermediate_size: 48, num_hidden_layers: 1}", "--eval_interval=1"]
    return [*shared, f"--load_path={folder / 'model'}", f"--data.paths=[{folder / 'data'}]", "--backend=pt"]


def test_all_that_is_promised_is_there():
    names = {"continue-pretraining", "lora-small-gpu", "olmo2-1b-chat", "olmo2-7b-chat", "toy"}
    assert {path.stem for path in CONFIGS} == names


@needs("pt")
@pytest.mark.parametrize("file", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_ready_config_runs(file, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(file.parents[1])
    config, notes = load_config(file, [*tiny(file, folder, tmp_path / "run"), "--sample_tokens=2"])
    assert notes == []
    result = loop.train(config)
    assert (result.step, result.finished) == (2, True)
    assert Tokenizer.from_pretrained(result.folder).decode([66, 67])
    if config.lora is not None:
        assert (tmp_path / "run/adapter/adapter_config.json").is_file()


@pytest.mark.parametrize("file", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_dry_run_of_it_needs_no_framework(file, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(file.parents[1])
    run = loop.dry_run(load_config(file, tiny(file, folder, tmp_path / "run"))[0])
    assert run.last == 2
    assert run.tokenizer is not None
    assert not (tmp_path / "run").exists()
