"""AI2's trainer: its YAML files as our configs, and its checkpoints.

Each habit of that trainer which differs from what one would expect is a field of `TrainConfig`; the translation sets it
and says so in a line.
"""

from __future__ import annotations

import math
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import CheckpointError, ConfigError, OlmozooError, raise_problems
from olmozoo.families.config import ModelConfig, is_number, read_json
from olmozoo.training.state import MOST, Progress, Saved, check

if TYPE_CHECKING:
    from olmozoo.training.config import TrainConfig

# -- YAML -------------------------------------------------------------------------------------------------------------

# Defaults of AI2's schema, where they are not ours.
OPTIMIZER = {
    "name": "lionw",
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "betas": [0.9, 0.95],
    "eps": 1e-5,
    "decay_norm_and_bias": False,
    "decay_embeddings": False,
}
SCHEDULER = {
    "name": "cosine_with_warmup",
    "units": "steps",
    "t_warmup": 100,
    "t_max": None,
    "alpha_f": 0.1,
    "grad_clip_warmup_steps": None,
    "grad_clip_warmup_factor": None,
    "warmup_min_lr": None,
}
DATA = {"memmap_dtype": "uint16", "drop_last": False, "generate_attention_mask": False, "pad_direction": "right"}
TOP: dict[str, Any] = {
    "run_name": None,
    "seed": 6198,
    "load_path": None,
    "save_overwrite": False,
    "save_interval": 1000,
    "save_interval_unsharded": None,
    "save_num_checkpoints_to_keep": -1,
    "save_num_unsharded_checkpoints_to_keep": -1,
    "save_data_indices": True,
    "reset_optimizer_state": False,
    "reset_trainer_state": False,
    "restore_dataloader": True,
    "max_duration": 10000,
    "stop_after": None,
    "stop_at": None,
    "time_limit": None,
    "extra_steps_after_cancel": 10,
    "early_stopping_factor": None,
    "global_train_batch_size": 512,
    "device_train_microbatch_size": 16,
    "max_grad_norm": None,
    "max_grad_norm_ratio": None,
    "softmax_auxiliary_loss": False,
    "auxiliary_loss_multiplier": 1e-4,
    "activation_checkpointing": None,
    "precision": None,
    "eval_interval": 1000,
    "eval_subset_num_batches": -1,
    "console_log_interval": 1,
}
# What says how AI2's trainer runs and not what it computes, or is about remote folders: read by nobody here.
IGNORED = {
    *("dry_run", "gen1_gc_interval", "compile", "fsdp", "ddp", "single", "distributed_strategy"),
    *("speed_monitor", "python_profiling", "torch_profiling", "save_interval_ephemeral"),
    *("remote_save_folder", "force_save_unsharded", "no_pre_train_checkpoint"),
    *("load_path_sharded_checkpointer", "sharded_checkpointer", "canceled_check_interval"),
    *("device_eval_batch_size", "eval_on_load", "device_train_grad_accum", "device_train_batch_size"),
    *("new_style_checkpoints", "console", "model", "tokenizer", "optimizer", "scheduler", "data"),
    *("evaluators", "wandb", "save_folder", "try_load_latest_save", "hf_datasets_cache_dir"),
    *("module_outputs_save_steps", "extra_steps_after_cancel"),
}
# Fields that change what is computed and are not built: the values that are fine.
REFUSED: dict[str, tuple[Any, ...]] = {
    "epoch": (None,),
    "fast_forward_batches": (None, 0),
    "fused_loss": (None, False),
}
REFUSED_DATA: dict[str, tuple[Any, ...]] = {
    "pad_direction": (None, "right"),
    "generate_doc_lengths": (None, False),
    "custom_dataset": (None,),
}
COUNTS = (
    *("global_train_batch_size", "device_train_microbatch_size", "save_interval", "save_interval_unsharded"),
    "eval_subset_num_batches",
)
KINDS = {dict: "fields of its own", list: "a list", str: "text", int: "an integer", float: "a number"}
OUR_FIELDS = ("backend", "device", "lora", "freeze", "sample_prompt", "sample_tokens", "tensorboard")


def is_ai2(data: dict[str, Any]) -> bool:
    """Whether this is a config of AI2's trainer: it has `model.d_model`."""
    return isinstance(data.get("model"), dict) and "d_model" in data["model"]


def translate(data: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The fields of `TrainConfig` that do what AI2's trainer does, and a line for each of its habits.

    Raises:
        ConfigError: something is set that is not built here; every problem is named.
    """
    raise_problems(f"{where} has fields that are wrong", _wrong_kinds(data), ConfigError)
    problems: list[str] = []
    notes: list[str] = []

    def section(name: str, defaults: dict[str, Any]) -> dict[str, Any]:
        given = data.get(name) or {}
        return {**defaults, **{key: value for key, value in given.items() if value is not None or key in defaults}}

    known = TOP.keys() | IGNORED | REFUSED.keys() | set(OUR_FIELDS)
    problems += [f"unknown field {name}" for name in data if name not in known]
    problems += [
        f"{name} is {data[name]!r}, which is not built here"
        for name, fine in REFUSED.items()
        if data.get(name) not in fine
    ]
    top = {name: data.get(name, default) for name, default in TOP.items()}
    model = data["model"]
    for name in ("residual_dropout", "embedding_dropout", "attention_dropout"):
        if model.get(name, 0.1):
            problems.append(
                f"model.{name} is {model.get(name, 'not set, which is 0.1 in that trainer')}, expected 0: these models "
                "have no such dropout"
            )
    length = model.get("max_sequence_length", 1024)

    optimizer = section("optimizer", OPTIMIZER)
    if (older := optimizer.pop("no_decay_norm_and_bias", None)) is not None:
        optimizer["decay_norm_and_bias"] = optimizer["decay_embeddings"] = not older
    if optimizer.pop("selective_updates", False):
        problems.append("optimizer.selective_updates is true, which is not built here")
    for name in ("metrics_log_interval", "record_update_metrics"):
        optimizer.pop(name, None)
    scheduler = section("scheduler", SCHEDULER)
    if scheduler["warmup_min_lr"] is None:
        scheduler["warmup_min_lr"] = 0.1 * optimizer["learning_rate"]
        if scheduler["name"] != "constant" and scheduler["t_warmup"]:
            notes.append("scheduler.warmup_min_lr is not set: the warmup starts at a tenth of the peak, as there")

    micro = min(top["device_train_microbatch_size"] or 16, top["global_train_batch_size"])
    intervals = [top["save_interval"], top["save_interval_unsharded"]]
    keep = top["save_num_unsharded_checkpoints_to_keep" if intervals[1] else "save_num_checkpoints_to_keep"]
    ours: dict[str, Any] = {
        **{name: data[name] for name in OUR_FIELDS if name in data},
        **{
            name: top[name]
            for name in (
                *("run_name", "seed", "load_path", "save_overwrite", "save_data_indices", "reset_optimizer_state"),
                *("stop_after", "time_limit", "early_stopping_factor", "global_train_batch_size", "max_grad_norm"),
                *("max_grad_norm_ratio", "softmax_auxiliary_loss", "eval_interval", "console_log_interval"),
                *("reset_trainer_state", "max_duration"),
            )
        },
        "save_folder": data.get("save_folder") or "",
        "save_interval": min((n for n in intervals if n), default=None),
        "save_num_checkpoints_to_keep": keep,
        "device_train_microbatch_size": micro,
        "max_sequence_length": length,
        "loss_divisor": "positions",
        "eval_divisor": "positions",
        "clip_one_step_late": True,
        "clip_fused": True,
        "auxiliary_loss_multiplier": 1e-4,
        "activation_checkpointing": bool(top["activation_checkpointing"]),
        "optimizer": optimizer,
        "scheduler": scheduler,
    }
    notes.append("loss_divisor: positions: losses are divided by batch size x length, not by the tokens learned")
    if top["softmax_auxiliary_loss"] and top["auxiliary_loss_multiplier"] != 1e-4:
        notes.append(
            "auxiliary_loss_multiplier: 1e-4: that trainer never reads the value of the file, "
            f"{top['auxiliary_loss_multiplier']}"
        )
    if scheduler["grad_clip_warmup_steps"]:
        notes.append("clip_one_step_late: the bound of a step's clipping is that of the step before")
    if top["max_grad_norm_ratio"] is not None:
        notes.append("clip_fused: queries, keys and values are clipped as one, and the running means begin at step 2")
    if top["stop_at"] is not None:
        ours["stop_at"] = top["stop_at"]
    elif not str(top["max_duration"]).endswith("ep"):
        ours["extra_steps"] = 10
        notes.append("extra_steps: 10: that trainer goes on ten steps past max_duration where the epoch has data")
    if top["precision"] not in (None, "fp32", "amp_bf16"):
        problems.append(f"precision is {top['precision']!r}, expected 'fp32' or 'amp_bf16'")
    ours["precision"] = "fp32" if top["precision"] in (None, "fp32") else "amp_bf16"
    ours["amp_on_cpu"] = False
    if data.get("load_path"):
        if top["reset_trainer_state"] and not top["reset_optimizer_state"]:
            ours["restore_optimizer_settings"] = "all"
            notes.append(
                "reset_trainer_state alone keeps the optimizer's running means, and with them the weight_decay, betas "
                "and eps of the checkpoint: those of the file do not count"
            )
        elif not top["reset_optimizer_state"]:
            ours["restore_optimizer_settings"] = "betas"
        if top["reset_optimizer_state"] and not top["reset_trainer_state"]:
            scheduler["bolt_on_warmup"] = True
        if not top["restore_dataloader"]:
            ours["reset_trainer_state"] = True
            notes.append("restore_dataloader: false: the step, the epoch and the tokens start at zero")
    else:
        ours["model"] = _new_model(model, where)
        ours["reset_optimizer_state"] = ours["reset_trainer_state"] = True
    ours["data"] = _data(data.get("data") or {}, problems, "data.")
    if not (data.get("data") or {}).get("drop_last"):
        notes.append("data.drop_last: true: that trainer stops with an error at a batch that is not full")
    if ours["data"]["generate_attention_mask"]:
        pad = model.get("pad_token_id", 50256)
        ours.setdefault("model", {})["pad_token_id"] = pad
        notes.append(f"data.leading_pads_see_all: tokens {pad} that an instance begins with attend to all of it")
        if pad == model.get("eos_token_id", 50256):
            notes.append(f"pad_token_id and eos_token_id are both {pad}: no end of a text is seen or learned")
    if ours["data"].get("instance_filter") is not None:
        notes.append("data.instance_filter: padding counts as repetition, and switches off instances with much of it")
    ours["evaluators"] = _evaluators(data.get("evaluators") or [], top["eval_subset_num_batches"], problems)
    if any(evaluator["subset_num_batches"] for evaluator in ours["evaluators"]):
        notes.append("subset_num_batches: that trainer takes other instances")
    if ours["evaluators"]:
        notes.append("eval_divisor: positions: losses of evaluations are divided by instances x (length - 1)")
    tokenizer = data.get("tokenizer")
    if isinstance(tokenizer, dict) and tokenizer.get("identifier"):
        name = tokenizer["identifier"]
        if name.endswith(".json") and not any((folder / name).is_file() for folder in (Path(), Path(where).parent)):
            notes.append(f"tokenizer.identifier {name} is not there: the model is saved without a tokenizer")
        else:
            ours["tokenizer"] = name
    if isinstance(data.get("wandb"), dict):
        ours["wandb"] = {k: v for k, v in data["wandb"].items() if k in ("project", "entity", "group", "name", "tags")}
    if ours["max_grad_norm_ratio"] is not None:
        ours["max_grad_norm"] = None
    raise_problems(f"{where} has what is not built here", problems, ConfigError)
    return ours, notes


def _wrong_kinds(data: dict[str, Any]) -> list[str]:
    """What is wrong with the kinds of the values that the translation computes with."""
    problems: list[str] = []

    def of(kind: type, value: Any, name: str) -> Any:
        """The value, or an empty one where there is none or one of another kind."""
        fits = is_number(value) if kind is float else type(value) is kind
        if value is not None and not fits:
            problems.append(f"{name} is {reprlib.repr(value)}, expected {KINDS[kind]}")
        return value if fits else kind()

    def check_data(data: dict[str, Any], name: str) -> None:
        sets = {f"{name}.datasets.{label}": paths for label, paths in of(dict, data.get("datasets"), name).items()}
        for key, paths in {f"{name}.paths": data.get("paths"), **sets}.items():
            for n, path in enumerate(of(list, paths, key)):
                of(str, path, f"{key}[{n}]")

    for name in ("model", "scheduler", "data", "wandb"):
        of(dict, data.get(name), name)
    tokenizer = data.get("tokenizer")
    if isinstance(tokenizer, dict):
        of(str, tokenizer.get("identifier"), "tokenizer.identifier")
    of(float, of(dict, data.get("optimizer"), "optimizer").get("learning_rate"), "optimizer.learning_rate")
    check_data(of(dict, data.get("data"), "data"), "data")
    for n, entry in enumerate(of(list, data.get("evaluators"), "evaluators")):
        name = f"evaluators[{n}]"
        evaluator = of(dict, entry, name)
        of(int, evaluator.get("subset_num_batches"), f"{name}.subset_num_batches")
        check_data(of(dict, evaluator.get("data"), f"{name}.data"), f"{name}.data")
    for name in COUNTS:
        of(int, data.get(name), name)
    if data.get("global_train_batch_size", 1) is None:
        problems.append("global_train_batch_size is None, expected an integer")
    if data.get("eval_subset_num_batches", 1) is None:
        problems.append("eval_subset_num_batches is None, expected an integer")
    return problems


def _data(data: dict[str, Any], problems: list[str], prefix: str) -> dict[str, Any]:
    found = {**DATA, **data}
    problems += [
        f"{prefix}{name} is {data[name]!r}, which is not built here"
        for name, fine in REFUSED_DATA.items()
        if data.get(name) not in fine
    ]
    if found.get("datasets") and not found.get("paths"):
        found["paths"] = [path for label in sorted(found["datasets"]) for path in found["datasets"][label]]
    found["drop_last"] = found["leading_pads_see_all"] = True
    names = [
        *("label_mask_paths", "memmap_dtype", "drop_last", "generate_attention_mask", "leading_pads_see_all"),
        *("instance_filter", "seed"),
    ]
    read_by_nobody = ("num_workers", "pin_memory", "prefetch_factor", "persistent_workers", "timeout", "datasets")
    known = {"paths", *names, *DATA, *REFUSED_DATA, *read_by_nobody}
    problems += [f"unknown field {prefix}{name}" for name in data if name not in known]
    return {"paths": list(found.get("paths") or []), **{name: found[name] for name in names if name in found}}


def _evaluators(given: list[Any], subset: int, problems: list[str]) -> list[dict[str, Any]]:
    found = []
    for n, entry in enumerate(given):
        if entry.get("type", "lm") != "lm":
            problems.append(
                f"evaluators[{n}] ({entry.get('label')}) is of type {entry['type']!r}, expected 'lm': give questions "
                "as a .jsonl to an evaluator's file in a config of olmozoo"
            )
            continue
        data = entry.get("data") or {}
        if data.get("instance_filter") is not None:
            problems.append(f"evaluators[{n}].data.instance_filter is set, which is not built here")
        fields = {
            "label": entry.get("label", f"evaluator-{n}"),
            "memmap_dtype": data.get("memmap_dtype", "uint16"),
            "device_eval_batch_size": entry.get("device_eval_batch_size"),
            "subset_num_batches": entry.get("subset_num_batches"),
            "label_mask_paths": data.get("label_mask_paths"),
            "generate_attention_mask": bool(data.get("generate_attention_mask")),
        }
        if data.get("datasets"):
            fields["datasets"] = data["datasets"]
        else:
            fields["paths"] = data.get("paths") or []
        if fields["subset_num_batches"] is None:
            fields["subset_num_batches"] = subset
        if fields["subset_num_batches"] <= 0:
            fields["subset_num_batches"] = None
        found.append(fields)
    return found


def _new_model(model: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a new model's config."""
    from conversion import olmo_native

    checked = olmo_native.checked_config({"model": model}, Path(where))
    return olmo_native.to_config(checked, Path(where)).to_dict()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def is_native(folder: Path) -> bool:
    """Whether this is a checkpoint of AI2's trainer."""
    return (folder / "config.yaml").is_file() and not (folder / "config.json").is_file()


def is_core(folder: Path) -> bool:
    """Whether this is a checkpoint of OLMo-core."""
    file = folder / "config.json"
    return file.is_file() and isinstance(read_json(file).get("model"), dict)


def open_weights(folder: Path) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """The config and the tensors of a checkpoint of AI2's, under canonical names.

    Raises:
        CheckpointError: it is broken, or its model is none that olmozoo has.
    """
    from conversion import olmo_core, olmo_native
    from conversion.common import check_sources, grouped_parameters

    if is_core(folder):
        config = olmo_core.to_config(read_json(folder / "config.json"), folder / "config.json", None)
        sources, rules = olmo_core.core_sources(folder, config), olmo_core.rules(config)
    else:
        model = olmo_native.read_config(folder)
        config, sources = olmo_native.to_config(model, folder), olmo_native.native_sources(folder, model)
        rules = olmo_native.RULES[model["block_type"]]
    grouped = grouped_parameters(rules, config)
    check_sources(sources, grouped, folder)
    return config, _canonical(sources, grouped)


def _canonical(sources: dict[str, LazyTensor], grouped: Any) -> dict[str, LazyTensor]:
    """Tensors under canonical names, from foreign ones that may stack several."""
    from conversion.common import links

    def part(link: Any) -> LazyTensor:
        source = sources[link.foreign]
        return LazyTensor(
            link.parameter.name, source.dtype, link.parameter.shape, lambda: source.rows(link.start, link.stop)
        )

    return {link.parameter.name: part(link) for link in links(grouped)}


def open_state(folder: Path, model: ModelConfig, config: TrainConfig) -> Saved:
    """The state of AI2's trainer in an unsharded checkpoint, as far as `config` asks for it.

    Raises:
        CheckpointError: a file is absent or broken, or is not about this model.
    """
    from conversion.archives import read_archive

    def need(name: str) -> Any:
        file = folder / name
        if not file.is_file():
            reset = "reset_optimizer_state" if name == "optim.pt" else "reset_trainer_state"
            raise CheckpointError(f"{folder} has no {name}: set {reset} to true to leave that state behind")
        found = read_archive(file)
        if not isinstance(found, dict):
            raise CheckpointError(f"{file} holds a {type(found).__name__}, expected a mapping")
        return found

    saved = Saved(Progress())
    if not config.reset_trainer_state:
        trainer, file = need("train.pt"), folder / "train.pt"

        def count(name: str, default: int | None = None) -> int:
            value = trainer.get(name)
            value = default if value is None else value
            if type(value) is not int or not 0 <= value < MOST:
                raise CheckpointError(f"{file}: {name} is {reprlib.repr(value)}, expected an integer from 0 on")
            return value

        progress, step = saved.progress, count("global_step")
        steps = count("global_data_step", step)  # of older versions
        seen = count("global_train_examples_seen", steps * config.global_train_batch_size)
        progress.step, progress.epoch = step, count("epoch", 0)
        progress.examples = count("global_train_examples_seen_this_epoch", seen)
        progress.tokens = count("global_train_tokens_seen", seen * (config.max_sequence_length or 0))
    if not config.reset_optimizer_state:
        file = folder / "optim.pt"
        try:
            _open_optimizer(folder, need("optim.pt"), model, config, saved)
        except OlmozooError as error:
            if file.name in str(error):
                raise
            raise CheckpointError(f"{file}: {error}") from error
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{file} has a state or param_groups that no optimizer has: {error!r}") from error
        check(saved.progress, saved.settings, file)
    return saved


def _open_optimizer(folder: Path, optim: dict[str, Any], model: ModelConfig, config: TrainConfig, saved: Saved) -> None:
    from conversion import olmo_native
    from conversion.archives import as_tensor
    from conversion.common import check_sources, grouped_parameters, links

    file = folder / "optim.pt"
    groups, states = optim.get("param_groups"), optim.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict) or not groups:
        raise CheckpointError(f"{file} has no param_groups or no state")
    native = olmo_native.read_config(folder)
    grouped = grouped_parameters(olmo_native.RULES[native["block_type"]], model)
    names: dict[Any, str] = {}
    decays: dict[str, float] = {}
    for group in groups:
        for key, name in zip(group["params"], group.get("param_names", group["params"]), strict=True):
            plain = re.sub(r"^(module\.)+", "", str(name)).replace("_fsdp_wrapped_module.", "")
            names[key] = plain
            decays[plain] = float(group["weight_decay"])
    moments: dict[str, dict[str, LazyTensor]] = {moment: {} for moment in config.optimizer.moments}
    means: dict[str, float] = {}
    count = 0
    for key, state in states.items():
        name = names.get(key) or re.sub(r"^(module\.)+", "", str(key)).replace("_fsdp_wrapped_module.", "")
        for moment in moments:
            if moment not in state:
                raise CheckpointError(f"{file}: {name} has no {moment}, which {config.optimizer.name} keeps")
            moments[moment][name] = as_tensor(state[moment], f"{moment} of {name}")
        count = max(count, _count(state.get("step", 0), file))
        if "grad_norm_exp_avg" in state:
            means[name] = float(as_tensor(state["grad_norm_exp_avg"], f"mean of {name}").read())
    for moment, tensors in moments.items():
        tensors = olmo_native.modern_names(tensors, native["block_type"])
        check_sources(tensors, grouped, file)
        for name, tensor in _canonical(tensors, grouped).items():
            saved.moments[f"{moment}.{name}"] = tensor.renamed(f"{moment}.{name}")
    saved.progress.updates = count
    first = groups[0]
    saved.progress.bound = math.inf if first.get("max_grad_norm") is None else first["max_grad_norm"]
    if means:
        by_name = {link.parameter.name: means[link.foreign] for link in links(grouped) if link.foreign in means}
        saved.clip_means = np.array([by_name[p.name] for p in model.parameters("causal_lm") if p.name in by_name])
    saved.settings = {
        "betas": [float(beta) for beta in first["betas"]],
        "eps": float(first["eps"]) if "eps" in first else None,
        "weight_decay": {
            link.parameter.name: decays[link.foreign] for link in links(grouped) if link.foreign in decays
        },
    }


def _count(step: Any, file: Path) -> int:
    from conversion.archives import as_tensor

    if isinstance(step, (int, float)):
        return int(step)
    return int(as_tensor(step, f"step in {file}").read())
