"""The configs in configs/, each run for two steps on a tiny model and tiny data."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from olmozoo import Olmo3Config, OlmoeConfig, Tokenizer
from olmozoo.training import load_config, loop
from olmozoo.training.manifest import FORMAT, IDS, MASK, TOKENIZER, Manifest, tokenizer_hash
from olmozoo.training.metrics import METRICS, read
from tests.helpers.checkpoints import TEXT_CONFIG, write_text_checkpoint
from tests.helpers.wings import needs

pytest.importorskip("omegaconf")
CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))
LENGTH, ROWS = 16, 6
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TINY = {name: getattr(TEXT_CONFIG, name) for name in (*SIZES, "pad_token_id", "eos_token_id")}
MODELS = {  # by the first word of a config's name
    "olmo3": Olmo3Config(**TINY, sliding_window=8),
    "olmoe": OlmoeConfig(**TINY, num_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, and data prepared with their tokenizer."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in {"model": TEXT_CONFIG, **MODELS}.items():
        (folder / name).mkdir()
        write_text_checkpoint(folder / name, config)
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
    family = file.stem.split("-")[0]
    model = folder / (family if family in MODELS else "model")
    return [*shared, f"--load_path={model}", f"--data.paths=[{folder / 'data'}]", "--backend=pt"]


def test_all_that_is_promised_is_there():
    names = {"continue-pretraining", "lora-small-gpu", "olmo2-1b-chat", "olmo2-7b-chat", "toy"}
    names |= {"olmo3-7b-chat", "olmoe-1b-7b-chat"}
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
    if "olmoe" in file.stem:
        assert all(line["aux_loss"] > 1 for line in read(tmp_path / "run" / METRICS)[0])
    if config.lora is not None:
        assert (tmp_path / "run/adapter/adapter_config.json").is_file()


@pytest.mark.parametrize("file", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_dry_run_of_it_needs_no_framework(file, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(file.parents[1])
    run = loop.dry_run(load_config(file, tiny(file, folder, tmp_path / "run"))[0])
    assert run.last == 2
    assert run.tokenizer is not None
    assert not (tmp_path / "run").exists()
