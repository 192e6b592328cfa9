"""AI2's trainer: recorded runs of it in every wing, its YAML files, its checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("omegaconf", reason="olmozoo[training] is not installed")

from olmozoo.errors import CheckpointError, ConfigError
from olmozoo.training import ai2
from olmozoo.training.config import load_config
from olmozoo.training.data import added_scores
from tests.helpers.ai2_trainer import Trainer, random_weights
from tests.helpers.runs import Outcome, close, run_config, same_weights, write_tokens
from tests.helpers.wings import WINGS, needs

FIXTURES = Path(__file__).parents[1] / "fixtures" / "training"
RECORDED = ("olmo2-sft-masked", "olmo1-continue")


def run_yaml(file, folder, wing, *overrides) -> tuple[Outcome, list[str]]:
    config, notes = load_config(file, [f"--save_folder={folder}", f"--backend={wing}", *overrides])
    return run_config(config), notes


def native_weights(folder) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in ai2.open_weights(Path(folder))[1].items()}


def compare(found: Outcome, expected: list[dict]) -> None:
    """Hold a run against AI2's: every step."""
    assert [line["step"] for line in found.steps] == [line["step"] for line in expected]
    assert [line["epoch"] for line in found.steps] == [line["epoch"] for line in expected]
    assert found.indices == [[line["step"], *line["indices"]] for line in expected]
    close(found.curve("loss"), [line["loss"] for line in expected], 1e-5)
    norms = np.array([line["grad_norm"] for line in expected])
    close(found.curve("grad_norm") / norms, np.ones_like(norms), 5e-5)
    np.testing.assert_allclose(found.curve("lr"), [line["lr"] for line in expected], rtol=1e-15, atol=0)
    if "z_loss" in expected[0]:
        close(found.curve("z_loss"), [line["z_loss"] for line in expected], 1e-5)


# -- recorded runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_run(name, wing, tmp_path, monkeypatch):
    monkeypatch.chdir(FIXTURES / name)
    found, _ = run_yaml("config.yaml", tmp_path / "run", wing)
    expected = json.loads(Path("expected.json").read_text())
    compare(found, expected["steps"])
    bounds = [line["max_grad_norm_applied"] for line in expected["steps"]]
    close(found.curve("max_grad_norm"), bounds, 0)
    evaluations = [line for line in expected["evals"] if len(line) > 1]
    for line, recorded in zip(found.evaluations, evaluations, strict=True):
        assert line["step"] == recorded["step"]
        for key, value in recorded.items():
            assert abs(line[key] - value) <= 2e-5 * (value if "Perplexity" in key else 1), (line["step"], key)
    same_weights(found.weights(), native_weights("final-unsharded"), 1e-4)
    assert found.result.finished


@needs("pt")
def test_the_micro_batch_does_not_change_a_recorded_run(tmp_path, monkeypatch):
    monkeypatch.chdir(FIXTURES / RECORDED[1])
    found, _ = run_yaml("config.yaml", tmp_path / "run", "pt", "--device_train_microbatch_size=3")
    compare(found, json.loads(Path("expected.json").read_text())["steps"])


# -- runs of the formulas ---------------------------------------------------------------------------------------------

MODEL = {
    **{"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 24, "max_sequence_length": 18},
    **{"vocab_size": 70, "embedding_size": 70, "eos_token_id": 0, "pad_token_id": 0, "weight_tying": False},
    **{"layer_norm_type": "rms", "layer_norm_eps": 1e-5, "attention_layer_norm": True, "norm_after": True},
    **{"layer_norm_with_affine": True, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False},
    **{"rope": True, "include_bias": False, "activation_type": "swiglu", "block_type": "sequential"},
    **{"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0},
}
ADAMW = {"name": "adamw", "learning_rate": 4e-3, "weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-6}
ADAMW |= {"decay_norm_and_bias": False, "decay_embeddings": False}
LION = {"name": "lionw", "learning_rate": 4e-4, "weight_decay": 0.1, "betas": [0.8, 0.95]}
LION |= {"decay_norm_and_bias": False, "decay_embeddings": False}
RUNS = {
    "adamw": {"optimizer": ADAMW, "max_grad_norm": 0.6},
    "lionw": {"optimizer": LION, "max_grad_norm_ratio": 0.9},
}
STEPS, SAVED = 8, 4  # and the step whose checkpoint a run goes on from: in the middle of the second epoch


@pytest.fixture(scope="module", params=RUNS)
def formulas(request, tmp_path_factory):
    """A run of tokens in uint32 with masks, pads and filtered instances: its folder, its steps and its last weights.

    pad_token_id and eos_token_id are one, as in AI2's defaults, so that ends of texts are masked, some of which begin
    an instance.
    """
    folder = tmp_path_factory.mktemp(request.param)
    data = write_tokens(folder, MODEL["vocab_size"], 18 * 8 + 5, dtype="uint32")
    stream = np.random.default_rng(7)
    for number, path in enumerate(data["paths"]):
        ids = np.fromfile(path, "uint32")
        ids[stream.random(len(ids)) < 0.12] = 0
        ids[18 * (2 + number) : 18 * (2 + number) + 2] = 0  # an instance begins with two
        ids[40:52] = np.tile([7, 9, 8], 4)  # and one repeats
        ids[18 * 6 + 9 : 18 * 7] = 0  # and one is padded by nine
        ids.tofile(path)
    config = {
        **{"run_name": "formulas", "seed": 5, "model": MODEL, "precision": "fp32", "save_overwrite": True},
        **{"softmax_auxiliary_loss": True, "auxiliary_loss_multiplier": 0.3, "save_folder": str(folder / "unused")},
        "scheduler": {
            **{"name": "cosine_with_warmup", "units": "tokens", "t_warmup": 300, "t_max": 900},
            **{"grad_clip_warmup_steps": 432, "grad_clip_warmup_factor": 0.5},
        },
        "data": data
        | {"generate_attention_mask": True}
        | {"instance_filter": {"repetition_max_period": 5, "repetition_min_period": 1, "repetition_max_count": 4}},
        **{"global_train_batch_size": 6, "device_train_microbatch_size": 4, "max_duration": STEPS, "stop_at": STEPS},
        **{"load_path": str(folder / "start"), "reset_optimizer_state": True, "reset_trainer_state": True},
        **RUNS[request.param],
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    trainer = Trainer(config, random_weights(MODEL))
    (folder / "start").mkdir()
    write_start(folder / "start", trainer)
    lines = trainer.run(SAVED)
    trainer.save(folder / "step4-unsharded")
    trainer.save(folder / "bare-names", prefix="")
    assert trainer.epoch == 1
    assert trainer.seen == 12
    lines += trainer.run(STEPS)
    trainer.save(folder / "final")
    return folder, lines, native_weights(folder / "final")


def write_start(folder, trainer):
    """A checkpoint without the state of an optimizer or a run."""
    import torch

    torch.save({name: value.detach() for name, value in trainer.w.items()}, folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": MODEL}))


@pytest.mark.pt
@pytest.mark.parametrize("wing", WINGS)
def test_masks_filter_and_uint32(formulas, wing, tmp_path):
    only_adamw(formulas, wing)
    folder, lines, weights = formulas
    found, _ = run_yaml(folder / "config.yaml", tmp_path / "run", wing)
    compare(found, lines)
    same_weights(found.weights(), weights, 2e-4)


@pytest.mark.pt
@pytest.mark.parametrize("wing", WINGS)
def test_a_checkpoint_of_its_own_is_resumed_in_the_middle_of_an_epoch(formulas, wing, tmp_path):
    only_adamw(formulas, wing)
    resume(formulas, wing, "step4-unsharded", tmp_path)


@needs("pt")
def test_a_weight_decay_of_zero_stays(formulas, tmp_path):
    """As in that trainer, which takes the file's weight decay where the checkpoint has more than 0."""
    import torch

    folder, *_ = formulas
    shutil.copytree(folder / "step4-unsharded", tmp_path / "zero-unsharded")
    state = torch.load(tmp_path / "zero-unsharded" / "optim.pt", weights_only=False)
    for group in state["param_groups"]:
        group["weight_decay"] = 0.0
    torch.save(state, tmp_path / "zero-unsharded" / "optim.pt")
    given = yaml.safe_load((folder / "config.yaml").read_text())
    resumed = {name: value for name, value in given.items() if not name.startswith("reset_")}
    outcomes = []
    for start, decay in ((tmp_path / "zero-unsharded", 0.1), (folder / "step4-unsharded", 0.0)):
        optimizer = given["optimizer"] | {"weight_decay": decay}
        file = tmp_path / f"{decay}.yaml"
        file.write_text(yaml.safe_dump(resumed | {"load_path": str(start), "optimizer": optimizer}))
        outcomes.append(run_yaml(file, tmp_path / f"run-{decay}", "pt")[0])
    assert outcomes[0].curve("loss").tolist() == outcomes[1].curve("loss").tolist()
    same_weights(outcomes[0].weights(), outcomes[1].weights(), 0)
    line = "optimizer.weight_decay = 0 of the checkpoint, not of the config, for 15 parameters such as"
    assert [line in outcome.text for outcome in outcomes] == [True, False]


@needs("pt")
def test_names_of_the_optimizer_without_a_prefix(formulas, tmp_path):
    resume(formulas, "pt", "bare-names", tmp_path)


def only_adamw(formulas, wing):
    if wing != "pt" and formulas[0].name.startswith("lionw"):
        pytest.skip("one wing is enough: tests/training/test_wings.py compares the others with it")


def resume(formulas, wing, start, tmp_path):
    folder, lines, weights = formulas
    given = yaml.safe_load((folder / "config.yaml").read_text())
    resumed = {name: value for name, value in given.items() if not name.startswith("reset_")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(resumed | {"load_path": str(folder / start)}))
    found, _ = run_yaml(tmp_path / "config.yaml", tmp_path / "run", wing)
    compare(found, lines[SAVED:])
    same_weights(found.weights(), weights, 2e-4)
    assert "goes on after step 4, epoch 1, instance 12 of it" in found.text


def test_scores_of_masked_tokens_are_those_of_the_formula():
    seen = np.array([[False, False, True, False, True], [True] * 5])
    least = np.finfo(np.float32).min
    with np.errstate(over="ignore"):
        causal = np.triu(np.full((5, 5), least, np.float32), 1)
        expected = causal + np.where(seen, np.float32(0), least)[:, None, None, :]
    expected[expected == -np.inf] = least
    np.testing.assert_array_equal(added_scores(seen), expected)
    assert added_scores(seen).dtype == np.float32


# -- YAML -------------------------------------------------------------------------------------------------------------


def config_of(**fields) -> dict:
    return {
        "save_folder": "run",
        "model": {**MODEL, "pad_token_id": 1},
        "data": {"paths": ["a.npy"], "drop_last": True},
        "load_path": "start",
        "reset_optimizer_state": True,
        "reset_trainer_state": True,
        "max_duration": "1ep",
        **fields,
    }


def translated(**fields) -> tuple[dict, str]:
    ours, notes = ai2.translate(config_of(**fields), "config.yaml")
    return ours, "\n".join(notes)


def test_defaults_are_those_of_its_schema():
    ours, notes = translated()
    optimizer, scheduler = ours["optimizer"], ours["scheduler"]
    assert optimizer["name"] == "lionw"
    assert optimizer["learning_rate"] == 1e-4
    assert optimizer["weight_decay"] == 0.01
    assert optimizer["eps"] == 1e-5
    assert optimizer["betas"] == [0.9, 0.95]
    assert scheduler["name"] == "cosine_with_warmup"
    assert scheduler["t_warmup"] == 100
    assert scheduler["warmup_min_lr"] == pytest.approx(1e-5)
    assert "a tenth of the peak" in notes
    assert ours["seed"] == 6198
    assert ours["global_train_batch_size"] == 512
    assert ours["device_train_microbatch_size"] == 16
    assert ours["data"]["memmap_dtype"] == "uint16"
    assert ours["max_grad_norm"] is None


def test_sums_are_divided_by_positions():
    ours, notes = translated(evaluators=[{"label": "a", "data": {"paths": ["v.npy"]}}])
    assert ours["loss_divisor"] == ours["eval_divisor"] == "positions"
    assert "loss_divisor: positions" in notes
    assert "eval_divisor: positions" in notes


def test_the_factor_of_the_z_loss_is_not_read():
    ours, notes = translated(softmax_auxiliary_loss=True, auxiliary_loss_multiplier=1e-5)
    assert ours["auxiliary_loss_multiplier"] == 1e-4
    assert "auxiliary_loss_multiplier: 1e-4" in notes
    assert "1e-05" in notes


def test_clipping_warms_up_one_step_late():
    scheduler = {"grad_clip_warmup_steps": 5, "grad_clip_warmup_factor": 2.0}
    ours, notes = translated(scheduler=scheduler)
    assert ours["clip_one_step_late"]
    assert "clip_one_step_late" in notes
    ours, notes = translated(max_grad_norm=1.0, max_grad_norm_ratio=0.5)
    assert ours["clip_fused"]
    assert ours["max_grad_norm"] is None
    assert "clip_fused" in notes


@pytest.mark.parametrize(
    ("fields", "extra", "stop_at"),
    [
        ({"max_duration": "2ep"}, None, None),
        ({"max_duration": 14}, 10, None),
        ({"max_duration": "14"}, 10, None),
        ({"max_duration": "1e4T"}, 10, None),
        ({"max_duration": 14, "stop_at": 12}, None, 12),
        ({"max_duration": "2ep", "stop_at": 3}, None, 3),
    ],
)
def test_it_goes_on_ten_steps(fields, extra, stop_at):
    ours, notes = translated(**fields)
    assert ours.get("extra_steps") == extra
    assert ours.get("stop_at") == stop_at
    assert ("extra_steps: 10" in notes) == (extra == 10)


def test_what_is_restored():
    ours, notes = translated(reset_optimizer_state=False)
    assert ours["restore_optimizer_settings"] == "all"
    assert "weight_decay" in notes
    ours, _ = translated(reset_optimizer_state=False, reset_trainer_state=False)
    assert ours["restore_optimizer_settings"] == "betas"
    assert not ours["reset_trainer_state"]
    ours, notes = translated(reset_optimizer_state=False, reset_trainer_state=False, restore_dataloader=False)
    assert ours["reset_trainer_state"]
    assert "restore_dataloader" in notes
    ours, _ = translated(reset_trainer_state=False)
    assert ours["scheduler"]["bolt_on_warmup"]


def test_batches_that_are_not_full_are_left_out():
    ours, notes = translated(data={"paths": ["a.npy"]})
    assert ours["data"]["drop_last"]
    assert "data.drop_last" in notes
    assert "data.drop_last" not in translated()[1]


def test_masks_and_filter_are_explained():
    data = {"paths": ["a.npy"], "drop_last": True, "generate_attention_mask": True, "instance_filter": {}}
    ours, notes = translated(data=data)
    assert ours["data"]["leading_pads_see_all"]
    assert ours["model"] == {"pad_token_id": 1}
    assert "data.leading_pads_see_all" in notes
    assert "padding counts as repetition" in notes
    assert "are both" not in notes
    assert "pad_token_id and eos_token_id are both 0" in translated(data=data, model=MODEL)[1]


def test_older_flags_of_decay():
    optimizer = {"no_decay_norm_and_bias": True, "decay_embeddings": True, "decay_norm_and_bias": True}
    assert not translated(optimizer=optimizer)[0]["optimizer"]["decay_embeddings"]
    optimizer["no_decay_norm_and_bias"] = False
    assert translated(optimizer=optimizer)[0]["optimizer"]["decay_norm_and_bias"]


def test_sets_are_sorted_by_their_labels():
    ours, _ = translated(data={"datasets": {"b": ["2.npy"], "a": ["1.npy", "3.npy"]}, "drop_last": True})
    assert ours["data"]["paths"] == ["1.npy", "3.npy", "2.npy"]


def test_evaluators_have_masks_of_their_own():
    data = {"paths": ["a.npy"], "drop_last": True, "generate_attention_mask": True}
    evaluators = [{"label": "a", "data": {"paths": ["v.npy"]}}]
    ours, notes = translated(data=data, evaluators=evaluators, eval_subset_num_batches=3)
    assert ours["evaluators"][0]["generate_attention_mask"] is False
    assert ours["evaluators"][0]["subset_num_batches"] == 3
    assert "subset_num_batches" in notes
    assert translated(evaluators=evaluators)[0]["evaluators"][0]["subset_num_batches"] is None


def test_a_tokenizer_beside_the_config_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, notes = load_config(FIXTURES / RECORDED[1] / "config.yaml")
    assert config.tokenizer == str(FIXTURES / RECORDED[1] / "tokenizer.json")
    assert not any("without a tokenizer" in note for note in notes)


def test_a_tokenizer_that_is_not_there_is_left_out():
    ours, notes = translated(tokenizer={"identifier": "tokenizers/no-such.json"})
    assert "tokenizer" not in ours
    assert "no-such.json is not there" in notes


def test_the_config_of_a_checkpoint_is_a_config(monkeypatch):
    """The file has every field of the schema."""
    monkeypatch.chdir(FIXTURES / RECORDED[1])
    ours, _ = ai2.translate(yaml.safe_load(Path("initial-unsharded/config.yaml").read_text()), "config.yaml")
    assert ours["stop_at"] == 6
    assert ours["model"]["hidden_size"] == 48


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_durations": 3}, "unknown field max_durations"),
        ({"data": {"paths": ["a.npy"], "generate_doc_lengths": True}}, "data.generate_doc_lengths is True"),
        ({"data": {"paths": ["a.npy"], "pad_direction": "left"}}, "data.pad_direction is 'left'"),
        ({"data": {"paths": ["a.npy"], "path": []}}, "unknown field data.path"),
        ({"fused_loss": True}, "fused_loss is True"),
        ({"optimizer": {"selective_updates": True}}, "optimizer.selective_updates"),
        ({"precision": "amp_fp16"}, "precision is 'amp_fp16'"),
        ({"evaluators": [{"label": "piqa", "type": "downstream"}]}, "(piqa) is of type 'downstream'"),
        ({"model": {**MODEL, "residual_dropout": 0.1}}, "model.residual_dropout is 0.1"),
        ({"model": {n: v for n, v in MODEL.items() if n != "attention_dropout"}}, "attention_dropout is not set"),
    ],
)
def test_what_is_not_built_is_refused(fields, problem):
    with pytest.raises(ConfigError) as caught:
        translated(**fields)
    assert problem in str(caught.value)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@needs("pt")
def test_a_checkpoint_without_its_state_is_refused(formulas, tmp_path):
    folder, _, _ = formulas
    given = yaml.safe_load((folder / "config.yaml").read_text()) | {"reset_optimizer_state": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(CheckpointError, match=r"no optim\.pt: set reset_optimizer_state"):
        run_yaml(tmp_path / "config.yaml", tmp_path / "run", "pt")


@needs("pt")
def test_a_number_of_an_older_version_is_in_batches(formulas, tmp_path):
    import torch

    folder, lines, _ = formulas
    old = tmp_path / "old"
    shutil.copytree(folder / "step4-unsharded", old)
    trainer = torch.load(old / "train.pt", weights_only=False)
    names = ("global_train_examples_seen_this_epoch", "global_train_tokens_seen", "epoch")
    trainer = {name: value for name, value in trainer.items() if name not in names} | {"global_data_step": 1}
    torch.save(trainer, old / "train.pt")
    given = yaml.safe_load((folder / "config.yaml").read_text()) | {"load_path": str(old), "stop_at": 5}
    given |= {"reset_optimizer_state": False, "reset_trainer_state": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    found, _ = run_yaml(tmp_path / "config.yaml", tmp_path / "run", "pt")
    assert found.indices == [[5, *lines[1]["indices"]]]
    assert found.steps[0]["tokens"] == 2 * 6 * 18


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in ("optimizer", "scheduler", "data", "wandb") for value in (True, [1], "x")),
        *(("global_train_batch_size", value) for value in (None, "x", [1])),
        *(("save_interval", "x"), ("eval_subset_num_batches", {}), ("evaluators", [1]), ("evaluators", "x")),
        *(("tokenizer", {"identifier": 1}), ("data", {"paths": True}), ("optimizer", {"learning_rate": 10**400})),
    ],
)
def test_fields_of_wrong_kinds_are_named(field, value):
    data = yaml.safe_load((FIXTURES / RECORDED[1] / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=field):
        ai2.translate({**data, field: value}, "config.yaml")


@pytest.mark.parametrize(
    "text",
    ["!!int ''", "!!bool x", "!!timestamp x", ":".join(["1"] * 3000) + ".5", "[" * 100_000, "x" * (1 << 20)],
    ids=["int", "bool", "timestamp", "float", "deep", "large"],
)
def test_yaml_that_cannot_be_is_refused(tmp_path, text):
    from conversion import olmo_native

    (tmp_path / "config.yaml").write_text(f"a: {text}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        olmo_native.read_config(tmp_path)


def test_states_of_wrong_kinds_are_refused(monkeypatch):
    """Each entry of train.pt and of optim.pt, in its place values of other kinds."""
    from conversion import archives

    folder = FIXTURES / RECORDED[1] / "initial-unsharded"
    config, _ = load_config(FIXTURES / RECORDED[1] / "config.yaml", ["--save_folder=x", "--reset_trainer_state=false"])
    config.reset_optimizer_state = config.reset_trainer_state = False
    model, _ = ai2.open_weights(folder)
    good = {name: archives.read_archive(folder / name) for name in ("train.pt", "optim.pt")}
    assert ai2.open_state(folder, model, config).progress.updates == 6

    def refused(file, content):
        with monkeypatch.context() as patched:
            patched.setattr(archives, "read_archive", lambda path: {**good, file: content}[path.name])
            try:
                ai2.open_state(folder, model, config)
            except CheckpointError as error:
                assert file in str(error)  # noqa: PT017

    odd = (None, True, -1, 10**400, float("nan"), "x" * 1000, [0] * 1000, {}, {"a": 1})
    for value in odd:
        for name in ("global_step", "global_train_examples_seen", "epoch", "global_train_tokens_seen"):
            refused("train.pt", {**good["train.pt"], name: value})
        optim = good["optim.pt"]
        for name in optim:
            refused("optim.pt", {**optim, name: value})
        for name in optim["param_groups"][0]:
            groups = [{**optim["param_groups"][0], name: value}, *optim["param_groups"][1:]]
            refused("optim.pt", {**optim, "param_groups": groups})
        first = next(iter(optim["state"]))
        for name in optim["state"][first]:
            states = {**optim["state"], first: {**optim["state"][first], name: value}}
            refused("optim.pt", {**optim, "state": states})
