"""The tensors of a folder against the parameter table."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from olmozoo import CheckpointError, OPTConfig
from olmozoo import backends as backend
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.matching import load_weights
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.writer import save_checkpoint
from tests.helpers.checkpoints import random_values, write_checkpoint
from tests.helpers.reading import CONFIG, TIED, load, rewrite


def test_the_largest_weights_come_first(tmp_path):
    config = CONFIG.replace(num_hidden_layers=3)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, config))
    sizes = [
        parameter.size for parameter, _ in load_weights(checkpoint, config, "causal_lm", dtype=np.dtype("float32"))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 3


PEAK = """
import re, sys
from olmozoo import backends
peaks = []
for folder in sys.argv[2:]:
    model = backends.load(folder, sys.argv[1])
    with open("/proc/self/status") as status:  # ru_maxrss would be that of the parent process at least
        peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) * 1024)
print(peaks[1] - peaks[0])
"""


@pytest.fixture(scope="module")
def small_and_large(tmp_path_factory):
    """A folder with a small and a large checkpoint of float32."""
    root = tmp_path_factory.mktemp("sizes")
    large = CONFIG.replace(hidden_size=1536, intermediate_size=1500, num_hidden_layers=6)
    for name, config in (("small", CONFIG), ("large", large)):
        save_checkpoint(root / name, config, "causal_lm", lambda p: np.ones(p.shape, "float32"), lambda p: "float32")
    yield root
    shutil.rmtree(root)


# PyTorch's weights stay in the mapped file. A `.bin` is mapped whole until it is read: its pages, which the system may
# take back, count here.
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize(
    ("wing", "to", "share"),
    [("pt", "safetensors", 0.15), ("tf", "safetensors", 1.1), ("flax", "safetensors", 1.1), ("flax", "pt-bin", 2.1)],
)
def test_a_model_that_loads_is_in_memory_once(small_and_large, tmp_path, wing, to, share):
    if to == "pt-bin":
        pytest.importorskip("torch")
    if wing not in backend.installed():
        pytest.skip(f"the {wing} wing is not installed")
    folders = [small_and_large / "small", small_and_large / "large"]
    if to != "safetensors":
        for folder in folders:
            convert_checkpoint(folder, tmp_path / folder.name, to=to)
        folders = [tmp_path / folder.name for folder in folders]
    command = [sys.executable, "-c", PEAK, wing, *folders]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = sum(file.stat().st_size for file in folders[1].iterdir())
    assert size > 3e8
    assert grown / size < share


def test_a_tied_head_is_not_written_and_may_be_there_if_equal(tmp_path):
    folder = write_checkpoint(tmp_path / "a", TIED)
    assert "lm_head.weight" not in Checkpoint(folder).tensors
    assert "lm_head.weight" not in load(folder, TIED)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "lm_head.weight" not in load(folder, TIED)
    rewrite(folder, lambda t: t["lm_head.weight"].__setitem__((3, 4), 9.0))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(folder, TIED)


def test_base_and_head_checkpoints_serve_each_other(tmp_path):
    base = write_checkpoint(tmp_path / "base", CONFIG, None)
    causal = write_checkpoint(tmp_path / "causal", CONFIG)
    assert not any(name.startswith("model.") for name in Checkpoint(base).tensors)
    assert all(np.array_equal(array, load(causal)[name]) for name, array in load(base, head=None).items())
    assert load(causal, head=None).keys() == load(base, head=None).keys()
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        found = load(base)
    table = {p.name: p for p in CONFIG.parameters("causal_lm")}
    assert np.array_equal(found["lm_head.weight"], table["lm_head.weight"].initial(0, "float64"))
    assert np.array_equal(
        load(write_checkpoint(tmp_path / "t", TIED, None), TIED)["model.norm.weight"], found["model.norm.weight"]
    )


def test_a_new_classification_head_is_announced(tmp_path):
    causal = write_checkpoint(tmp_path / "causal", CONFIG)
    with pytest.warns(UserWarning, match=r"score\.weight"):
        assert load(causal, head="sequence_classification")["score.weight"].shape == (2, 24)
    classifier = write_checkpoint(tmp_path / "classifier", CONFIG, "sequence_classification")
    assert np.array_equal(load(classifier, head=None)["model.norm.weight"], load(causal)["model.norm.weight"])


def test_a_causal_checkpoint_without_its_head_is_broken(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight \[37, 24\]"):
        load(folder)


def test_one_error_lists_every_problem(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)

    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 3))
        tensors["model.norm.weight"] = np.zeros(25)
        tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2)

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    assert "4 problem(s)" in text
    for part in (
        "missing: model.layers.1.mlp.up_proj.weight [20, 24]",
        "unexpected: model.layers.7.mlp.up_proj.weight [2, 3]",
        "wrong shape: model.norm.weight is [25], expected [24]",
        "duplicate: ",
    ):
        assert part in text


def test_a_saved_rotary_table_is_passed_over_and_has_no_say_in_the_dtype(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG, dtype="float16")
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}))
    assert Checkpoint(folder).dtype == np.float16
    assert len(load(folder, dtype="float16")) == len(CONFIG.parameters("causal_lm"))


@pytest.mark.parametrize("head_on_disk", [False, True])
def test_opt_loads_with_either_prefix_and_with_its_tied_head_or_without(tmp_path, head_on_disk):
    config = OPTConfig(vocab_size=37, hidden_size=24, ffn_dim=20, num_hidden_layers=2, num_attention_heads=4)
    folder = write_checkpoint(tmp_path / "a", config)
    expected = load(folder, config)

    def respell(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        if head_on_disk:
            tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"].copy()

    rewrite(folder, respell)
    assert all(name.startswith(("decoder.", "lm_head.")) for name in Checkpoint(folder).tensors)
    found = load(folder, config)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_square_matrix_is_not_transposed_and_a_transposed_one_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    q = next(p for p in CONFIG.parameters() if p.name.endswith("q_proj.weight"))
    assert q.shape == (24, 24)
    assert np.array_equal(load(folder)[q.name], random_values(q))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[24, 37\], expected \[37, 24\]"):
        load(folder)


def test_mismatched_sizes_start_anew_only_if_asked(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG)
    larger = CONFIG.replace(vocab_size=41)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is \[37, 24\], expected \[41, 24\]"):
        load(folder, larger)
    with pytest.warns(UserWarning, match=r"lm_head\.weight is \[37, 24\]"):
        assert load(folder, larger, ignore_mismatched_sizes=True)["lm_head.weight"].shape == (41, 24)
