"""Blocks that families share: norm, rotary positions, masks, attention, gated MLP.

Shapes in comments: b batch, s positions in this call, t positions with the cache, h query heads, g key/value heads,
d head_dim, c hidden size, f MLP width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from olmozoo.checkpoint.tensors import aligned_empty, dtype_of
from olmozoo.errors import InputError
from olmozoo.families.rope import Rope
from olmozoo.memory import MIN_ROWS, SCORE_BYTES, quarters

Tensor: TypeAlias = tf.Tensor


def at_least_float32(dtype: Any) -> str:
    """float32, or float64 for float64."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def gelu(x: Tensor) -> Tensor:
    """`x * P(normal <= x)` (arXiv:1606.08415). Written out, since TensorFlow's own rounds its constants to float32."""
    return 0.5 * x * (1 + ops.erf(x * 0.5**0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    """The approximation of `gelu` by a tanh."""
    return 0.5 * x * (1 + ops.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def in_wide(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function in at least float32, rounded once at its end, as PyTorch's are."""
    return lambda x: ops.cast(function(ops.cast(x, at_least_float32(x.dtype))), x.dtype)


ACTIVATIONS = {
    "relu": ops.relu,
    "gelu": in_wide(gelu),
    "gelu_new": in_wide(gelu_tanh),
    "gelu_pytorch_tanh": in_wide(gelu_tanh),
    "silu": in_wide(ops.silu),
    "swish": in_wide(ops.silu),
}


def static(value: Any) -> int | None:
    """The value of an integer scalar where it is known before a graph runs, else None."""
    known = tf.get_static_value(value)
    return None if known is None else int(known)


def concrete(x: Any) -> np.ndarray | None:
    """The values of a tensor where they are at hand: on the CPU, and not in a graph."""
    if not tf.is_tensor(x):
        return np.asarray(x)
    if not tf.executing_eagerly() or not hasattr(x, "numpy") or ("GPU" in x.device or "TPU" in x.device):
        return None
    values: np.ndarray = x.numpy()
    return values


def from_numpy(array: np.ndarray) -> Tensor:
    """The array as a tensor, sharing its memory."""
    if array.dtype.name == "bfloat16":  # DLPack takes NumPy's own dtypes only
        return tf.bitcast(from_numpy(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def no_values(shape: tuple[int, ...], dtype: Any = None) -> Tensor:
    """An initializer that leaves memory as it is: values come from the parameter table or from a checkpoint."""
    return from_numpy(aligned_empty(tuple(shape), dtype_of(keras.backend.standardize_dtype(dtype))))


class WithAdapters(keras.layers.Layer):
    """A linear layer whose LoRA adapters are saved beside its kernel: Keras alone would merge them.

    A file with adapters loads into a layer without them too, merged.
    """

    lora_enabled = use_bias = False

    def add_weight(self, *arguments: Any, **options: Any) -> keras.Variable:
        """Keras's own, but for adapters of a layer in float64, which Keras makes in float32."""
        if str(options.get("name")).startswith("lora_kernel") and self.variable_dtype == "float64":
            options["dtype"] = "float64"
        return super().add_weight(*arguments, **options)

    def save_own_variables(self, store: Any) -> None:
        if not self.lora_enabled or self.quantization_mode is not None:
            super().save_own_variables(store)
            return
        store["0"] = self._kernel  # without the adapters; see test_lora_survives_a_keras_file
        if self.use_bias:
            store["1"] = self.bias
        store["lora_a"], store["lora_b"] = self.lora_kernel_a, self.lora_kernel_b
        store["lora_scale"] = np.float64(self.lora_alpha / self.lora_rank)

    def load_own_variables(self, store: Any) -> None:
        if "lora_a" not in store.keys():  # noqa: SIM118  (Keras's store is no mapping)
            super().load_own_variables(store)
            return
        kernel, (a, b) = store["0"], (store["lora_a"], store["lora_b"])
        if self.lora_enabled:
            self.lora_kernel_a.assign(a)
            self.lora_kernel_b.assign(b)
        else:
            kernel = kernel + np.asarray(store["lora_scale"]) * np.matmul(np.asarray(a), np.asarray(b))
        self._kernel.assign(kernel)
        if self.use_bias:
            self.bias.assign(store["1"])

    def merge_lora(self) -> None:
        """Add the adapters to the kernel, and set them to zero."""
        self._kernel.assign(self.kernel)
        self.lora_kernel_b.assign(ops.zeros_like(self.lora_kernel_b))


class Dense(WithAdapters, keras.layers.Dense):
    """Keras's own `Dense`."""

    def quantize(self, mode: str | None = None, type_check: bool = True, config: Any = None) -> None:
        super().quantize(mode, type_check=False, config=config)  # Keras refuses subclasses of its own


def linear(size: int, bias: bool, name: str) -> Dense:
    """A `Dense`, from whatever comes in to `size`."""
    return Dense(size, use_bias=bias, kernel_initializer=no_values, bias_initializer=no_values, name=name)


class Embedding(keras.layers.Embedding):
    """Keras's own `Embedding` with a dense gradient.

    A gathered row's own gradient comes as slices, one for each time that it was gathered, and Keras's optimizers square
    those before they add them up: with Adam, a token that is there twice would be learned otherwise than in PyTorch.
    """

    def call(self, ids: Tensor) -> Tensor:
        return ops.cast(gather(tf.convert_to_tensor(self.embeddings), ops.cast(ids, "int32")), self.compute_dtype)


@tf.custom_gradient
def gather(table: Tensor, ids: Tensor) -> tuple[Tensor, Any]:
    """Rows of a table, whose gradient is one tensor, in a SavedModel too."""

    def gradient(upstream: Tensor) -> tuple[Tensor, None]:
        return tf.math.unsorted_segment_sum(upstream, ids, tf.shape(table)[0]), None

    return tf.gather(table, ids), gradient


def embedding(rows: int, size: int, name: str) -> Embedding:
    """An `Embedding`."""
    return Embedding(rows, size, embeddings_initializer=no_values, name=name)


class Layer(keras.layers.Layer):
    """A layer of layers.

    It has no variables of its own and so nothing to build. It takes arguments as they are: under a mixed policy Keras
    would cast every float argument to the compute dtype, and rotary tables must stay as wide as they are.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, autocast=False)
        self.built = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Note the width of the hidden states, for `output_shape`."""
        self.width = input_shape[-1]

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """The shape of the hidden states that come out, which `summary` shows."""
        return (None, None, self.width)


class TrackedBlocks:
    """A layer or model with a list of `blocks`, which `tf.train.Checkpoint` alone would not see into."""

    def _trackable_children(self, save_type: str = "checkpoint", **options: Any) -> dict[str, Any]:
        """What TensorFlow saves. Not public; see test_a_checkpoint_of_tensorflow_holds_every_variable."""
        blocks = enumerate(getattr(self, "blocks", ()) if save_type == "checkpoint" else ())
        return {**super()._trackable_children(save_type, **options), **{f"block_{i}": block for i, block in blocks}}


class RMSNorm(keras.layers.Layer):
    """`w * x / sqrt(mean(x^2) + eps)` in at least float32, cast back after the product (arXiv:1910.07467)."""

    def __init__(self, eps: float, name: str) -> None:
        super().__init__(name=name)
        self.eps = eps

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.scale = self.add_weight(name="scale", shape=input_shape[-1:], initializer=no_values, autocast=False)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def call(self, x: Tensor) -> Tensor:
        wide = ops.cast(x, at_least_float32(x.dtype))
        wide = wide * ops.rsqrt(ops.mean(ops.square(wide), -1, keepdims=True) + self.eps)
        return ops.cast(ops.cast(self.scale, wide.dtype) * wide, x.dtype)


class LayerNorm(keras.layers.Layer):
    """`w * (x - mean) / sqrt(var + 1e-5) + b` in at least float32, cast back (arXiv:1607.06450); w, b if `affine`."""

    def __init__(self, affine: bool, name: str) -> None:
        super().__init__(name=name)
        self.affine = affine
        self.built = not affine  # then there is nothing to build

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if self.affine:
            self.scale = self.add_weight(name="scale", shape=input_shape[-1:], initializer=no_values, autocast=False)
            self.bias = self.add_weight(name="bias", shape=input_shape[-1:], initializer=no_values, autocast=False)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def call(self, x: Tensor) -> Tensor:
        wide = ops.cast(x, at_least_float32(x.dtype))
        wide = wide - ops.mean(wide, -1, keepdims=True)
        wide = wide * ops.rsqrt(ops.mean(ops.square(wide), -1, keepdims=True) + 1e-5)
        if self.affine:
            wide = wide * ops.cast(self.scale, wide.dtype) + ops.cast(self.bias, wide.dtype)
        return ops.cast(wide, x.dtype)


def rotary(rope: Rope, positions: Tensor, dtype: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (b, 1, s, d), for positions (b, s), in at least float32; see `Rope.frequencies`."""
    dtype = at_least_float32(dtype)
    inv_freq = tf.constant(rope.inv_freq, dtype)
    if rope.growth is not None:
        past = ops.cast(ops.maximum(ops.max(positions) + 1 - rope.length, 0), dtype)
        inv_freq = inv_freq * (1 + rope.factor * past / rope.length) ** -tf.constant(rope.growth, dtype)
    elif rope.long_inv_freq is not None:
        is_long = ops.max(positions) + 1 > rope.length
        inv_freq = ops.where(is_long, tf.constant(rope.long_inv_freq, dtype), inv_freq)
    angles = ops.cast(positions, dtype)[:, None, :, None] * inv_freq
    angles = ops.concatenate([angles, angles], -1)
    return ops.cos(angles) * rope.scale, ops.sin(angles) * rope.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of x (b, h, s, d) by its angle (arXiv:2104.09864, in the half-split layout)."""
    wide = ops.cast(x, cos.dtype)
    first, second = ops.split(wide, 2, -1)
    return ops.cast(wide * cos + ops.concatenate([-second, first], -1) * sin, x.dtype)


def causal_mask(
    attention_mask: Tensor | None,
    batch: Any,
    length: Any,
    past: Any,
    keys: Any,
    window: int | None = None,
    end: Any = None,
) -> Tensor:
    """Which keys each query sees: bool (b or 1, 1, s, t).

    A query sees the real keys up to its own position, in a window the last of these alone. One that would see none
    (padding on the left) sees itself, so that no softmax is over nothing. Positions of a `KVCache` that are not written
    yet come after every query's own, so none sees them.

    Args:
        attention_mask: (b, past + s), 1 for real tokens; it may be as wide as (b, t). Or (b or 1, h or 1, s, past + s
            or t), which is the answer itself, with no window: true where a query sees a key, or floats, which
            `attention` adds to the scores.
        batch: b.
        length: s.
        past: positions in the cache before this call.
        keys: t; past + s, but for a `KVCache` its `max_length`.
        window: how many positions a query sees, padding and its own included; None for all.
        end: None where key i is that of position i. For a layer of a `WindowCache`, the number of positions cached
            after this call; key i is then that of the last position before `end` that is i modulo t.

    Raises:
        InputError: attention_mask has another shape.
    """
    if attention_mask is not None and len(attention_mask.shape) == 4:
        return whole_mask(attention_mask, length, past, keys)
    query = past + ops.arange(length, dtype="int32")[:, None]  # whatever floatx is
    key = ops.arange(keys, dtype="int32")[None, :]
    if end is not None:
        key = end - 1 - (end - 1 - key) % keys  # below 0 where nothing is written yet
    causal = (key <= query)[None, None]
    if window is not None:
        causal &= key > query - window
    if end is not None:
        causal &= key >= 0
    if attention_mask is None:
        return causal
    if end is None:
        real = real_keys(attention_mask, batch, length, past, keys)
    else:
        real = tf.gather(ops.cast(attention_mask, "bool"), ops.maximum(key[0], 0), axis=1)
    seen = causal & real[:, None, None, :]
    return seen | (~ops.any(seen, -1, keepdims=True) & (key == query))


@dataclass(frozen=True)
class QueryBlocks:
    """The masks of a long call, made for `rows` queries at a time; the other fields are arguments of `causal_mask`."""

    attention_mask: Tensor | None
    past: Any
    batch: Any
    keys: int
    window: int | None
    end: Any
    rows: int

    def run(self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`attend(query, key, value, mask)` by blocks of queries, in memory linear in s and t (arXiv:2112.05682).

        In a window, a block is given the keys in it alone; without one, a quarter of the queries is given the keys up
        to its own last, where the positions are known to the program. The backward pass computes each block again.
        """
        first, length = static(self.past), static(ops.shape(query)[2])
        if self.window is not None or self.end is not None or first is None or length is None:
            return self.blocks(attend, query, key, value)
        out = []
        for start, stop in quarters(length, self.rows):
            keys = first + stop
            mask = None if self.attention_mask is None else self.attention_mask[:, :keys]
            part = replace(self, attention_mask=mask, past=first + start, keys=keys)
            out.append(part.blocks(attend, query[:, :, start:stop], key[:, :, :keys], value[:, :, :keys]))
        return ops.concatenate(out, 1)

    def blocks(self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `run`; all queries are given the same keys, but for a window."""
        batch, heads, length, head_dim = ops.shape(query)
        count = -(-length // self.rows)
        query = tf.pad(query, [[0, 0], [0, 0], [0, count * self.rows - length], [0, 0]])
        blocks = ops.transpose(ops.reshape(query, (batch, heads, count, self.rows, head_dim)), (2, 0, 1, 3, 4))
        starts = tf.range(count) * self.rows
        in_order = self.window is not None and self.end is None
        width = min(self.keys, self.window + self.rows - 1) if in_order else self.keys

        def one(start: Tensor, block: Tensor, key: Tensor, value: Tensor) -> Tensor:
            first = self.past + start
            mask = causal_mask(self.attention_mask, self.batch, self.rows, first, self.keys, self.window, self.end)
            if width < self.keys:
                begin = tf.clip_by_value(first - self.window + 1, 0, self.keys - width)
                key, value = (tf.slice(x, [0, 0, begin, 0], [-1, -1, width, -1]) for x in (key, value))
                mask = tf.slice(mask, [0, 0, 0, begin], [-1, -1, -1, width])
            return attend(block, key, value, mask)

        @tf.custom_gradient
        def run(blocks: Tensor, key: Tensor, value: Tensor) -> Any:
            out = tf.map_fn(
                lambda part: one(part[0], part[1], key, value), (starts, blocks), fn_output_signature=blocks.dtype
            )

            def gradient(upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                def add(i: Tensor, of_blocks: Any, of_key: Tensor, of_value: Tensor) -> tuple[Any, ...]:
                    inputs = blocks[i], key, value
                    with tf.GradientTape(watch_accessed_variables=False) as tape:
                        tape.watch(inputs)
                        part = one(starts[i], *inputs)
                    of_block, more_key, more_value = tape.gradient(part, inputs, upstream[i])
                    return i + 1, of_blocks.write(i, of_block), of_key + more_key, of_value + more_value

                array = tf.TensorArray(blocks.dtype, count, element_shape=blocks.shape[1:])
                state = tf.constant(0), array, tf.zeros_like(key), tf.zeros_like(value)
                _, array, *others = tf.while_loop(lambda i, *_: i < count, add, state, maximum_iterations=count)
                return array.stack(), *others

            return out, gradient

        out = run(blocks, key, value)  # (count, b, rows, h * d)
        return ops.reshape(ops.transpose(out, (1, 0, 2, 3)), (batch, count * self.rows, heads * head_dim))[:, :length]


def query_mask(
    attention_mask: Tensor | None,
    batch: Any,
    length: Any,
    past: Any,
    keys: Any,
    window: int | None,
    end: Any,
    heads: int,
) -> Tensor | QueryBlocks:
    """`causal_mask`, or `QueryBlocks` where the scores of `heads` heads would take more than `SCORE_BYTES`.

    In a graph that serves any length, it is the former.
    """
    rows, queries, known = static(batch), static(length), static(keys)
    if (
        rows is None
        or queries is None
        or known is None
        or (attention_mask is not None and len(attention_mask.shape) == 4)
    ):
        return causal_mask(attention_mask, batch, length, past, keys, window, end)
    width = known if window is None else min(known, 2 * window)
    at_once = SCORE_BYTES // (4 * rows * heads * width)  # queries
    if queries <= max(at_once, 1):
        return causal_mask(attention_mask, batch, length, past, keys, window, end)
    if attention_mask is not None and end is None:
        attention_mask = real_keys(attention_mask, batch, length, past, keys)
    return QueryBlocks(attention_mask, past, batch, known, window, end, max(at_once // 4, MIN_ROWS["tf"]))


def real_keys(attention_mask: Tensor, batch: Any, length: Any, past: Any, keys: Any) -> Tensor:
    """An attention_mask of two dimensions as bools of all keys, (b, t); see `causal_mask`."""
    real = ops.cast(attention_mask, "bool")
    rows, width = (*real.shape, None)[:2]
    written = static(past + length)
    wrong_rows = None not in (rows, static(batch)) and rows != static(batch)
    wrong_width = None not in (width, written) and width not in (written, static(keys))
    if len(real.shape) != 2 or wrong_rows or wrong_width:
        raise InputError(
            f"attention_mask has shape {tuple(real.shape)}, expected {(static(batch), written)}: "
            f"{static(past)} cached and {static(length)} new positions"
        )
    unwritten = keys - ops.shape(real)[1]
    return real if static(unwritten) == 0 else tf.pad(real, [[0, 0], [0, unwritten]])


def whole_mask(mask: Tensor, length: Any, past: Any, keys: Any) -> Tensor:
    """An attention_mask of four dimensions, as wide as the keys: bool, or floats to add to the scores."""
    mask = ops.convert_to_tensor(mask)
    floating = mask.dtype.is_floating
    rows, width = mask.shape[2:]
    written = static(past + length)
    wrong_rows = None not in (rows, static(length)) and rows != static(length)
    if wrong_rows or (None not in (width, written) and width not in (written, static(keys))):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, expected (batch, 1 or heads, {static(length)}, {written})"
        )
    pad = [[0, 0], [0, 0], [0, 0], [0, keys - ops.shape(mask)[3]]]
    return tf.pad(mask if floating else ops.cast(mask, "bool"), pad, constant_values=-math.inf if floating else False)


def clip(x: Tensor, limit: float | None) -> Tensor:
    """Clamp x to [-limit, limit]; as it is for None."""
    return x if limit is None else ops.clip(x, -limit, limit)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(b, s, h * d) -> (b, h, s, d)."""
    b, s, width = ops.shape(x)
    return ops.transpose(ops.reshape(x, (b, s, width // head_dim, head_dim)), (0, 2, 1, 3))


def dropout(x: Tensor, rate: float, seed: Tensor | None) -> Tensor:
    """Dropout that is a function of its seed, so that a block computed again drops the same; no seed, no dropout."""
    return x if seed is None or rate == 0 else tf.nn.experimental.stateless_dropout(x, rate, seed)


def split_seed(seed: Tensor | None, count: int) -> list[Tensor | None]:
    """Seeds for `count` draws, from one; none from none."""
    return [None] * count if seed is None else tf.unstack(tf.random.split(ops.cast(seed, "int32"), count))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | QueryBlocks,
    scale: float,
    rate: float,
    seed: Tensor | None,
    head_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of query (b, h, s, d) on key and value (b, g, t, d); key head i serves h/g query heads.

    A mask of floats is added to the scores. A head_mask (h,) multiplies each head's weights. Dropout of the weights
    is drawn from `seed`; none without.

    Returns:
        The heads' outputs, side by side, (b, s, h * d); and the weights (b, h, s, t). For `QueryBlocks` these are None,
        and there is no dropout.
    """
    if isinstance(mask, QueryBlocks):
        attend = partial(attention, scale=scale, rate=0.0, seed=None, head_mask=head_mask)
        return mask.run(lambda *args: attend(*args)[0], query, key, value), None
    b, h, s, d = ops.shape(query)
    g, t = ops.shape(key)[1:3]
    wide, value = at_least_float32(query.dtype), ops.cast(value, query.dtype)  # a cache may be narrower
    # Queries that share a key head lie one after another: to see them as one longer run of queries costs nothing.
    query = ops.cast(ops.reshape(query, (b * g, h // g * s, d)), wide)
    key, value = ops.reshape(key, (b * g, t, d)), ops.reshape(value, (b * g, t, d))
    scores = tf.matmul(query, ops.cast(key, wide), transpose_b=True) * scale
    scores = ops.reshape(scores, (b, h, s, t))
    if mask.dtype.is_floating:
        scores += ops.maximum(ops.cast(mask, wide), value.dtype.min)  # no row of infinities alone
    else:
        scores = ops.where(mask, scores, scores.dtype.min)
    weights = dropout(ops.cast(tf.nn.softmax(scores), value.dtype), rate, seed)
    if head_mask is not None:
        weights = weights * ops.cast(head_mask, weights.dtype)[:, None, None]
    out = ops.reshape(tf.matmul(ops.reshape(weights, (b * g, h // g * s, t)), value), (b, h, s, d))
    return ops.reshape(ops.transpose(out, (0, 2, 1, 3)), (b, s, h * d)), weights


class GatedMLP(Layer):
    """`down(act(gate(x)) * up(x))` (arXiv:2002.05202), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, name: str) -> None:
        super().__init__(name)
        self.gate_proj = linear(intermediate_size, False, name="gate_proj")
        self.up_proj = linear(intermediate_size, False, name="up_proj")
        self.down_proj = linear(hidden_size, False, name="down_proj")
        self.act = ACTIVATIONS[activation]

    def call(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
