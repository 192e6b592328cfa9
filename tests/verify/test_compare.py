"""`verify` over the installed backends."""

import subprocess
import sys

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.verify.compare import plot, verify
from tests.helpers.checkpoints import TEXT_CONFIG, write_checkpoint, write_text_checkpoint
from tests.helpers.wings import PRESENT, several


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_checkpoint(tmp_path_factory.mktemp("text"))


def command(*words, check=True):
    done = subprocess.run([sys.executable, "-m", "olmozoo", *map(str, words)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


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
    folder = write_checkpoint(tmp_path / "m", TEXT_CONFIG, dtype="float32")
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
