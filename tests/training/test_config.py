"""The config of a run: files, overrides, paths, and what is wrong with a run before its first step."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from olmozoo import ConfigError, InputError, OlmozooError
from olmozoo.training import TrainConfig, load_config, loop
from olmozoo.training.summary import check_mesh
from tests.helpers.checkpoints import TEXT_CONFIG, write_checkpoint, write_text_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.wings import needs

pytest.importorskip("omegaconf")
FIELDS = {
    "save_folder": "run",
    "load_path": "model",
    "data": {"paths": ["ids.npy"]},
    "max_sequence_length": 16,
    "global_train_batch_size": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data, good and bad, beside run.yaml."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "model").mkdir()
    write_text_checkpoint(folder / "model")
    write_checkpoint(folder / "bare", TEXT_CONFIG, dtype="float32")
    (folder / "big").mkdir()
    TEXT_CONFIG.replace(vocab_size=70_000).save_pretrained(folder / "big")
    (folder / "big/model.safetensors").write_bytes((folder / "bare/model.safetensors").read_bytes())
    (folder / "nothing").mkdir()
    ids = np.random.default_rng(0).integers(2, 300, (9, 16))
    ids.astype(np.uint16).tofile(folder / "ids.npy")
    ids.astype(np.uint32).tofile(folder / "ids32.npy")
    np.where(ids == ids.max(), 320, ids).astype(np.uint16).tofile(folder / "high.npy")
    np.save(folder / "saved.npy", ids.astype(np.uint16))
    np.ones((8, 16), bool).tofile(folder / "mask.npy")
    np.save(folder / "saved-mask.npy", np.ones((9, 16), bool))
    np.tile(np.arange(16) < 1, (9, 1)).tofile(folder / "false.npy")  # nothing predicts the first token of a row
    (folder / "empty.npy").write_bytes(b"")
    (folder / "odd.npy").write_bytes(b"a" * 65)
    (folder / "run.yaml").write_text(yaml.safe_dump(FIELDS))
    (folder / "broken.yaml").write_text("data: [1")
    (folder / "list.yaml").write_text("- 1")
    (folder / "empty.yaml").write_text("")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing is there
    monkeypatch.chdir(folder)
    return folder


def refusal(*overrides: str, file: str = "run.yaml") -> str:
    with pytest.raises(OlmozooError) as caught:
        loop.dry_run(load_config(file, overrides)[0])
    return str(caught.value)


# A user's mistake, and what the message has to name.
MISTAKES = [
    ("--optimiser.name=adamw", "no field optimiser: did you mean optimizer?"),
    ("--optimizer.lr=1e-4", "no field optimizer.lr: there are name, learning_rate"),
    ("--data.path=[ids.npy]", "no field data.path: did you mean data.paths?"),
    ("--model.hidden_sizes=8", "no field hidden_sizes"),
    ("--load_path=null --model={model_type: olmo2, hidden_sizes: 8}", "hidden_sizes: did you mean model.hidden_size?"),
    ("--load_path=null --model={model_type: llama}", "'llama', expected one of flex_olmo, olmo"),
    ("--load_path=null --model={preset: olmo2}", "no preset 'olmo2'; there are flexolmo-2x7b"),
    ("--load_path=null", "neither load_path nor model is set"),
    ("--load_path=modle", "load_path: there is no folder 'modle'"),
    ("--load_path=nothing", "nothing/config.json"),
    ("--tokenizer=modle", "tokenizer: there is no folder 'modle'"),
    ("--tokenizer=bare", "bare has no tokenizer.json"),
    ("--load_path=bare --sample_prompt=Hello", "sample_prompt is 'Hello', and the run has no tokenizer"),
    ("--optimizer.learning_rate=1e-4x", "optimizer.learning_rate is '1e-4x', expected a number"),
    ("--optimizer.learning_rate=.nan", "optimizer.learning_rate is nan, expected 0 or more"),
    ("--optimizer.betas=0.9", "optimizer.betas is 0.9, expected a list, as [a number, ...]"),
    ("--optimizer.betas=[0.9]", "optimizer.betas are [0.9], expected two numbers"),
    ("--optimizer.name=sgd", "optimizer.name is 'sgd', expected 'adamw' or 'lionw'"),
    ("--scheduler.name=cosine", "scheduler.name is 'cosine', expected 'cosine_with_warmup'"),
    ("--scheduler.name=inverse_sqrt_with_warmup", "scheduler.t_warmup is 0, expected more"),
    ("--scheduler.t_warmup=0.5", "scheduler.t_warmup is 0.5, expected an integer"),
    ("--precision=bf16", "precision is 'bf16', expected 'fp32' or 'amp_bf16' or 'fp64'"),
    ("--max_duration=3epochs", "max_duration is '3epochs', expected steps, tokens as '1e9T' or epochs as '3ep'"),
    ("--max_duration=1.2.3ep", "max_duration is '1.2.3ep'"),
    ("--max_duration=1e400T", "max_duration is '1e400T'"),
    ("--max_duration=0.1ep", "max_duration is '0.1ep', which is no step"),
    ("--max_duration=0", "max_duration is 0, which is no step"),
    ("--seed=-1", "seed is -1, expected 0 or more"),
    ("--save_folder=null", "save_folder is None, expected text"),
    ("--save_folder=", "save_folder is"),
    ("--save_folder=model", "save_folder model is the folder of a model"),
    ("--save_folder=ids.npy", "save_folder ids.npy is a file"),
    ("--backend=torch", "backend is 'torch', expected one of pt, tf, flax"),
    ("--wandb=true", "wandb is True, expected fields of its own, as wandb.project"),
    ("--global_train_batch_size=10", "9 instances, and a batch is 10"),
    ("--device_train_microbatch_size=0", "device_train_microbatch_size is 0, expected more than 0"),
    ("--max_sequence_length=4096", "max_sequence_length is 4096, and the model has 2048 positions"),
    ("--max_sequence_length=1", "max_sequence_length is 1, expected at least 2"),
    ("--max_sequence_length=null", "max_sequence_length is not set"),
    ("--data.paths=ids.npy", "data.paths is 'ids.npy', expected a list, as [text, ...]"),
    ("--data.paths=[]", "data.paths is empty"),
    ("--data.paths=[nowhere.npy]", "nowhere.npy: No such file"),
    ("--data.paths=[saved.npy]", "saved.npy was written by numpy.save"),
    ("--data.paths=[empty.npy]", "empty.npy has 0 bytes, expected 32 for one instance of 16"),
    ("--data.paths=[odd.npy]", "odd.npy has 65 bytes, which uint16 of 2 bytes do not fill"),
    ("--data.paths=[high.npy]", "high.npy has the id 320 as uint16, and the model's vocabulary has 320"),
    (
        "--data.paths=[ids32.npy]",
        "ids32.npy: every second token is 0 or 1: it is of uint32, and memmap_dtype is uint16",
    ),
    ("--data.paths=[model]", "model has no manifest.json"),
    ("--data.memmap_dtype=uint32", "as uint32, and the model's vocabulary has 320"),
    ("--data.memmap_dtype=int16", "data.memmap_dtype is 'int16', expected one of uint8"),
    (
        "--load_path=big",
        "data.memmap_dtype is not set, which is uint16, and the ids of a vocabulary of 70000 do not fit",
    ),
    ("--data.label_mask_paths=[mask.npy]", "mask.npy has 8 rows of 16 bools, and ids.npy 9 of 16 tokens"),
    ("--data.label_mask_paths=[saved-mask.npy]", "saved-mask.npy was written by numpy.save"),
    ("--data.label_mask_paths=[false.npy]", "the training data have nothing to learn: every mask is false"),
    (
        "--evaluators=[{label: x, paths: [ids.npy], label_mask_paths: [false.npy]}]",
        "the data of the evaluator x have nothing to learn",
    ),
    ("--data.label_mask_paths=[mask.npy,mask.npy]", "data.label_mask_paths are 2, expected 1"),
    ("--data.weights=[-1]", "data.weights[0] is -1.0, expected more than 0"),
    ("--data.generate_attention_mask --model.pad_token_id=null", "the model has no pad_token_id"),
    ("--data.paths=${path.glob:'*.npx'}", "data.paths: no file fits *.npx"),
    ("--run_name=${oc.env:OLMOZOO_NOT_SET}", "run_name: Environment variable 'OLMOZOO_NOT_SET' not found"),
    ("--run_name=${nothing}", "run_name: Interpolation key 'nothing' not found"),
    ("--lora.target_modules=[qkv_proj]", "qkv_proj; there are down_proj"),
    ("--lora.rank=0", "lora.rank is 0, expected more than 0"),
    ("--mesh.fsdp=0", "mesh.fsdp is 0, expected more than 0"),
    ("--mesh.data=2", "mesh has no axis data: there are fsdp, tensor, experts"),
    ("--mesh=4", "mesh is 4, expected a mapping, as {name: an integer}"),
    ("--mesh.fsdp=2", "global_train_batch_size is 3, which fsdp = 2 does not divide"),
    ("--lora.dropout=1", "lora.dropout is 1.0, expected 0 to less than 1"),
    ("--freeze=[model.layerz*]", "freeze fits no parameter of the model: 1 problem(s)\n  - model.layerz*"),
    ("--freeze=['*']", "freeze leaves no parameter"),
    ("--evaluators=[{label: x}]", "evaluators[0] has no data, expected paths, datasets or file"),
    (
        "--evaluators=[{label: x, paths: [ids.npy], quantization: int3}]",
        "evaluators[0].quantization is 'int3', expected None or 'int8' or 'int4'",
    ),
    ("--evaluators=[{label: x, paths: [ids.npy], group_size: 0}]", "group_size is 0, expected more than 0"),
    (
        "--evaluators=[{label: x, paths: [ids.npy], quantization: int4, group_size: 48}]",
        "the evaluator x: group_size 48 does not divide every layer",
    ),
    ("--evaluators=[{label: x, paths: [nowhere.npy]}]", "the data of the evaluator x cannot be used"),
    ("--evaluators=[{label: x, file: nowhere.txt}]", "nowhere.txt"),
    ("--evaluators.0.label=x", "evaluators is {'0': {'label': 'x'}}, expected a list of fields"),
    ("--data.paths.7=ids.npy", "an entry of a list is named by its number from 0"),
    ("--data.paths.first=ids.npy", "an entry of a list is named by its number from 0"),
    ("--reset_optimizer_state=false", "model is a model without the state of an optimizer"),
    ("--data.paths=[ids.npy", "--data.paths=[ids.npy cannot be set"),
    ("seed", "'seed' is no override, expected --field=value"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[mistake for mistake, _ in MISTAKES])
def test_a_mistake_is_named_before_anything_is_written(here, mistake, message):
    overrides = [f"--{part}" for part in mistake.removeprefix("--").split(" --")] if "--" in mistake else [mistake]
    assert message in refusal(*overrides)
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("nowhere.yaml", "there is no file nowhere.yaml"),
        ("broken.yaml", "broken.yaml is not readable YAML"),
        ("list.yaml", "list.yaml has no fields at its top level"),
        ("empty.yaml", "save_folder is not set"),
        ("model", "model is not a regular file"),
    ],
)
def test_a_bad_file_is_named(here, file, message):
    assert message in refusal(file=file)


@needs("pt")
def test_a_device_that_is_absent_is_named_before_anything_is_written(here):
    config, _ = load_config("run.yaml", ["--device=tpu:7", "--backend=pt"])
    with pytest.raises(OlmozooError, match="device is 'tpu:7', and PyTorch has cpu"):
        loop.train(config)
    assert not (here / "run").exists()


def test_save_overwrite_keeps_what_the_run_starts_from(here, tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    write_text_checkpoint(run / "model")
    message = refusal(f"--save_folder={run}", f"--load_path={run / 'model'}", "--save_overwrite")
    assert f"save_overwrite would remove {run / 'model'}" in message
    assert "has a finished model and no step" in refusal(f"--save_folder={run}", f"--load_path={run / 'model'}")


def test_every_mistake_is_in_one_error(here):
    message = refusal("--seed=-1", "--precision=half", "--optimizer.eps=-1")
    assert all(name in message for name in ("seed is -1", "precision is 'half'", "optimizer.eps is -1"))


# -- what is read -----------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_entries_of_lists_are_numbered(here):
    config, notes = load_config(
        "run.yaml",
        [
            "--optimizer.betas=[0.8,0.9]",
            "--evaluators=[{label: a, paths: [ids.npy]}, {label: b, paths: [ids.npy]}]",
            "--evaluators.1.label=c",
            "--lora.target-modules=[q_proj]",
            "--tensorboard",
            "run_name=first",
            "--save_interval=null",
            "--seed=${global_train_batch_size}",
        ],
    )
    assert notes == []
    assert config.optimizer.betas == [0.8, 0.9]
    assert [evaluator.label for evaluator in config.evaluators] == ["a", "c"]
    assert config.lora is not None
    assert (config.lora.target_modules, config.lora.rank) == (["q_proj"], 8)
    assert (config.tensorboard, config.run_name, config.save_interval, config.seed) == (True, "first", None, 3)


def test_what_is_written_is_read_again(here, tmp_path):
    config, _ = load_config("run.yaml", ["--lora.rank=3", "--wandb.project=x", "--data.instance_filter={}"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml")[0] == config


def test_paths_that_are_not_here_are_taken_from_beside_the_config(here, tmp_path, monkeypatch):
    overrides = [
        "--evaluators=[{label: a, paths: [ids.npy]}, {label: b, file: run.yaml}, {label: c, datasets: {d: [ids.npy]}}]",
        "--data.label_mask_paths=[mask.npy]",
        "--tokenizer=model",
    ]
    near, _ = load_config("run.yaml", overrides)
    assert (near.load_path, near.data.paths, near.tokenizer) == ("model", ["ids.npy"], "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask.npy").write_bytes(b"")
    far, _ = load_config(here / "run.yaml", overrides)
    assert (far.load_path, far.tokenizer) == (str(here / "model"), str(here / "model"))
    assert far.data.paths == far.evaluators[0].paths == far.evaluators[2].datasets["d"] == [str(here / "ids.npy")]
    assert far.evaluators[1].file == str(here / "run.yaml")
    assert far.data.label_mask_paths == ["mask.npy"], "what is in the current folder comes first"
    assert far.save_folder == "run"
    found, _ = load_config(here / "run.yaml", ["--data.paths=${path.glob:'ids*.npy'}"])
    assert [Path(path).name for path in found.data.paths] == ["ids.npy", "ids32.npy"]


def test_a_config_is_made_in_python_too():
    with pytest.raises(ConfigError, match="save_folder is not set"):
        loop.train(TrainConfig())


def test_keras_trains_experts_on_one_device():
    config = TrainConfig(global_train_batch_size=4)
    check_mesh(config, CONFIGS["olmoe"], {}, "tf")
    check_mesh(config, CONFIGS["olmoe"], {"fsdp": 2, "experts": 5}, "flax")
    with pytest.raises(InputError, match="a model of type olmoe has experts, which Keras trains on one device"):
        check_mesh(config, CONFIGS["olmoe"], {"fsdp": 2}, "tf")
    with pytest.raises(InputError, match="experts is 5, which experts = 2 does not divide"):
        check_mesh(config, CONFIGS["olmoe"], {"experts": 2}, "flax")


def test_a_tilde_is_the_folder_of_the_user(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    monkeypatch.chdir(tmp_path)
    names = {"load_path": "model", "tokenizer": "model", "save_folder": "a run"}
    options = [*(f"{name}=~/{path}" for name, path in names.items()), "data.paths=[~/ids.npy]"]
    config = load_config(here / "run.yaml", options)[0]
    assert {name: getattr(config, name) for name in names} == {name: str(here / path) for name, path in names.items()}
    assert config.data.paths == [str(here / "ids.npy")]


@pytest.mark.parametrize(("duration", "steps"), [("1.5ep", 4), ("0.5ep", 2), ("2ep", 6), ("0.34ep", 1)])
def test_epochs_may_be_parts(here, duration, steps):
    run = loop.dry_run(load_config("run.yaml", [f"max_duration={duration}"])[0])
    assert (run.data.batches_per_epoch, run.last) == (3, steps)
