"""Quantized weights in a checkpoint: their parts on disk as one tensor, and back.

Read are the parts that compressed-tensors (`pack-quantized` and `int-quantized`, 8 and 4 bits), torchao (int8 and
unpacked int4) and bitsandbytes (int8) keep for a weight W (out, in):

    W.weight_packed, .weight_scale, .weight_shape, .weight_zero_point      compressed-tensors, packed
    W.weight, .weight_scale, .weight_zero_point                            compressed-tensors, one byte a value
    W._weight_qdata, ._weight_scale, ._weight_zero_point                   torchao
    W.weight, .SCB, .weight_format                                         bitsandbytes, 8 bits
    W.weight, .weight.absmax, .weight.quant_map, .weight.quant_state...    bitsandbytes, 4 bits: read as floats

What is written is `pack-quantized`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from olmozoo.checkpoint.tensors import DTYPES, INTEGERS, LazyIntegers, LazyTensor, widest
from olmozoo.errors import CheckpointError, InputError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import BASE_PREFIX
from olmozoo.quantization import (
    Quantization,
    QuantizedTensor,
    check_groups,
    is_quantizable,
    pack,
    quantize,
    scale_dtype,
    unpack,
)
from olmozoo.typing import Array

Wanted = Quantization | Literal["none"] | None  # "none" is floats; None is as the files have it
Tensors = dict[str, LazyTensor]

CODES = {dtype: code for code, dtype in (DTYPES | INTEGERS).items()}
NF4_STATE = ".quant_state.bitsandbytes__"
BNB_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def join(tensors: Mapping[str, LazyTensor], problems: list[str]) -> Tensors:
    """The tensors with the parts of each quantized weight joined; floats stay as they are.

    Args:
        tensors: by the names in the files.
        problems: gets what is wrong: parts that are missing or do not fit, and integers that are parts of nothing.
    """
    left = dict(tensors)
    found: list[_Parts] = []
    for name in tensors:
        for split in (_packed, _torchao, _bitsandbytes_4bit, _one_byte):
            if (parts := split(name, tensors)) is not None:
                found.append(parts)
                break
    for parts in found:
        for part in parts.names:
            left.pop(part, None)
    dtype = widest(tensor.dtype for tensor in left.values() if tensor.dtype.kind not in "iu")
    for parts in found:
        if parts.weight in left:
            problems.append(f"{parts.names[0]} is a part of {parts.weight}, which is there in another form too")
            continue
        try:
            left[parts.weight] = parts.make(dtype)
        except CheckpointError as error:
            problems.append(str(error))
    problems += [
        f"{name} has dtype {CODES[tensor.dtype]}, expected one of {', '.join(DTYPES)}"
        for name, tensor in left.items()
        if tensor.dtype.kind in "iu"
    ]
    return left


class _Parts(NamedTuple):
    """The tensors that one weight is stored as."""

    weight: str  # the name that the weight has in floats
    names: list[str]  # of its parts
    make: Callable[[np.dtype[Any]], LazyTensor]  # from the dtype of the model


def _packed(name: str, tensors: Mapping[str, LazyTensor]) -> _Parts | None:
    """compressed-tensors, `pack-quantized`."""
    if not name.endswith(".weight_packed"):
        return None
    weight = name.removesuffix("_packed")

    def make(dtype: np.dtype[Any]) -> LazyTensor:
        words, scale = tensors[name], _part(tensors, f"{weight}_scale", name)
        given = _part(tensors, f"{weight}_shape", name)
        if given.shape != (2,) or given.dtype.kind not in "iu":
            raise CheckpointError(f"{given.name} is {CODES[given.dtype]} {list(given.shape)}, expected two integers")
        if len(words.shape) != 2 or words.dtype != np.int32:
            raise CheckpointError(f"{name} is {CODES[words.dtype]} {list(words.shape)}, expected words of a matrix")
        out, width = (int(size) for size in given.read())
        bits = next((bits for bits in (4, 8) if (out, _words(width, bits)) == words.shape), None)
        if bits is None or width < 1:
            raise CheckpointError(f"{name} is {list(words.shape)}, expected [{out}, {width}] in words of 4 or 8 bits")
        zero = tensors.get(f"{weight}_zero_point")
        groups = scale.shape[-1] if scale.shape else 1
        if zero is not None and zero.dtype == np.int32:
            packed = zero
            if packed.shape != (_words(out, bits), groups):
                raise CheckpointError(
                    f"{packed.name} is {list(packed.shape)}, expected {[_words(out, bits), groups]} words"
                )
            zero = dataclasses.replace(
                packed, dtype=np.dtype(np.int8), shape=(out, groups), read=lambda: unpack(packed.read().T, bits, out).T
            )
        return _integers(
            weight, dtype, (out, width), bits, lambda: unpack(words.read(), bits, width), scale, zero, words
        )

    names = [name, *(f"{weight}_{part}" for part in ("scale", "shape", "zero_point"))]
    return _Parts(weight, names, make)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _one_byte(name: str, tensors: Mapping[str, LazyTensor]) -> _Parts | None:
    """compressed-tensors, `int-quantized`; bitsandbytes, 8 bits."""
    if not name.endswith(".weight") or tensors[name].dtype != np.int8:
        return None
    module = name.removesuffix(".weight")
    scb = f"{module}.SCB"

    def make(dtype: np.dtype[Any]) -> LazyTensor:
        values = tensors[name]
        if scb not in tensors:
            scale, zero = _part(tensors, f"{name}_scale", name), tensors.get(f"{name}_zero_point")
            return _integers(name, dtype, values.shape, 8, values.read, scale, zero, values)
        order = tensors.get(f"{module}.weight_format")
        if order is not None and order.read().any():
            raise CheckpointError(f"{module}.weight_format is {order.read()}, expected 0: rows one after another")
        largest = tensors[scb]  # of each row
        if len(largest.shape) != 1:
            raise CheckpointError(f"{scb} is {list(largest.shape)}, expected a value for each row of {name}")
        scale = dataclasses.replace(
            largest, shape=(*largest.shape, 1), read=lambda: largest.read().astype(np.float32)[:, None] / 127
        )
        return _integers(name, dtype, values.shape, 8, values.read, scale, None, values)

    others = [scb, f"{module}.weight_format"] if scb in tensors else [f"{name}_scale", f"{name}_zero_point"]
    return _Parts(name, [name, *others], make)


def _torchao(name: str, tensors: Mapping[str, LazyTensor]) -> _Parts | None:
    """torchao, `Int8WeightOnlyConfig` and `IntxWeightOnlyConfig`."""
    if not name.endswith("._weight_qdata"):
        return None
    stem = name.removesuffix("_qdata")
    weight = f"{name.removesuffix('._weight_qdata')}.weight"

    def make(dtype: np.dtype[Any]) -> LazyTensor:
        values, scale = tensors[name], _part(tensors, f"{stem}_scale", name)
        if values.dtype != np.int8:
            raise CheckpointError(f"{name} is {CODES[values.dtype]}, expected I8")
        zero = tensors.get(f"{stem}_zero_point")
        return _integers(weight, dtype, values.shape, 8, values.read, scale, zero, values)

    return _Parts(weight, [name, f"{stem}_scale", f"{stem}_zero_point"], make)


def _bitsandbytes_4bit(name: str, tensors: Mapping[str, LazyTensor]) -> _Parts | None:
    """bitsandbytes, 4 bits (arXiv:2305.14314): indices into a table of 16 values, which is no row of integers."""
    weight, found, kind = name.partition(NF4_STATE)
    if not found:
        return None

    def make(dtype: np.dtype[Any]) -> LazyTensor:
        nibbles, table = _part(tensors, weight, name), _part(tensors, f"{weight}.quant_map", name)
        absmax = _part(tensors, f"{weight}.absmax", name)
        try:
            state = json.loads(tensors[name].read().tobytes())
            shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
            offset, nested_block = float(state.get("nested_offset", 0.0)), int(state.get("nested_blocksize", 1))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{name} is no state of bitsandbytes: {error!r}") from error
        size = math.prod(shape)
        fits = len(shape) == 2 and min(*shape, block, nested_block) > 0 and math.prod(nibbles.shape) == -(-size // 2)
        if not fits or math.prod(absmax.shape) != -(-size // block) or table.shape != (16,):
            raise CheckpointError(f"{weight} in {kind} does not fit its shape {list(shape)} and blocks of {block}")
        if nibbles.dtype.itemsize != 1:
            raise CheckpointError(f"{weight} in {kind} is {CODES[nibbles.dtype]}, expected two values a byte")
        block = min(block, size)  # a block that says more has no more
        nested = None
        if absmax.dtype == np.uint8:
            nested = [_part(tensors, f"{weight}.nested_{part}", name) for part in ("absmax", "quant_map")]
            count = math.prod(absmax.shape)
            if math.prod(nested[0].shape) != -(-count // nested_block) or nested[1].shape != (256,):
                raise CheckpointError(f"{weight}.nested_absmax does not fit blocks of {nested_block}")
            nested_block = min(nested_block, count)
        for part in (table, *(nested or [absmax])):
            if part.dtype.kind in "iu":
                raise CheckpointError(f"{part.name} is {CODES[part.dtype]}, expected floats")

        def exact() -> Array:
            largest = absmax.read().reshape(-1)
            if nested is not None:
                scales = np.repeat(nested[0].read().reshape(-1), nested_block)[: len(largest)]
                largest = nested[1].read()[largest] * scales + np.float32(offset)
            pairs = nibbles.read().reshape(-1).view(np.uint8)
            indices = np.stack([pairs >> 4, pairs & 15], -1).reshape(-1)[:size]
            values: Array = table.read()[indices] * np.repeat(largest, block)[:size]
            return np.asarray(values, np.float32).reshape(shape)

        return LazyTensor(weight, dtype, shape, lambda: exact().astype(dtype), nibbles.file, exact=exact)

    return _Parts(weight, [name, weight, *(weight + part for part in BNB_PARTS)], make)


def _part(tensors: Mapping[str, LazyTensor], name: str, of: str) -> LazyTensor:
    if name not in tensors:
        raise CheckpointError(f"{of} is without {name}")
    return tensors[name]


def _integers(
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    bits: int,
    values: Callable[[], Array],
    scale: LazyTensor,
    zero: LazyTensor | None,
    source: LazyTensor,
) -> LazyTensor:
    """A weight of these parts, once their shapes fit: scales and zero points are (out, groups), (out,) or one."""
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    rows = scale.shape[0] if scale.shape else 1
    fits = len(shape) == 2 and rows in (1, *shape[:1]) and len(scale.shape) <= 2 and groups > 0
    if not fits or shape[1] % groups or scale.dtype.kind in "iu":
        raise CheckpointError(f"{scale.name} is {list(scale.shape)}, expected scales of groups of {name} {list(shape)}")
    if zero is not None and (zero.shape not in (scale.shape, (shape[0], groups)) or zero.dtype.kind == "u"):
        raise CheckpointError(f"{zero.name} is {list(zero.shape)}, expected {list(scale.shape)}, as the scales")
    kept = np.dtype(np.float32) if scale.dtype.itemsize != 2 or scale.dtype == np.float16 else scale.dtype
    full = (shape[0], groups)

    def read() -> QuantizedTensor:
        scales = np.broadcast_to(np.reshape(scale.read(), (rows, groups)), full).astype(kept)
        zeros = None
        if zero is not None:
            given, most = zero.read(), 1 << (bits - 1)
            if not ((given >= -most) & (given < most) & (given == np.rint(given))).all():
                raise CheckpointError(f"{zero.name} has values that are no integers of {bits} bits")
            zeros = np.broadcast_to(np.reshape(given, (-1, groups)), full).astype(np.int8)
        return QuantizedTensor(values(), scales, zeros if zeros is not None and zeros.any() else None, bits)

    scheme = Quantization(bits, None if groups == 1 else shape[1] // groups, zero is None)
    return _quantized(
        LazyTensor(name, dtype, shape, lambda: np.empty(0), source.file), LazyIntegers(scheme, kept, read)
    )


def _quantized(tensor: LazyTensor, integers: LazyIntegers) -> LazyTensor:
    """A tensor whose values are those of integers."""
    wide = np.dtype(np.float64 if tensor.dtype == np.float64 else np.float32)
    return dataclasses.replace(
        tensor,
        read=lambda: integers.read().dequantize(tensor.dtype),
        exact=lambda: integers.read().dequantize(wide),
        read_rows=None,
        integers=integers,
    )


def floats(tensor: LazyTensor) -> LazyTensor:
    """A tensor that is read as floats, whether or not it is quantized."""
    return dataclasses.replace(tensor, integers=None)


def quantized_tensors(tensors: Tensors, config: ModelConfig, wanted: Wanted) -> Tensors:
    """The tensors as a caller wants them: linear weights of the blocks quantized, or all as floats.

    Raises:
        InputError: groups do not divide a layer, weights are quantized with another number of bits, or the experts of a
            layer are not quantized alike.
    """
    if wanted is None:
        check_experts(tensors, config)
        return tensors
    if wanted == "none":
        return {name: floats(tensor) for name, tensor in tensors.items()}
    weights = {parameter.name: parameter for parameter in config.parameters() if is_quantizable(parameter)}
    check_groups(weights.values(), wanted)
    result = {}
    for name, tensor in tensors.items():
        canonical = name if name in weights else BASE_PREFIX + name
        if tensor.integers is not None and tensor.integers.scheme.bits != wanted.bits:
            raise InputError(
                f"quantization is int{wanted.bits}, and {name} has {tensor.integers.scheme.bits} bits in its file: "
                "load it as it is, or as floats by quantization='none'"
            )
        fresh = canonical in weights and tensor.integers is None and tensor.shape == weights[canonical].shape
        result[name] = _rounded(tensor, wanted) if fresh else tensor
    check_experts(result, config)
    return result


def check_experts(tensors: Tensors, config: ModelConfig) -> None:
    """Check that all experts of a layer are quantized alike, as those that have one variable have to be.

    Raises:
        InputError: they are not; every such layer is named.
    """
    found: dict[str, set[str]] = {}
    for parameter in config.parameters():
        tensor = tensors.get(parameter.name) or tensors.get(parameter.name.removeprefix(BASE_PREFIX))
        if parameter.stack is not None and tensor is not None:
            integers = tensor.integers
            kind = "floats" if integers is None else f"{integers.scheme}, scales in {integers.scale.name}"
            found.setdefault(parameter.stack[0], set()).add(kind)
    raise_problems(
        "the experts of a layer are quantized in several ways: load them by quantization='none'",
        (f"{stack}: {'; '.join(sorted(kinds))}" for stack, kinds in found.items() if len(kinds) > 1),
        InputError,
    )


def _rounded(tensor: LazyTensor, scheme: Quantization) -> LazyTensor:
    """A tensor of floats, quantized when it is read."""
    scale = scale_dtype(tensor.dtype)

    def read() -> QuantizedTensor:
        try:
            return quantize(tensor.exact_values(), scheme, scale)
        except InputError as error:
            raise CheckpointError(f"{tensor.name}: {error}") from error

    return _quantized(tensor, LazyIntegers(scheme, scale, read))


# -- writing ------------------------------------------------------------------------------------------------------


def parts(tensor: LazyTensor) -> Iterator[LazyTensor]:
    """The tensors that a file has for one: itself, or the parts of a quantized weight as `pack-quantized`."""
    if tensor.integers is None:
        yield tensor
        return
    integers, (out, width) = tensor.integers, tensor.shape
    scheme, groups, held = integers.scheme, integers.scheme.groups(width), list[QuantizedTensor]()

    def shared() -> QuantizedTensor:
        if not held:
            held.append(integers.read())
        return held[0]

    def packed_zeros() -> Array:
        zero = shared().zero
        return pack((np.zeros((out, groups), np.int8) if zero is None else zero).T, scheme.bits).T

    def last() -> Array:
        scale = shared().scale
        held.clear()
        return scale

    words, shape = (out, _words(width, scheme.bits)), np.array([out, width], np.int64)
    yield _stored(tensor, "packed", np.int32, words, lambda: pack(shared().values, scheme.bits))
    if not scheme.symmetric:
        yield _stored(tensor, "zero_point", np.int32, (_words(out, scheme.bits), groups), packed_zeros)
    yield _stored(tensor, "scale", integers.scale, (out, groups), last)
    yield _stored(tensor, "shape", np.int64, (2,), lambda: shape)


def _stored(tensor: LazyTensor, part: str, dtype: Any, shape: tuple[int, ...], read: Callable[[], Array]) -> LazyTensor:
    return LazyTensor(f"{tensor.name}_{part}", np.dtype(dtype), shape, read, tensor.file)


def quantization_config(tensors: Iterable[LazyTensor], linear: Iterable[str]) -> dict[str, Any] | None:
    """What config.json says of tensors that are stored by `parts`; None where none is quantized.

    Args:
        tensors: all of the model's.
        linear: the names, in the files, of all linear weights.
    """
    modules: dict[Quantization, list[str]] = {}
    for tensor in tensors:
        if tensor.integers is not None:
            modules.setdefault(tensor.integers.scheme, []).append(tensor.name.removesuffix(".weight"))
    if not modules:
        return None
    quantized = {module for names in modules.values() for module in names}
    groups = {
        f"group_{n}": {
            "targets": ["Linear"] if len(modules) == 1 else names,
            "format": "pack-quantized",  # here too: else Transformers may take it for another one
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "channel" if scheme.group_size is None else "group",
                "group_size": scheme.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for n, (scheme, names) in enumerate(modules.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({name.removesuffix(".weight") for name in linear} - quantized),
    }
