"""One run in each wing, in float64: the same losses and the same weights; and one run through all of them."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("omegaconf", reason="olmozoo[training] is not installed")

from olmozoo.backends import backend_class
from olmozoo.training import state
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.configs import CONFIGS, OTHERS, REFERENCE
from tests.helpers.runs import close, run, same_weights, write_tokens
from tests.helpers.wings import PRESENT, WINGS, several

STEPS = 50
LENGTH = 12
COMMON = {
    **{"precision": "fp64", "max_sequence_length": LENGTH, "max_duration": STEPS, "seed": 4},
    **{"global_train_batch_size": 5, "device_train_microbatch_size": 2, "save_interval": None},
}
ADAMW = {"learning_rate": 5e-3, "weight_decay": 0.1, "decay_embeddings": True}
RUNS = {
    "olmo2": {
        "model": CONFIGS["olmo2"],
        "data": {"generate_attention_mask": True},
        "optimizer": ADAMW,
        "scheduler": {"name": "linear_with_warmup", "t_warmup": 5, "warmup_min_lr": 1e-4},
        **{"max_grad_norm": 0.5, "softmax_auxiliary_loss": True, "auxiliary_loss_multiplier": 1e-3},
    },
    "olmo-lion": {
        "model": CONFIGS["olmo-clip-tied"],
        "optimizer": {"name": "lionw", "learning_rate": 1e-3, "weight_decay": 0.3, "decay_embeddings": True},
        "scheduler": {"name": "cosine_linear_envelope", "t_warmup": 200, "units": "tokens"},
        **{"max_grad_norm_ratio": 0.95, "freeze": ["model.layers.1.mlp*"], "loss_divisor": "positions"},
    },
    "opt": {
        "model": CONFIGS["opt"].replace(dropout=0.0, attention_dropout=0.0),
        "optimizer": {**ADAMW, "decay_norm_and_bias": True, "decay_embeddings": False},
        "activation_checkpointing": True,
    },
    "lora": {
        "model": CONFIGS["olmo2"],
        "optimizer": ADAMW,
        "lora": {"rank": 3, "alpha": 6.0, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    },
    "olmoe": {
        "model": CONFIGS["olmoe"].replace(router_aux_loss_coef=0.5),
        "data": {"generate_attention_mask": True},
        "optimizer": ADAMW,
        **{"max_grad_norm": 0.5, "activation_checkpointing": True},
    },
    "olmoe-lion-parts": {  # experts 1 and 2 are trained, and the attention
        "model": CONFIGS["olmoe"].replace(norm_topk_prob=True),
        "optimizer": {"name": "lionw", "learning_rate": 1e-3, "weight_decay": 0.3},
        **{"max_grad_norm_ratio": 0.95, "freeze": ["*.experts.[034].*", "*.mlp.gate.*", "*norm*", "model.embed*"]},
    },
    "lora-olmoe": {
        "model": CONFIGS["olmoe"],
        "optimizer": ADAMW,
        "lora": {"rank": 3, "alpha": 6.0, "target_modules": ["v_proj", "gate", "gate_proj", "down_proj"]},
    },
}


@pytest.fixture(scope="module", params=RUNS)
def reference(request, tmp_path_factory):
    """The name of a run, its fields, and what it gives in the first wing."""
    folder = tmp_path_factory.mktemp(request.param)
    fields = {**COMMON, **RUNS[request.param]}
    config = fields.pop("model")
    write_checkpoint(folder / "start", config)
    data = write_tokens(folder / "data", config.vocab_size, LENGTH * 9 + 5)
    stream = np.random.default_rng(2)
    for path in data["paths"]:
        ids = np.fromfile(path, "uint16")
        ids[stream.random(len(ids)) < 0.1] = config.pad_token_id
        ids.tofile(path)
    fields |= {"load_path": str(folder / "start"), "data": data | fields.get("data", {})}
    plain = {"activation_checkpointing": False}
    if not hasattr(config, "num_experts"):  # the load-balancing loss is of a micro-batch
        plain["device_train_microbatch_size"] = None
    found = run(fields, **plain, backend=REFERENCE, save_folder=str(folder / "run"))
    assert found.result.finished
    return request.param, fields, found


def compare(found, expected) -> None:
    assert found.indices == expected.indices
    names = ("loss", "loss_per_target", "grad_norm", "z_loss", "aux_loss")
    for name in [name for name in names if name in expected.steps[0]]:
        close(found.curve(name), expected.curve(name), 1e-8)
    assert (found.curve("lr") == expected.curve("lr")).all()
    same_weights(found.weights(), expected.weights(), 1e-7)


def test_a_run_learns_and_meets_what_it_is_to_test(reference):
    name, _, found = reference
    losses = found.curve("loss")
    assert losses[-5:].mean() < losses[:5].mean() - 0.2
    if name == "olmo2":
        assert (found.curve("grad_norm") > 0.5).sum() > 5
    assert len({line["epoch"] for line in found.steps}) > 10
    assert len(set(map(tuple, np.array(found.indices)[:, 1:].tolist()))) == STEPS


@pytest.mark.parametrize("wing", WINGS)
def test_wings_agree(reference, wing, tmp_path):
    """In micro-batches of 2, 2 and 1, and with activation checkpointing, where the first run has neither."""
    _, fields, expected = reference
    found = run(fields, backend=wing, save_folder=str(tmp_path))
    compare(found, expected)


@pytest.mark.parametrize("wing", OTHERS)
def test_adapters_agree(reference, wing, tmp_path):
    _, fields, expected = reference
    if "lora" not in fields:
        pytest.skip("it has no adapter")
    found = run(fields, backend=wing, save_folder=str(tmp_path), max_duration=STEPS, stop_at=6)
    again = run(fields, backend=REFERENCE, save_folder=str(tmp_path / "reference"), stop_at=6)
    close(found.curve("loss"), expected.curve("loss")[:6], 1e-8)
    from olmozoo.checkpoint.formats import safetensors

    adapters = [
        {n: t.read() for n, t in safetensors.read_tensors(o.folder / "adapter" / "adapter_model.safetensors").items()}
        for o in (found, again)
    ]
    same_weights(*adapters, 1e-7)
    assert all(name.startswith("base_model.model.model.layers.") for name in adapters[0])


@several
def test_a_run_goes_through_all_wings(reference, tmp_path):
    name, fields, expected = reference
    if name not in ("olmo2", "olmo-lion", "lora", "olmoe-lion-parts"):
        pytest.skip("these runs are enough")
    share = -(-STEPS // len(PRESENT))
    for number, wing in enumerate(PRESENT):
        found = run(fields, backend=wing, save_folder=str(tmp_path), stop_after=share)
        assert found.result.finished == (number == len(PRESENT) - 1)
        assert found.result.step == min(STEPS, share * (number + 1))
        if number:
            assert f"resumed from {tmp_path}/step{share * number}" in found.text
    compare(found, expected)
    assert list(state.steps(tmp_path)) == [share * n for n in range(1, len(PRESENT))] + [STEPS]


@pytest.mark.parametrize("wing", [wing for wing in WINGS if wing.values[0] != "pt"])
def test_a_run_compiles_each_part_once_a_shape(wing, tmp_path, monkeypatch):
    step, traces = backend_class(wing).training().TrainStep, Counter()

    def counted(method):
        return lambda *arguments: traces.update([method.__name__]) or method(*arguments)

    for name in ("_compute", "_apply", "_evaluate"):
        monkeypatch.setattr(step, name, counted(getattr(step, name)))
    config = CONFIGS["olmo2"]
    data = write_tokens(tmp_path / "data", config.vocab_size, LENGTH * 9 + 5)
    found = run(
        COMMON | {"precision": "fp32", "max_duration": 8, "model": config.to_dict(), "max_grad_norm": 1e-3},
        **{"backend": wing, "data": data, "save_folder": str(tmp_path / "run"), "eval_interval": 3},
        evaluators=[{"paths": data["paths"], "label_mask_paths": data["label_mask_paths"]}],
    )
    assert found.result.finished
    assert len(found.evaluations) == 3
    # Micro-batches of 2, 2 and 1 in a step, and 9 of 2 in an evaluation; every update is clipped.
    assert traces == {"_compute": 2, "_apply": 1, "_evaluate": 1}
