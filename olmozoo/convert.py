"""Models from one framework to another: live ones in memory, checkpoint folders on disk.

On disk every conversion goes tensor by tensor: one is read, turned and written before the next is touched, and a
bfloat16 value is never anything else on its way.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from olmozoo import hub
from olmozoo.checkpoint import (
    ALIGNMENT,
    EVERY_WEIGHT,
    GENERATION_CONFIG,
    PICKLED,
    Array,
    Behind,
    Checkpoint,
    Output,
    dtype_of,
    fail,
    match_tensors,
    new_file,
    parse_size,
    replacing_folder,
    same_bits,
    widest,
    write_config,
    write_weights,
)
from olmozoo.errors import CheckpointError, HubError, InputError
from olmozoo.families.base import ARCHITECTURES, BASE_PREFIX, HEAD_MODULES, Head, Kind, ModelConfig, Parameter
from olmozoo.formats import FLAX_WEIGHTS, KERAS, KERAS_WEIGHTS, ORBAX
from olmozoo.generation import GenerationConfig
from olmozoo.pickling import Made, Named, Persistent, pickled
from olmozoo.saved_model import write_saved_model

WINGS = {"pt": "", "tf": "TF", "flax": "Flax"}  # and how their classes' names begin
FLAX_LEAVES: dict[Kind, str] = {"linear": "kernel", "embedding": "embedding", "norm": "scale", "bias": "bias"}
FLAX_CHUNK = 1 << 30  # bytes; flax.serialization cuts larger arrays, since msgpack counts bytes in 32 bits
STORAGES = {  # what PyTorch calls the values of a dtype
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}


# -- live models ------------------------------------------------------------------------------------------------------


def convert(model: Any, to: str) -> Any:
    """A model of another framework with the same config, head, weights and generation settings, without the disk.

    The two share nothing that changes: training one leaves the other as it is. Each tensor keeps its dtype; a Keras
    model, which has one for all, takes the widest.

    Args:
        model: a model of `olmozoo.pt`, `olmozoo.tf` or `olmozoo.flax`, with parameters of its own.
        to: "pt", "tf" or "flax".

    Raises:
        InputError: `model` is none of olmozoo's, or has other parameters than its config says; or `to` is none of
            the wings.
        MissingBackendError: the framework is not installed.
        ConfigError: the model is in float64 and JAX has that switched off.
    """
    if to not in WINGS:
        raise InputError(f"to is {to!r}, expected one of {', '.join(WINGS)}")
    modules = {cls.__module__.split(".")[1] for cls in type(model).__mro__ if cls.__module__.startswith("olmozoo.")}
    wing = next(iter(modules & set(WINGS)), None)
    if wing is None or not isinstance(getattr(model, "config", None), ModelConfig):
        raise InputError(f"a {type(model).__name__} is no model of olmozoo.pt, olmozoo.tf or olmozoo.flax")
    config, head = model.config, model.head
    read = _live_reader(model, wing)
    table = [parameter for parameter in config.parameters(head) if parameter.tied_to is None]
    made = _empty_model(to, config, head, lambda: widest(read(parameter).dtype for parameter in table))
    made.generation_config = copy.deepcopy(model.generation_config)
    if to == "flax":
        from olmozoo.flax.base import to_leaf

        made.params = made._bind((parameter, to_leaf(parameter, read(parameter))) for parameter in table)
        return made
    for parameter in table:
        if to == "pt":
            from olmozoo.pt.base import to_tensor

            made._bind(parameter, to_tensor(np.array(read(parameter), order="C")))
        else:
            made._bind(parameter, read(parameter).astype(dtype_of(made.variable_dtype)))
    if to == "pt":
        made.tie_weights()
        made.train(getattr(model, "training", False) is True)
    return made


def _live_reader(model: Any, wing: str) -> Callable[[Parameter], Array]:
    if wing != "flax":
        model.check()
    if wing == "pt":
        from olmozoo.pt.base import to_array as pt_array

        return lambda parameter: pt_array(model._find(parameter))
    if wing == "tf":
        read: Callable[[Parameter], Array] = model._read
        return read
    from flax.traverse_util import flatten_dict

    from olmozoo.flax.base import to_array as flax_array

    leaves: Any = flatten_dict(model.checked(model.params))  # type: ignore[no-untyped-call]
    return lambda parameter: flax_array(parameter, leaves[model._path(parameter)])


def _empty_model(wing: str, config: ModelConfig, head: Head | None, dtype: Callable[[], np.dtype[Any]]) -> Any:
    """A model of that wing whose parameters are yet to be bound."""
    cls = _model_class(wing, config, head)
    if wing == "pt":
        return cls(config, seed=None)
    if wing == "tf":
        return cls(config, seed=None, dtype=dtype().name)
    return cls(config, dtype=dtype(), param_dtype=dtype(), _do_init=False)


def _model_class(wing: str, config: ModelConfig, head: Head | None) -> Any:
    from importlib import import_module

    return getattr(import_module(f"olmozoo.{wing}"), WINGS[wing] + config.name + ARCHITECTURES[head])


# -- checkpoint folders -----------------------------------------------------------------------------------------------


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **hub_options: Any,
) -> None:
    """Write a checkpoint in another format, with its config, generation settings and tokenizer.

    `target` is a folder whatever the format. It is made beside the old one and takes its place when it is whole, so
    that a crash, a full disk or a failed check leaves the old one as it was.

    Args:
        source: a folder, or a repository on the hub, with weights in any format that olmozoo reads.
        target: the folder to write; in an old one, other files are kept, old weights are not.
        to: a key of `FORMATS`.
        dtype: what floating-point values are cast to; default each tensor's own.
        max_shard_size: bytes a file, for the formats that have shards: safetensors, pt-bin and flax-msgpack.
        verify: read what was written, and compare every tensor bit for bit, before it takes its place.
        progress: called as progress(bytes done, bytes in all).
        **hub_options: as of `hub.resolve`.

    Raises:
        InputError: there is no such format.
        HubError: the repository or a file cannot be had.
        ConfigError: config.json is missing or bad.
        CheckpointError: the weights are broken, do not fit the config or do not fit `dtype`; or nothing could be
            written, and the message says why.
    """
    if to not in FORMATS:
        raise InputError(f"to is {to!r}, expected one of {', '.join(FORMATS)}")
    parse_size(max_shard_size)
    folder = hub.resolve(source, need="weights", **hub_options)
    config = ModelConfig.from_folder(folder)
    checkpoint = Checkpoint(folder)
    head = head_of(folder, config, checkpoint)
    wanted = dtype_of(dtype) if dtype is not None else checkpoint.dtype if to in ONE_DTYPE else None
    tensors = _tensors(checkpoint, config, head, wanted)
    job = _Job(config, head, _counted(tensors, progress), max_shard_size)
    with replacing_folder(target, EVERY_WEIGHT) as staging:
        write_config(staging, config, head, list(tensors.values()))
        _copy_settings(source, folder, staging, hub_options)
        FORMATS[to](job, staging)
        if verify:
            _verify(staging, config, head, tensors)


def head_of(folder: Path, config: ModelConfig, checkpoint: Checkpoint) -> Head | None:
    """The head of a checkpoint: by `architectures` in its config.json, else, or if that names none, by its tensors."""
    names = getattr(config, "architectures", None)
    names = [str(name) for name in names] if isinstance(names, list) else []
    for head in config.heads:
        if any(name.endswith(ARCHITECTURES[head]) for name in names):
            return head
    is_base, tied = any(name.endswith(ARCHITECTURES[None]) for name in names), config.tie_word_embeddings
    modules = {name.split(".")[0] for name in checkpoint.tensors}
    for head in config.heads:
        if HEAD_MODULES[head] in modules and not (head == "causal_lm" and is_base and tied):
            return head
    return "causal_lm" if tied and BASE_PREFIX[:-1] in modules and not is_base else None


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a writer of a format is given."""

    config: ModelConfig
    head: Head | None
    tensors: dict[Parameter, Output]  # under canonical names
    max_shard_size: int | str

    @property
    def keras_class(self) -> str:
        """The name of the Keras wing's class for this model."""
        return f"TF{self.config.name}{ARCHITECTURES[self.head]}"


def _tensors(
    checkpoint: Checkpoint, config: ModelConfig, head: Head | None, dtype: np.dtype[Any] | None
) -> dict[Parameter, Output]:
    sources, fresh = match_tensors(checkpoint, config, head, False)
    fail(f"{checkpoint.folder} lacks a head to convert", fresh.values())
    result = {}
    for parameter in config.parameters(head):
        if parameter.tied_to is None:
            info = checkpoint.tensors[sources[parameter.name]]
            read = _cast(parameter.name, info.read, info.dtype if dtype is None else dtype)
            name = parameter.name if head else parameter.name.removeprefix(BASE_PREFIX)
            result[parameter] = Output(name, dtype or info.dtype, parameter.shape, read)
    return result


def _cast(name: str, read: Callable[[], Array], dtype: np.dtype[Any]) -> Callable[[], Array]:
    def values() -> Array:
        array = read()
        if array.dtype == dtype:
            return array
        with np.errstate(over="ignore"):  # told below, with the tensor's name
            result = array.astype(dtype)
        if dtype.itemsize < array.dtype.itemsize or dtype == np.float16:
            lost = int(np.isinf(result).sum()) - int(np.isinf(array).sum())
            if lost:
                raise CheckpointError(f"{name} has {lost} value(s) too large for {dtype.name}: choose a wider dtype")
        return result

    return values


def _counted(tensors: dict[Parameter, Output], progress: Callable[[int, int], None] | None) -> dict[Parameter, Output]:
    """The tensors, telling `progress` when each has been read."""
    if progress is None:
        return tensors
    total, done = sum(output.nbytes for output in tensors.values()), 0

    def counted(output: Output) -> Output:
        def read() -> Array:
            nonlocal done
            array = output.read()
            done += output.nbytes
            progress(done, total)
            return array

        return dataclasses.replace(output, read=read)

    progress(0, total)
    return {parameter: counted(output) for parameter, output in tensors.items()}


def _copy_settings(source: Any, folder: Path, staging: Path, hub_options: dict[str, Any]) -> None:
    """Copy generation_config.json and the tokenizer's files, where there are any."""
    (staging / GENERATION_CONFIG).unlink(missing_ok=True)  # that of the folder's old model
    sources = [folder]
    if not Path(source).expanduser().is_dir():
        with contextlib.suppress(HubError):  # a repository need not have a tokenizer
            sources.append(hub.resolve(source, need="tokenizer", **hub_options))
    found = {name: content for place in sources for name, content in settings_files(place).items()}
    put_settings(found, staging)


def settings_files(folder: Path) -> dict[str, bytes]:
    """A folder's generation_config.json and its tokenizer's files: name -> content."""
    names = [name for name in (GENERATION_CONFIG, *hub.TOKENIZER_FILES) if (folder / name).is_file()]
    names += [f"{hub.CHAT_TEMPLATES}/{path.name}" for path in sorted((folder / hub.CHAT_TEMPLATES).glob("*.jinja"))]
    return {name: (folder / name).read_bytes() for name in names}


def put_settings(files: dict[str, bytes], folder: Path) -> None:
    """Write such files as new ones. Where a tokenizer is among them, nothing of an older one stays beside it."""
    if any(name != GENERATION_CONFIG for name in files):
        shutil.rmtree(folder / hub.CHAT_TEMPLATES, ignore_errors=True)
        for name in hub.TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _verify(staging: Path, config: ModelConfig, head: Head | None, tensors: dict[Parameter, Output]) -> None:
    written = _tensors(Checkpoint(staging), config, head, None)
    problems = [
        f"{output.name} differs"
        for parameter, output in tensors.items()
        if not same_bits(written[parameter].read(), output.read())
    ]
    fail("what was written is not what was read", problems)


def _turned(parameter: Parameter, output: Output, name: str) -> Output:
    """The tensor as Keras and Flax have it, under another name: linear weights are (in, out)."""
    if parameter.kind != "linear":
        return dataclasses.replace(output, name=name)
    return dataclasses.replace(output, name=name, shape=output.shape[::-1], transposed=True)


# -- safetensors and PyTorch ------------------------------------------------------------------------------------------


def _to_safetensors(job: _Job, staging: Path) -> None:
    write_weights(staging, list(job.tensors.values()), job.max_shard_size)


def _to_pickled(job: _Job, staging: Path) -> None:
    write_weights(staging, list(job.tensors.values()), job.max_shard_size, PICKLED, write_pickled)


def write_pickled(file: Path, outputs: list[Output], *, single: bool = False) -> None:
    """Write a state dict as `torch.save` does, without PyTorch and with one tensor in memory at a time.

    It is a zip of stored entries: a pickle, and the values of each tensor. `torch.load(file, weights_only=True)` loads
    it, also with `mmap=True`.

    Args:
        file: a new file.
        outputs: the tensors.
        single: write the one tensor that there is, and not a dict.
    """
    with (
        new_file(file) as stream,
        contextlib.closing(Behind(stream)) as behind,
        zipfile.ZipFile(behind, "w") as archive,
    ):
        tensors = {output.name: _rebuilt(number, output) for number, output in enumerate(outputs)}
        content = pickled(tensors[outputs[0].name] if single else tensors)
        # A ZipInfo of our own, and not a name alone, has a fixed date: the same weights give the same bytes.
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), content)
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        for number, output in enumerate(outputs):
            entry = zipfile.ZipInfo(f"archive/data/{number}")
            header = 30 + len(entry.filename) + 20 + 4  # the entry's own, its sizes in 64 bits, the padding's head
            padding = -(behind.tell() + header) % ALIGNMENT
            entry.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)  # as torch.save aligns tensors
            with archive.open(entry, "w", force_zip64=True) as values:
                output.write(values)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def _rebuilt(number: int, output: Output) -> Made:
    """A tensor whose storage lies in the entry of that number."""
    strides = tuple(math.prod(output.shape[i + 1 :]) for i in range(len(output.shape)))
    kind = Named("torch", STORAGES[output.dtype.name])
    storage = Persistent(("storage", kind, str(number), "cpu", math.prod(output.shape)))
    hooks = Made(Named("collections", "OrderedDict"), ())
    return Made(Named("torch._utils", "_rebuild_tensor_v2"), (storage, 0, output.shape, strides, False, hooks))


# -- Flax -------------------------------------------------------------------------------------------------------------


def _flax_tensors(job: _Job) -> list[Output]:
    """The tensors under their paths in a Flax wing's tree, joined by slashes."""
    return [
        _turned(p, output, "/".join([*output.name.split(".")[:-1], FLAX_LEAVES[p.kind]]))
        for p, output in job.tensors.items()
    ]


def _to_msgpack(job: _Job, staging: Path) -> None:
    write_weights(staging, _flax_tensors(job), job.max_shard_size, FLAX_WEIGHTS, write_msgpack)


def write_msgpack(file: Path, outputs: list[Output]) -> None:
    """Write arrays into a new file as flax.serialization does, one in memory at a time.

    A single file holds nested maps; a shard, as Transformers 4 made them, one flat map.
    """
    tree = {output.name: output for output in outputs}
    with new_file(file) as stream:
        _pack(stream, _nested(outputs, lambda output: output) if file.name == FLAX_WEIGHTS else tree)


def _nested(outputs: list[Output], leaf: Callable[[Output], Any]) -> dict[str, Any]:
    """A tree of maps by the steps of the tensors' names, with something at each leaf."""
    tree: dict[str, Any] = {}
    for output in outputs:
        *path, last = output.name.split("/")
        place = tree
        for step in path:
            place = place.setdefault(step, {})
        place[last] = leaf(output)
    return tree


def _pack(stream: IO[bytes], value: Any) -> None:
    if isinstance(value, Output):
        _pack_output(stream, value)
    elif isinstance(value, dict):
        stream.write(_head(len(value), 0x80, 16, {0xDE: 2, 0xDF: 4}))
        for key, item in value.items():
            _pack(stream, key)
            _pack(stream, item)
    elif value is True:
        stream.write(b"\xc3")
    elif isinstance(value, int):
        stream.write(_head(value, 0, 128, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}))
    else:
        stream.write(_text(value))


def _head(size: int, fixed: int, below: int, wide: dict[int, int]) -> bytes:
    """The first bytes of a value of msgpack: its kind with a small size, or its kind and then the size."""
    if size < below:
        return bytes([fixed + size])
    code, width = next((code, width) for code, width in wide.items() if size < 1 << 8 * width)
    return bytes([code]) + size.to_bytes(width, "big")


def _text(text: str) -> bytes:
    data = text.encode()
    return _head(len(data), 0xA0, 32, {0xD9: 1, 0xDA: 2, 0xDB: 4}) + data


def _pack_output(stream: IO[bytes], output: Output) -> None:
    left, chunks = output.nbytes, 0
    if left <= FLAX_CHUNK:
        _pack_head(stream, output.shape, output.dtype, left)
        output.write(stream)
        return
    stream.write(_head(3, 0x80, 16, {}))
    _pack(stream, "__msgpack_chunked_array__")
    _pack(stream, True)
    _pack(stream, "shape")
    _pack(stream, {str(axis): size for axis, size in enumerate(output.shape)})
    _pack(stream, "chunks")
    stream.write(_head(-(-left // FLAX_CHUNK), 0x80, 16, {0xDE: 2}))
    room = 0
    for piece in output.pieces():
        while len(piece):
            if room == 0:
                room = min(left, FLAX_CHUNK)
                _pack(stream, str(chunks))
                _pack_head(stream, (room // output.dtype.itemsize,), output.dtype, room)
                chunks += 1
            written, piece = piece[:room], piece[room:]
            stream.write(written)
            room, left = room - len(written), left - len(written)


def _pack_head(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], nbytes: int) -> None:
    """All of an array but its bytes: an extension of type 1, with shape and dtype."""
    content = bytes([0x93, 0x90 + len(shape)])
    content += b"".join(_head(size, 0, 128, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}) for size in shape) + _text(dtype.name)
    content += _head(nbytes, 0, 0, {0xC4: 1, 0xC5: 2, 0xC6: 4})
    stream.write(_head(len(content) + nbytes, 0, 0, {0xC7: 1, 0xC8: 2, 0xC9: 4}) + b"\x01" + content)


def _to_orbax(job: _Job, staging: Path) -> None:
    """Orbax writes the tree with one value for each array, in folders, while the arrays are written that then go there.

    Each array is one piece, whatever its size.
    """
    for module in ("orbax", "tensorstore"):
        if find_spec(module) is None:
            raise CheckpointError("writing orbax needs orbax-checkpoint: pip install 'olmozoo[flax]'")
    tensors, arrays = _flax_tensors(job), staging / f".{ORBAX}"
    with ThreadPoolExecutor(1) as beside:
        tree = beside.submit(_save_tree, (staging / ORBAX).absolute(), tensors)
        arrays.mkdir()
        for output in tensors:
            with new_file(arrays / output.name.replace("/", ".")) as stream:
                output.write(stream)
        places = tree.result()
    for output, place in zip(tensors, places, strict=True):
        (arrays / place.name).rename(place / ".".join("0" for _ in output.shape))
    arrays.rmdir()


def _save_tree(folder: Path, tensors: list[Output]) -> list[Path]:
    """Save a tree with Orbax, with no piece of an array, and return the folders in which those belong."""
    try:
        import orbax.checkpoint as ocp
        import tensorstore

        with ocp.Checkpointer(ocp.StandardCheckpointHandler(use_ocdbt=False)) as checkpointer:
            tree = _nested(tensors, lambda output: np.zeros(1, output.dtype))
            checkpointer.save(folder, args=ocp.args.StandardSave(tree))
        places = [folder / output.name.replace("/", ".") for output in tensors]
        for output, place in zip(tensors, places, strict=True):
            shutil.rmtree(place)
            metadata = {"chunks": output.shape, "compressor": None}
            store = {"driver": "file", "path": f"{place}/"}
            spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
            tensorstore.open(spec, create=True, dtype=output.dtype, shape=output.shape).result()
    except Exception as error:  # of many kinds
        raise CheckpointError(f"Orbax could not write: {error}") from error
    return places


# -- Keras ------------------------------------------------------------------------------------------------------------


def keras_steps(config: ModelConfig, name: str) -> Iterator[tuple[str, str]]:
    """The way to a parameter's layer as Keras saves it: each step's place in the file, and its layer's name.

    Keras names a place by the attribute that leads there, but what it finds in a list by its class. The list `layers`
    that every model has comes before most attributes, in alphabetical order, and takes what is in it.
    """
    parts = iter(name.split(".")[:-1])
    for part in parts:
        if part == "model":
            yield f"layers/{_snake_case(f'TF{config.name}Model')}", part
        elif part in HEAD_MODULES.values():
            yield "layers/dense", part
        elif part == "layers":
            number = next(parts)
            yield f"blocks/{_snake_case(f'{config.name}Block')}" + (f"_{number}" if number != "0" else ""), number
        elif part == "norm":
            yield "layers/rms_norm", part
        else:
            yield part, part


def _snake_case(name: str) -> str:
    """The name of a class as Keras spells it in files."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def _skeleton(file: Path, job: _Job) -> list[tuple[int, Output]]:
    """Make a Keras weights file with holes for the tensors, and return them with the bytes at which they belong.

    Nothing is written twice, and no value passes through the HDF5 library.
    """
    try:
        import h5py
    except ImportError as error:
        raise CheckpointError("writing Keras weights needs h5py: pip install h5py, or 'olmozoo[tf]'") from error
    plain = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plain.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plain.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    places = []
    with h5py.File(file, "w") as h5:
        h5.require_group("vars").attrs["name"] = _snake_case(job.keras_class)
        for parameter, output in job.tensors.items():
            group = h5
            for place, name in keras_steps(job.config, output.name):
                group = group.require_group(place)
                group.require_group("vars").attrs["name"] = name
            turned = _turned(parameter, output, output.name)
            bfloat16 = output.dtype.name == "bfloat16"  # HDF5 has no such type
            kind = h5py.h5t.py_create(np.dtype("V2") if bfloat16 else output.dtype)
            index = b"1" if parameter.kind == "bias" else b"0"
            dataset = h5py.h5d.create(group["vars"].id, index, kind, h5py.h5s.create_simple(turned.shape), dcpl=plain)
            if bfloat16:
                h5py.Dataset(dataset).attrs["dtype"] = "bfloat16"
            places.append((dataset.get_offset(), turned))
    return sorted(places, key=lambda place: place[0])


def _to_keras_weights(job: _Job, staging: Path) -> None:
    with new_file(staging / KERAS_WEIGHTS) as stream:
        _fill(stream, job, staging)


def _fill(stream: IO[bytes], job: _Job, staging: Path) -> None:
    """Write a Keras weights file from its beginning to its end: systems are slow in writing into holes."""
    skeleton = staging / f".{KERAS_WEIGHTS}"
    places = _skeleton(skeleton, job)
    with skeleton.open("rb") as rest:
        for offset, output in places:
            stream.write(rest.read(offset - rest.tell()))
            output.write(stream)
            rest.seek(output.nbytes, os.SEEK_CUR)
        stream.write(rest.read())
    skeleton.unlink()


def _to_keras(job: _Job, staging: Path) -> None:
    """The archive that `model.save("model.keras")` writes, with no model made."""
    dtype = next(iter(job.tensors.values())).dtype.name
    config = {
        "module": f"olmozoo.tf.{job.config.model_type}",
        "class_name": job.keras_class,
        "config": {
            "config": job.config.to_dict(),
            "generation_config": GenerationConfig.from_folder(staging, job.config).to_dict(),
            "name": _snake_case(job.keras_class),
            "dtype": {
                "module": "keras",
                "class_name": "DTypePolicy",
                "config": {"name": dtype},
                "registered_name": None,
            },
        },
        "registered_name": f"olmozoo>{job.keras_class}",
        "compile_config": {},
    }
    with new_file(staging / KERAS) as stream, zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(zipfile.ZipInfo("metadata.json"), json.dumps({"keras_version": "3"}))
        archive.writestr(zipfile.ZipInfo("config.json"), json.dumps(config))
        with archive.open(zipfile.ZipInfo(KERAS_WEIGHTS), "w", force_zip64=True) as entry:
            _fill(entry, job, staging)


def _to_saved_model(job: _Job, staging: Path) -> None:
    write_saved_model(staging, job.keras_class, [_turned(p, output, output.name) for p, output in job.tensors.items()])


FORMATS: dict[str, Callable[[_Job, Path], None]] = {
    "safetensors": _to_safetensors,
    "pt-bin": _to_pickled,
    "keras": _to_keras,
    "keras-weights": _to_keras_weights,
    "savedmodel": _to_saved_model,
    "flax-msgpack": _to_msgpack,
    "orbax": _to_orbax,
}
ONE_DTYPE = ("keras", "keras-weights", "savedmodel")  # a Keras model has one dtype for all its variables
