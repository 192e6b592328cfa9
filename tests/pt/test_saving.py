"""Saving and loading PyTorch models."""

import numpy as np
import pytest

from olmozoo import ConfigError
from olmozoo.checkpoint.reader import Checkpoint
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.configs import SMALL_OLMO, SMALL_OLMO2, config_of
from tests.helpers.pt_models import CLASSES
from tests.helpers.wings import refusal

torch = pytest.importorskip("torch")

from olmozoo import pt


def test_the_weights_are_the_mapped_file_and_never_change_it(tmp_path):
    folder = write_checkpoint(tmp_path / "m", SMALL_OLMO2, dtype="bfloat16")
    before = (folder / "model.safetensors").read_bytes()
    model = pt.Olmo2ForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert np.any(np.asarray(Checkpoint(folder)["lm_head.weight"], np.float32))
    assert pt.Olmo2ForCausalLM.from_pretrained(folder, dtype="float32").dtype == torch.float32


def test_overrides_change_the_config_and_wrong_families_are_refused(tmp_path, batch):
    folder = write_checkpoint(tmp_path / "m", SMALL_OLMO2, dtype="float32")
    assert pt.AutoModelForCausalLM.from_pretrained(folder, rms_norm_eps=0.5).config.rms_norm_eps == 0.5
    chatty = pt.Olmo2ForCausalLM.from_pretrained(folder, output_hidden_states=True)
    assert len(chatty(*batch).hidden_states) == 3
    with pytest.raises(ConfigError, match="'olmo2', expected 'olmo'"):
        pt.OlmoForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="hiden_size"):
        pt.Olmo2ForCausalLM.from_pretrained(folder, hiden_size=3)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_safetensors_library_saves_and_loads_the_model(cls, batch, tmp_path):
    from safetensors.torch import load_model, save_model

    model, other = cls(config_of(cls), seed=1).eval(), cls(config_of(cls), seed=2).eval()
    save_model(model, tmp_path / "model.safetensors")
    assert not torch.equal(other(*batch)[0], model(*batch)[0])
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(*batch)[0], model(*batch)[0])


@pytest.mark.parametrize("keep", ["save", "pt"])
def test_parameters_that_the_config_does_not_know_are_named_and_not_lost(keep, tmp_path):
    tied = pt.OlmoForCausalLM(SMALL_OLMO)
    tied.lm_head = torch.nn.Linear(tied.config.hidden_size, tied.config.vocab_size, bias=False)
    assert f"unexpected: lm_head.weight {tuple(tied.lm_head.weight.shape)}" in refusal(tied, keep, tmp_path)

    transposed = pt.Olmo2ForCausalLM(SMALL_OLMO2)
    shape = tuple(transposed.lm_head.weight.shape)
    transposed.lm_head = torch.nn.Linear(*shape, bias=False)
    assert f"wrong shape: lm_head.weight is {shape[::-1]}, expected {shape}" in refusal(transposed, keep, tmp_path)

    empty = refusal(pt.Olmo2Model(SMALL_OLMO2, seed=None), keep, tmp_path)
    assert "without values, on the meta device: norm.weight" in empty
