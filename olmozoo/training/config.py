"""The config of a training run: fields, defaults, YAML files and overrides.

Fields have the names of AI2's trainer where they mean the same. The defaults are not AI2's: see `olmozoo.training.ai2`
for its YAML files.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmozoo.errors import ConfigError, MissingBackendError, raise_problems
from olmozoo.families.config import read_yaml
from olmozoo.quantization import GROUP_SIZE, NAMES
from olmozoo.sharding import MESH_AXES
from olmozoo.training.schedules import SCHEDULES
from olmozoo.typing import StrPath

OPTIMIZERS = {"adamw": ("exp_avg", "exp_avg_sq"), "lionw": ("exp_avg",)}  # and the running means of each
PRECISIONS = ("fp32", "amp_bf16", "fp64")
DURATION = re.compile(r"(?P<number>[0-9]+(\.[0-9]*)?(e[0-9]+)?)(?P<unit>ep|T)?")


@dataclass
class OptimizerConfig:
    """The optimizer.

    Attributes:
        name: "adamw" or "lionw".
        learning_rate: the peak of the schedule.
        weight_decay: decoupled, of linear weights; of others by the two flags below.
        betas: decays of the running means of gradients and of their squares.
        eps: added to the root of the mean square, of AdamW.
        decay_norm_and_bias: whether norms and biases decay too.
        decay_embeddings: whether embeddings decay too, tied heads included.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    decay_norm_and_bias: bool = False
    decay_embeddings: bool = False

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the running means: `exp_avg` of gradients and, of AdamW, `exp_avg_sq` of their squares."""
        return OPTIMIZERS[self.name]


@dataclass
class SchedulerConfig:
    """The learning rate over the run; see `olmozoo.training.schedules`.

    Attributes:
        name: one of `SCHEDULES`.
        units: "steps" or "tokens", of the numbers below.
        t_warmup: the warmup, linear from `warmup_min_lr` to the peak.
        t_max: where the schedule ends; default the run's duration.
        alpha_f: the last learning rate, as a part of the peak.
        warmup_min_lr: the learning rate that the warmup starts from.
        grad_clip_warmup_steps: until then, clip at `max_grad_norm * grad_clip_warmup_factor`.
        grad_clip_warmup_factor: see above.
        bolt_on_warmup: rise from 0 to the schedule over `t_warmup` from the step that was loaded, as AI2's trainer does
            where the optimizer's state starts anew and the trainer's does not.
    """

    name: str = "cosine_with_warmup"
    units: str = "steps"
    t_warmup: int = 0
    t_max: int | None = None
    alpha_f: float = 0.1
    warmup_min_lr: float = 0.0
    grad_clip_warmup_steps: int | None = None
    grad_clip_warmup_factor: float | None = None
    bolt_on_warmup: bool = False


@dataclass
class InstanceFilter:
    """Instances with a run of so many repetitions give no loss.

    Attributes:
        repetition_max_period: tokens in the longest repeated piece.
        repetition_min_period: and in the shortest.
        repetition_max_count: repetitions that are too many. Padding counts as one repeated token.
    """

    repetition_max_period: int = 13
    repetition_min_period: int = 1
    repetition_max_count: int = 32


@dataclass
class DataConfig:
    """The training data: raw arrays of tokens without a header, in rows of `max_sequence_length`.

    Attributes:
        paths: files of tokens, or folders that `olmozoo prepare` has written.
        label_mask_paths: for each of `paths`, the file of bools that says which tokens are learned; default all, or
            the mask of the prepared folder.
        weights: for each of `paths`, how often it is seen in an epoch, such as 0.5 or 2; default once.
        memmap_dtype: of the tokens: uint8, uint16, uint32 or uint64; default the one of the manifest, else uint16.
        generate_attention_mask: whether tokens equal to the pad token, wherever they are, are neither seen nor learned.
        leading_pads_see_all: whether the pad tokens that an instance begins with attend to all of its tokens alike,
            later ones included, as in AI2's trainer; else each to itself. It matters to the token after them.
        instance_filter: which instances give no loss; default none.
        drop_last: whether an epoch leaves out the instances that do not fill a batch, or has a smaller last batch.
        seed: of the order; default the run's.
    """

    paths: list[str] = field(default_factory=list)
    label_mask_paths: list[str] | None = None
    weights: list[float] | None = None
    memmap_dtype: str | None = None
    generate_attention_mask: bool = False
    leading_pads_see_all: bool = False
    instance_filter: InstanceFilter | None = None
    drop_last: bool = True
    seed: int | None = None


@dataclass
class EvaluatorConfig:
    """What is measured every `eval_interval` steps; one of `paths`, `datasets` and `file`.

    Attributes:
        label: its name in the metrics.
        paths: files of tokens or prepared folders, as the training data; prepared ones may have another length.
        label_mask_paths: their masks.
        datasets: several sets of files, by labels of their own.
        file: a .txt or a .jsonl of texts or of multiple-choice questions, as `olmozoo evaluate` takes it.
        memmap_dtype: of the tokens; default the training data's.
        generate_attention_mask: see `DataConfig`; default the training data's.
        device_eval_batch_size: rows at once; default the training micro-batch.
        subset_num_batches: at most so many batches of tokens; default all.
        quantization: "int8" or "int4" scores the model with the linear weights of its blocks rounded to integers of so
            many bits (see `olmozoo.quantization`), adapters merged before, while training goes on in floats; default
            floats.
        group_size: of int4, the values along a row that share a scale.
    """

    label: str = "validation"
    paths: list[str] = field(default_factory=list)
    label_mask_paths: list[str] | None = None
    datasets: dict[str, list[str]] | None = None
    file: str | None = None
    memmap_dtype: str | None = None
    generate_attention_mask: bool | None = None
    device_eval_batch_size: int | None = None
    subset_num_batches: int | None = None
    quantization: str | None = None
    group_size: int = GROUP_SIZE


@dataclass
class LoraConfig:
    """Adapters of low rank (arXiv:2106.09685); all else is frozen.

    Attributes:
        rank: of the two factors.
        alpha: their product is scaled by alpha / rank.
        dropout: of their input; PyTorch only.
        target_modules: names of linear layers; `gate_proj`, `up_proj` and `down_proj` are those of every expert.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class WandbConfig:
    """Weights & Biases; needs the wandb package."""

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] | None = None


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        run_name: for people; default the name of `save_folder`.
        seed: of initial weights, data order and dropout.
        backend: "pt", "tf" or "flax"; default the first that is installed.
        device: default an accelerator if there is one.
        mesh: the number of devices by axis, as {fsdp: 4, tensor: 2}: along `fsdp` the rows of a batch are split, and in
            PyTorch and JAX the storage of weights and optimizer; along `tensor`, not in Keras, heads, the MLP and the
            vocabulary; along `experts`, not in Keras, the experts of a mixture. `fsdp` is by default all devices that
            the others leave. Default all processes of torchrun or `jax.distributed`, and one device where there is one
            process. Losses and weights are the same on any mesh.
        precision: "fp32"; "amp_bf16", which computes in bfloat16 with weights in float32; or "fp64".
        amp_on_cpu: whether "amp_bf16" computes in bfloat16 on the CPU too. AI2's trainer does not.
        load_path: a model's folder or repository in any format that is read, a checkpoint of AI2's trainer or of
            OLMo-core, or a step of another run; None for a new model, as `model` says.
        model: of a new model, a `preset` or a `model_type`, and fields of its config; of a loaded one, fields that
            change.
        tokenizer: a folder or repository; default the one of `load_path`, or of prepared data.
        save_folder: where the steps, metrics and the model go.
        save_overwrite: whether to start over where `save_folder` has steps, and not to resume from the last.
        save_interval: steps between checkpoints; None for one at the end only.
        save_num_checkpoints_to_keep: the newest are kept; -1 for all, 0 for none but the model at the end.
        save_data_indices: whether to write the indices of each step's instances.
        reset_optimizer_state: whether the moments of `load_path` are left behind.
        reset_trainer_state: whether the step, epoch and position in the data of `load_path` are.
        restore_optimizer_settings: which settings come from the optimizer's state in `load_path` rather than from
            here: "none", "betas" (with eps, and with a weight decay of 0 where it is 0 there), or "all" (with the
            weight decay and the first bound of clipping).
        max_sequence_length: tokens in an instance; default that of prepared data.
        max_duration: steps; or tokens as "1e9T"; or epochs as "3ep" or "0.5ep".
        extra_steps: so many steps more, where the data of the last epoch suffice. AI2's trainer makes ten.
        stop_at: stop at this step at the latest.
        stop_after: stop after so many steps of this process.
        time_limit: and after so many seconds, with a checkpoint.
        early_stopping_factor: stop where the loss is more than this times the least one so far.
        global_train_batch_size: instances in a step, of all devices together; `fsdp` of the mesh divides it.
        device_train_microbatch_size: instances at once on each device of `fsdp`; default all. It does not change the
            gradient, but for that of the load-balancing loss of a mixture of experts, which is of each micro-batch:
            the rows that all devices compute at once.
        loss_divisor: what the summed loss of a step is divided by: "targets", the tokens learned in it, or
            "positions", batch size times length, as AI2's trainer does.
        softmax_auxiliary_loss: whether the z-loss (arXiv:2204.02311) is added.
        auxiliary_loss_multiplier: its factor.
        optimizer, scheduler: see there.
        max_grad_norm: clip the gradient of all parameters at this norm.
        max_grad_norm_ratio: clip each parameter's at this ratio to its running mean instead.
        clip_one_step_late: whether the warmup of clipping counts from the step before, as in AI2's trainer.
        clip_fused: whether `max_grad_norm_ratio` counts queries, keys and values as one parameter, and gates and ups,
            and the running means begin at the second step, as in AI2's trainer.
        freeze: patterns of names of parameters that are not trained, such as "model.embed_tokens*".
        activation_checkpointing: whether blocks are computed again in the backward pass, to save memory.
        lora: train adapters and nothing else.
        data, evaluators: see there.
        eval_interval: steps between evaluations; there is always one at the end.
        eval_divisor: what the loss of an evaluation is divided by, as `loss_divisor`.
        sample_prompt: what the model continues at each evaluation.
        sample_tokens: with so many tokens.
        console_log_interval: steps between lines on the console.
        tensorboard: whether to write events for TensorBoard into `save_folder`/tensorboard.
        wandb: see there.
    """

    run_name: str | None = None
    seed: int = 6198
    backend: str | None = None
    device: str | None = None
    mesh: dict[str, int] | None = None
    precision: str = "fp32"
    amp_on_cpu: bool = True
    load_path: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    save_folder: str = ""
    save_overwrite: bool = False
    save_interval: int | None = 1000
    save_num_checkpoints_to_keep: int = -1
    save_data_indices: bool = True
    reset_optimizer_state: bool = True
    reset_trainer_state: bool = True
    restore_optimizer_settings: str = "none"
    max_sequence_length: int | None = None
    max_duration: int | str = "1ep"
    extra_steps: int = 0
    stop_at: int | None = None
    stop_after: int | None = None
    time_limit: float | None = None
    early_stopping_factor: float | None = None
    global_train_batch_size: int = 8
    device_train_microbatch_size: int | None = None
    loss_divisor: str = "targets"
    softmax_auxiliary_loss: bool = False
    auxiliary_loss_multiplier: float = 1e-4
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    max_grad_norm: float | None = 1.0
    max_grad_norm_ratio: float | None = None
    clip_one_step_late: bool = False
    clip_fused: bool = False
    freeze: list[str] = field(default_factory=list)
    activation_checkpointing: bool = False
    lora: LoraConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    evaluators: list[EvaluatorConfig] = field(default_factory=list)
    eval_interval: int = 1000
    eval_divisor: str = "targets"
    sample_prompt: str | None = None
    sample_tokens: int = 40
    console_log_interval: int = 1
    tensorboard: bool = False
    wandb: WandbConfig | None = None

    @property
    def micro_batch_size(self) -> int:
        """Instances at once on one device."""
        return self.device_train_microbatch_size or self.global_train_batch_size

    @property
    def data_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def z_factor(self) -> float:
        """The factor of the z-loss; 0 without one."""
        return self.auxiliary_loss_multiplier if self.softmax_auxiliary_loss else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data, as a YAML file has it."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The config as YAML."""
        from omegaconf import OmegaConf

        return str(OmegaConf.to_yaml(OmegaConf.structured(self)))


def load_config(file: StrPath, overrides: Sequence[str] = ()) -> tuple[TrainConfig, list[str]]:
    """The config of a YAML file, one of olmozoo's or of AI2's trainer, and what was read otherwise than it says there.

    Paths are relative to the current folder. Those that are not there are taken from the folder of the file, if they
    are there.

    Args:
        file: the file. One with `model.d_model` is AI2's; see `olmozoo.training.ai2`.
        overrides: such as "--optimizer.learning_rate=1e-4"; leading dashes may be left out, and `--flag` alone is true.
            An entry of a list is named by its number: "--evaluators.0.label=test".

    Returns:
        The config, and a line for each setting of AI2's trainer that has a meaning of its own.

    Raises:
        ConfigError: the file is unreadable, a field is unknown or has a wrong value; every problem is named.
    """
    from olmozoo.training import ai2

    where, file = str(file), Path(file).expanduser()
    data = _read(file, overrides)
    notes: list[str] = []
    if ai2.is_ai2(data):
        data, notes = ai2.translate(data, where)
    config = from_dict(data, where)
    _find_paths(config, file.parent)
    return config, notes


def dotted(override: str) -> tuple[str, str]:
    """The field and the YAML of an option of the command line: `--a-b.c=1` is `a_b.c` and `1`, `--flag` is `true`.

    Raises:
        ConfigError: there is no value, and no dashes before the name.
    """
    name, equals, value = override.partition("=")
    if not name.strip("-") or not (equals or name.startswith("--")):
        raise ConfigError(
            f"{override!r} is no override, expected --field=value, such as --optimizer.learning_rate=1e-4"
        )
    return name.lstrip("-").replace("-", "_"), value if equals else "true"


def _read(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError as error:
        raise MissingBackendError("training needs the omegaconf package: pip install 'olmozoo[training]'") from error
    _register_resolvers(file.parent)
    loaded = read_yaml(file, OmegaConf.load)
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{file} has no fields at its top level, expected lines such as save_folder: runs/first")
    for override in overrides:
        name, value = dotted(override)
        try:
            loaded.merge_with_dotlist([f"{name}={value}"])
        except (IndexError, ValueError, TypeError, YAMLError, RecursionError, OmegaConfBaseException) as error:
            entry = isinstance(error, IndexError) or type(error) is ValueError
            reason = "an entry of a list is named by its number from 0, as evaluators.0.label" if entry else error
            raise ConfigError(f"--{name}={value} cannot be set: {_one_line(reason)}") from error
    try:
        resolved: Any = OmegaConf.to_container(loaded, resolve=True)
    except (ValueError, OSError, RecursionError, OmegaConfBaseException) as error:
        field_name = getattr(error, "full_key", None) or "a value"
        raise ConfigError(f"{file}: {field_name}: {_one_line(error)}") from error
    return {str(name): value for name, value in resolved.items()}


def _one_line(error: object) -> str:
    """The text of an error, without what OmegaConf adds."""
    text = re.sub(r"^\w+ raised while resolving interpolation: |\n    full_key:.*", "", str(error), flags=re.DOTALL)
    return " ".join(text.split()).strip('"')


def _beside(path: str, folder: Path) -> str:
    """A path, with the user's folder for `~`; where it is not there and is in `folder`, that one."""
    path, other = os.path.expanduser(path), folder / path
    try:
        return str(other) if path and not Path(path).exists() and other.exists() else path
    except OSError as error:
        raise ConfigError(f"{path[:80]} cannot be a path: {error.strerror}") from error


def _find_paths(config: TrainConfig, folder: Path) -> None:
    """Take `~` as the user's folder, and the paths that are not there from `folder`, where they are."""

    def found(paths: list[str] | None) -> list[str] | None:
        return paths and [_beside(path, folder) for path in paths]

    sets: list[DataConfig | EvaluatorConfig] = [config.data, *config.evaluators]
    for data in sets:
        data.paths, data.label_mask_paths = found(data.paths) or [], found(data.label_mask_paths)
    for evaluator in config.evaluators:
        evaluator.datasets = evaluator.datasets and {k: found(v) or [] for k, v in evaluator.datasets.items()}
        evaluator.file = evaluator.file and _beside(evaluator.file, folder)
    config.save_folder = os.path.expanduser(config.save_folder)
    config.load_path = config.load_path and _beside(config.load_path, folder)
    config.tokenizer = config.tokenizer and _beside(config.tokenizer, folder)


def _register_resolvers(folder: Path) -> None:
    """The resolvers of AI2's configs: path.glob, path.choose and path.last_checkpoint."""
    from omegaconf import OmegaConf

    def glob(pattern: str) -> list[str]:
        base = Path("/") if pattern.startswith("/") else Path()
        pattern = pattern.lstrip("/")
        found = sorted(str(path) for path in base.glob(pattern)) or sorted(str(path) for path in folder.glob(pattern))
        if not found:
            raise ConfigError(f"no file fits {pattern}")
        return found

    def choose(*paths: str) -> str:
        for path in paths:
            if Path(path := _beside(path, folder)).exists():
                return path
        raise ConfigError(f"none of these is there: {', '.join(paths)}")

    def last_checkpoint(run: str) -> str:
        found = {
            int(match[1]): path
            for path in Path(_beside(run, folder)).glob("step*")
            if (match := re.fullmatch(r"step(\d+)(-unsharded)?", path.name))
        }
        if not found:
            raise ConfigError(f"{run} has no checkpoint stepN")
        return str(found[max(found)])

    for name, resolver in (("glob", glob), ("choose", choose), ("last_checkpoint", last_checkpoint)):
        OmegaConf.register_resolver(f"path.{name}", resolver, replace=True)


def from_dict(data: dict[str, Any], where: str = "the config") -> TrainConfig:
    """The config of these fields, checked.

    Raises:
        ConfigError: a field is unknown, of a wrong type or has a wrong value; every problem is named.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    raise_problems(f"{where} has fields that are wrong", _wrong_fields(data, TrainConfig, ""), ConfigError)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), data))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {error.full_key}: {_one_line(error)}") from error
    assert isinstance(config, TrainConfig)
    check(config, where)
    return config


def _wrong_fields(data: Mapping[Any, Any], kind: type, prefix: str) -> list[str]:
    """The fields of `data` that the dataclass has not, or whose values are of another type."""
    hints = typing.get_type_hints(kind)
    problems = []
    for name, value in data.items():
        if name in hints:
            problems += _wrong_type(value, hints[name], f"{prefix}{name}")
        else:
            close = difflib.get_close_matches(str(name), hints, 1)
            there = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(hints)}"
            problems.append(f"there is no field {prefix}{name}: {there}")
    return problems


KINDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _converts(value: Any, kind: Any) -> bool:
    """Whether OmegaConf makes a number or text of a value, such as 3 of "3"."""
    from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode
    from omegaconf.errors import ValidationError

    nodes: dict[Any, Any] = {int: IntegerNode, float: FloatNode, str: StringNode, bool: BooleanNode}
    if kind not in nodes or value is None:
        return False
    try:
        nodes[kind](value)
    except (ValidationError, OverflowError):  # of an integer beyond any float
        return False
    return True


def _wrong_type(value: Any, hint: Any, name: str) -> list[str]:
    """What is wrong with the type of a value, and of those in it."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if Any in options or type(value) in options:
        return []
    for option in options:
        if _converts(value, option):
            return []
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if origin is list and isinstance(value, list):
            return [x for n, part in enumerate(value) for x in _wrong_type(part, inner[0], f"{name}[{n}]")]
        if origin is dict and isinstance(value, dict):
            return [x for key, part in value.items() for x in _wrong_type(part, inner[1], f"{name}.{key}")]
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return _wrong_fields(value, option, f"{name}.")  # type: ignore[arg-type]
    return [f"{name} is {value!r}, expected {' or '.join(_kind(option, name) for option in options)}"]


def _kind(hint: Any, name: str) -> str:
    """A type in the words of a config."""
    if typing.get_origin(hint) is list:
        inner = typing.get_args(hint)[0]
        return "a list of fields" if inner not in KINDS else f"a list, as [{KINDS[inner]}, ...]"
    if typing.get_origin(hint) is dict:
        return f"a mapping, as {{name: {KINDS.get(typing.get_args(hint)[1], 'value')}}}"
    if hint in KINDS:
        return KINDS[hint]
    return f"fields of its own, as {name}.{next(iter(typing.get_type_hints(hint)), '...')}" if hint else "null"


def check(config: TrainConfig, where: str = "the config") -> None:
    """Check the values and that they fit together.

    Raises:
        ConfigError: they do not; every problem is named.
    """
    problems = [
        f"{name} is {value!r}, expected {' or '.join(map(repr, allowed))}"
        for name, value, allowed in (
            ("precision", config.precision, PRECISIONS),
            ("loss_divisor", config.loss_divisor, ("targets", "positions")),
            ("eval_divisor", config.eval_divisor, ("targets", "positions")),
            ("restore_optimizer_settings", config.restore_optimizer_settings, ("none", "betas", "all")),
            ("optimizer.name", config.optimizer.name, tuple(OPTIMIZERS)),
            ("scheduler.name", config.scheduler.name, tuple(SCHEDULES)),
            ("scheduler.units", config.scheduler.units, ("steps", "tokens")),
            *(
                (f"evaluators[{n}].quantization", evaluator.quantization, (None, *NAMES))
                for n, evaluator in enumerate(config.evaluators)
            ),
        )
        if value not in allowed
    ]
    mesh = config.mesh or {}
    problems += [f"mesh has no axis {axis}: there are {', '.join(MESH_AXES)}" for axis in mesh if axis not in MESH_AXES]
    if not config.save_folder:
        problems.append("save_folder is not set")
    positive = {
        "global_train_batch_size": config.global_train_batch_size,
        "device_train_microbatch_size": config.device_train_microbatch_size,
        "max_sequence_length": config.max_sequence_length,
        "save_interval": config.save_interval,
        "eval_interval": config.eval_interval,
        "console_log_interval": config.console_log_interval,
        "max_grad_norm": config.max_grad_norm,
        "max_grad_norm_ratio": config.max_grad_norm_ratio,
        "stop_at": config.stop_at,
        "stop_after": config.stop_after,
        "sample_tokens": config.sample_tokens,
        "time_limit": config.time_limit,
        "early_stopping_factor": config.early_stopping_factor,
        **{f"mesh.{axis}": size for axis, size in mesh.items()},
        "lora.rank": None if config.lora is None else config.lora.rank,
        **{f"data.weights[{n}]": weight for n, weight in enumerate(config.data.weights or ())},
        **{
            f"evaluators[{n}].device_eval_batch_size": evaluator.device_eval_batch_size
            for n, evaluator in enumerate(config.evaluators)
        },
        **{f"evaluators[{n}].group_size": evaluator.group_size for n, evaluator in enumerate(config.evaluators)},
    }
    problems += [
        f"{name} is {value}, expected more than 0"
        for name, value in positive.items()
        if value is not None and not 0 < value < math.inf
    ]
    optimizer, scheduler = config.optimizer, config.scheduler
    not_negative = {
        "seed": config.seed,
        "data.seed": config.data_seed,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.eps": optimizer.eps,
        "scheduler.t_warmup": scheduler.t_warmup,
        "scheduler.alpha_f": scheduler.alpha_f,
        "extra_steps": config.extra_steps,
        "auxiliary_loss_multiplier": config.auxiliary_loss_multiplier,
    }
    problems += [
        f"{name} is {value}, expected 0 or more" for name, value in not_negative.items() if not 0 <= value < math.inf
    ]
    if config.save_num_checkpoints_to_keep < -1:
        problems.append(f"save_num_checkpoints_to_keep is {config.save_num_checkpoints_to_keep}, expected -1 or more")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        problems.append(f"optimizer.betas are {optimizer.betas}, expected two numbers from 0 to less than 1")
    if optimizer.learning_rate >= 0 and not 0 <= scheduler.warmup_min_lr <= optimizer.learning_rate:
        problems.append(
            f"scheduler.warmup_min_lr is {scheduler.warmup_min_lr}, expected 0 to the peak, {optimizer.learning_rate}"
        )
    if scheduler.name == "inverse_sqrt_with_warmup" and not scheduler.t_warmup:
        problems.append(
            "scheduler.t_warmup is 0, expected more: inverse_sqrt_with_warmup has a learning rate of 0 then"
        )
    if config.max_sequence_length == 1:
        problems.append("max_sequence_length is 1, expected at least 2: a token, and one before it that predicts it")
    if (scheduler.grad_clip_warmup_steps is None) != (scheduler.grad_clip_warmup_factor is None):
        problems.append("scheduler.grad_clip_warmup_steps and grad_clip_warmup_factor need one another")
    match = DURATION.fullmatch(str(config.max_duration))
    if not match or not float(match["number"]) < math.inf:
        problems.append(f"max_duration is {config.max_duration!r}, expected steps, tokens as '1e9T' or epochs as '3ep'")
    if not config.data.paths:
        problems.append("data.paths is empty, expected files of tokens or folders that `olmozoo prepare` has written")
    masks, weights = config.data.label_mask_paths, config.data.weights
    if masks is not None and len(masks) != len(config.data.paths):
        problems.append(f"data.label_mask_paths are {len(masks)}, expected {len(config.data.paths)}, one a path")
    if weights is not None and len(weights) != len(config.data.paths):
        problems.append(f"data.weights are {len(weights)}, expected {len(config.data.paths)}, one a path")
    for n, evaluator in enumerate(config.evaluators):
        given = [name for name in ("paths", "datasets", "file") if getattr(evaluator, name)]
        if len(given) != 1:
            problems.append(f"evaluators[{n}] has {' and '.join(given) or 'no data'}, expected paths, datasets or file")
    labels = [evaluator.label for evaluator in config.evaluators]
    problems += [
        f"evaluators: {label!r} is there twice" for label in sorted({x for x in labels if labels.count(x) > 1})
    ]
    if config.lora is not None and config.freeze:
        problems.append("freeze and lora are both set: lora freezes all but its adapters")
    if config.lora is not None and not 0 <= config.lora.dropout < 1:
        problems.append(f"lora.dropout is {config.lora.dropout}, expected 0 to less than 1")
    if config.load_path is None and not config.model:
        problems.append("neither load_path nor model is set: what is to be trained?")
    raise_problems(f"{where} has wrong values", problems, ConfigError)
