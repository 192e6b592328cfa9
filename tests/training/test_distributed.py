"""Runs on several processes and devices: the curve, the weights and the files of one device."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("omegaconf", reason="olmozoo[training] is not installed")

import safetensors.numpy
import yaml

from olmozoo.training import state
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.processes import free_port, start
from tests.helpers.runs import Outcome, close, run, same_weights, write_tokens
from tests.helpers.wings import WINGS, needs

LENGTH, STEPS = 12, 5
SIZES = {"vocab_size": 64, "eos_token_id": None}
ADAMW = {"learning_rate": 5e-3, "weight_decay": 0.1, "decay_embeddings": True}
LORA = {"lora": {"rank": 2, "alpha": 6.0}, "max_grad_norm": None, "max_duration": 3}
COMMON = {
    **{"precision": "fp64", "max_sequence_length": LENGTH, "max_duration": STEPS, "seed": 4, "save_interval": None},
    **{"global_train_batch_size": 8, "device_train_microbatch_size": 1},
}
RUNS = {
    "olmo2": {
        "model": CONFIGS["olmo2"].replace(**SIZES),
        "data": {"generate_attention_mask": True, "drop_last": False},
        "optimizer": ADAMW,
        "scheduler": {"name": "linear_with_warmup", "t_warmup": 2, "warmup_min_lr": 1e-4},
        **{"max_grad_norm": 0.5, "softmax_auxiliary_loss": True, "auxiliary_loss_multiplier": 1e-3},
    },
    "lion": {
        "model": CONFIGS["olmo-clip-tied"].replace(**SIZES),
        "optimizer": {"name": "lionw", "learning_rate": 1e-3, "weight_decay": 0.3, "decay_embeddings": True},
        **{"max_grad_norm_ratio": 0.95, "freeze": ["model.layers.1.mlp*"], "loss_divisor": "positions"},
        **{"device_train_microbatch_size": None, "evaluate": True},
    },
    "opt": {
        "model": CONFIGS["opt-projected-post-norm"].replace(**SIZES, dropout=0.0),
        "optimizer": {**ADAMW, "decay_norm_and_bias": True},
        "activation_checkpointing": True,
    },
    "olmoe": {
        "model": CONFIGS["olmoe"].replace(**SIZES, num_experts=6, router_aux_loss_coef=0.3),
        "data": {"generate_attention_mask": True, "drop_last": False},
        "optimizer": ADAMW,
        **{"max_grad_norm_ratio": 0.95, "device_train_microbatch_size": 4, "freeze": ["*layers.1.mlp.experts.2.*"]},
    },
    "flexolmo": {
        "model": CONFIGS["flexolmo-all"].replace(**SIZES, num_experts=4, num_experts_per_tok=2),
        "optimizer": ADAMW,
        **{"max_grad_norm": 0.5, "device_train_microbatch_size": None},
    },
}
MICRO = {"olmoe": 2}  # on two parts of the batch, so that micro-batches of all devices are those of one


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The fields of each run, and what it gives on one device, in PyTorch."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, fields in RUNS.items():
        fields = {**COMMON, **fields}
        config = fields.pop("model")
        write_checkpoint(folder / name, config)
        data = write_tokens(folder / f"{name}-data", config.vocab_size, LENGTH * 9 + 5)
        stream = np.random.default_rng(2)
        for path in data["paths"]:
            ids = np.fromfile(path, "uint16")
            ids[stream.random(len(ids)) < 0.1] = config.pad_token_id
            ids.tofile(path)
        if fields.pop("evaluate", False):
            fields["evaluators"] = [{"label": "held-out", "paths": data["paths"][:1], "device_eval_batch_size": 2}]
            fields["eval_interval"] = 2
        fields |= {"load_path": str(folder / name), "data": data | fields.get("data", {})}
        found[name] = fields, run(fields, backend="pt", save_folder=str(folder / f"{name}-run"))
    return found


def processes(folder, wing, count, cases, **environment):
    """What each of several processes gives for each case: fields, and who is interrupted when."""
    (folder / "cases").write_bytes(pickle.dumps((wing, cases)))
    shared = {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", **environment}
    return start("tests.training.world_cases", folder, [{**shared, "RANK": str(rank)} for rank in range(count)], 600)


def saved_in(fields, folder, **more):
    """The fields of a run in a folder of its own."""
    return {**fields, "save_folder": str(folder), **more}


def split_in_two(runs, name, folder, **more):
    """The fields of a run whose batches are split in two, in a folder of its own."""
    micro = {"device_train_microbatch_size": MICRO[name]} if name in MICRO else {}
    return saved_in(runs[name][0], folder / name, **micro, **more)


@pytest.fixture(scope="module")
def two(runs, tmp_path_factory):
    """The folder of runs on two ranks, and what each rank gives of each."""
    folder = tmp_path_factory.mktemp("two")
    fields = runs["olmo2"][0]
    cases = {name: (split_in_two(runs, name, folder), None) for name in runs}
    cases["interrupted"] = saved_in(fields, folder / "interrupted"), (1, 3)
    cases["resumed"] = saved_in(fields, folder / "interrupted", stop_at=4), None
    cases["alone"] = saved_in(fields, folder / "alone", stop_at=2), None
    run(saved_in(fields, folder / "alone"), backend="pt", stop_after=2)
    shutil.copytree(fields["load_path"], folder / "nan")
    file = folder / "nan" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    for name, more in {
        "nan": {"load_path": str(folder / "nan")},
        "odd": {"global_train_batch_size": 7},
        "large": {"mesh": {"fsdp": 4}},
        "lora": {"lora": {"rank": 2}},
    }.items():
        cases[name] = saved_in(fields, folder / f"{name}-run", **more), None
    cases["some"] = saved_in(runs["olmoe"][0], folder / "some-run", mesh={"experts": 2}), None
    return folder, ranks(folder, 2, cases)


@pytest.fixture(scope="module")
def four(runs, tmp_path_factory):
    """The same on four ranks, two of which share their rows."""
    return on_four(runs, tmp_path_factory, "olmo2")


@pytest.fixture(scope="module")
def four_more(runs, tmp_path_factory):
    """Further runs on them."""
    return on_four(runs, tmp_path_factory, "lion", "opt", "flexolmo")


def on_four(runs, tmp_path_factory, *names):
    folder = tmp_path_factory.mktemp("four")
    cases = {name: (split_in_two(runs, name, folder, mesh={"tensor": 2}), None) for name in names}
    if "flexolmo" in names:  # in two parts, the second of which reads what the first one wrote
        begun = {**cases.pop("flexolmo")[0], "stop_after": 2}
        cases |= {"begun": (begun, None), "flexolmo": ({**begun, "mesh": {"experts": 2}, "stop_after": None}, None)}
    return folder, ranks(folder, 4, cases)


def ranks(folder, count, cases):
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    return processes(folder, "pt", count, cases, **address)


def same_run(found: Outcome, expected: Outcome, bound: float = 1e-8) -> None:
    assert found.indices == expected.indices
    for name in expected.steps[0].keys() - {"tokens_per_second"}:
        close(found.curve(name), expected.curve(name), bound)
    for line, other in zip(found.evaluations, expected.evaluations, strict=True):
        assert line == pytest.approx(other, rel=bound)
    same_weights(found.weights(), expected.weights(), bound)
    last = expected.steps[-1]["step"]
    a, b = (state.load(outcome.folder / f"step{last}") for outcome in (found, expected))
    assert a.progress == b.progress
    same_weights(*({name: tensor.read() for name, tensor in each.moments.items()} for each in (a, b)), bound)


@needs("pt")
@pytest.mark.parametrize(
    ("group", "name"),
    [
        *(("two", name) for name in RUNS),
        ("four", "olmo2"),
        *(("four_more", name) for name in ("lion", "opt", "flexolmo")),
    ],
)
def test_ranks_train_as_one_process(runs, request, group, name):
    folder, found = request.getfixturevalue(group)
    for each in found:
        assert isinstance(each[name], dict), each[name]
        assert each[name]["result"].finished
    same_run(Outcome(folder / name), runs[name][1])
    assert not any(each[name]["text"] for each in found[1:])
    sizes = "2: fsdp 2" if group == "two" else f"4: fsdp 2 x {'experts' if name == 'flexolmo' else 'tensor'} 2"
    assert f"devices    {sizes}" in found[0][name]["text"]


@needs("pt")
@pytest.mark.parametrize(("group", "parts"), [("two", 2), ("four", 4)])
def test_a_rank_reads_and_holds_its_share(runs, request, group, parts):
    _, found = request.getfixturevalue(group)
    config = RUNS["olmo2"]["model"]
    whole = 8 * sum(parameter.size for parameter in config.parameters("causal_lm"))
    for each in found:
        weights, moments = each["olmo2"]["share"]
        assert each["olmo2"]["read"] == weights < 1.2 * whole / parts
        assert moments == 2 * weights


@needs("pt")
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(runs, two):
    folder, found = two
    for each in found:
        stopped, resumed = each["interrupted"]["result"], each["resumed"]["result"]
        assert (stopped.step, stopped.stopped, stopped.finished) == (3, "SIGTERM", False)
        assert (resumed.step, resumed.finished) == (4, True)
    assert "resumed from" in found[0]["resumed"]["text"]
    expected = runs["olmo2"][1]
    close(Outcome(folder / "interrupted").curve("loss"), expected.curve("loss")[:4], 1e-8)


@needs("pt", "flax")
def test_another_framework_goes_on_with_a_run_of_ranks(runs, two, tmp_path):
    shutil.copytree(two[0] / "interrupted", tmp_path / "run")
    fields, expected = runs["olmo2"]
    found = run(saved_in(fields, tmp_path / "run"), backend="flax")
    assert f"resumed from {tmp_path}/run/step4" in found.text
    same_run(found, expected)


@needs("pt")
def test_ranks_write_the_bytes_of_one_process(two):
    folder, found = two
    assert found[0]["alone"]["result"].finished
    model, step = folder / "alone" / "model", folder / "alone" / "step2"
    assert sorted(path.name for path in model.iterdir()) == sorted(
        p.name for p in step.iterdir() if p.name != "training"
    )
    assert all(path.read_bytes() == (step / path.name).read_bytes() for path in model.iterdir())


@needs("pt")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "TrainingError: the loss is nan at step 1, before the update"),
        ("odd", "InputError: global_train_batch_size is 7, which fsdp = 2 does not divide"),
        (
            "large",
            "InputError: mesh is fsdp = 4, tensor = 1, experts = 1: 4 devices, and torchrun has started 2 processes",
        ),
        ("lora", "InputError: lora in PyTorch is for one device"),
        ("some", "InputError: 5 of the 6 experts of model.layers.1.mlp.experts.gate_proj.weight are trained, expected"),
    ],
)
def test_every_rank_ends_with_the_same_error(two, name, message):
    folder, found = two
    assert all(message in each[name]["error"] for each in found), found
    assert found[0][name] == found[1][name]
    assert not list((folder / f"{name}-run").glob("step*"))


@needs("pt")
def test_the_command_under_torchrun(runs, tmp_path):
    fields, expected = runs["olmo2"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(saved_in(fields, tmp_path / "run")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, "-m", "olmozoo", "train", str(tmp_path / "run.yaml"), "--backend", "pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    for line in ("devices    2: fsdp 2", f"step {STEPS}/{STEPS}", f"the model is in {tmp_path}/run/model"):
        assert done.stdout.count(line) == 1, done.stdout
    same_run(Outcome(tmp_path / "run"), expected)


# -- JAX --------------------------------------------------------------------------------------------------------------


MESH = {"fsdp": 4, "tensor": 2}


@pytest.fixture(scope="module")
def devices(runs, tmp_path_factory):
    """The folder of runs on 8 devices of JAX, and what they give."""
    folder, fields = tmp_path_factory.mktemp("devices"), runs["olmo2"][0]
    cases = {
        "olmo2": saved_in(fields, folder / "olmo2", mesh=MESH),
        "stopped": saved_in(fields, folder / "stopped", mesh=MESH, stop_after=2),
        "resumed": saved_in(fields, folder / "stopped", mesh={"fsdp": 2}, stop_after=2),
        "large": saved_in(fields, folder / "large", mesh={"fsdp": 16}),
        "heads": saved_in(fields, folder / "heads", mesh={"tensor": 8}),
    }
    return on_eight(folder, cases)


@pytest.fixture(scope="module")
def devices_more(runs, tmp_path_factory):
    """Further runs on them."""
    folder = tmp_path_factory.mktemp("more-devices")
    cases = {name: saved_in(runs[name][0], folder / name, mesh=MESH) for name in ("lion", "opt")}
    # Of the last batch's two rows two copies are made, which do not count.
    mixture = {"mesh": {"fsdp": 4, "experts": 2}, "device_train_microbatch_size": 1}
    cases["olmoe"] = saved_in(runs["olmoe"][0], folder / "olmoe", **mixture)
    return on_eight(folder, {**cases, "lora": saved_in(runs["olmo2"][0], folder / "lora", mesh=MESH, **LORA)})


def on_eight(folder, cases):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    cases = {name: (fields, None) for name, fields in cases.items()}
    return folder, processes(folder, "flax", 1, cases, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")[0]


@needs("pt", "flax")
@pytest.mark.parametrize(
    ("group", "name"), [("devices", "olmo2"), *(("devices_more", each) for each in ("lion", "opt", "olmoe"))]
)
def test_devices_of_jax_train_as_one(runs, request, group, name):
    folder, found = request.getfixturevalue(group)
    assert isinstance(found[name], dict), found[name]
    same_run(Outcome(folder / name), runs[name][1])
    assert f"devices    8: fsdp 4 x {'experts' if name == 'olmoe' else 'tensor'} 2" in found[name]["text"]


@needs("pt", "flax")
def test_a_device_of_jax_holds_its_share(devices):
    _, found = devices
    whole = 8 * sum(parameter.size for parameter in RUNS["olmo2"]["model"].parameters("causal_lm"))
    weights, moments = found["olmo2"]["share"]
    assert weights < 1.1 * whole / 8
    assert moments == 2 * weights
    assert found["olmo2"]["read"] == whole  # once, by the one process that has all devices


@needs("pt", "flax")
def test_a_run_goes_on_on_another_mesh_and_then_in_another_framework(runs, devices, tmp_path):
    folder, found = devices
    assert [found[name]["result"].step for name in ("stopped", "resumed")] == [2, 4]
    shutil.copytree(folder / "stopped", tmp_path / "run")
    fields, expected = runs["olmo2"]
    same_run(run(saved_in(fields, tmp_path / "run"), backend="pt"), expected)


@pytest.mark.parametrize("wing", [param for param in WINGS if param.values[0] != "pt"])
@needs("pt")
def test_adapters_train_on_a_mesh(runs, request, wing, tmp_path):
    folder, found = request.getfixturevalue({"flax": "devices_more", "tf": "replicas_more"}[wing])
    assert isinstance(found["lora"], dict), found["lora"]
    expected = run(saved_in(runs["olmo2"][0], tmp_path / "run", **LORA), backend=wing)
    close(Outcome(folder / "lora").curve("loss"), expected.curve("loss"), 1e-8)
    same_weights(Outcome(folder / "lora").weights(), expected.weights(), 1e-8)


@needs("pt", "flax")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("large", "mesh is fsdp = 16, tensor = 1, experts = 1: 16 devices, and JAX has 8 of this kind"),
        ("heads", "kv_heads is 20, which tensor = 8 does not divide"),
    ],
)
def test_a_mesh_that_does_not_fit_jax_is_refused(devices, name, message):
    folder, found = devices
    assert message in found[name]["error"]
    assert not (folder / name).exists()


@needs("pt", "flax")
def test_processes_of_jax_train_as_one(runs, tmp_path):
    fields, expected = runs["olmo2"]
    cases = {"olmo2": (saved_in(fields, tmp_path / "olmo2", mesh={"tensor": 2}), None)}
    cases["interrupted"] = saved_in(fields, tmp_path / "interrupted"), (1, 1)
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    found = processes(tmp_path, "flax", 2, cases, **address)
    for each in found:
        assert isinstance(each["olmo2"], dict), each["olmo2"]
        stopped = each["interrupted"]["result"]
        assert (stopped.step, stopped.stopped) == (1, "SIGTERM")
    same_run(Outcome(tmp_path / "olmo2"), expected)
    whole = 8 * sum(parameter.size for parameter in RUNS["olmo2"]["model"].parameters("causal_lm"))
    assert found[0]["olmo2"]["read"] < 0.6 * whole


# -- Keras ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replicas(runs, tmp_path_factory):
    """The folder of runs on two devices of TensorFlow, and what they give."""
    folder, fields = tmp_path_factory.mktemp("replicas"), runs["olmo2"][0]
    cases = {
        "olmo2": (saved_in(fields, folder / "olmo2", mesh={"fsdp": 2}), None),
        "tensor": (saved_in(fields, folder / "tensor", mesh={"tensor": 2}), None),
    }
    return folder, processes(folder, "tf", 1, cases)[0]


@pytest.fixture(scope="module")
def replicas_more(runs, tmp_path_factory):
    """Further runs on them."""
    folder = tmp_path_factory.mktemp("more-replicas")
    cases = {name: (saved_in(runs[name][0], folder / name, mesh={"fsdp": 2}), None) for name in ("lion", "opt")}
    cases["lora"] = saved_in(runs["olmo2"][0], folder / "lora", mesh={"fsdp": 2}, **LORA), None
    return folder, processes(folder, "tf", 1, cases)[0]


@needs("pt", "tf")
@pytest.mark.parametrize(
    ("group", "name"), [("replicas", "olmo2"), ("replicas_more", "lion"), ("replicas_more", "opt")]
)
def test_replicas_of_keras_train_as_one(runs, request, group, name):
    folder, found = request.getfixturevalue(group)
    assert isinstance(found[name], dict), found[name]
    same_run(Outcome(folder / name), runs[name][1])


@needs("pt", "tf")
def test_keras_splits_rows_alone(replicas):
    assert "mesh.tensor is for PyTorch and JAX" in replicas[1]["tensor"]["error"]
