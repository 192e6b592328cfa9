"""Blocks that families share: norm, rotary positions, masks, attention, gated MLP.

Shapes in comments: b batch, s positions in this call, t positions with the cache, h query heads, g key/value heads,
d head_dim, c hidden size, f MLP width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from olmozoo.errors import InputError
from olmozoo.families.rope import Rope
from olmozoo.memory import MASK_BYTES, MIN_ROWS

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
}


def as_tensor(x: Any, device: torch.device) -> Any:
    """Lists and NumPy arrays as tensors on a device; tensors and None as they are."""
    if x is None or isinstance(x, Tensor):
        return x
    return torch.from_numpy(np.array(x)).to(device)


def concrete(x: Tensor) -> np.ndarray | None:
    """The values of a tensor where they are at hand: on the CPU, and not traced."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    try:
        return x.detach().numpy()
    except RuntimeError:  # traced by a transform of torch.func
        return None


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Linear):
    """`nn.Linear` with the faster of two float32 products on the CPU.

    PyTorch's builds take them from MKL, which runs at about half of its speed on processors of AMD. oneDNN, which is
    part of the same builds, does not; its operator takes the plain weight and repacks nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by the faster of the two."""
    if not takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out = Product.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias
    return product(x, weight, bias)


class Product(torch.autograd.Function):
    """`x @ weight.T` of x (n, in) and weight (out, in), and the same operator for both of its gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return product(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = Product.apply(grad, weight.t()) if wants_x else None  # (n, out) @ (out, in)
        grad_weight = Product.apply(grad.t(), x.t()) if wants_weight else None  # (out, n) @ (n, in)
        return grad_x, grad_weight


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is oneDNN's: of plain float32 tensors on the CPU, where nothing traces or casts it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not onednn_is_faster():
        return False
    return (
        x.dtype is weight.dtype is torch.float32
        and x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None  # torch.func; see tests/pt/test_layers.py
    )


@cache
def onednn_is_faster() -> bool:
    """Whether this build takes products from MKL, has oneDNN's operator, and runs on a processor of AMD."""
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not has_operator or "BLAS_INFO=mkl" not in torch.__config__.show():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


class RMSNorm(nn.Module):
    """`w * x / sqrt(mean(x^2) + eps)` in at least float32, cast back after the product (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(at_least_float32(x.dtype))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """`w * (x - mean) / sqrt(var + 1e-5) + b` in at least float32, cast back (arXiv:1607.06450); w, b if `affine`."""

    def __init__(self, size: int, affine: bool) -> None:
        super().__init__(size, eps=1e-5, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x.dtype)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def constant(values: tuple[float, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor of `values` on the device of `like`, made once for each dtype and device.

    It is no buffer: `model.half()` would round it, and `model.double()` could not undo that. What traces a graph, or
    brings tensors of its own kind (fake, distributed), gets a tensor of its own.
    """
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return torch.tensor(values, dtype=dtype, device=like.device)
    return cached_constant(values, dtype, like.device)


@lru_cache(maxsize=64)
def cached_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """See `constant`."""
    with torch.inference_mode(False):  # the next call may be of training
        return torch.tensor(values, dtype=dtype, device=device)


def rotary(rope: Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (b, 1, s, d), for positions (b, s), in at least float32; see `Rope.frequencies`."""
    dtype = at_least_float32(dtype)
    inv_freq = constant(rope.inv_freq, dtype, positions)
    if rope.growth is not None:
        past = (positions.max() + 1 - rope.length).clamp(min=0).to(dtype)
        inv_freq = inv_freq * (1 + rope.factor * past / rope.length) ** -constant(rope.growth, dtype, positions)
    elif rope.long_inv_freq is not None:
        is_long = positions.max() + 1 > rope.length
        inv_freq = torch.where(is_long, constant(rope.long_inv_freq, dtype, positions), inv_freq)
    angles = positions[:, None, :, None].to(dtype) * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * rope.scale, angles.sin() * rope.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of x (b, h, s, d) by its angle (arXiv:2104.09864, in the half-split layout)."""
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def causal_mask(
    attention_mask: Tensor | None,
    batch: int,
    length: int,
    past: int | Tensor,
    keys: int,
    device: torch.device,
    window: int | None = None,
    end: int | Tensor | None = None,
) -> Tensor | None:
    """Which keys each query sees: bool (b or 1, 1, s, t), or None where that is plain causality.

    A query sees the real keys up to its own position, in a window the last of these alone. One that would see none
    (padding on the left) sees itself, so that no softmax is over nothing.

    Args:
        attention_mask: (b, t), 1 for real tokens. Or (b or 1, h or 1, s, t), which is the answer itself, with no
            window: true where a query sees a key, or floats, which `attention` adds to the scores.
        batch: b.
        length: s.
        past: positions in the cache before this call.
        keys: t; past + s, but for a `StaticCache` all that a layer has memory for.
        device: of the result.
        window: how many positions a query sees, padding and its own included; None for all.
        end: None where key i is that of position i. For a layer of a `StaticCache` with a window, the number of
            positions cached after this call; key i is then that of the last position before `end` that is i modulo t,
            and attention_mask is of all positions.

    Raises:
        InputError: attention_mask has another shape.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask if attention_mask.is_floating_point() else attention_mask.to(torch.bool)
    if window is not None and end is None and not torch.compiler.is_exporting() and keys <= window:
        window = None  # not in an exported graph, which serves any length
    if attention_mask is None and window is None and (past == 0 or length == 1):
        return None
    query = past + torch.arange(length, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    if end is not None:
        key = end - 1 - (end - 1 - key) % keys  # below 0 where nothing is written yet
    causal = (key <= query)[None, None]
    if window is not None:
        causal = causal & (key > query - window)
    if end is not None:
        causal = causal & (key >= 0)
        attention_mask = None if attention_mask is None else attention_mask[:, key[0].clamp(min=0)]
    if attention_mask is None:
        return causal
    check_mask(attention_mask, batch, past, length, keys)
    seen = causal & attention_mask.to(torch.bool)[:, None, None, :]
    return seen | (~seen.any(-1, keepdim=True) & (key == query))


@dataclass(frozen=True)
class QueryBlocks:
    """The masks of a long call, made for `rows` queries at a time; the other fields are arguments of `causal_mask`."""

    attention_mask: Tensor | None
    past: int
    batch: int
    keys: int
    window: int | None
    rows: int

    def run(self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`attend(query, key, value, mask)` by blocks of queries, in memory linear in s and t (arXiv:2112.05682).

        A block is given the keys up to its last query, in a window those in it alone. The backward pass computes each
        block again.
        """
        absent = self.keys - key.shape[2]  # which a cache of windows no longer has
        out = []
        for start in range(0, query.shape[2], self.rows):
            block = query[:, :, start : start + self.rows]
            first = self.past + start
            end = first + block.shape[2]
            begin = absent if self.window is None else max(absent, first - self.window + 1)
            near = [x[:, :, begin - absent : end - absent] for x in (key, value)]
            real = None if self.attention_mask is None else self.attention_mask[:, begin:end]
            sizes = self.batch, block.shape[2], first - begin, end - begin
            one = partial(self.attend_to, attend, real, sizes)
            if torch.is_grad_enabled() and any(x.requires_grad for x in (block, *near)):
                out.append(checkpoint(one, block, *near, use_reentrant=False))
            else:
                out.append(one(block, *near))
        return torch.cat(out, dim=1)  # (b, s, h * d)

    def attend_to(
        self,
        attend: Callable[..., Tensor],
        real: Tensor | None,
        sizes: tuple[int, int, int, int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """One block; `sizes` are `batch`, `length`, `past` and `keys` of its mask."""
        return attend(query, key, value, causal_mask(real, *sizes, query.device, self.window))


def query_mask(
    attention_mask: Tensor | None,
    batch: int,
    length: int,
    past: int | Tensor,
    keys: int,
    device: torch.device,
    window: int | None = None,
    end: int | Tensor | None = None,
) -> Tensor | QueryBlocks | None:
    """`causal_mask`, or `QueryBlocks` where that would take more than `MASK_BYTES` and no graph is traced."""
    rows = 1 if attention_mask is None else batch
    at_once = (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or end is not None
        or 4 * rows * length * keys <= MASK_BYTES
        or (attention_mask is not None and attention_mask.ndim == 4)
        or (attention_mask is None and past == 0 and (window is None or keys <= window))  # plain causality
    )
    if at_once:
        return causal_mask(attention_mask, batch, length, past, keys, device, window, end)
    if attention_mask is not None:
        check_mask(attention_mask, batch, past, length, keys)
    width = keys if window is None else min(keys, 2 * window)
    block = max(MASK_BYTES // (16 * rows * width), MIN_ROWS["pt"])
    return QueryBlocks(attention_mask, int(past), batch, keys, window, block)


def check_mask(mask: Tensor, batch: int, past: int | Tensor, length: int, keys: int) -> None:
    """Check the shape of an attention_mask of two dimensions; see `causal_mask`."""
    if mask.shape != (batch, keys):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, expected {(batch, keys)}: "
            f"{past} cached and {length} new positions"
        )


def clip(x: Tensor, limit: float | None) -> Tensor:
    """Clamp x to [-limit, limit]; as it is for None."""
    return x if limit is None else x.clamp(-limit, limit)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(b, s, h * d) -> (b, h, s, d)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | QueryBlocks | None,
    scale: float,
    dropout: float,
    want_weights: bool,
    head_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of query (b, h, s, d) on key and value (b, g, t, d); key head i serves h/g query heads.

    A mask of floats is added to the scores. A head_mask (h,) multiplies each head's weights. Dropout of the weights
    has the probability `dropout`. Where a layer has a window, a cache of Transformers keeps the last keys alone; the
    last columns of the mask are theirs.

    Returns:
        The heads' outputs, side by side, (b, s, h * d); and the weights (b, h, s, t) where they are wanted. For
        `QueryBlocks` these are None.
    """
    if isinstance(mask, QueryBlocks):
        options = {"scale": scale, "dropout": dropout, "want_weights": False, "head_mask": head_mask}
        return mask.run(lambda *args: attention(*args, **options)[0], query, key, value), None
    weights, wide = None, at_least_float32(query.dtype)
    key, value = key.to(query.dtype), value.to(query.dtype)  # a cache may be narrower
    if mask is not None:
        mask = mask[..., -key.shape[2] :]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(wide).clamp(min=torch.finfo(query.dtype).min).to(query.dtype)  # no row of infinities alone
    if want_weights or head_mask is not None:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = (query @ key.transpose(-1, -2)).to(wide) * scale
        if mask is None:
            mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, torch.finfo(wide).min)
        weights = F.dropout(scores.softmax(-1).to(query.dtype), dropout)
        if head_mask is not None:
            weights = weights * head_mask[:, None, None].to(weights.dtype)
        out = weights @ value
    else:
        causal = False
        if mask is None and query.shape[2] > 1:  # a branch: as a value, the answer is a symbol where the length is one
            causal = True
        gqa = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=gqa
        )
    return out.transpose(1, 2).flatten(2), weights


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (arXiv:2002.05202), no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
