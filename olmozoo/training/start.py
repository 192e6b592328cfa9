"""What a run starts from: a new model, a checkpoint of any kind, or its own last step."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.checkpoint.adapters import locate, open_merged
from olmozoo.checkpoint.matching import find_weights, initial_weights
from olmozoo.errors import CheckpointError, ConfigError, HubError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter
from olmozoo.families.registry import config_class
from olmozoo.quantization import as_floats
from olmozoo.training import ai2, state
from olmozoo.training.config import TrainConfig
from olmozoo.training.parameters import stored_parameters, weight_decays
from olmozoo.training.state import Progress, Saved
from olmozoo.typing import Array

DTYPES = {"fp32": "float32", "amp_bf16": "float32", "fp64": "float64"}


@dataclass
class Start:
    """What a run starts from.

    Attributes:
        model: the config of the model.
        weights: its parameters with their values, in the dtype of the file.
        generation: the contents of generation_config.json, if there is one.
        tokenizer: where the tokenizer is, if that is known.
        saved: the state to go on from; None for a new run.
        lines: what was restored and what starts anew, for people.
        folder: the folder that the weights come from, if any.
        adapter: that of the adapter to go on training, if any.
    """

    model: ModelConfig
    weights: Iterator[tuple[Parameter, Array]]
    generation: dict[str, Any] | None = None
    tokenizer: str | None = None
    saved: Saved | None = None
    lines: list[str] = field(default_factory=list)
    folder: Path | None = None
    adapter: Path | None = None


def open_start(config: TrainConfig) -> Start:
    """Open what a run starts from; no tensor is read yet.

    Raises:
        ConfigError: the model's fields are wrong.
        CheckpointError: the checkpoint is broken, or has not the state that is asked for.
    """
    own = None if config.save_overwrite else state.latest(Path(config.save_folder))
    if own:
        return _own_step(config, own)
    if config.load_path is None:
        return _new(config)
    folder = Path(config.load_path)
    if (folder / state.TRAINING / state.STATE).is_file():
        return _other_step(config, folder)
    if ai2.is_native(folder) or ai2.is_core(folder):
        return _foreign(config, folder)
    return _model_folder(config)


def _weights(source: Any, dtype: str) -> Iterator[tuple[Parameter, Array]]:
    """The weights of a checkpoint in floating point, also where it is quantized; mapped ones are not read yet."""
    weights = find_weights(source.checkpoint, source.config, "causal_lm", dtype=np.dtype(dtype))
    return ((parameter, as_floats(read(), dtype)) for parameter, read in weights)


def _new(config: TrainConfig) -> Start:
    fields = dict(config.model)
    preset = fields.pop("preset", None)
    if preset is not None:
        model = ModelConfig.from_preset(preset, **fields)
    elif "model_type" in fields:
        model = config_class(fields["model_type"]).from_dict(fields)
    else:
        raise ConfigError("model has neither a preset nor a model_type: of which family is the new model?")
    known = [*type(model).from_dict({}).to_dict(), "head_dim", "rope_parameters"]
    unknown = [
        f"{name}" + "".join(f": did you mean model.{close}?" for close in difflib.get_close_matches(name, known, 1))
        for name in fields
        if name not in known
    ]
    raise_problems(f"{model.name} has no such field of model", unknown, ConfigError)
    weights = initial_weights(model, "causal_lm", seed=config.seed, dtype=DTYPES[config.precision])
    return Start(model, weights, lines=[f"a new {model.name} model, its weights drawn from seed {config.seed}"])


def _model_folder(config: TrainConfig) -> Start:
    assert config.load_path is not None
    if not (config.reset_optimizer_state and config.reset_trainer_state):
        raise CheckpointError(
            f"{config.load_path} is a model without the state of an optimizer or a run: set reset_optimizer_state and "
            "reset_trainer_state to true"
        )
    try:
        found = locate(config.load_path, need="model")
    except HubError as error:
        raise HubError(f"load_path: {error}") from error
    source = open_merged(found, quantization="none", **config.model)
    return Start(
        source.config,
        _weights(source, DTYPES[config.precision]),
        source.generation,
        str(found.tokenizer),
        lines=[f"weights of {config.load_path}; the optimizer, the step and the data order start anew"],
        folder=found.folder,
    )


def _step(config: TrainConfig, folder: Path, **fields: Any) -> Start:
    """The model of a step, or where LoRA is trained its adapter and the model below it."""
    found = locate(folder, need="model")
    adapter = found.adapter if config.lora is not None else None
    source = open_merged(found if adapter is None else found._replace(adapter=None), quantization="none", **fields)
    weights = _weights(source, DTYPES[config.precision])
    return Start(source.config, weights, source.generation, str(folder), folder=found.folder, adapter=adapter)


def _other_step(config: TrainConfig, folder: Path) -> Start:
    return _restore(config, _step(config, folder, **config.model), state.load(folder), [f"weights of {folder}"])


def _own_step(config: TrainConfig, folder: Path) -> Start:
    start, saved = _step(config, folder), state.load(folder)
    where = f"step {saved.progress.step}, epoch {saved.progress.epoch}, instance {saved.progress.examples} of it"
    start.saved, start.lines = saved, [f"resumed from {folder}: weights, optimizer and data position ({where})"]
    return start


def _foreign(config: TrainConfig, folder: Path) -> Start:
    """A checkpoint of AI2's trainer or of OLMo-core."""
    model, sources = ai2.open_weights(folder)
    if config.model:
        model = model.replace(**config.model)
    dtype = np.dtype(DTYPES[config.precision])
    weights = ((p, sources[p.name].exact_values().astype(dtype, copy=False)) for p in stored_parameters(model))
    start = Start(model, weights, folder=None)
    if config.reset_optimizer_state and config.reset_trainer_state:
        start.lines = [f"weights of {folder}; the optimizer, the step and the data order start anew"]
        return start
    if ai2.is_core(folder):
        raise CheckpointError(
            f"{folder} is of OLMo-core, of which only the weights are read: set reset_optimizer_state and "
            "reset_trainer_state to true"
        )
    saved = ai2.open_state(folder, model, config)
    return _restore(config, start, saved, [f"weights of {folder}"])


def _restore(config: TrainConfig, start: Start, saved: Saved, lines: list[str]) -> Start:
    """What the two `reset_` fields leave of a state, with a line for each part."""
    if config.reset_optimizer_state:
        saved.moments, saved.clip_means, saved.settings = {}, None, {}
        saved.progress.updates, saved.progress.bound = 0, None
        lines.append("the optimizer's running means start at zero")
    else:
        lines.append(f"the optimizer's running means after {saved.progress.updates} updates are kept")
        for line in _settings_kept(config, start.model, saved):
            lines.append(line)
    if config.reset_trainer_state:
        progress = saved.progress
        saved.progress = Progress(updates=progress.updates, bound=progress.bound)
        lines.append("the step, the epoch and the position in the data start at zero")
    else:
        progress = saved.progress
        lines.append(f"goes on after step {progress.step}, epoch {progress.epoch}, instance {progress.examples} of it")
        if config.scheduler.bolt_on_warmup:
            units = config.scheduler.units
            progress.bolted_on = progress.step if units == "steps" else progress.tokens
            lines.append(f"the learning rate rises from 0 over {config.scheduler.t_warmup} {units}")
    start.saved, start.lines = saved, lines
    return start


def _settings_kept(config: TrainConfig, model: ModelConfig, saved: Saved) -> Iterator[str]:
    kept = {"none": (), "betas": ("betas", "eps"), "all": ("betas", "eps", "weight_decay")}
    names = kept[config.restore_optimizer_settings]
    found = saved.settings.get("weight_decay", {})
    saved.settings = {name: value for name, value in saved.settings.items() if name in names}
    for name in ("betas", "eps"):
        if name in saved.settings and saved.settings[name] is not None:
            setattr(config.optimizer, name, saved.settings[name])
            yield f"optimizer.{name} = {saved.settings[name]} of the checkpoint, not of the config"
    if "weight_decay" in saved.settings:
        values = sorted(set(saved.settings["weight_decay"].values()))
        yield f"optimizer.weight_decay = {' and '.join(map(str, values))} of the checkpoint, not of the config"
    elif "betas" in names:  # a weight decay of 0 stays
        table = stored_parameters(model)
        wanted = zip(table, weight_decays(config.optimizer, table), strict=True)
        still = [p.name for p, decay in wanted if decay and found.get(p.name) == 0]
        saved.settings["weight_decay"] = dict.fromkeys(still, 0.0)
        if still:
            yield (
                f"optimizer.weight_decay = 0 of the checkpoint, not of the config, for {len(still)} parameters such as "
                f"{still[0]}"
            )
