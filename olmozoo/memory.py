"""The memory that a model takes on each device, planned from its config alone.

Weights, gradients, optimizer state and key/value cache are exact: what PyTorch and XLA allocate for them. So are the
activations that PyTorch keeps for the backward pass, without padding, dropout and frozen parameters; everything else is
an upper bound, and `Plan.bounds` says what. Not counted are what the framework itself takes, and fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Head, Parameter, by_variable
from olmozoo.sharding import Placement, Style, layout

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = {"adamw": 2, "lionw": 1, "sgd": 0}  # values of optimizer state for each trained one
TILE = 64  # rows of an expert that Keras and Flax compute at once, at most
COUNTER = 4  # bytes of a count of steps
SPARE = 256  # positions that a layer with a window generates before what it sees is moved in memory
SCORE_BYTES = 1 << 26  # of attention in Keras and Flax; what would take more is computed by blocks of a quarter of it
MASK_BYTES = 1 << 26  # the same for masks of attention in PyTorch, in float32
MIN_ROWS = {"pt": 256, "tf": 8, "flax": 8}  # queries of such a block, at least
INTEGER = {"pt": 8, "flax": 4}  # bytes of a token id
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "gathered", "cache")
MOST = 1 << 40  # of rows and positions that `largest` looks for


@dataclass(frozen=True)
class Plan:
    """The bytes that each device needs at most; on a mesh, those of the device with the largest parts.

    Attributes:
        weights: of parameters; tied ones count once.
        gradients: of those that are trained.
        optimizer: its state.
        activations: in training, what is kept for the backward pass; else what one block needs while it is computed.
        logits: with the float32 values and, in training, the gradients that are computed from them.
        gathered: with `fsdp`, the copies of whole parameters in use: those outside of blocks and of two blocks; in
            training, whole gradients of one block with them.
        cache: of keys and values, for `length` positions.
        bounds: the names of those that are upper bounds; the others are exact.
    """

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    gathered: int = 0
    cache: int = 0
    bounds: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """The bytes of each of `KINDS`."""
        return {kind: getattr(self, kind) for kind in KINDS}


def plan(
    config: ModelConfig,
    *,
    batch: int = 1,
    length: int | None = None,
    head: Head | None = "causal_lm",
    mesh: Mapping[str, int] | None = None,
    dtype: str = "float32",
    param_dtype: str | None = None,
    train: bool = False,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    trained: Callable[[Parameter], bool] | None = None,
    backend: Style = "pt",
) -> Plan:
    """The memory of a training step, or of `generate`, on each device.

    Args:
        config: the model's config.
        batch: rows on each device; devices along `tensor` and `experts` share their rows.
        length: tokens a row; in generation, prompt and answer. Default `max_position_embeddings`.
        head: the model's head; None for the decoder alone.
        mesh: devices by axis, as for `olmozoo.sharding.layout`; default one device.
        dtype: what is computed in, and that of the cache.
        param_dtype: of parameters, gradients and optimizer state; default `dtype`.
        train: a training step; default generation.
        optimizer: "adamw", "lionw" or "sgd", in training.
        checkpointing: blocks are computed again in the backward pass, in training.
        trained: whether a parameter is trained; default all are.
        backend: "pt" (FSDP2 and tensor parallelism of PyTorch) or "flax" (GSPMD).

    Raises:
        InputError: an argument has no such value, or the mesh does not fit the model; see `layout`.
    """
    length = config.max_position_embeddings if length is None else length
    param_dtype = dtype if param_dtype is None else param_dtype
    for name, value, known in (
        ("dtype", dtype, SIZES),
        ("param_dtype", param_dtype, SIZES),
        ("optimizer", optimizer, MOMENTS),
        ("backend", backend, INTEGER),
    ):
        if value not in known:
            raise InputError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    for name, number in (("batch", batch), ("length", length)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise InputError(f"{name} is {number!r}, expected a positive integer")
    shape = _Shape(config, head, batch, length, dtype, dict(mesh or {}), backend)
    stored = SIZES[param_dtype]
    weights = stored * sum(place.local_size for place in shape.places)
    gathered, bounds = 0, ["logits"]
    if shape.mesh.get("fsdp", 1) > 1:
        bounds.append("gathered")
        gathered = SIZES[dtype] * (shape.whole(None) + 2 * max(map(shape.whole, range(config.num_hidden_layers))))
    if not train:
        return Plan(
            weights,
            activations=max(map(shape.block, range(config.num_hidden_layers))),
            logits=batch * shape.outputs * (shape.element + shape.wide) if head else 0,
            gathered=gathered,
            cache=cache_bytes(config, batch, length, dtype, mesh, backend) if head == "causal_lm" else 0,
            bounds=(*bounds, "activations"),
        )
    chosen = [place for place in shape.places if trained is None or trained(place.parameter)]
    gradients = stored * sum(place.local_size for place in chosen)
    state = MOMENTS[optimizer] * gradients
    if optimizer != "sgd":  # PyTorch counts steps for each parameter (lionw for none), optax once
        stacked = any(place.owner is not None for place in chosen)  # then a layer's experts are one parameter
        stored_as = by_variable(place.parameter for place in chosen) if stacked else chosen
        state += COUNTER * (1 if backend == "flax" else len(stored_as) if optimizer == "adamw" else 0)
    if gathered:
        gathered += SIZES[dtype] * max(map(shape.whole, range(config.num_hidden_layers)))
    if (
        backend == "flax"
        or trained is not None
        or checkpointing
        or shape.has_dropout
        or shape.experts
        or (any(config.windows) and 4 * length**2 > MASK_BYTES)
        or shape.mesh.get("tensor", 1) > 1
    ):
        bounds.append("activations")
    return Plan(
        weights,
        gradients,
        state,
        activations=shape.kept(checkpointing),
        logits=batch * (length if head == "causal_lm" else 1) * shape.outputs * (shape.element + 3 * shape.wide)
        if head
        else 0,
        gathered=gathered,
        bounds=tuple(bounds),
    )


def cache_bytes(
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: str = "float32",
    mesh: Mapping[str, int] | None = None,
    backend: Style = "pt",
) -> int:
    """The bytes of keys and values on each device, for `batch` rows of `length` positions.

    `generate` keeps of a layer with a window what it sees; in PyTorch, `SPARE` positions more.
    """
    kept = enumerate(config.cache_slots(length, SPARE if backend == "pt" else 0))
    positions = sum(config.kv_heads_in(layer) * count for layer, count in kept)
    return 2 * batch * positions * config.head_dim * SIZES[dtype] // (mesh or {}).get("tensor", 1)


def largest(memory: int, name: str, config: ModelConfig, **settings: Any) -> int:
    """The largest `batch` or `length` of a plan of at most `memory` bytes; 0 where there is none.

    Args:
        memory: bytes of a device.
        name: "batch" or "length".
        config: as of `plan`.
        **settings: further arguments of `plan`.
    """
    if plan(config, **{**settings, name: 1}).total > memory:
        return 0
    low, high = 1, MOST
    while low < high:
        middle = (low + high + 1) // 2
        if plan(config, **{**settings, name: middle}).total <= memory:
            low = middle
        else:
            high = middle - 1
    return low


def meshes(config: ModelConfig, devices: int, **settings: Any) -> dict[str, Plan]:
    """The plan on each mesh `fsdp x tensor` of so many devices that fits the model, by a name of the mesh.

    `experts` of the mesh in `settings` stays as it is.
    """
    plans = {}
    experts = settings.get("mesh", {}).get("experts", 1)
    for tensor in range(1, devices + 1):
        if devices % (tensor * experts):
            continue
        mesh = {"fsdp": devices // (tensor * experts), "tensor": tensor, "experts": experts}
        name = f"{mesh['fsdp']} x {tensor}" + (f" x {experts}" if experts > 1 else "")
        try:
            plans[name] = plan(config, **{**settings, "mesh": mesh})
        except InputError:
            continue
    return plans


class _Shape:
    """The sizes of one call on one device, by which its memory is counted."""

    def __init__(
        self,
        config: ModelConfig,
        head: Head | None,
        batch: int,
        length: int,
        dtype: str,
        mesh: Mapping[str, int],
        backend: Style,
    ) -> None:
        self.config, self.batch, self.length, self.mesh, self.backend = config, batch, length, mesh, backend
        self.element = SIZES[dtype]
        self.wide = max(self.element, 4)
        placements = layout(config, head, mesh, style=backend)
        self.places = [place for place in placements.values() if place.parameter.tied_to is None]
        computed = {axis: size for axis, size in mesh.items() if axis != "fsdp"}  # parameters are gathered on that one
        self.parts = layout(config, head, computed, style=backend)
        top = next(config.head_parameters(head), None)
        shape = (0,) if top is None else top.shape if backend == "pt" else self.parts[top.name].local_shape
        self.outputs = shape[0]  # logits for each position; PyTorch gathers those of all devices
        self.final_norms = int(getattr(config, "has_final_norm", True))
        self.activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
        self.experts = getattr(config, "num_experts", 0)
        dropouts = ("dropout", "attention_dropout", "layerdrop")
        self.has_dropout = any(getattr(config, name, 0) for name in dropouts)

    def of_layer(self, layer: int | None) -> Iterable[Placement]:
        """The parameters of a block as it computes with them, or those outside of blocks, without tied ones."""
        for name, part in self.parts.items():
            parts = name.split(".")
            inside = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
            if inside == layer and part.parameter.tied_to is None:
                yield part

    def whole(self, layer: int | None) -> int:
        """The number of values of a block, or of what is outside of blocks, when they are gathered."""
        return sum(part.local_size for part in self.of_layer(layer))

    def block(self, layer: int) -> int:
        """The bytes that one block keeps for the backward pass."""
        config, hidden, wide = self.config, self.config.hidden_size, self.wide
        tokens = self.batch * self.length
        linears = [part for part in self.of_layer(layer) if part.parameter.kind == "linear"]
        heads = [part.local_shape[0] for part in linears if part.parameter.axes[0] in ("heads", "kv_heads")]
        inner = [part.local_shape[0] for part in linears if part.parameter.axes == ("mlp", "embed")]
        width = 0 if self.experts else sum(inner[:1])
        if self.backend == "pt":
            # The inputs of both sublayers; queries, keys, values, and what attention returns, as wide as the queries.
            values = 2 * hidden + sum(heads) + heads[0]
            values += width * ((3 if len(inner) > 1 else 1) + (self.activation != "relu"))  # keeps its output
        else:  # what JAX keeps before XLA simplifies it, at most
            values = 3 * hidden + 2 * (sum(heads) + heads[0]) + width * (6 if len(inner) > 1 else 4)
        if getattr(config, "clip_qkv", None) is not None:
            values += sum(heads)
        if getattr(config, "dropout", 0):
            values += 2 * hidden
        scores = heads[0] // config.head_dim
        kept = tokens * (self.element * values + self.norms(layer, 2) + wide * scores) + self.cast_norms(layer)
        window = config.windows[layer]
        width = self.length if window is None else min(self.length, 2 * window)
        drops = getattr(config, "attention_dropout", 0) > 0
        if self.backend == "flax" or drops:  # scores and weights themselves
            rows = self.length if drops else self.rows(SCORE_BYTES, 4 * self.batch * scores * width)
            kept += rows * self.batch * scores * self.length * (3 * wide + self.element + 1)
        if self.experts:
            kept += self.mixture(inner[0])
        if window is not None and self.length > window:  # its mask, as numbers
            kept += self.element * self.length * self.rows(MASK_BYTES, 4 * self.length)
        return kept

    def rows(self, most: int, each: int) -> int:
        """How many queries attention computes at once where each takes `each` bytes, and all at most `most`."""
        at_once = most // each
        return self.length if self.length <= max(at_once, 1) else max(at_once // 4, MIN_ROWS[self.backend])

    def mixture(self, inner: int) -> int:
        """The most bytes that the experts of a block keep, each of them `inner` wide, and their router.

        A token is a row of each of its experts, and an expert without tokens has one row; in tiles, where Flax computes
        them, each expert has less than a tile of rows more. The router has its logits, its probabilities, the chosen
        ones and the share of the balancing loss.
        """
        tokens, hidden, chosen = self.batch * self.length, self.config.hidden_size, self.config.num_experts_per_tok
        rows = tokens * chosen + self.experts * (1 if self.backend == "pt" else TILE)
        of_rows = rows * (self.element * (3 * hidden + 5 * inner + 1) + 3 * INTEGER["pt"])
        return int(of_rows + tokens * self.wide * (2 * hidden + 6 * self.experts + 4 * chosen))

    def kept(self, checkpointing: bool) -> int:
        """The bytes that a step keeps for the backward pass, without logits."""
        config, layers, tokens = self.config, range(self.config.num_hidden_layers), self.batch * self.length
        if checkpointing:
            blocks = len(layers) * tokens * config.hidden_size * self.element + max(map(self.block, layers))
        else:
            blocks = sum(map(self.block, layers))
        integer = INTEGER[self.backend]
        outside = list(self.of_layer(None))
        width = config.embedding.shape[1]  # of the input of the head
        width += sum(part.local_shape[1] for part in outside if part.parameter.group == "projection")
        rest = tokens * (2 * integer + self.element * width + self.norms(None, self.final_norms))
        rest += self.cast_norms(None) + integer + self.wide  # the number of labels, and the loss
        if any("positions" in part.parameter.axes for part in outside):
            return blocks + rest + integer * self.length
        tables = len({window is None for window in config.windows})
        return blocks + rest + tables * 2 * self.wide * self.length * config.head_dim  # cosines and sines

    def norms(self, layer: int | None, unlisted: int) -> int:
        """The bytes that norms keep for each position; where the table has none, `unlisted` layer norms."""
        rms, affine = self.norm_sizes(layer)
        if not rms and not affine:
            affine = [self.config.hidden_size] * unlisted
        if self.backend == "flax":
            return self.wide * sum(4 * size + 3 for size in (*rms, *affine))
        # The input, what it is normed to, and the inverse deviation; the input, its mean and inverse deviation.
        return self.wide * (sum(2 * size + 1 for size in rms) + sum(size + 2 for size in affine))

    def cast_norms(self, layer: int | None) -> int:
        """The bytes of weights of layer norms in float32, where they are narrower."""
        return 2 * self.wide * sum(self.norm_sizes(layer)[1]) if self.element < self.wide else 0

    def norm_sizes(self, layer: int | None) -> tuple[list[int], list[int]]:
        """The sizes of RMS norms, which have no bias, and of layer norms."""
        sizes = {
            part.parameter.name: part.local_size for part in self.of_layer(layer) if part.parameter.group == "norm"
        }
        scales = {name.removesuffix("weight"): size for name, size in sizes.items() if name.endswith("weight")}
        affine = {name for name in scales if f"{name}bias" in sizes}
        return [n for name, n in scales.items() if name not in affine], [scales[name] for name in affine]


def quarters(length: int, rows: int) -> list[tuple[int, int]]:
    """Where the quarters of `length` queries begin and end, each in whole blocks of `rows` but for the last one."""
    size = -(-length // (4 * rows)) * rows
    return [(start, min(start + size, length)) for start in range(0, length, size)]
