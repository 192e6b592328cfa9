"""A sparse MLP: a router sends each token to a few of many gated MLPs (arXiv:1701.06538, arXiv:2409.02060).

Shapes in comments: n tokens (batch times positions), e experts, k of them a token, m = n * k rows, c hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from olmozoo.families.olmoe import ExpertsConfig
from olmozoo.tf.layers import (
    ACTIVATIONS,
    Layer,
    Tensor,
    WithAdapters,
    at_least_float32,
    linear,
    no_values,
    static,
)

MOST_ROWS = 64  # of one product of a tile with an expert; as many as twice an expert's mean, if that is less
LEAST_ROWS = 2  # XLA would look up the kernel of a vector within the product, for each value of the kernel


class SparseMLP(Layer):
    """The sum of the outputs of a token's k experts, each times the weight that the router gives it.

    Each expert is computed on the tokens that are sent to it.
    """

    def __init__(self, config: ExpertsConfig, name: str) -> None:
        super().__init__(name)
        self.gate = linear(config.num_experts, False, name="gate")
        self.experts = Experts(config, name="experts")
        self.count = config.num_experts
        self.chosen = config.num_experts_per_tok
        self.normalized = config.norm_topk_prob

    def call(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs (b, s, c) for x (b, s, c), and the router's logits (b * s, e)."""
        width = x.shape[-1]
        tokens = ops.reshape(x, (-1, width))  # (n, c)
        logits = self.gate(tokens)
        weights, experts = route(logits, self.chosen, self.normalized)
        experts = ops.reshape(experts, (-1,))
        order = tf.argsort(experts, stable=True)  # (m,)
        sizes = ops.sum(tf.one_hot(experts, self.count, dtype=tf.int32), 0)  # rows of each expert
        rows = tf.gather(tf.repeat(tokens, self.chosen, axis=0), order)
        out = tf.gather(self.experts(rows, sizes), tf.argsort(order))  # (m, c), by token again
        out = ops.sum(ops.reshape(out, (-1, self.chosen, width)) * weights[..., None], 1)
        return ops.reshape(out, ops.shape(x)), logits


def route(logits: Tensor, chosen: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """Weights and indices (n, k) of the experts of each token, from logits (n, e).

    The softmax is over all experts, in at least float32, so that the weights of the chosen ones sum to less than 1.

    Args:
        logits: of the router.
        chosen: k.
        normalized: whether the weights are divided by their sum.
    """
    weights, experts = tf.math.top_k(tf.nn.softmax(ops.cast(logits, at_least_float32(logits.dtype))), chosen)
    if normalized:
        weights = weights / ops.sum(weights, -1, keepdims=True)
    return ops.cast(weights, logits.dtype), experts


class Experts(Layer):
    """All gated MLPs of a layer, `down(act(gate(x)) * up(x))`, without biases."""

    def __init__(self, config: ExpertsConfig, name: str) -> None:
        super().__init__(name)
        self.gate_proj = ExpertDense(config.num_experts, config.intermediate_size, name="gate_proj")
        self.up_proj = ExpertDense(config.num_experts, config.intermediate_size, name="up_proj")
        self.down_proj = ExpertDense(config.num_experts, config.hidden_size, name="down_proj")
        self.act = ACTIVATIONS[config.hidden_act]

    def call(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """Rows (m, c), the first `sizes[0]` of them for expert 0, the next `sizes[1]` for expert 1, ..."""
        return self.down_proj(self.act(self.gate_proj(rows, sizes)) * self.up_proj(rows, sizes), sizes)


class ExpertDense(WithAdapters):
    """A linear layer of each expert, their kernels (e, in, out) stacked in one variable.

    LoRA adapters, (e, in, rank) and (e, rank, out), are those of Keras's `Dense` for each expert.
    """

    def __init__(self, experts: int, units: int, name: str) -> None:
        super().__init__(name=name)
        self.experts, self.units = experts, units

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = (self.experts, input_shape[-1], self.units)
        self._kernel = self.add_weight(name="kernel", shape=shape, initializer=no_values, autocast=False)

    @property
    def kernel(self) -> Any:
        """The variable of the kernels; with adapters, the kernels that these make of it."""
        if not self.lora_enabled:
            return self._kernel
        product = tf.matmul(self.lora_kernel_a.value, self.lora_kernel_b.value)
        return self._kernel + ops.cast(self.lora_alpha / self.lora_rank * product, self._kernel.dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...], *others: Any) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def call(self, rows: Tensor, sizes: Tensor) -> Tensor:
        out = grouped_product(rows, tf.convert_to_tensor(self._kernel), sizes)
        if not self.lora_enabled:
            return out
        for factor in (self.lora_kernel_a, self.lora_kernel_b):
            rows = grouped_product(rows, tf.convert_to_tensor(factor), sizes)
        return out + self.lora_alpha / self.lora_rank * rows

    def enable_lora(self, rank: int, lora_alpha: float | None = None) -> None:
        """Add adapters, and freeze the kernels; as the method of Keras's `Dense`."""
        if self.lora_enabled:
            raise ValueError("lora is already enabled. This can only be done once per layer.")
        experts, width, units = self._kernel.shape
        limit = (6 / width) ** 0.5  # He's uniform values, which Keras's Dense starts from
        start = keras.initializers.RandomUniform(-limit, limit)
        self._tracker.unlock()
        a, b = (
            self.add_weight(
                name=f"lora_kernel_{name}", shape=shape, initializer=initial, dtype="float32", autocast=False
            )
            for name, shape, initial in (("a", (experts, width, rank), start), ("b", (experts, rank, units), "zeros"))
        )
        self.lora_kernel_a, self.lora_kernel_b = a, b
        self._tracker.lock()
        self._kernel.trainable = False
        self.lora_enabled, self.lora_rank = True, rank
        self.lora_alpha = rank if lora_alpha is None else lora_alpha


@tf.custom_gradient
def grouped_product(rows: Tensor, kernel: Tensor, sizes: Tensor) -> tuple[Tensor, Any]:
    """Rows (m, in), sorted by expert, times each one's own kernel (in, out): (m, out).

    TensorFlow has no such product. It is a loop over tiles of rows that have one expert. How many there are is known
    when it runs: at most e tiles are not full. It has a first derivative.

    Args:
        rows: (m, in).
        kernel: (e, in, out), of any dtype.
        sizes: int32 (e,), the rows of each expert; they sum to m.
    """
    _, width, units = kernel.shape

    def own(expert: Tensor) -> Tensor:
        return tf.gather(kernel, expert)

    def gradient(upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        of_kernel = kernel_gradient(rows, upstream, kernel, sizes)
        return tiled_product(upstream, own, width, sizes, True), of_kernel, None

    return tiled_product(rows, own, units, sizes, False), gradient


def frozen_product(rows: Tensor, own: Callable[[Tensor], Tensor], width: int, units: int, sizes: Tensor) -> Tensor:
    """`grouped_product` with kernels that do not train; `own` gives that of an expert, (width, units)."""

    @tf.custom_gradient
    def product(rows: Tensor) -> tuple[Tensor, Any]:
        out = tiled_product(rows, own, units, sizes, False)
        return out, lambda upstream: tiled_product(upstream, own, width, sizes, True)

    return product(rows)


class Tiles:
    """Runs of rows that have one expert, in the order of the rows; of all rows of an expert, only the last is short.

    What depends on the experts of tokens is gathered: XLA takes where a slice begins for a constant of the program, and
    would compile it again for all that this depends on.

    Args:
        rows: how many there are, m.
        sizes: (e,), the rows of each expert.
    """

    def __init__(self, rows: Any, sizes: Tensor) -> None:
        known, experts = static(rows), sizes.shape[0]
        share = 2 * MOST_ROWS if known is None else 2 * known // experts
        self.rows = min(max(1 << max(share - 1, 0).bit_length(), LEAST_ROWS), MOST_ROWS)  # a power of two
        counts = -(-sizes // self.rows)
        self.total, self.sizes = rows, sizes
        self.ends = tf.cumsum(counts)
        self.firsts, self.starts = self.ends - counts, tf.cumsum(sizes) - sizes
        self.count = self.ends[-1]
        self.most = rows // self.rows + experts

    def tile(self, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The expert of tile i, its first row, and which of its rows are the expert's own."""
        expert = ops.sum(ops.cast(self.ends <= i, "int32"))
        first, start, size = (tf.gather(x, expert) for x in (self.firsts, self.starts, self.sizes))
        done = (i - first) * self.rows
        return expert, start + done, tf.range(self.rows) < size - done

    def cut(self, x: Tensor, start: Tensor) -> Tensor:
        """The rows of one tile of x (m, ...); after the end of x, its last row.

        `tf.slice` is not used: TensorFlow asks whether its start is a constant, and follows it back through the loops
        of all layers, which takes minutes.
        """
        return tf.gather(x, tf.minimum(start + tf.range(self.rows), self.total - 1))

    def join(self, parts: Tensor) -> Tensor:
        """The rows (m, ...) of the tiles (most, rows, ...) that hold them."""
        row = tf.range(self.total)
        expert = ops.sum(ops.cast(tf.cumsum(self.sizes) <= row[:, None], "int32"), -1)
        slot = tf.gather(self.firsts, expert) * self.rows + row - tf.gather(self.starts, expert)
        return tf.gather(ops.reshape(parts, (-1, parts.shape[-1])), slot)


def tiled_product(rows: Tensor, own: Callable[[Tensor], Tensor], out: int, sizes: Tensor, transposed: bool) -> Tensor:
    """`grouped_product` by a loop, with the kernels that `own` gives or with their transposes, to `out` values."""
    tiles = Tiles(ops.shape(rows)[0], sizes)
    parts = tf.TensorArray(rows.dtype, tiles.most, element_shape=(tiles.rows, out))

    def write(i: Tensor, parts: Any) -> tuple[Tensor, Any]:
        expert, start, _ = tiles.tile(i)
        kernel = ops.cast(own(expert), rows.dtype)
        return i + 1, parts.write(i, tf.matmul(tiles.cut(rows, start), kernel, transpose_b=transposed))

    _, parts = tf.while_loop(lambda i, _: i < tiles.count, write, (tf.constant(0), parts))
    return tiles.join(parts.stack())


def kernel_gradient(rows: Tensor, upstream: Tensor, kernel: Tensor, sizes: Tensor) -> Tensor:
    """The gradient (e, in, out) of the kernels, from that of the products (m, out)."""
    tiles = Tiles(ops.shape(rows)[0], sizes)

    def add(i: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        expert, start, real = tiles.tile(i)
        tile = ops.where(real[:, None], tiles.cut(rows, start), tf.zeros((), rows.dtype))
        part = tf.matmul(tile, tiles.cut(upstream, start), transpose_a=True)
        return i + 1, tf.tensor_scatter_nd_add(total, [[expert]], ops.cast(part, total.dtype)[None])

    return tf.while_loop(lambda i, _: i < tiles.count, add, (tf.constant(0), tf.zeros_like(kernel)))[1]
