"""What the conversion programs share: the table of names read both ways, writing, verification, the command."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table

from conversion.tensors import stacked
from olmozoo.checkpoint.atomic import atomic_folder
from olmozoo.checkpoint.convert import check_target, settings_files, write_settings
from olmozoo.checkpoint.files import GENERATION_CONFIG, FolderHandle, write_json
from olmozoo.checkpoint.formats import ALL_WEIGHTS, SHARDED_WEIGHTS
from olmozoo.checkpoint.reader import Checkpoint, name_tied_embedding
from olmozoo.checkpoint.tensors import LazyTensor, same_bits
from olmozoo.checkpoint.writer import write_config, write_weights
from olmozoo.cli.common import printable
from olmozoo.errors import CheckpointError, OlmozooError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter
from olmozoo.families.rope import rope_kind
from olmozoo.families.rotary import RotaryConfig
from olmozoo.typing import Array

Rule = tuple[str, tuple[str, ...]]  # a foreign name, and the canonical names whose rows it stacks, in order
WEIGHTS = re.compile(rf"{ALL_WEIGHTS.pattern}|model\.pt|model_and_optim|rank\d+\.pt")  # and of foreign formats
LAYER = "{}"  # stands for the layer's number in both

out = Console()
err = Console(stderr=True)

Src = Annotated[Path, typer.Argument(help="The checkpoint to read.")]
Dst = Annotated[Path, typer.Argument(help="The folder to write; it is replaced in one step, when all is written.")]
Reverse = Annotated[bool, typer.Option("--reverse", help="From a canonical folder back to the foreign format.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List what would be mapped to what, and write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace weights that DST has.")]
Verify = Annotated[bool, typer.Option(help="Compare what was written with what was read, bit by bit.")]
ShardSize = Annotated[str, typer.Option(help="The most bytes in a file, such as 5GB or 1GiB.")]
TokenizerPath = Annotated[Path | None, typer.Option(help="A tokenizer.json, or a folder with one, to check and copy.")]


def run(main: Callable[..., None]) -> None:
    """Run a program's command: a bad input is a message on standard error and exit code 2, and no traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (OlmozooError, OSError) as error:
        message = str(error).replace("force=True", "--force")
        err.print("error: " + printable(message, "\n"), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


# -- the table of names, read both ways -------------------------------------------------------------------------------


def grouped_parameters(rules: Iterable[Rule], config: ModelConfig) -> dict[str, list[Parameter]]:
    """Foreign name -> the canonical parameters that it stacks; rules for other parameters are left out."""
    table = {parameter.name: parameter for parameter in config.parameters("causal_lm") if parameter.tied_to is None}
    found: dict[str, list[Parameter]] = {}
    for foreign, canonical in rules:
        for layer in range(config.num_hidden_layers) if LAYER in foreign else (0,):
            names = [name.replace(LAYER, str(layer)) for name in canonical]
            if all(name in table for name in names):
                found[foreign.replace(LAYER, str(layer))] = [table.pop(name) for name in names]
    raise_problems(f"{config.name} cannot be expressed", [f"there is no foreign name for {name}" for name in table])
    return found


@dataclass(frozen=True)
class Link:
    """A canonical parameter, and the rows of a foreign tensor that it is."""

    parameter: Parameter
    foreign: str
    start: int
    stop: int


def links(grouped: dict[str, list[Parameter]]) -> Iterator[Link]:
    """The same table the other way round: for each canonical parameter, which rows of which tensor it is."""
    for foreign, parameters in grouped.items():
        row = 0
        for parameter in parameters:
            yield Link(parameter, foreign, row, row + parameter.shape[0])
            row += parameter.shape[0]


def foreign_shape(parameters: Sequence[Parameter]) -> tuple[int, ...]:
    """The shape of the tensor that stacks these."""
    return (sum(parameter.shape[0] for parameter in parameters), *parameters[0].shape[1:])


def check_sources(sources: dict[str, LazyTensor], grouped: dict[str, list[Parameter]], where: Path) -> None:
    """Raise one error that lists every missing, unexpected and misshapen tensor, if there is any."""
    problems = [f"missing: {name} {list(foreign_shape(grouped[name]))}" for name in grouped if name not in sources]
    problems += [f"unexpected: {name} {list(sources[name].shape)}" for name in sources if name not in grouped]
    for name, parameters in grouped.items():
        expected = foreign_shape(parameters)
        if name in sources and sources[name].shape != expected:
            problems.append(f"wrong shape: {name} is {list(sources[name].shape)}, expected {list(expected)}")
    raise_problems(f"{where} does not fit its config", problems)


def canonical_sources(src: Path, config: ModelConfig) -> dict[str, LazyTensor]:
    """The tensors of a canonical folder, checked against its config.

    Raises:
        CheckpointError: one error that lists every missing, unexpected and misshapen tensor.
    """
    checkpoint = Checkpoint(src)
    sources = dict(checkpoint.tensors)
    name_tied_embedding(sources, config)
    table = {parameter.name: [parameter] for parameter in config.parameters("causal_lm") if parameter.tied_to is None}
    for parameter in config.parameters("causal_lm"):
        if parameter.tied_to is not None and parameter.name in sources:
            check_tied(sources.pop(parameter.name), sources.get(parameter.tied_to), parameter.name)
    check_sources(sources, table, src)
    return sources


def check_tied(head: LazyTensor, embedding: LazyTensor | None, name: str) -> None:
    """Raise a CheckpointError unless a tied head that is there all the same is the embedding."""
    if embedding is not None and not same_bits(head.read(), embedding.read()):
        raise CheckpointError(f"{head.file}: {name} differs from the embedding, to which the config ties it")


def yarn_factor(factor: float) -> float:
    """What YaRN multiplies cosines and sines by (arXiv:2309.00071, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0


def yarn_fields(config: RotaryConfig) -> dict[str, Any] | None:
    """`factor`, `beta_fast`, `beta_slow` and `original_max_position_embeddings` of a config's YaRN.

    None where `rope_scaling` is of another kind, or has anything beyond these, such as an `attention_factor` other than
    `yarn_factor`: foreign formats have no field for it.
    """
    scaling = config.rope_scaling or {}
    found = {
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": config.max_position_embeddings,
        **{name: value for name, value in scaling.items() if name not in ("rope_type", "type")},
    }
    attention = found.pop("attention_factor", None)
    if rope_kind(scaling) != "yarn" or len(found) > 4:
        return None
    if attention is not None and not math.isclose(attention, yarn_factor(found["factor"])):
        return None
    return found


# -- from and to the canonical folder ---------------------------------------------------------------------------------


def to_canonical(
    sources: dict[str, LazyTensor],
    rules: Iterable[Rule],
    config: ModelConfig,
    source: FolderHandle,
    dst: Path,
    *,
    tokenizer: Path | None,
    max_shard_size: str,
    dry_run: bool,
    verify: bool,
    force: bool,
) -> None:
    """Write a canonical folder from foreign tensors, and compare it with them before it is renamed into place.

    Raises:
        InputError: `dst` is the source, or has weights and `force` is not given.
        CheckpointError: the tensors do not fit the config, or what was written differs, or the source, whose files are
            opened when they are read, was replaced meanwhile.
    """
    grouped = grouped_parameters(rules, config)
    check_sources(sources, grouped, source.path)
    check_dst(source.path, dst, force or dry_run)
    files = tokenizer_files(tokenizer, config) if tokenizer else {}
    found = {link.parameter.name: link for link in links(grouped)}
    if dry_run:
        show((link.foreign, sources[link.foreign], link) for link in found.values())
        return

    def rows(parameter: Parameter) -> Array:
        link = found[parameter.name]
        values = sources[link.foreign].rows(link.start, link.stop)
        source.check()
        return values

    def dtype(parameter: Parameter) -> np.dtype[Any]:
        return sources[found[parameter.name].foreign].dtype

    total = sum(sources[name].nbytes for name in grouped)
    write_canonical(dst, config, rows, dtype, total, files=files, max_shard_size=max_shard_size, verify=verify)


def write_canonical(
    dst: Path,
    config: ModelConfig,
    read: Callable[[Parameter], Array],
    dtype: Callable[[Parameter], np.dtype[Any]],
    total: int,
    *,
    files: dict[str, bytes],
    max_shard_size: str,
    verify: bool,
) -> None:
    """Write a canonical folder with a progress bar, read it again and compare; only then is it renamed into place.

    Args:
        dst: the folder.
        config: written as config.json; its special tokens make the generation_config.json, unless `files` has one.
        read: returns a parameter's values; called again for the comparison.
        dtype: returns their dtype.
        total: bytes to write, for the bar.
        files: name -> content of settings and a tokenizer; see `write_settings`.
        max_shard_size: as for `write_weights`.
        verify: whether to compare.

    Raises:
        CheckpointError: the folder cannot be written, or what was written differs.
    """

    def counted(parameter: Parameter) -> LazyTensor:
        return LazyTensor(parameter.name, dtype(parameter), parameter.shape, lambda: advance(read(parameter)))

    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    table = {p.name: p for p in config.parameters("causal_lm") if p.tied_to is None}
    with atomic_folder(dst, SHARDED_WEIGHTS) as staging:
        with progress("writing", total) as advance:
            tensors = [counted(parameter) for parameter in table.values()]
            write_config(staging, config, "causal_lm", tensors)
            write_weights(staging, tensors, max_shard_size)
        write_json(staging / GENERATION_CONFIG, {name: value for name, value in tokens.items() if value is not None})
        write_settings(files, staging)
        if verify:
            written = canonical_sources(staging, type(config).from_folder(staging))
            compare((name, functools.partial(read, table[name]), source) for name, source in written.items())


def from_canonical(
    src: Path,
    dst: Path,
    rules: Iterable[Rule],
    config: ModelConfig,
    sources: dict[str, LazyTensor],
    write: Callable[[Path, list[LazyTensor]], None],
    read: Callable[[Path], dict[str, LazyTensor]],
    *,
    dry_run: bool,
    verify: bool,
    force: bool,
) -> None:
    """Write foreign tensors from a canonical folder, and compare them with it before they are renamed into place.

    Args:
        src: the canonical folder.
        dst: the folder to write.
        rules: the table of names.
        config: of the canonical folder.
        sources: its tensors; see `canonical_sources`.
        write: writes everything into a folder, given the tensors under their foreign names.
        read: reads it again.
        dry_run: only list what would be mapped.
        verify: whether to compare.
        force: replace weights that are in `dst`.

    Raises:
        InputError: `dst` is `src`, or has weights and `force` is not given.
        CheckpointError: the folder does not fit its config, or what was written differs.
    """
    check_dst(src, dst, force or dry_run)
    grouped = grouped_parameters(rules, config)
    if dry_run:
        show((link.foreign, sources[link.parameter.name], link) for link in links(grouped))
        return

    def joined(parameters: list[Parameter]) -> Array:
        return stacked([sources[parameter.name] for parameter in parameters])

    with atomic_folder(dst, SHARDED_WEIGHTS) as staging:
        with progress("writing", sum(tensor.nbytes for tensor in sources.values())) as advance:

            def read_parts(parts: list[Parameter]) -> Array:
                return advance(joined(parts))

            tensors = [
                LazyTensor(
                    name, dtype_of(name, parts, sources), foreign_shape(parts), functools.partial(read_parts, parts)
                )
                for name, parts in grouped.items()
            ]
            write(staging, tensors)
        if verify:
            written = read(staging)
            check_sources(written, grouped, staging)
            compare((name, functools.partial(joined, parts), written[name]) for name, parts in grouped.items())


def dtype_of(name: str, parts: list[Parameter], sources: dict[str, LazyTensor]) -> np.dtype[Any]:
    """The dtype that the parts of a foreign tensor share."""
    found = {sources[part.name].dtype for part in parts}
    if len(found) > 1:
        kinds = ", ".join(f"{part.name} {sources[part.name].dtype.name}" for part in parts)
        raise CheckpointError(f"the parts of {name} must be of one dtype: {kinds}")
    return found.pop()


def check_dst(src: Path, dst: Path, force: bool) -> None:
    """Raise an InputError where a conversion would write over what it reads or, without --force, over other weights."""
    check_target(src, dst, force, WEIGHTS)


def compare(pairs: Iterable[tuple[str, Callable[[], Array], LazyTensor]]) -> None:
    """Compare what was written with what it was made of, bit by bit, one tensor at a time.

    Raises:
        CheckpointError: one error that lists every tensor that differs.
    """
    pairs = list(pairs)
    with progress("verifying", sum(tensor.nbytes for _, _, tensor in pairs)) as advance:
        differing = [f"{name} differs" for name, read, found in pairs if not same_bits(read(), advance(found.read()))]
    raise_problems("what was written is not what was read", differing)
    err.print(f"verified: {len(pairs)} tensors are the same, bit by bit")


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[Array], Array]]:
    """A progress bar over bytes; yields a function that counts an array and returns it."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(what, total=total)

        def advance(array: Array) -> Array:
            bar.advance(task, array.nbytes)
            return array

        yield advance


def show(rows: Iterable[tuple[str, LazyTensor, Link]]) -> None:
    """List what would be mapped to what."""
    table = Table("foreign tensor", "rows", "canonical parameter", "shape", "dtype")
    for foreign, source, link in rows:
        span = f"{link.start}:{link.stop}"
        table.add_row(
            escape(printable(foreign)), span, link.parameter.name, str(list(link.parameter.shape)), source.dtype.name
        )
    wide = Console(width=max(out.width, 140))  # names are for reading and for grep: whole, whatever the terminal
    wide.print(table, f"dry run: {table.row_count} parameters, nothing was written")


# -- configs and tokenizers -------------------------------------------------------------------------------------------


def tokenizer_files(path: Path, config: ModelConfig) -> dict[str, bytes]:
    """The files of a tokenizer that fits a config: name -> content.

    Args:
        path: a tokenizer in a JSON file of any name, or a folder with a tokenizer.json.
        config: of the model it is for.

    Raises:
        CheckpointError: it is not readable, has ids past the model's vocabulary, or lacks the model's special tokens.
    """
    import tokenizers

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file} is not a readable tokenizer: {error}") from error
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    problems = []
    if max(ids, default=0) >= config.vocab_size:
        problems.append(f"its largest id is {max(ids)}, expected less than vocab_size = {config.vocab_size}")
    tokens = {name: getattr(config, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    for name, found in tokens.items():
        for token in found if isinstance(found, list) else [found]:
            if token is not None and tokenizer.id_to_token(token) is None:
                problems.append(f"it has no token {token}, the config's {name}_id")
    raise_problems(f"{file} does not fit the model", problems)
    files = settings_files(path) if path.is_dir() else {}
    files.pop(GENERATION_CONFIG, None)
    return {**files, "tokenizer.json": file.read_bytes()}
