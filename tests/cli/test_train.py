"""`olmozoo train`: what it prints, its exit codes, and that a dry run writes nothing."""

import json
import math
import signal
import sys

import numpy as np
import pytest
import yaml

from olmozoo import Tokenizer, cli
from olmozoo.backends import load
from olmozoo.cli.common import in_bytes
from olmozoo.memory import plan
from tests.helpers.checkpoints import TEXT_CONFIG, write_checkpoint, write_text_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.wings import PRESENT, WINGS

pytest.importorskip("omegaconf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, tokens with a mask, and a config beside them."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "model").mkdir()
    write_text_checkpoint(folder / "model", TEXT_CONFIG)
    ids = Tokenizer.from_pretrained(folder / "model").encode("The quick brown fox jumps over the lazy dog. " * 40)
    np.array(ids[: 9 * 16], np.uint16).tofile(folder / "ids.npy")
    (np.random.default_rng(0).random((9, 16)) < 0.5).tofile(folder / "mask.npy")
    fields = {
        "save_folder": "run",
        "load_path": "model",
        "data": {"paths": ["ids.npy"], "label_mask_paths": ["mask.npy"]},
        "max_sequence_length": 16,
        "global_train_batch_size": 3,
        "scheduler": {"t_warmup": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(fields))
    return folder


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs `olmozoo train` in this process and in a folder of its own: the lines that it writes, or its error."""
    monkeypatch.chdir(tmp_path)

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["olmozoo", "train", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        assert (ended.value.code or 0) == code, written.err
        return " ".join(written.err.split()) if code == 2 else written.out

    return run


@pytest.mark.parametrize("wing", WINGS)
def test_a_run_from_start_to_end(command, folder, tmp_path, wing):
    text = command(
        folder / "run.yaml", "--backend", wing, "--optimizer.learning-rate=1e-3", "--sample_prompt=The quick"
    )
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("step ")] == [
        ["step", "1/3"], ["step", "2/3"], ["step", "3/3"]
    ]  # fmt: skip
    assert f"weights of {folder / 'model'}" in text
    assert "olmozoo generate run/model 'The quick'" in text
    assert "olmozoo evaluate run/model FILE.txt" in text
    assert "olmozoo chat" not in text, "the tokenizer has no chat template"
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 0.00055, 0.0001])
    assert load(tmp_path / "run/model", wing).config.hidden_size == TEXT_CONFIG.hidden_size
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["backend"] == wing


@pytest.mark.skipif(not PRESENT, reason="no framework is installed")
def test_the_same_command_resumes_what_a_field_or_a_signal_has_stopped(command, folder, tmp_path, monkeypatch):
    words = [folder / "run.yaml", "--save-data-indices=false"]
    text = command(*words, "--stop_after=1")
    assert "stopped by stop_after 1 at step 1; the same command goes on from there" in text
    assert "olmozoo generate" not in text

    from olmozoo.training import metrics

    step = metrics.Metrics.step

    def interrupted(self, *arguments):
        step(self, *arguments)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "step", interrupted)
        assert "stopped by SIGTERM at step 2" in command(*words, code=143)
    text = command(*words)
    assert "resumed from run/step2" in text
    assert "step 3/3" in text
    assert "olmozoo generate run/model" in text
    assert "the run is complete at step 3" in command(*words)


def test_a_dry_run_shows_everything_and_writes_nothing(command, folder, tmp_path):
    text = command(folder / "run.yaml", "--dry-run", "--freeze=[model.embed_tokens*]", "--max_duration=2ep")
    total = sum(TEXT_CONFIG.count_parameters().values())
    frozen = TEXT_CONFIG.vocab_size * TEXT_CONFIG.hidden_size
    tensors = sum(parameter.tied_to is None for parameter in TEXT_CONFIG.parameters("causal_lm"))
    for part in (
        "max_duration: 2ep",
        f"{total:,} parameters",
        f"{total - frozen:,}; {frozen:,} frozen",
        "9 instances of 16 tokens; 3 steps an epoch",
        "6 steps, 2 epochs, 288 tokens",
        f"{4 * total / 1000:,.2f} kB",
        f"{(8 * (total - frozen) + 4 * (tensors - 1)) / 1000:,.2f} kB",  # two means, and a count each
        "the optimizer, the step and the data order start anew",
        "instance 2: 16 tokens",
        "nothing was written",
    ):
        assert part in text, part
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("olmo2", {"fsdp": 4}),
        ("olmo2", {"fsdp": 2, "tensor": 2}),
        ("olmoe", {"fsdp": 4}),
        ("olmoe", {"fsdp": 2, "tensor": 2, "experts": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("wing", ["pt", "flax"])
def test_a_dry_run_shows_the_memory_of_each_device_of_a_mesh(
    command, folder, tmp_path, monkeypatch, wing, family, mesh
):
    """Of the plan for the framework that is installed, where the command names none."""
    monkeypatch.setattr("olmozoo.backends.installed", lambda: [wing])
    config = CONFIGS[family].replace(vocab_size=320, **({"num_experts": 6} if family == "olmoe" else {}))
    write_checkpoint(tmp_path / "model", config, dtype="float32")
    axes = [f"--mesh.{axis}={size}" for axis, size in mesh.items()]
    words = ["--global_train_batch_size=8", "--optimizer.name=lionw", "--device_train_microbatch_size=1"]
    text = command(folder / "run.yaml", f"--load_path={tmp_path / 'model'}", "--dry-run", *words, *axes)
    expected = plan(config, length=16, mesh=mesh, train=True, optimizer="lionw", backend=wing)
    assert f"memory of a step on each of {math.prod(mesh.values())} devices" in " ".join(text.split())
    rows = [[cell.strip() for cell in line.split("│")] for line in text.partition("memory of a step")[2].splitlines()]
    found = {row[1]: row[2] for row in rows if len(row) == 4}
    for kind, count in expected.by_kind().items():
        bound = "≤ " if kind in expected.bounds else ""
        assert found.get(kind, bound + in_bytes(0)) == bound + in_bytes(count), kind
    assert found["total"] == f"≤ {in_bytes(expected.total)}"
    assert expected.weights < 1.1 * plan(config, length=16, train=True).weights / mesh["fsdp"]


def test_a_dry_run_marks_what_is_learned(command, folder):
    """Without colours, learned tokens are in brackets."""
    text = command(folder / "run.yaml", "--dry-run")
    first = np.arange(9)
    np.random.default_rng(6198).shuffle(first)
    ids = np.fromfile(folder / "ids.npy", np.uint16).reshape(9, 16)[first[0]]
    mask = np.fromfile(folder / "mask.npy", bool).reshape(9, 16)[first[0]]
    mask[0] = False  # nothing predicts the first token
    pieces = Tokenizer.from_pretrained(folder / "model").token_bytes()
    expected = "".join(
        "\u27e6" * m + pieces[i].decode() + "\u27e7" * m for i, m in zip(ids, mask.tolist(), strict=True)
    )
    assert text.partition("instance 0")[2].splitlines()[1] == expected.replace("\u27e7\u27e6", "")


def test_the_last_of_a_bad_command_is_one_message(command, folder):
    assert "there is no field optimizer.learning_rat: did you mean optimizer.learning_rate?" in command(
        folder / "run.yaml", "--optimizer.learning-rat=1", code=2
    )
    assert "'1e-3' is no override" in command(folder / "run.yaml", "--optimizer.learning_rate", "1e-3", code=2)
    assert "there is no file nowhere.yaml" in command("nowhere.yaml", code=2)


def test_a_config_of_ai2s_trainer_says_what_is_as_there(command, folder, tmp_path):
    model = {"d_model": 40, "n_heads": 4, "n_layers": 1, "mlp_hidden_size": 72, "vocab_size": 320, "eos_token_id": 0}
    model |= {"embedding_size": 320, "pad_token_id": 1, "max_sequence_length": 16, "include_bias": False, "rope": True}
    model |= {"block_type": "sequential", "layer_norm_type": "default", "layer_norm_with_affine": False}
    model |= {"activation_type": "swiglu", "weight_tying": False, "flash_attention": False}
    model |= dict.fromkeys(("residual_dropout", "embedding_dropout", "attention_dropout"), 0)
    fields = {"model": model, "save_folder": "run", "data": {"paths": ["ids.npy"]}, "global_train_batch_size": 3}
    (folder / "ai2.yaml").write_text(yaml.safe_dump(fields))
    text = command(folder / "ai2.yaml", "--dry-run", "--max_duration=2", "--data.drop-last")
    assert text.startswith("a config of AI2's trainer; as there:\n  scheduler.warmup_min_lr")
    assert "extra_steps: 10" in text
    assert "a new Olmo model" in text
