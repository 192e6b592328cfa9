"""What a run writes besides its metrics: the folders of steps, adapters, the finished model, sample texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from olmozoo.backends import Backend
from olmozoo.checkpoint.atomic import locked
from olmozoo.checkpoint.convert import convert_checkpoint, settings_files, write_settings
from olmozoo.checkpoint.files import GENERATION_CONFIG, remove, write_json
from olmozoo.checkpoint.formats import safetensors
from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import HubError, InputError, OlmozooError, raise_problems
from olmozoo.families.parameter import Parameter
from olmozoo.hub import ADAPTER_CONFIG, resolve
from olmozoo.text.pipeline import TextGenerationPipeline
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.training import state
from olmozoo.training.config import TrainConfig
from olmozoo.training.manifest import IDS, MASK, TOKENIZER, read_manifest, tokenizer_hash
from olmozoo.training.start import Start
from olmozoo.typing import Array

if TYPE_CHECKING:
    from olmozoo.training.loop import Run

MODEL, BASE, CONFIG, ADAPTER_WEIGHTS = "model", "base", "config.yaml", "adapter_model.safetensors"
LOCK = ".run.lock"
PEFT_PREFIX = "base_model.model."
FIRST = 1000  # instances that show how answers end


def tokenizer_folder(config: TrainConfig, start: Start) -> Path | None:
    """Where the tokenizer of a run is: of the config, of prepared data, or of the model; None where none is named."""
    prepared = [Path(path) / TOKENIZER for path in config.data.paths if (Path(path) / TOKENIZER).is_dir()]
    named = config.tokenizer or next(iter(prepared), start.tokenizer)
    if named is None:
        return None
    if Path(named).is_file():
        return Path(named)
    try:
        return resolve(named, need="tokenizer")
    except HubError as error:
        raise HubError(f"tokenizer: {error}") from error


def open_tokenizer(config: TrainConfig, start: Start) -> Tokenizer | None:
    """The tokenizer of a run; None where nothing names one, or where the model's folder has none.

    Raises:
        InputError: it has ids that the model lacks.
    """
    folder = tokenizer_folder(config, start)
    if folder is None:
        return None
    try:
        tokenizer = Tokenizer.from_pretrained(folder.parent if folder.is_file() else folder)
    except OlmozooError:
        if config.tokenizer is not None and not folder.is_file():
            raise
        return None
    if len(tokenizer) > start.model.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, and the model's vocabulary has "
            f"{start.model.vocab_size}"
        )
    for path in map(Path, config.data.paths):
        if path.is_dir() and read_manifest(path).tokenizer_sha256 != tokenizer_hash(tokenizer):
            raise InputError(
                f"{path} was prepared with another tokenizer than {folder}: prepare it again with this one"
            )
    return tokenizer


def tokenizer_files(config: TrainConfig, start: Start) -> dict[str, bytes]:
    """The contents of the tokenizer's files by name, as they are now: a step that has them may be removed later."""
    source = tokenizer_folder(config, start)
    if source is None:
        return {}
    if source.is_file():
        return {"tokenizer.json": source.read_bytes()}
    return {name: content for name, content in settings_files(source).items() if name != GENERATION_CONFIG}


def answer_ends(config: TrainConfig, tokenizer: Tokenizer) -> list[int]:
    """The added tokens, such as `<|im_end|>`, that end what is learned in the first instances of prepared chats."""
    added = set(tokenizer.backend.get_added_tokens_decoder())
    found: set[int] = set()
    for path in map(Path, config.data.paths):
        if not path.is_dir() or (manifest := read_manifest(path)).template is None:
            continue
        shape = (manifest.instances, manifest.length)
        ids = np.memmap(path / IDS, manifest.dtype, "r", shape=shape)[:FIRST]
        learned = np.memmap(path / MASK, "bool", "r", shape=shape)[:FIRST]
        found.update(ids[:, :-1][learned[:, :-1] & ~learned[:, 1:]].tolist())
    return sorted(found & added)


def check_folder(config: TrainConfig) -> None:
    """Check that the folder of a run is one, or can be.

    Raises:
        InputError: it has a model or other files that are not of a run, or what the run starts from would be removed.
    """
    folder = Path(config.save_folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"save_folder {folder} is a file, expected a folder")
    if (folder / "config.json").is_file():
        raise InputError(f"save_folder {folder} is the folder of a model, expected one for a run: choose another")
    if not config.save_overwrite and (folder / MODEL).is_dir() and not state.steps(folder):
        raise InputError(f"{folder} has a finished model and no step to go on from: set save_overwrite to start over")
    for old in _older_run(config):
        for path in (config.load_path, config.tokenizer, *config.data.paths, *(config.data.label_mask_paths or ())):
            if path and Path(path).resolve().is_relative_to(old.resolve()):
                raise InputError(f"save_overwrite would remove {old}, and the run needs {path}: choose another folder")


def _older_run(config: TrainConfig) -> list[Path]:
    """The folders in `save_folder` that `save_overwrite` removes."""
    folder = Path(config.save_folder)
    found = (*state.steps(folder).values(), folder / MODEL) if config.save_overwrite else ()
    return [path for path in found if path.is_dir()]


def prepare_folder(config: TrainConfig) -> None:
    """Make the folder of a run, with its config; an older run in it is removed where it is to be overwritten."""
    folder = Path(config.save_folder)
    for path in _older_run(config):
        state.remove(path)
    folder.mkdir(parents=True, exist_ok=True)
    state.remove_abandoned(folder)
    file = folder / CONFIG
    temporary = folder / f".{CONFIG}.new"
    remove(temporary)  # a link may be there
    temporary.write_text(config.to_yaml(), encoding="utf-8")
    temporary.replace(file)


@contextlib.contextmanager
def lock(config: TrainConfig) -> Iterator[None]:
    """Keep other runs out of the folder of a run, which is made.

    Raises:
        InputError: another run is in it.
    """
    folder = Path(config.save_folder)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK, wait=False))
        except BlockingIOError as error:
            raise InputError(
                f"save_folder {folder} is in use by another run ({error}): wait for it, or choose another"
            ) from error
        yield


def is_complete(folder: Path) -> bool:
    """Whether a run's folder has the model of its last step, which is written after it."""
    model, step = folder / MODEL, state.latest(folder)
    return model.is_dir() and step is not None and model.stat().st_mtime >= step.stat().st_mtime


def write_step(run: Run, folder: Path) -> None:
    """Write the model, or the adapter, of a step, with its tokenizer. Every process calls this."""
    if run.config.lora is not None:
        values = run.world.kept(run.step.values())
        run.world.by_first(lambda: write_adapter(run, folder, values))
    else:
        run.step.sync().save_pretrained(folder)
    run.world.by_first(lambda: write_settings(run.tokenizer_files, folder))


def write_adapter(run: Run, folder: Path, values: Mapping[str, Array]) -> None:
    """Write the adapter in PEFT's format."""
    lora = run.config.lora
    assert lora is not None
    assert run.start.folder is not None
    write_json(
        folder / ADAPTER_CONFIG,
        {
            "base_model_name_or_path": str(run.start.folder.resolve()),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "peft_type": "LORA",
            "r": lora.rank,
            "target_modules": list(lora.target_modules),
            "task_type": "CAUSAL_LM",
        },
    )
    tensors = [
        LazyTensor(PEFT_PREFIX + name, array.dtype, array.shape, lambda array=array: array)  # type: ignore[misc]
        for name, array in values.items()
    ]
    safetensors.write(folder / ADAPTER_WEIGHTS, tensors)
    write_json(folder / GENERATION_CONFIG, run.model.generation_config.to_dict())


def adapter_values(folder: Path, trained: Sequence[Parameter]) -> dict[str, Array]:
    """The values of an adapter, by the names of the parameters.

    Raises:
        InputError: it has not the factors that are trained.
    """
    file = folder / ADAPTER_WEIGHTS
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in safetensors.read_tensors(file).items()}
    problems = [
        f"{parameter.name} is {list(tensors[parameter.name].shape) if parameter.name in tensors else 'not there'}, "
        f"expected {list(parameter.shape)}"
        for parameter in trained
        if parameter.name not in tensors or tensors[parameter.name].shape != parameter.shape
    ]
    problems += [f"{name} is not trained" for name in tensors.keys() - {parameter.name for parameter in trained}]
    raise_problems(f"{file} does not fit the settings of lora", problems, InputError)
    return {name: tensor.read() for name, tensor in tensors.items()}


def write_base(config: TrainConfig, model: Any) -> Path:
    """Write the model that adapters are trained on, where it is no folder that they can name."""
    folder = Path(config.save_folder) / BASE
    model.save_pretrained(folder)
    return folder


def write_final(run: Run) -> None:
    """Write the finished model, merged with its adapter, where `generate`, `chat` and `evaluate` take it.

    Every process calls this.
    """
    folder, base = Path(run.config.save_folder), run.start.folder
    if run.config.lora is None:
        with state.shared_folder(folder / MODEL, run.world) as staging:
            write_step(run, staging)
        return
    with state.shared_folder(folder / "adapter", run.world) as staging:
        write_step(run, staging)

    def merge() -> None:
        assert base is not None
        convert_checkpoint(base, folder / MODEL, to="safetensors", adapter=folder / "adapter", force=True)
        write_settings(run.tokenizer_files, folder / MODEL)

    run.world.by_first(merge)


def sample(config: TrainConfig, backend: Backend, tokenizer: Tokenizer) -> str:
    """What the model makes of the prompt of the config."""
    prompt = config.sample_prompt
    assert prompt is not None
    pipe = TextGenerationPipeline(backend, tokenizer)
    messages: Any = [{"role": "user", "content": prompt}] if tokenizer.chat_templates else prompt
    text = pipe(messages, max_new_tokens=config.sample_tokens, do_sample=False)
    return f"sample: {prompt!r} -> {text!r}"
