"""A family that is registered from four short files outside the package works everywhere."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from olmozoo.backends import backend_class, load
from olmozoo.checkpoint import Checkpoint, convert_checkpoint
from olmozoo.checkpoint.formats import WRITABLE
from olmozoo.interop import convert
from olmozoo.verify import verify
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.formats import needs
from tests.helpers.wings import WINGS
from tests.helpers.wings import needs as needs_wings
from tests.toy_family.config import ToyConfig

CONFIG = ToyConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attention_bias=True,
    pad_token_id=0,
    eos_token_id=3,
)


def toy(wing: str) -> None:
    import_module(f"tests.toy_family.{wing}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("toy"), CONFIG)


@pytest.mark.parametrize("wing", WINGS)
def test_it_loads_and_generates(folder, wing):
    toy(wing)
    model = load(folder, wing, "float64")
    ids, mask = left_padded(CONFIG)
    answer = model.generate(ids, mask, max_new_tokens=5)
    new = answer[:, ids.shape[1] :]
    is_end = new == CONFIG.eos_token_id
    assert new.shape[1] == 5 or is_end.any(1).all()
    logits = model.forward(answer, np.concatenate([mask, np.ones_like(new)], 1))["logits"]  # without a cache
    greedy = logits[:, ids.shape[1] - 1 : -1].argmax(-1)
    assert np.array_equal(new, np.where(np.cumsum(is_end, 1) > is_end, CONFIG.pad_token_id, greedy))


@needs_wings("pt", "tf", "flax")
def test_verify_finds_the_same_numbers_in_all_three(folder):
    for wing in ("pt", "tf", "flax"):
        toy(wing)
    report = verify(folder)
    assert report.ok
    assert {row.backend for row in report.rows} == {"tf", "flax"}


@pytest.mark.parametrize("to", WRITABLE)
def test_it_converts_to_every_format_and_back(folder, tmp_path, to):
    needs(to)
    if WRITABLE[to].takes == "keras_model":
        toy("tf")
    convert_checkpoint(folder, tmp_path / "there", to=to, verify=True)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert Checkpoint(tmp_path / "there").tensors.keys() == Checkpoint(folder).tensors.keys()


@needs_wings("pt", "tf")
def test_live_models_become_others(folder):
    toy("pt"), toy("tf")
    model = backend_class("pt").model_class(CONFIG, "causal_lm").from_pretrained(folder)
    assert type(convert(model, to="tf")).__name__ == "TFToyForCausalLM"


def test_four_short_files_are_all():
    files = sorted(Path(__file__).parent.joinpath("toy_family").glob("[!_]*.py"))
    assert [file.stem for file in files] == ["config", "flax", "pt", "tf"]
    assert all(len(file.read_text().splitlines()) < 60 for file in files)
