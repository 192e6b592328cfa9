"""Linear layers with weights of 8 or 4 bits (see `olmozoo.quantization`).

In bfloat16 on the CPU, PyTorch's own kernels multiply by the integers as they are. Otherwise the weight is dequantized
for each call, in the dtype of the input, which is exact and slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmozoo.errors import InputError
from olmozoo.pt.layers import at_least_float32
from olmozoo.quantization import Quantization, QuantizedTensor, pack

KERNEL_GROUPS = (32, 64, 128, 256)  # of the 4-bit kernel
KERNEL_WIDTH = 32  # the 8-bit kernel reads rows by vectors of up to so many values, and past the end of others
KERNEL_ROWS = 64  # of an input; more are faster with the weight dequantized once
UNPACKED = 512  # columns that are unpacked at a time


class DequantizedWeight(Tensor):
    """A dequantized weight, whose `data` is not there to be changed: what a program adds to it would be lost."""

    @property
    def data(self) -> Any:
        raise InputError(
            "the weight of a quantized layer is integers, to which nothing can be added: merge an adapter into the "
            "float model, as from_pretrained(folder, adapter=...) does"
        )


class QuantizedLinear(nn.Linear):
    """`x W^T + b` for a weight W (out, in) of integers, which does not train.

    Args:
        tensor: the weight.
        bias: (out,), or None.
        dtype: of the inputs to come.
        device: of the integers.

    Attributes:
        values: int8 (out, in); of 4 bits uint8 (out, in / 2), two to a byte, the first in the low bits, or in the
            order of PyTorch's kernel where `in_kernel_order`.
        scale: (out, groups).
        zero: int8 (out, groups), or None for zeros.
        bias: (out,), or None.
    """

    def __init__(
        self,
        tensor: QuantizedTensor,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = tensor.shape
        self.bits = tensor.bits
        self.dtype = dtype
        self.in_kernel_order = False
        values = tensor.values if self.bits == 8 else pack(tensor.values, 4).view(np.uint8)
        scale = torch.from_numpy(tensor.scale.astype(np.float32))
        if tensor.scale.dtype != np.float32:
            scale = scale.bfloat16()
        zero = None if tensor.zero is None else torch.from_numpy(np.array(tensor.zero)).to(device)
        self.register_buffer("values", torch.from_numpy(np.array(values, order="C")).to(device))
        self.register_buffer("scale", scale.to(device))
        self.register_buffer("zero", zero)
        self.register_parameter("bias", bias)
        self._order(self._fits_kernel())

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (out, in), in `dtype`, to look at."""
        return self.dequantize(self.dtype).as_subclass(DequantizedWeight)

    @property
    def group_size(self) -> int:
        """Values along a row that share a scale."""
        return self.in_features // self.scale.shape[1]

    @property
    def scheme(self) -> Quantization:
        """How the weight is quantized."""
        group_size = None if self.scale.shape[1] == 1 else self.group_size
        return Quantization(self.bits, group_size, self.zero is None)

    @property
    def scale_dtype(self) -> np.dtype[Any]:
        """The dtype of the scales in NumPy and on disk: float32 or bfloat16."""
        return np.dtype(ml_dtypes.bfloat16 if self.scale.dtype == torch.bfloat16 else np.float32)

    def integers(self) -> Tensor:
        """The weight's integers, int8 (out, in)."""
        values: Any = self.values
        if self.bits == 8:
            return values
        if self.in_kernel_order:
            return self._from_kernel_order()
        pairs = torch.stack([values & 15, values >> 4], -1).flatten(1)[:, : self.in_features]
        return pairs.to(torch.int8) - 8

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), computed in at least float32 and rounded to a dtype."""
        wide = at_least_float32(dtype)
        values = self.integers().unflatten(1, (-1, self.group_size)).to(wide)
        if self.zero is not None:
            values = values - self.zero[..., None]
        return (values * self.scale[..., None].to(wide)).flatten(1).to(dtype)

    def tensor(self) -> QuantizedTensor:
        """The weight in NumPy."""
        zero = None if self.zero is None else self.zero.cpu().numpy()
        scale = self.scale.float().cpu().numpy().astype(self.scale_dtype)
        return QuantizedTensor(self.integers().cpu().numpy(), scale, zero, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        if self.uses_kernel(x):
            rows = x.reshape(-1, self.in_features)
            out = self._multiply(rows).view(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        is_vector = x.numel() == self.in_features and (self.bits == 8 or self.group_size % 2 == 0)
        if is_vector and x.is_cuda and torch.compiler.is_compiling():
            out = self.multiply_vector(x)
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.dequantize(x.dtype), self.bias)

    def multiply_vector(self, x: Tensor) -> Tensor:
        """`x W^T` for x (..., in) of one row: one sum, of which `torch.compile` makes a kernel that reads integers.

        A product with the dequantized weight would write it to memory, and read it again.
        """
        wide, groups = at_least_float32(x.dtype), self.scale.shape[1]
        values: Any = self.values
        values, row = values.view(self.out_features, groups, -1), x.to(wide).view(groups, self.group_size)
        offset: Any = 0
        parts = [(values, row)]
        if self.bits == 4:
            parts, offset = [(values & 15, row[:, ::2]), (values >> 4, row[:, 1::2])], 8
        if self.zero is not None:
            offset = offset + self.zero[..., None].to(wide)
        total = sum((integers.to(wide) - offset) * inputs for integers, inputs in parts)
        total = total * self.scale[..., None].to(wide)
        return total.flatten(1).sum(-1).to(x.dtype).view(*x.shape[:-1], self.out_features)

    def uses_kernel(self, x: Tensor) -> bool:
        """Whether a kernel multiplies by the integers: for bfloat16 on the CPU, without a gradient."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
            return False
        is_small = self.bits == 4 or x.numel() <= KERNEL_ROWS * self.in_features
        return is_small and self._kernel_scale is not None

    def _multiply(self, rows: Tensor) -> Tensor:
        if self.bits == 8:
            return torch._weight_int8pack_mm(rows, self.values, self._kernel_scale)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.values, self.group_size, self._kernel_scale)

    def _order(self, for_kernel: bool) -> None:
        """Put 4-bit values into the order of PyTorch's kernel, or out of it."""
        if for_kernel and not self.in_kernel_order:
            unsigned = self.integers().to(torch.int32) + 8
            self.values = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        elif self.in_kernel_order and not for_kernel:
            self.values = torch.from_numpy(pack(self.integers().numpy(), 4).view(np.uint8))
        self.in_kernel_order = for_kernel
        self._kernel_scale: Any = self._make_kernel_scale()

    def _make_kernel_scale(self) -> Tensor | None:
        """Scales as a kernel takes them: bfloat16 (out,), or of 4 bits (groups, out, 2), beside the zero points.

        They are made once, since that takes a good part of the time of one row. None where no kernel takes the weight.
        """
        scale: Any = self.scale
        if self.bits == 4:
            zero = torch.zeros_like(scale) if self.zero is None else -self.zero * scale
            return torch.stack([scale.T, zero.T], -1).bfloat16() if self.in_kernel_order else None
        is_there = self.dtype == torch.bfloat16 and scale.device.type == "cpu"
        fits = self.in_features % KERNEL_WIDTH == 0 and scale.shape[1] == 1 and self.zero is None
        return scale[:, 0].bfloat16() if is_there and fits else None

    def _fits_kernel(self) -> bool:
        """Whether PyTorch's 4-bit kernel takes this weight, for inputs in `dtype`."""
        is_there = self.bits == 4 and self.dtype == torch.bfloat16 and self.values.device.type == "cpu"
        return is_there and self.group_size in KERNEL_GROUPS and self.out_features % 16 == 0

    def _from_kernel_order(self) -> Tensor:
        """The integers, as the kernel multiplies unit vectors by them: the order of the bits is the kernel's own."""
        groups = self.in_features // self.group_size
        ones = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(groups, self.out_features, 2).contiguous()
        columns = []
        for start in range(0, self.in_features, UNPACKED):
            count = min(UNPACKED, self.in_features - start)
            units = torch.zeros(count, self.in_features, dtype=torch.bfloat16)
            units[torch.arange(count), start + torch.arange(count)] = 1
            found = torch.ops.aten._weight_int4pack_mm_for_cpu(units, self.values, self.group_size, ones)
            columns.append(found.to(torch.int8).T)
        return torch.cat(columns, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow `model.to(...)` to another dtype or device, in whose order the values are kept."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.values.device)).dtype
        self._order(False)
        super()._apply(fn, recurse)
        self._order(self._fits_kernel())
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme}"
