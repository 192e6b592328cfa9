"""The loop of a training run, in no framework: data, learning rates, clipping, reports, checkpoints.

Each wing's `training.py` has one class, `TrainStep`, that computes the gradients of a micro-batch and updates the
parameters.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from olmozoo.backends import Backend, backend_class
from olmozoo.checkpoint.atomic import FULL
from olmozoo.errors import InputError, TrainingError
from olmozoo.families.parameter import Parameter
from olmozoo.generation.config import GenerationConfig
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.training import evaluators, outputs, state
from olmozoo.training.config import DURATION, TrainConfig, check
from olmozoo.training.data import Batch, TrainingData, open_data
from olmozoo.training.metrics import Metrics
from olmozoo.training.parameters import Clipping, total_norm, trained_parameters, weight_decays
from olmozoo.training.schedules import clipping_norm, learning_rate
from olmozoo.training.start import DTYPES, Start, open_start
from olmozoo.training.state import Progress
from olmozoo.training.summary import check_mesh, summary
from olmozoo.world import World


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: the last step.
        loss: of that step, per token learned.
        finished: whether the run is complete; else it can be resumed.
        stopped: what ended a run that is not complete: the name of a signal, such as "SIGINT", or a field of the config
            with its value.
        folder: of the finished model; None before the run is complete.
        rank: the number of this process.
    """

    step: int
    loss: float | None
    finished: bool
    folder: Path | None
    stopped: str | None = None
    rank: int = 0


@dataclass(frozen=True)
class Plan:
    """How long a run is.

    Attributes:
        steps: the duration in steps.
        total: in the units of the schedule.
        stop: the step that the run stops at, unless the data end before.
        epochs: the number of epochs.
    """

    steps: int
    total: int
    stop: int
    epochs: int


def plan(config: TrainConfig, data: TrainingData, progress: Progress) -> Plan:
    """The length of a run from where it is.

    Raises:
        InputError: there is nothing to do.
    """
    per_batch = config.global_train_batch_size * data.files.length
    duration, extra = config.max_duration, config.extra_steps
    match = DURATION.fullmatch(str(duration))
    assert match is not None
    if match["unit"] == "ep":
        steps = round(float(match["number"]) * data.batches_per_epoch)
        tokens, extra = steps * per_batch, 0
    elif match["unit"] == "T":
        tokens = int(float(match["number"]))
        steps = progress.step + max(0, -(-(tokens - progress.tokens) // per_batch))
    else:
        steps = int(float(match["number"]))
        tokens = progress.tokens + max(0, steps - progress.step) * per_batch
    if steps < 1:
        raise InputError(f"max_duration is {duration!r}, which is no step: expected at least one")
    stop = steps + extra if config.stop_at is None else config.stop_at
    total = steps if config.scheduler.units == "steps" else tokens
    return Plan(steps, total, stop, -(-steps // data.batches_per_epoch))


def last_step(plan: Plan, data: TrainingData, progress: Progress) -> int:
    """The step that the run ends at: where it is to stop, or where the data of its epochs end."""
    left = data.batches_per_epoch * (plan.epochs - progress.epoch - 1) + data.batches_left(progress.examples)
    return max(progress.step, min(plan.stop, progress.step + left))


def train(config: TrainConfig, console: Console | None = None) -> Result:
    """Train a model as the config says, or go on with a run that was interrupted.

    Where there are several processes, all of them call this with the same config, and read the same folders.

    Args:
        config: the run. It is checked as a whole before the first step.
        console: where lines and the progress bar go; default standard error.

    Returns:
        How the run ended.

    Raises:
        ConfigError: a field has a wrong value.
        InputError: the data do not fit the config or the model.
        CheckpointError: what the run starts from is broken, or a checkpoint cannot be written: the last one is whole.
        TrainingError: the loss or a gradient is not finite, and the message names the step and the instances; or the
            folder cannot be written.
    """
    console = console or Console(stderr=True)
    config = copy.deepcopy(config)  # a checkpoint may bring settings of its own
    check(config)
    backend = backend_class(config.backend)
    with backend.training().scope(
        config, lambda: backend.choose_device(DTYPES[config.precision], config.device)
    ) as world:
        start = open_start(config)
        data = open_data(config, start.model)
        run = Run(config, start, data, console if world.is_first else Console(quiet=True), world)
        try:
            return run.train()
        except OSError as error:
            last = state.latest(Path(config.save_folder)) or "there is none yet"
            reason = "the disk is full" if error.errno in FULL else (error.strerror or str(error))
            raise TrainingError(f"{config.save_folder}: {reason}. The last checkpoint is whole: {last}") from error


class Run:
    """A training run that is under way."""

    def __init__(self, config: TrainConfig, start: Start, data: TrainingData, console: Console, world: World) -> None:
        self.config, self.start, self.data, self.console, self.world = config, start, data, console, world
        saved = start.saved
        self.progress = saved.progress if saved else Progress()
        self.plan = plan(config, data, self.progress)
        _check_resumed(config, start, data)
        self.backend_class = backend_class(config.backend)
        check_mesh(config, start.model, world.sizes, self.backend_class.wing)
        outputs.check_folder(config)
        if config.lora is not None and config.lora.dropout and self.backend_class.wing != "pt":
            raise InputError(f"lora.dropout is {config.lora.dropout}, expected 0: only the backend pt has it")
        self.training: Any = self.backend_class.training()
        if config.precision == "amp_bf16" and not config.amp_on_cpu and self.backend_class.is_cpu(world.device):
            config.precision = "fp32"
            start.lines.append("precision: fp32: amp_on_cpu is false, and the device is the CPU")
        self.tokenizer = outputs.open_tokenizer(config, start)
        self.tokenizer_files = outputs.tokenizer_files(config, start)
        self.evaluators = evaluators.open_evaluators(config, start.model, data, self.tokenizer)
        self.trained = trained_parameters(config, start.model)
        _check_moments(config, start, self.trained)
        self.asked: str | None = None  # why this process wants to stop
        self.stopped: str | None = None  # and why all of them do
        self.metrics: Any = None  # in the first process

    def _prepare(self) -> None:
        """Load the model and what the run goes on from."""
        config, start = self.config, self.start
        cls = self.backend_class.model_class(start.model, "causal_lm")
        self.model = self.training.make_model(cls, start.model, start.weights, config, self.world)
        self.model.generation_config = self._generation()
        if config.lora is not None and start.folder is None:
            start.folder = outputs.write_base(config, self.model)
        decays = weight_decays(config.optimizer, self.trained)
        names = [parameter.name for parameter in self.trained]
        self.clipping = Clipping(config.max_grad_norm_ratio, config.optimizer.betas, names, config.clip_fused)
        saved = start.saved
        if saved and "weight_decay" in saved.settings:
            of_file = saved.settings["weight_decay"]
            decays = [of_file.get(parameter.name, decay) for parameter, decay in zip(self.trained, decays, strict=True)]
        self.decays = decays
        self.step = self.training.TrainStep(self.model, self.trained, decays, config, self.world)
        if saved:
            self.clipping.means = saved.clip_means
            values = outputs.adapter_values(start.adapter, self.trained) if start.adapter else {}
            self.step.restore(values, state.as_arrays(saved.moments), self.progress.updates)
            saved.moments = {}

    def _generation(self) -> GenerationConfig:
        """The settings of generation of what is loaded, which also stops where the answers of the data end."""
        generation = GenerationConfig.from_contents(self.start.generation, self.start.model)
        if self.tokenizer is None:
            return generation
        ends = outputs.answer_ends(self.config, self.tokenizer)
        new = [end for end in ends if end not in generation.ends]
        if not new:
            return generation
        texts = ", ".join(str(self.tokenizer.backend.id_to_token(end)) for end in new)
        self.start.lines.append(f"answers end with {texts}: generation stops there too (generation_config.json)")
        return generation.replace(eos_token_id=[*generation.ends, *new])

    def train(self) -> Result:
        """Run to the end, or to where it is stopped."""
        config, progress, world = self.config, self.progress, self.world
        folder, last = Path(config.save_folder), self._last_step()
        if world.by_first(lambda: progress.step >= last and outputs.is_complete(folder)):
            self._print(f"the run is complete at step {progress.step}: {folder / outputs.MODEL}")
            return Result(progress.step, None, True, folder / outputs.MODEL, rank=world.rank)
        with contextlib.ExitStack() as stack:
            world.by_first(lambda: stack.enter_context(outputs.lock(config)))
            world.by_first(lambda: outputs.prepare_folder(config))
            self._prepare()
            return self._train(folder, last)

    def _train(self, folder: Path, last: int) -> Result:
        """Make the steps up to `last`, and write what a run leaves in its folder."""
        config, progress, world = self.config, self.progress, self.world
        sizes = summary(config, self.start.model, self.data, self.plan, last, self.trained, world.sizes)
        lines = [*(f"{name:<10} {text}" for name, text in sizes.items()), *self.start.lines]
        self.metrics = world.by_first(lambda: Metrics(config, progress.step, last, self.console))
        self._text(*lines)
        started, first_step = time.monotonic(), progress.step
        loss: float | None = None
        try:
            with self._signals():
                for batch in self._batches():
                    loss = self._one_step(batch)
                    done = progress.step >= last
                    if self.asked is None and not done:
                        if config.stop_after is not None and progress.step - first_step >= config.stop_after:
                            self.asked = f"stop_after {config.stop_after}"
                        elif config.time_limit is not None and time.monotonic() - started > config.time_limit:
                            self.asked = f"time_limit {config.time_limit}"
                    if self.evaluators and progress.step % config.eval_interval == 0 and not done:
                        self._evaluate()
                    due = config.save_interval is not None and progress.step % config.save_interval == 0
                    self.stopped = world.reason(self.asked)  # a signal from here on counts at the next step
                    if self.stopped is not None or (due and not done):
                        self._save()
                    if self.stopped is not None or done:
                        break
                if self.stopped is None:  # each part is done once, wherever the run was interrupted before
                    if (self.evaluators or config.sample_prompt) and not world.by_first(
                        lambda: self.metrics.is_evaluated(progress.step)
                    ):
                        self._evaluate()
                    if not world.by_first(lambda: progress.step in state.steps(folder)):
                        self._save()
                    outputs.write_final(self)
        finally:
            if self.metrics is not None:
                self.metrics.close(plot=True)
        if self.stopped is not None:
            self._print(f"stopped by {self.stopped} at step {progress.step}; the same command goes on from there")
            return Result(progress.step, loss, False, None, self.stopped, world.rank)
        return Result(progress.step, loss, True, folder / outputs.MODEL, rank=world.rank)

    def _text(self, *lines: str) -> None:
        """Print lines above the progress bar."""

        def write() -> None:
            for line in lines:
                self.metrics.text(line)

        self.world.by_first(write)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _last_step(self) -> int:
        return last_step(self.plan, self.data, self.progress)

    def _batches(self) -> Iterator[Batch]:
        """The batches of the run, counted in `progress`."""
        progress, last = self.progress, self._last_step()
        while progress.step < last:
            for batch in self.data.batches(progress.epoch, progress.examples):
                progress.step += 1
                progress.examples += len(batch.indices)
                progress.tokens += batch.input_ids.size
                at_end = not self.data.batches_left(progress.examples)
                if at_end:
                    progress.epoch, progress.examples = progress.epoch + 1, 0
                    self.epoch_of_step = progress.epoch - 1
                else:
                    self.epoch_of_step = progress.epoch
                yield batch
                if progress.step >= last or at_end:
                    break
            else:
                progress.epoch, progress.examples = progress.epoch + 1, 0

    def _one_step(self, batch: Batch) -> float:
        """Compute the gradients of a batch and update the parameters; returns the loss per token learned."""
        config, progress, step = self.config, self.progress, self.step
        targets = batch.num_targets
        positions = batch.input_ids.size
        divisor = float(positions if config.loss_divisor == "positions" else max(targets, 1))
        sums = [
            step.gradients(part, divisor, _seed(config.seed, progress.step, number))
            for number, part in enumerate(batch.split(config.micro_batch_size * self.world.rows))
        ]
        cross_entropy, z, aux = (math.fsum(float(values[i]) for values in sums) for i in range(3))
        loss = cross_entropy / divisor
        norms = step.norms()
        norm = total_norm(norms)
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradient is {norm}"
            raise TrainingError(
                f"the {what} at step {progress.step}, before the update. Its batch are the instances "
                f"{', '.join(map(str, batch.indices.tolist()))} of epoch {self.epoch_of_step}. The last checkpoint is "
                f"whole: {state.latest(Path(config.save_folder)) or 'there is none yet'}"
            )
        current = progress.step if config.scheduler.units == "steps" else progress.tokens
        bound = clipping_norm(config.scheduler, config.max_grad_norm, current)
        if config.clip_one_step_late:
            bound, progress.bound = progress.bound if progress.bound is not None else config.max_grad_norm, bound
        rate = learning_rate(
            config.scheduler, config.optimizer.learning_rate, current, self.plan.total, progress.bolted_on
        )
        step.update(rate, self.clipping.scales(norms, bound))
        if config.clip_fused and progress.step == 1:
            self.clipping.means = None
        progress.updates += 1
        progress.targets += targets
        per_target = cross_entropy / max(targets, 1)
        numbers = {
            "step": progress.step,
            "epoch": self.epoch_of_step,
            "loss": loss,
            "loss_per_target": per_target,
            **({"z_loss": config.z_factor * z / divisor} if config.z_factor else {}),
            **({"aux_loss": aux} if step.aux_factor else {}),
            "grad_norm": norm,
            **({"max_grad_norm": bound} if bound is not None and math.isfinite(bound) else {}),
            "lr": rate,
            "tokens": progress.tokens,
            "targets": progress.targets,
        }
        self.world.by_first(lambda: self.metrics.step(numbers, batch.indices, positions))
        if config.early_stopping_factor is not None and current > config.scheduler.t_warmup:
            least = loss if progress.least_loss is None else progress.least_loss
            if loss > config.early_stopping_factor * least:
                self.asked = f"early_stopping_factor {config.early_stopping_factor} (loss {loss:.4f})"
            progress.least_loss = min(loss, least)
        return per_target

    def _evaluate(self) -> None:
        numbers: dict[str, float] = {}
        for scheme, group in itertools.groupby(self.evaluators, lambda evaluator: evaluator.quantization):
            with self.step.rounded(scheme) if scheme else contextlib.nullcontext():
                backend = self.live()
                for evaluator in group:
                    numbers |= evaluator(self.step, backend)
        self.world.by_first(lambda: self.metrics.evaluation(self.progress.step, numbers))
        if self.config.sample_prompt is not None and self.tokenizer is not None:
            self._text(outputs.sample(self.config, self.live(), self.tokenizer))

    def live(self) -> Backend:
        """The model as it is now, for generation and scoring."""
        return self.backend_class.of(self.step.sync())

    def _save(self) -> None:
        config, folder = self.config, Path(self.config.save_folder)
        if config.save_num_checkpoints_to_keep == 0 and self.stopped is None:
            return
        settings = {
            "betas": list(config.optimizer.betas),
            "eps": config.optimizer.eps,
            "weight_decay": {p.name: decay for p, decay in zip(self.trained, self.decays, strict=True)},
        }
        state.save(
            folder / f"step{self.progress.step}",
            lambda staging: outputs.write_step(self, staging),
            self.progress,
            self.step.moments(),
            self.clipping.means,
            settings,
            _fixed(config, self.data),
            self.world,
        )
        if config.save_num_checkpoints_to_keep > 0:
            self.world.by_first(lambda: state.keep_newest(folder, config.save_num_checkpoints_to_keep))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step that is under way, in all processes; a second one at once."""

        def stop(number: int, frame: Any) -> None:
            if self.asked is not None:
                raise KeyboardInterrupt
            self.asked = signal.Signals(number).name

        old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(ValueError):  # not in the main thread
                    old[number] = signal.signal(number, stop)
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _seed(seed: int, step: int, part: int) -> int:
    """The seed of a micro-batch's dropout: the same where a run is resumed."""
    return int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint32)[0]) >> 1


def _fixed(config: TrainConfig, data: TrainingData) -> dict[str, Any]:
    """What must not differ where a run is resumed."""
    return {
        "max_sequence_length": data.files.length,
        "instances": len(data.files),
        "data_seed": config.data_seed,
        "data_weights": config.data.weights,
        "optimizer": config.optimizer.name,
        "lora": config.lora is not None,
    }


def _check_resumed(config: TrainConfig, start: Start, data: TrainingData) -> None:
    """Check that a run that is resumed is the same run.

    Raises:
        InputError: it is not; every difference is named.
    """
    if start.saved is None or not start.saved.run or start.saved.progress.step == 0:
        return
    now = _fixed(config, data)
    different = [
        f"{name} was {value!r} and is {now[name]!r}"
        for name, value in start.saved.run.items()
        if name in now and now[name] != value
    ]
    if different:
        raise InputError(
            f"{config.save_folder} has a run of another kind: {'; '.join(different)}. Choose another save_folder, or "
            "set save_overwrite to start over"
        )


def _check_moments(config: TrainConfig, start: Start, trained: Sequence[Parameter]) -> None:
    """Check the running means of what a run goes on from; see `state.check_moments`."""
    if start.saved is not None:
        clips = config.max_grad_norm_ratio is not None
        state.check_moments(start.saved, trained, config.optimizer.moments, clips)


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        start: what it starts from.
        data: its data.
        plan: its duration.
        progress: where it starts.
        last: the step that it ends at.
        tokenizer: its tokenizer, if there is one.
        trained: the parameters that are trained.
    """

    start: Start
    data: TrainingData
    plan: Plan
    progress: Progress
    last: int
    tokenizer: Tokenizer | None
    trained: list[Parameter]

    def batch(self) -> Batch | None:
        """The first batch; None where nothing is left to do."""
        return next(self.data.batches(self.progress.epoch, self.progress.examples), None)


def dry_run(config: TrainConfig) -> DryRun:
    """What a run would do. Everything is opened and checked as for the run, without a framework; nothing is written.

    Raises:
        ConfigError, InputError, CheckpointError: as `train`.
    """
    start = open_start(config)
    data = open_data(config, start.model)
    progress = start.saved.progress if start.saved else Progress()
    found = plan(config, data, progress)
    _check_resumed(config, start, data)
    outputs.check_folder(config)
    check_mesh(config, start.model, config.mesh or {}, backend_class(config.backend).wing)
    tokenizer = outputs.open_tokenizer(config, start)
    evaluators.open_evaluators(config, start.model, data, tokenizer)
    trained = trained_parameters(config, start.model)
    _check_moments(config, start, trained)
    return DryRun(start, data, found, progress, last_step(found, data, progress), tokenizer, trained)
