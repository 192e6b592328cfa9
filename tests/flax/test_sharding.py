"""Models over 8 devices: every number that of one device, and each device with its share alone."""

import os

import numpy as np
import pytest

from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import CONFIGS, GRADIENT_BOUND, WIDE
from tests.helpers.processes import free_port, start

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return start("tests.flax.mesh_cases", tmp_path_factory.mktemp("mesh"), [environment], 400)[0]


@pytest.mark.parametrize(("mesh", "rows"), [("fsdp", 1), ("tensor", 8), ("both", 2)])
@pytest.mark.parametrize("family", ["olmo", "olmo2", "opt"])
def test_losses_and_gradients_are_those_of_one_device(results, family, mesh, rows):
    found = results[f"equal-{family}-{mesh}"]
    assert isinstance(found, dict), found
    assert found["difference"] < GRADIENT_BOUND
    assert found["rows"] == rows  # the batch stays split through the blocks
    assert found["as said"]
    if mesh == "both":
        assert found["whole"] == []


@pytest.mark.parametrize(
    ("family", "mesh", "rows", "experts", "inner", "hidden"),
    [
        ("olmoe", "both", 2, 8, 18, 10),
        ("olmoe", "experts", 8, 2, 36, 40),
        ("olmoe", "experts-fsdp", 4, 4, 36, 20),
        ("olmoe", "experts-tensor", 8, 4, 18, 40),
        ("flexolmo", "all", 4, 3, 18, 20),
    ],
)
def test_experts_are_split(results, family, mesh, rows, experts, inner, hidden):
    found = results[f"equal-{family}-{mesh}"]
    assert isinstance(found, dict), found
    assert found["difference"] < GRADIENT_BOUND
    assert found["rows"] == rows
    assert sorted(found["experts"]) == sorted([(experts, hidden, inner)] * 2 + [(experts, inner, hidden)])
    assert found["as said"]


@pytest.mark.parametrize("family", ["olmo", "olmo2", "opt", "olmoe", "flexolmo"])
def test_tokens_are_those_of_one_device(results, family):
    found = results[f"tokens-{family}"]
    assert isinstance(found, dict), found
    assert all(found["same"])
    rows, heads = {"opt": (1, 2), "olmoe": (2, 2), "flexolmo": (2, 1)}.get(family, (1, 1))
    assert found["cache"] == (rows, heads, 16, 10)


@pytest.mark.parametrize(("count", "rest"), [(2, 0.05), (4, 0.3), (8, 0.05)])
def test_every_byte_is_read_once_and_held_in_parts(results, count, rest):
    found = results[f"bytes-{count}"]
    assert isinstance(found, dict), found
    assert found["read"] == found["all"]
    assert found["held"] == pytest.approx(found["all"] / count, rel=rest)  # with `experts`, all else is on fsdp alone


@pytest.mark.parametrize("family", ["olmo2", "olmoe"])
def test_the_plan_is_that_of_xla(results, family):
    found = results[f"planned-{family}"]
    assert isinstance(found, dict), found
    assert found["xla"] == found["plan"]


def test_the_state_of_an_optimizer_is_split_as_the_parameters(results):
    assert results["state_is_split"] == [True] * len(results["state_is_split"]), results["state_is_split"]


def test_a_saved_folder_has_the_same_bytes(results):
    assert results["saved"] == {"olmo2": [True] * 3, "olmoe": [True] * 3}


def test_initial_weights_are_the_same(results):
    assert results["initial"] == {"opt": (0.0, (10, 18)), "olmoe": (0.0, (4, 20, 18))}


def test_meshes_that_do_not_fit_are_refused(results):
    explicit, divide, devices, none, dense, six = results["refused"]
    assert "axes of type Explicit or Manual (fsdp, tensor), expected AxisType.Auto" in explicit
    assert "kv_heads is 20, which tensor = 8 does not divide" in divide
    assert "make 6 devices, expected 8" in devices
    assert "the model has no mesh" in none
    assert "the model has no experts, for experts = 4" in dense
    assert "experts is 6, which experts = 4 does not divide" in six


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes found, and the folder that they loaded and wrote."""
    folder = tmp_path_factory.mktemp("processes")
    write_checkpoint(folder / "olmo2", CONFIGS["olmo2"].replace(vocab_size=64, eos_token_id=None, attention_bias=True))
    mixture = CONFIGS["olmoe"].replace(vocab_size=64, eos_token_id=None, num_experts=4)
    write_checkpoint(folder / "olmoe", mixture)
    write_checkpoint(folder / "wide", CONFIGS["olmo2"].replace(vocab_size=WIDE), dtype="float32")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "OLMOZOO_PORT": str(free_port())}
    return start("tests.flax.process_cases", folder, [environment] * 2, 200), folder


def test_two_processes_are_as_one(processes):
    from olmozoo.flax import FlaxOlmo2ForCausalLM

    (first, second), folder = processes
    for found in (first, second):
        assert isinstance(found["loaded"], dict), found["loaded"]
        assert found["loaded"]["read"] == pytest.approx(found["loaded"]["all"] / 2, rel=0.05)
        assert isinstance(found["state"], dict), found["state"]
    with jax.enable_x64(True):
        model = FlaxOlmo2ForCausalLM.from_pretrained(folder / "olmo2")
        ids, mask = left_padded(model.config, batch=4, length=7)
        expected = np.asarray(model.generate(ids, mask, max_new_tokens=5).sequences)
        model.save_pretrained(folder / "one")
    np.testing.assert_array_equal(first["tokens"], expected)
    np.testing.assert_array_equal(second["tokens"], expected)
    assert first["saved"] == sorted(path.name for path in (folder / "one").iterdir())
    assert all(path.read_bytes() == (folder / "two" / path.name).read_bytes() for path in (folder / "one").iterdir())


def test_a_process_takes_the_memory_of_its_share(processes):
    """An embedding is cast part by part: the whole of it is nowhere."""
    embedding = 8 * WIDE * CONFIGS["olmo2"].hidden_size
    for found in (each["allocated"] for each in processes[0]):
        assert isinstance(found, dict), found
        assert 0.9 * embedding < found["held"] < 1.1 * embedding  # half of two
        assert found["peak"] < found["held"] + embedding / 4


def test_experts_of_two_processes_are_as_of_one(processes):
    from olmozoo.flax import FlaxOlmoeForCausalLM

    results, folder = processes
    with jax.enable_x64(True):
        model = FlaxOlmoeForCausalLM.from_pretrained(folder / "olmoe")
        ids, mask = left_padded(model.config, batch=4, length=7)
        expected = np.asarray(model.generate(ids, mask, max_new_tokens=2).sequences)
    for found in results:
        assert isinstance(found["experts"], np.ndarray), found["experts"]
        np.testing.assert_array_equal(found["experts"], expected)
    file = "model.safetensors"
    assert (folder / "two-olmoe" / file).read_bytes() == (folder / "olmoe" / file).read_bytes()


def test_a_folder_that_cannot_be_written_is_an_error_in_every_process(processes):
    (first, second), _ = processes
    assert "file" in first["not_saved"]
    assert "could not write the checkpoint" in second["not_saved"]
