"""Training data: files of tokens as instances of one length, their order, and batches with targets.

The files are raw arrays without a header, as AI2's trainers write and read them: `input_ids.npy` is no file of
`numpy.save`. The order is AI2's too: `numpy.random.default_rng(seed + epoch).shuffle` of the indices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from olmozoo.errors import InputError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.training.config import DataConfig, EvaluatorConfig, InstanceFilter, TrainConfig
from olmozoo.training.manifest import IDS, MASK, Manifest, read_manifest
from olmozoo.typing import Array

IGNORED = -100  # the target of a position that nothing is learned from
DTYPES = ("uint8", "uint16", "uint32", "uint64")
NUMPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Batch:
    """Some instances, as the wings take them.

    Attributes:
        indices: of the instances in the data, (batch,); -1 for copies, see `padded`.
        input_ids: (batch, seq) int32.
        targets: (batch, seq) int32, the token after each position, or -100 where nothing is learned.
        attention_mask: (batch, seq) int32, 0 at tokens that are not seen; None where all are. Or (batch, 1, seq, seq)
            float32, which is added to the scores of attention.
        share: of a micro-batch, the part of its step's tokens, as the mask counts them, that it has.
    """

    indices: Array
    input_ids: Array
    targets: Array
    attention_mask: Array | None = None
    share: float = 1.0

    @property
    def num_targets(self) -> int:
        """The number of tokens that are learned."""
        return int((self.targets != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """The number of tokens that are seen; all where a mask says for each query what it sees."""
        mask = self.attention_mask
        return int(mask.sum()) if mask is not None and mask.ndim == 2 else self.input_ids.size

    @property
    def counted(self) -> Array | None:
        """(batch, seq) int32, 1 for the tokens of the load-balancing loss: those of `num_tokens`; None for all."""
        mask = self.attention_mask
        seen = mask if mask is not None and mask.ndim == 2 else None
        copies = self.indices < 0
        if not copies.any():
            return seen
        return np.where(copies[:, None], 0, np.ones_like(self.input_ids) if seen is None else seen)

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most `size` instances, in order."""
        for start in range(0, len(self.indices), size):
            rows = slice(start, start + size)
            mask = None if self.attention_mask is None else self.attention_mask[rows]
            part = Batch(self.indices[rows], self.input_ids[rows], self.targets[rows], mask)
            yield replace(part, share=self.share * part.num_tokens / max(self.num_tokens, 1))

    def padded(self, parts: int) -> Batch:
        """The batch with copies of its last row from which nothing is learned, so that `parts` divides its rows."""
        count = len(self.indices)
        missing = -count % parts
        if not missing:
            return self
        rows = np.minimum(np.arange(count + missing), count - 1)
        targets = self.targets[rows]
        targets[count:] = IGNORED
        indices = self.indices[rows]
        indices[count:] = -1
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        return replace(self, indices=indices, input_ids=self.input_ids[rows], targets=targets, attention_mask=mask)

    def rows_for(self, part: int, parts: int) -> Batch:
        """The rows of one of `parts` devices, in order; see `padded`."""
        whole = self.padded(parts)
        return list(whole.split(len(whole.indices) // parts))[part]


class TokenFiles:
    """Instances of `length` tokens, numbered through the files in order; what is left at the end of each is not used.

    Args:
        paths: files of tokens.
        mask_paths: for each of them the file of bools that says which tokens are learned; None where all are.
        dtype: of the tokens.
        length: tokens in an instance.
        vocab_size: the ids are below it.
        pad_token_id: tokens that are neither seen nor learned; None for none.
        leading_pads_see_all: see `DataConfig`.
        instance_filter: which instances give no loss.
        label: what errors call them.

    Raises:
        InputError: a file is absent, empty, shorter than an instance or has a header, or a mask does not fit its file;
            every problem is named.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        mask_paths: Sequence[Path | None],
        dtype: str,
        length: int,
        *,
        vocab_size: int,
        pad_token_id: int | None = None,
        leading_pads_see_all: bool = False,
        instance_filter: InstanceFilter | None = None,
        label: str = "the training data",
    ) -> None:
        self.paths, self.length, self.vocab_size = list(paths), length, vocab_size
        self.pad_token_id, self.instance_filter = pad_token_id, instance_filter
        self.leading_pads_see_all = leading_pads_see_all
        problems: list[str] = []
        self.tokens = [_open(path, dtype, length, problems) for path in paths]
        self.masks = [None if path is None else _open(path, "bool", length, problems) for path in mask_paths]
        for path, mask_path, tokens, mask in zip(paths, mask_paths, self.tokens, self.masks, strict=True):
            if mask is not None and len(mask) != len(tokens) and len(tokens) and len(mask):
                problems.append(
                    f"{mask_path} has {len(mask):,} rows of {length} bools, and {path} {len(tokens):,} of {length} "
                    f"tokens of {dtype}"
                )
        for path, tokens in zip(paths, self.tokens, strict=True):
            problems += _unlikely(path, tokens, dtype, vocab_size)
        raise_problems(f"{label} cannot be used", problems, InputError)
        if not any(mask is None or _learns(mask) for mask in self.masks):
            raise InputError(f"{label} have nothing to learn: every mask is false from the second token on")
        self.starts = np.cumsum([0, *(len(tokens) for tokens in self.tokens)])

    def __len__(self) -> int:
        """The number of instances."""
        return int(self.starts[-1])

    def batch(self, indices: Array) -> Batch:
        """The instances at `indices`.

        Raises:
            InputError: an id is not in the vocabulary.
        """
        ids = np.empty((len(indices), self.length), np.int64)
        learned = np.ones((len(indices), self.length), bool)
        for row, index in enumerate(indices):
            file = int(np.searchsorted(self.starts, index, "right")) - 1
            chunk = int(index) - int(self.starts[file])
            ids[row] = self.tokens[file][chunk]
            labels = self.masks[file]
            if labels is not None:
                learned[row] = labels[chunk]
            if ids[row].max() >= self.vocab_size:
                position = int(ids[row].argmax())
                raise InputError(
                    f"{self.paths[file]}: instance {chunk} has the id {ids[row, position]} at {position}, and the "
                    f"model's vocabulary has {self.vocab_size}"
                )
            if self.instance_filter is not None and repeats(ids[row], self.instance_filter):
                learned[row] = False
        mask: Array | None = None
        if self.pad_token_id is not None:
            seen = ids != self.pad_token_id
            learned &= seen
            matters = self.leading_pads_see_all and not seen[:, 0].all()
            mask = added_scores(seen) if matters else seen.astype(np.int32)
        targets = np.full(ids.shape, IGNORED, np.int32)
        targets[:, :-1] = np.where(learned[:, 1:], ids[:, 1:], IGNORED)
        return Batch(np.asarray(indices), ids.astype(np.int32), targets, mask)


def _open(path: Path, dtype: str, length: int, problems: list[str]) -> Array:
    """The rows of a file, mapped; what is wrong with it goes to `problems`."""
    none: Array = np.empty((0, length), dtype)
    if path.exists() and not path.is_file():  # a pipe or a device may never end
        problems.append(f"{path} is not a regular file")
        return none
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(len(NUMPY_MAGIC))
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return none
    itemsize = np.dtype(dtype).itemsize
    if head == NUMPY_MAGIC:
        problems.append(
            f"{path} was written by numpy.save, whose header would be read as tokens: expected the raw array, as "
            "array.tofile writes it"
        )
    elif size < itemsize * length:
        problems.append(f"{path} has {size:,} bytes, expected {itemsize * length:,} for one instance of {length}")
    elif size % itemsize:
        problems.append(f"{path} has {size:,} bytes, which {dtype} of {itemsize} bytes do not fill")
    else:
        rows = size // itemsize // length
        return np.memmap(path, dtype, "r", shape=(rows, length))
    return none


def _learns(mask: Array) -> bool:
    """Whether a token is learned in some row; the first one of a row is predicted by nothing."""
    return any(mask[start : start + 4096, 1:].any() for start in range(0, len(mask), 4096))


def _unlikely(path: Path, tokens: Array, dtype: str, vocab_size: int) -> list[str]:
    """What says, in some of the rows, that the tokens are of another dtype or vocabulary."""
    if not len(tokens):
        return []
    rows = np.unique([*range(min(len(tokens), 64)), *np.linspace(0, len(tokens) - 1, 256).astype(int)])
    part = np.asarray(tokens[rows]).reshape(-1)
    if part.size > 16 and dtype == "uint16" and (part[1::2] <= 1).all() and (part[::2] > 1).any():
        return [f"{path}: every second token is 0 or 1: it is of uint32, and memmap_dtype is uint16"]
    if (part.astype(np.int64) >= vocab_size).any():
        return [f"{path} has the id {part.max()} as {dtype}, and the model's vocabulary has {vocab_size}"]
    return []


def added_scores(seen: Array) -> Array:
    """What AI2's trainer adds to the scores of attention where tokens (batch, seq) are not seen, (batch, 1, seq, seq).

    It is float32's least number at each of them and at later tokens. A query that sees none has it everywhere, which
    leaves nothing of the scores: its weights are all the same.
    """
    causal = np.tri(seen.shape[1], dtype=bool)
    least = np.finfo(np.float32).min
    return np.where(causal & seen[:, None, None, :], np.float32(0), least)


def repeats(ids: Array, settings: InstanceFilter) -> bool:
    """Whether a piece of some length is repeated too often, one after another."""
    for period in range(settings.repetition_min_period, min(settings.repetition_max_period, len(ids) // 3) + 1):
        same = np.concatenate([[False], ids[period:] == ids[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        runs = edges[1::2] - edges[::2]
        if runs.size:
            times = (int(runs.max()) + period) // period
            if times >= max(3, settings.repetition_max_count):
                return True
    return False


class TrainingData:
    """The instances of a run in their order, epoch after epoch.

    Args:
        files: the instances.
        batch_size: instances in a step.
        seed: of the order.
        drop_last: see `DataConfig`.
        weights: for each file, how often it is seen in an epoch; None for once.

    Attributes:
        size: instances in an epoch, with those that fill no batch.
        batches_per_epoch: steps in an epoch.

    Raises:
        InputError: an epoch has no step.
    """

    def __init__(
        self,
        files: TokenFiles,
        batch_size: int,
        seed: int,
        *,
        drop_last: bool = True,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.files, self.batch_size, self.seed, self.drop_last = files, batch_size, seed, drop_last
        self.weights = None if weights is None else list(weights)
        self.size = len(self.order(0))
        self.batches_per_epoch = self.batches_left(0)
        if not self.batches_per_epoch:
            raise InputError(f"the data are {self.size} instances, and a batch is {batch_size}: an epoch has no step")

    def batches_left(self, start: int) -> int:
        """The number of batches of an epoch from its instance `start` on."""
        left = self.size - start
        return max(0, left // self.batch_size if self.drop_last else -(-left // self.batch_size))

    def order(self, epoch: int) -> Array:
        """The indices of an epoch's instances in their order."""
        stream = np.random.default_rng(self.seed + epoch)
        if self.weights is None:
            order = np.arange(len(self.files))
        else:
            starts = self.files.starts
            order = np.concatenate(
                [
                    _drawn(np.arange(start, stop), weight, stream)
                    for start, stop, weight in zip(starts[:-1], starts[1:], self.weights, strict=True)
                ]
            )
        stream.shuffle(order)
        return order

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from its instance `start` on."""
        order = self.order(epoch)
        for first in range(start, len(order), self.batch_size):
            indices = order[first : first + self.batch_size]
            if len(indices) < self.batch_size and self.drop_last:
                return
            yield self.files.batch(indices)

    # -- for loops of other libraries -----------------------------------------------------------------------------

    def examples(self, epochs: int = 1) -> Iterator[dict[str, Array]]:
        """Batches as dicts of `input_ids`, `labels` (as the models take them: -100 ignored) and `attention_mask`."""
        for epoch in range(epochs):
            for batch in self.batches(epoch):
                labels = np.full_like(batch.targets, IGNORED)
                labels[:, 1:] = batch.targets[:, :-1]
                mask = np.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
                yield {"input_ids": batch.input_ids, "labels": labels, "attention_mask": mask}

    def as_tf_dataset(self, epochs: int = 1) -> Any:
        """A `tf.data.Dataset` of pairs of inputs and labels.

        For `model.fit(dataset, epochs=epochs, steps_per_epoch=data.batches_per_epoch, shuffle=False)`.
        """
        import tensorflow as tf

        spec = tf.TensorSpec((None, self.files.length), tf.int32)
        dataset = tf.data.Dataset.from_generator(
            lambda: (
                ({"input_ids": e["input_ids"], "attention_mask": e["attention_mask"]}, e["labels"])
                for e in self.examples(epochs)
            ),
            output_signature=({"input_ids": spec, "attention_mask": spec}, spec),
        )
        return dataset.apply(tf.data.experimental.assert_cardinality(epochs * self.batches_per_epoch))

    def as_torch_dataset(self, epochs: int = 1) -> Any:
        """A `torch.utils.data.IterableDataset` of batches: give a DataLoader `batch_size=None`."""
        import torch

        data = self

        class Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
            def __iter__(self) -> Iterator[dict[str, Any]]:
                for example in data.examples(epochs):
                    yield {name: torch.from_numpy(array).long() for name, array in example.items()}

        return Batches()


def _drawn(indices: Array, weight: float, stream: np.random.Generator) -> Array:
    """`weight` times as many indices: whole repetitions, and a random part for the rest."""
    count = round(weight * len(indices))
    whole, rest = divmod(count, len(indices))
    return np.concatenate([np.tile(indices, whole), stream.permutation(indices)[:rest]])


# -- what a config names ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One of the paths of a config: a file of tokens, or a folder of prepared data."""

    tokens: Path
    mask: Path | None
    manifest: Manifest | None


def open_data(config: TrainConfig, model: ModelConfig) -> TrainingData:
    """The data of a run, checked against its model.

    Raises:
        InputError: they do not fit; every problem is named.
        CheckpointError: a prepared folder is broken.
    """
    data = config.data
    sources = _sources(data.paths, data.label_mask_paths)
    length = _length(config, sources)
    if length > model.max_position_embeddings:
        raise InputError(
            f"max_sequence_length is {length}, and the model has {model.max_position_embeddings} positions "
            "(max_position_embeddings)"
        )
    files = _files(sources, data.memmap_dtype, length, model, data)
    weights = data.weights
    return TrainingData(
        files, config.global_train_batch_size, config.data_seed, drop_last=data.drop_last, weights=weights
    )


def open_evaluation(
    evaluator: EvaluatorConfig, config: TrainConfig, model: ModelConfig, length: int
) -> dict[str, TokenFiles]:
    """The instances of an evaluator, by the label of each of its sets.

    Raises:
        InputError: they do not fit the model; every problem is named.
    """
    sets = evaluator.datasets or {evaluator.label: evaluator.paths}
    dtype = evaluator.memmap_dtype or config.data.memmap_dtype
    masks = None if evaluator.datasets else evaluator.label_mask_paths
    sources = {label: _sources(paths, masks) for label, paths in sets.items()}
    return {
        label: _files(
            found,
            dtype,
            _length_of_evaluation(label, found, length, model),
            model,
            DataConfig(
                generate_attention_mask=config.data.generate_attention_mask
                if evaluator.generate_attention_mask is None
                else evaluator.generate_attention_mask,
                leading_pads_see_all=config.data.leading_pads_see_all,
            ),
            f"the data of the evaluator {label}",
        )
        for label, found in sources.items()
    }


def _length_of_evaluation(label: str, sources: Sequence[_Source], length: int, model: ModelConfig) -> int:
    """The length of prepared data; of files of tokens alone that of the run."""
    lengths = sorted({source.manifest.length if source.manifest else length for source in sources})
    if len(lengths) > 1 or lengths[0] > model.max_position_embeddings:
        raise InputError(
            f"the data of the evaluator {label} have instances of {' and '.join(map(str, lengths))} tokens, expected "
            f"one length of at most {model.max_position_embeddings}, the model's positions"
        )
    return lengths[0]


def _sources(paths: Sequence[str], masks: Sequence[str] | None) -> list[_Source]:
    found = []
    for path, mask in zip(map(Path, paths), masks or repeat(None, len(paths)), strict=True):
        if path.is_dir():
            found.append(_Source(path / IDS, path / MASK if mask is None else Path(mask), read_manifest(path)))
        else:
            found.append(_Source(path, None if mask is None else Path(mask), None))
    return found


def _length(config: TrainConfig, sources: Sequence[_Source]) -> int:
    lengths = {source.manifest.length for source in sources if source.manifest}
    if config.max_sequence_length is not None:
        lengths.add(config.max_sequence_length)
    if len(lengths) != 1:
        what = " and ".join(map(str, sorted(lengths))) or "not set"
        raise InputError(f"max_sequence_length is {what}, expected one length for the config and all prepared data")
    return lengths.pop()


def _files(
    sources: Sequence[_Source],
    dtype: str | None,
    length: int,
    model: ModelConfig,
    data: DataConfig,
    what: str = "the training data",
) -> TokenFiles:
    manifests = [source.manifest for source in sources if source.manifest]
    problems = [
        f"{source.tokens.parent} was prepared with a tokenizer of {source.manifest.vocab_size} tokens, and the model's "
        f"vocabulary has {model.vocab_size}"
        for source in sources
        if source.manifest and source.manifest.vocab_size > model.vocab_size
    ]
    eos = model.eos_token_id if isinstance(model.eos_token_id, list) else [model.eos_token_id]
    problems += [
        f"{source.tokens.parent} ends documents with the token {source.manifest.eos_token_id}, and the model's "
        f"eos_token_id is {model.eos_token_id}: set model.eos_token_id, or prepare the data with the model's tokenizer"
        for source in sources
        if source.manifest and None not in eos and source.manifest.eos_token_id not in eos
    ]
    dtypes = {manifest.dtype for manifest in manifests} | ({dtype} if dtype else set())
    if len(dtypes) > 1:
        problems.append(f"data.memmap_dtype is {' and '.join(sorted(dtypes))}, expected one dtype for all files")
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"data.memmap_dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not manifests and dtype in (None, "uint16") and model.vocab_size > 1 << 16:
        problems.append(
            f"data.memmap_dtype is {dtype or 'not set, which is uint16'}, and the ids of a vocabulary of "
            f"{model.vocab_size} do not fit: write the tokens as uint32, and set it to that"
        )
    pad = model.pad_token_id
    if data.generate_attention_mask and pad is None:
        problems.append("data.generate_attention_mask is true, and the model has no pad_token_id")
    raise_problems(f"{what} do not fit", problems, InputError)
    return TokenFiles(
        [source.tokens for source in sources],
        [source.mask for source in sources],
        dtypes.pop() if dtypes else "uint16",
        length,
        vocab_size=model.vocab_size,
        pad_token_id=pad if data.generate_attention_mask else None,
        leading_pads_see_all=data.leading_pads_see_all,
        instance_filter=data.instance_filter,
        label=what,
    )
