"""A sparse MLP: a router sends each token to a few of many gated MLPs (arXiv:1701.06538, arXiv:2409.02060).

Shapes in comments: n tokens (batch times positions), e experts, k of them a token, m = n * k rows, c hidden size.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from olmozoo.families.olmoe import ExpertsConfig
from olmozoo.tf.layers import ACTIVATIONS, Layer, Tensor, at_least_float32, linear, no_values, static

MOST_ROWS = 64  # of one product of a tile with an expert


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


class ExpertDense(keras.layers.Layer):
    """A linear layer of each expert, their kernels (e, in, out) stacked in one variable."""

    def __init__(self, experts: int, units: int, name: str) -> None:
        super().__init__(name=name)
        self.experts, self.units = experts, units

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = (self.experts, input_shape[-1], self.units)
        self.kernel = self.add_weight(name="kernel", shape=shape, initializer=no_values, autocast=False)

    def compute_output_shape(self, input_shape: tuple[int | None, ...], *others: Any) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def call(self, rows: Tensor, sizes: Tensor) -> Tensor:
        return grouped_product(rows, tf.convert_to_tensor(self.kernel), sizes)


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

    def gradient(upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        return tiled_product(upstream, kernel, sizes, True), kernel_gradient(rows, upstream, kernel, sizes), None

    return tiled_product(rows, kernel, sizes, False), gradient


class Tiles:
    """Runs of rows that have one expert, in the order of the rows; of all rows of an expert, only the last is short.

    Args:
        rows: how many there are, m.
        sizes: (e,), the rows of each expert.
    """

    def __init__(self, rows: Any, sizes: Tensor) -> None:
        known, experts = static(rows), sizes.shape[0]
        share = 2 * MOST_ROWS if known is None else 2 * known // experts
        self.rows = min(1 << max(share - 1, 0).bit_length(), MOST_ROWS)  # twice an expert's mean, as a power of two
        counts = -(-sizes // self.rows)
        self.total, self.sizes = rows, sizes
        self.ends = tf.cumsum(counts)
        self.firsts, self.starts = self.ends - counts, tf.cumsum(sizes) - sizes
        self.count = self.ends[-1]
        self.most = rows // self.rows + experts

    def tile(self, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The expert of tile i, its first row, and which of its rows are the expert's own."""
        expert = ops.sum(ops.cast(self.ends <= i, "int32"))
        done = (i - self.firsts[expert]) * self.rows
        return expert, self.starts[expert] + done, tf.range(self.rows) < self.sizes[expert] - done

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


def tiled_product(rows: Tensor, kernel: Tensor, sizes: Tensor, transposed: bool) -> Tensor:
    """`grouped_product` by a loop, with the kernels or with their transposes."""
    tiles = Tiles(ops.shape(rows)[0], sizes)
    width = kernel.shape[1 if transposed else 2]
    parts = tf.TensorArray(rows.dtype, tiles.most, element_shape=(tiles.rows, width))

    def write(i: Tensor, parts: Any) -> tuple[Tensor, Any]:
        expert, start, _ = tiles.tile(i)
        own = ops.cast(tf.gather(kernel, expert), rows.dtype)
        return i + 1, parts.write(i, tf.matmul(tiles.cut(rows, start), own, transpose_b=transposed))

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
