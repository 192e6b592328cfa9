"""Models spread over several devices by accelerate; here the CPU and the disk."""

import pytest

from olmozoo import InputError
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import SMALL_OLMO, SMALL_OLMO2, SMALL_OPT

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from olmozoo import pt


@pytest.mark.parametrize("config", [SMALL_OLMO2, SMALL_OLMO, SMALL_OPT], ids=lambda config: config.name)
def test_blocks_on_disk_give_the_same_answers(config, tmp_path):
    write_checkpoint(tmp_path / "model", config, dtype="float32")
    whole = pt.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    nbytes = sum(p.nbytes for p in whole.parameters())
    model = pt.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(0.7 * nbytes)},
        offload_folder=tmp_path / "offload",
    )
    places = model.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert not any(".self_attn" in name or ".mlp" in name or ".fc1" in name for name in places)  # blocks stay whole
    ids, mask = left_padded(config)
    assert torch.equal(whole.generate(ids, mask, max_new_tokens=4), model.generate(ids, mask, max_new_tokens=4))
    with pytest.raises(InputError, match="without values, on the meta device"):
        model.save_pretrained(tmp_path / "new")


def test_an_embedding_on_disk_has_the_device_that_inputs_go_to(tmp_path):
    write_checkpoint(tmp_path / "model", SMALL_OLMO2, dtype="float32")
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    model = pt.Olmo2ForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert next(model.parameters()).is_meta
    assert model.device == torch.device("cpu")
    expected = pt.Olmo2ForCausalLM.from_pretrained(tmp_path / "model").generate([[5, 6, 7]], max_new_tokens=3)
    assert torch.equal(model.generate([[5, 6, 7]], max_new_tokens=3), expected)


def test_one_device_needs_no_accelerate(tmp_path):
    write_checkpoint(tmp_path / "model", SMALL_OLMO2, dtype="float32")
    for device_map in ("cpu", {"": "cpu"}, torch.device("cpu")):
        model = pt.Olmo2ForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map)
        assert not hasattr(model, "hf_device_map")


def test_what_cannot_be_is_refused(tmp_path):
    write_checkpoint(tmp_path / "model", SMALL_OLMO2, dtype="float32")
    for settings, message in (
        ({"device": "cpu", "device_map": "auto"}, "device and device_map are given, expected one of them"),
        ({"device_map": "auto", "max_memory": {"cpu": 30_000}}, "pass offload_folder, or more max_memory"),
        ({"max_memory": {"cpu": 30_000}}, "are for a device_map"),
    ):
        with pytest.raises(InputError, match=message):
            pt.Olmo2ForCausalLM.from_pretrained(tmp_path / "model", **settings)
