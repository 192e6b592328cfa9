"""Making, loading and saving Flax models: canonical parameters bound to the leaves of a tree."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from olmozoo.checkpoint.adapters import config_alone, locate, open_merged
from olmozoo.checkpoint.matching import check_floats, find_weights, load_weights
from olmozoo.checkpoint.reader import OpenCheckpoint
from olmozoo.checkpoint.tensors import LazyIntegers, aligned_copy, check_shapes, dtype_of
from olmozoo.checkpoint.writer import save_checkpoint, save_together
from olmozoo.errors import ConfigError, InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Kind, Parameter
from olmozoo.flax.buckets import SETTINGS, cut_output, is_traced, pad_call
from olmozoo.flax.cache import KVCache
from olmozoo.flax.layers import at_least_float32
from olmozoo.flax.quantization import from_leaves, shapes_in_floats, to_leaves
from olmozoo.flax.sharding import agree, check_mesh, constrain, from_slices, parameter_shardings, to_host
from olmozoo.generation.config import GenerationConfig
from olmozoo.modeling import ModelMixin, given_dtype, given_quantization, resized_config, split_options
from olmozoo.outputs import OUTPUTS
from olmozoo.quantization import GROUP_SIZE, QuantizedTensor, as_floats

DROPOUTS = ("dropout", "attention_dropout", "layerdrop")  # what a config may have that draws random numbers in training
COMPILED = ("_forward", "_read_prompt", "_read_answer", "trace_count")  # attributes that are not copied
LEAVES: dict[Kind, str] = {"linear": "kernel", "embedding": "embedding", "norm": "scale", "bias": "bias"}

for output_class in OUTPUTS:
    jax.tree_util.register_dataclass(output_class)


class PreTrainedModel(ModelMixin):
    """Base of every model here: a config, a Flax module and, in most uses, its parameters.

    Args:
        config: the model's config.
        input_shape: ignored; it is an argument of Transformers' Flax classes.
        seed: initial weights are drawn from it, bit for bit the same as in the other frameworks.
        dtype: what is computed in.
        _do_init: False makes no parameters: pass `params` to each call, as `init_weights` or a checkpoint gives them.
        param_dtype: of the parameters; default `dtype`, but at least float32.
        mesh: the devices that parameters and computation are split over; see `olmozoo.flax.sharding`. Default one.

    Attributes:
        config, dtype, param_dtype, mesh: as above.
        module: the Flax module, whose `apply({"params": params}, ...)` is the model.
        generation_config: the defaults of `generate`.

    Raises:
        ConfigError: the config is of another family, or float64 is asked for and JAX has it switched off.
        InputError: the mesh does not fit the model, or has an axis that is not of type Auto.
    """

    wing = "flax"

    def __init__(
        self,
        config: ModelConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        *,
        param_dtype: Any = None,
        mesh: Mesh | None = None,
    ) -> None:
        config = self.check_config(config)
        self.config = config
        self.mesh = mesh
        if mesh is not None:
            self.shardings()  # checks it
        self.dtype = usable_dtype(dtype)
        self.param_dtype = at_least_float32(self.dtype) if param_dtype is None else usable_dtype(param_dtype)
        self.generation_config = GenerationConfig.from_model(config)
        self.module = self.make_module()
        self._params: dict[str, Any] | None = self.init_weights(seed) if _do_init else None

    def make_module(self) -> nn.Module:
        """The Flax module that `self.config` asks for."""
        raise NotImplementedError

    # -- parameters -----------------------------------------------------------------------------------------------

    @property
    def params(self) -> dict[str, Any]:
        """The model's own parameters.

        Setting them checks their names and shapes against the parameter table.

        Raises:
            InputError: there are none, or those given do not fit; every problem is named.
        """
        if self._params is None:
            raise InputError(f"this {type(self).__name__} was made with _do_init=False: pass or set `params`")
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        self._params = self.check_parameters(params)

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """The parameters as `jax.ShapeDtypeStruct`s, in `param_dtype`."""
        return self._tree((parameter, self._struct(parameter)) for parameter in self._parameter_table())

    def init_weights(self, seed: int = 0) -> dict[str, Any]:
        """Initial parameters in `param_dtype`, bit for bit the same as in the other frameworks.

        Under `jax.eval_shape` and while jit traces, nothing is drawn or allocated. On a mesh, each parameter is drawn
        on the host, and each device gets its part.
        """
        traced = (seed,) if isinstance(seed, jax.Array) else ()
        if self.mesh is not None and not traced and not isinstance(jnp.zeros(()), jax.core.Tracer):
            return self._split((p, partial(p.initial, seed, self.param_dtype)) for p in self._parameter_table())

        def draw(parameter: Parameter) -> jax.Array:
            def initial(*seeds: Any) -> np.ndarray:
                return oriented(parameter, parameter.initial(int(*seeds or (seed,)), self.param_dtype))

            return jax.pure_callback(initial, self._struct(parameter), *traced)

        return self._tree((parameter, draw(parameter)) for parameter in self._parameter_table())

    def tree(self, params: Any = None) -> Any:
        """The bare tree of `params`, which may be `{"params": tree}`; the model's own by default."""
        if params is None:
            return self.params
        return params.get("params", params)

    def check_parameters(self, params: Any = None) -> dict[str, Any]:
        """`tree(params)` as plain dicts, once its names and shapes are those of the parameter table.

        Raises:
            InputError: they are not; every problem is named.
        """
        params = unfreeze(self.tree(params))
        found = {"/".join(path): shape for path, shape in shapes_in_floats(flatten_dict(params))}
        expected = {"/".join(path): leaf.shape for path, leaf in flatten_dict(self.params_shape_tree).items()}
        check_shapes(f"params do not fit {type(self).__name__}", found, expected)
        return params

    def bind_parameters(self, items: Iterable[tuple[Parameter, np.ndarray | QuantizedTensor]]) -> None:
        """Set `params` to copies of values, which keep their dtype.

        Args:
            items: all parameters of the table with their values, as they are in a checkpoint; quantized weights
                become the leaves of `olmozoo.flax.quantization`.

        Raises:
            InputError: some are missing or have another shape; every problem is named.
        """
        self.params = self._tree((parameter, from_numpy(parameter, array)) for parameter, array in items)

    def read_parameters(self, params: Any = None) -> Iterator[tuple[Parameter, np.ndarray | QuantizedTensor]]:
        """The parameters of the table, without tied ones, with their values as they are in a checkpoint.

        Args:
            params: default the model's own.

        Raises:
            InputError: there are no parameters, or they do not fit; every problem is named.
        """
        leaves = flatten_dict(self.check_parameters(params))
        for parameter in self._parameter_table():
            path = self._leaf(parameter)
            if path in leaves:
                yield parameter, to_numpy(parameter, leaves[path])
            else:
                yield parameter, from_leaves(leaves, path, _expert(parameter))

    def _leaf(self, parameter: Parameter) -> tuple[str, ...]:
        """The path of a parameter's leaf in the tree: the canonical one, its last name changed to the one of Flax."""
        return (*self._variable_path(parameter)[:-1], LEAVES[parameter.kind])

    def _integers(self, leaves: Mapping[tuple[str, ...], Any], parameter: Parameter) -> LazyIntegers:
        """The integers of a quantized weight."""
        read = partial(from_leaves, leaves, self._leaf(parameter), _expert(parameter))
        tensor = read()
        return LazyIntegers(tensor.scheme, tensor.scale.dtype, read)

    def _struct(self, parameter: Parameter) -> jax.ShapeDtypeStruct:
        shape = parameter.shape[::-1] if parameter.kind == "linear" else parameter.shape
        return jax.ShapeDtypeStruct(shape, self.param_dtype)

    def shardings(self, mesh: Mesh | None = None) -> dict[str, Any]:
        """The `NamedSharding` of each parameter, as a tree like `params`.

        Args:
            mesh: default the model's own.

        Raises:
            InputError: there is no mesh, or it does not fit the model; every problem is named.
        """
        mesh = self.mesh if mesh is None else mesh
        if mesh is None:
            raise InputError("the model has no mesh: pass one, as olmozoo.flax.sharding.make_mesh makes")
        found = parameter_shardings(self.config, self.head, check_mesh(mesh))
        return unflatten_dict({self._leaf(parameter): found[parameter.name] for parameter in self._parameter_table()})

    def _split(self, items: Iterable[tuple[Parameter, Any]]) -> dict[str, Any]:
        """A tree on the mesh, of parameters with functions that return their values; a layer's experts in order."""
        assert self.mesh is not None
        shardings = parameter_shardings(self.config, self.head, self.mesh)

        def place(group: list[tuple[Parameter, Any]]) -> jax.Array:
            """One variable: of a parameter, or of all experts of a layer."""
            parameter = group[0][0]
            values = [oriented(each, read()) for each, read in group]

            def cut(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
                return aligned_copy(array[index], False).astype(self.param_dtype, copy=False)

            def part(index: tuple[slice, ...]) -> np.ndarray:
                if parameter.stack is None:
                    return cut(values[0], index)
                return np.stack([cut(expert, index[1:]) for expert in values[index[0]]])

            shape = self._struct(parameter).shape
            stack = () if parameter.stack is None else (len(values),)
            return from_slices((*stack, *shape), self.param_dtype, shardings[parameter.name], part)

        groups = (list(group) for _, group in groupby(items, lambda item: self._leaf(item[0])))
        return unflatten_dict({self._leaf(group[0][0]): place(group) for group in groups})

    def _tree(self, leaves: Iterable[tuple[Parameter, Any]]) -> dict[str, Any]:
        """The tree of values as Flax has them; experts' are stacked."""
        tree: dict[tuple[str, ...], Any] = {}
        experts: dict[tuple[str, ...], dict[int, Any]] = {}
        for parameter, leaf in leaves:
            path = self._leaf(parameter)
            if parameter.stack is not None:
                experts.setdefault(path, {})[parameter.stack[1]] = leaf
            elif isinstance(leaf, dict):
                tree |= {(*path[:-1], name): part for name, part in leaf.items()}
            else:
                tree[path] = leaf
        for path in list(experts):
            found = [leaf for _, leaf in sorted(experts.pop(path).items())]
            if isinstance(found[0], dict):
                tree |= {(*path[:-1], name): stacked([leaf[name] for leaf in found]) for name in found[0]}
            else:
                tree[path] = stacked(found)
        return unflatten_dict(tree)

    # -- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        dtype: Any = None,
        ignore_mismatched_sizes: bool = False,
        _do_init: bool = True,
        adapter: str | os.PathLike[str] | None = None,
        mesh: Mesh | None = None,
        quantization: str | None = None,
        group_size: int = GROUP_SIZE,
        **options: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """A model with the weights of a checkpoint.

        The file is mapped, and each tensor is read and copied once, so that the memory of one tensor is all that it
        takes beyond the parameters themselves.

        Args:
            path_or_repo: a folder, or a repository on the hub.
            dtype: of the parameters and of what is computed; default the checkpoint's own.
            ignore_mismatched_sizes: start tensors of a wrong shape anew, with a warning, rather than refuse.
            _do_init: False returns `(model, params)`, the model without parameters of its own.
            adapter: a folder or a repository with a LoRA adapter of PEFT, which is merged into the weights; default one
                that is in the model's folder. See `olmozoo.checkpoint.adapters`.
            mesh: the devices that the model is split over; each process reads the parts of its own devices alone. See
                `olmozoo.flax.sharding`.
            quantization: `int8` or `int4` makes the linear weights of the blocks integers (see `olmozoo.quantization`);
                `none` reads a quantized folder as floats; default, as the folder has them. Transformers'
                `load_in_8bit`, `load_in_4bit` and a `quantization_config` of bitsandbytes or torchao mean the same.
            group_size: of int4, the values along a row that share a scale.
            **options: `revision`, `subfolder`, `token`, `cache_dir` and `local_files_only` say where on the hub to look
                (see `olmozoo.hub.resolve`). `config` is used instead of config.json. Keywords of Transformers are taken
                where they mean the same here (`torch_dtype`, `attn_implementation`, `low_cpu_mem_usage`, ...). All
                others are fields of the config to change.

        Raises:
            HubError: the repository or one of its files cannot be downloaded and is not in the cache.
            ConfigError: the config is of another family or has a bad value, or the dtype is float64 and JAX has it
                switched off.
            InputError: the mesh does not fit the model; every problem is named, before anything is downloaded but the
                config.
            CheckpointError: the weights are broken or do not fit the config; every problem is named.
            InputError: there is no such quantization, or its groups do not divide a layer, which is named.
        """
        dtype = given_dtype(dtype, options)
        how = given_quantization(quantization, group_size, options)
        hub, overrides = split_options(options)
        if mesh is not None:
            config = config_alone(path_or_repo, cls.config_class, adapter=adapter, hub=hub, **overrides)
            parameter_shardings(config, cls.head, mesh)
        found = locate(path_or_repo, need="weights", adapter=adapter, **hub)
        source = open_merged(found, cls.config_class, quantization=how, **overrides)
        return cls._from_checkpoint(
            source, dtype=dtype, ignore_mismatched_sizes=ignore_mismatched_sizes, _do_init=_do_init, mesh=mesh
        )

    @classmethod
    def _from_checkpoint(
        cls,
        source: OpenCheckpoint,
        *,
        dtype: Any = None,
        ignore_mismatched_sizes: bool = False,
        _do_init: bool = True,
        mesh: Mesh | None = None,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """`from_pretrained` of a folder that is open."""
        config, checkpoint = source.config, source.checkpoint
        wanted = usable_dtype(checkpoint.dtype if dtype in (None, "auto") else dtype)
        model = cls(config, dtype=wanted, param_dtype=wanted, _do_init=False, mesh=mesh)
        model.generation_config = GenerationConfig.from_contents(source.generation, config)
        settings: Any = {"dtype": wanted, "ignore_mismatched_sizes": ignore_mismatched_sizes}
        if mesh is not None:
            check_floats(checkpoint)
            params = model._split(find_weights(checkpoint, config, cls.head, **settings))
            if not _do_init:
                return model, params
            model.params = params
            return model
        weights = load_weights(checkpoint, config, cls.head, **settings)
        if not _do_init:
            return model, model._tree((parameter, from_numpy(parameter, array)) for parameter, array in weights)
        model.bind_parameters(weights)
        return model

    def save_pretrained(
        self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB", *, params: Any = None
    ) -> None:
        """Write config.json, generation_config.json and safetensors into `folder`, in one step.

        Args:
            folder: made if need be; in an old one, other files are kept.
            max_shard_size: bytes a file, as a number or as text such as "5GB".
            params: default the model's own.

        Raises:
            InputError: there are no parameters, or they do not fit.
            CheckpointError: the folder could not be written and is as it was before.

        With several processes, all of them call this: parameters are gathered one by one, and process 0 writes.
        """
        leaves = flatten_dict(self.check_parameters(params))

        def in_floats(parameter: Parameter) -> bool:
            return self._leaf(parameter) in leaves

        save = partial(
            save_checkpoint,
            folder,
            self.config,
            self.head,
            dtype=lambda parameter: leaves[self._leaf(parameter)].dtype if in_floats(parameter) else self.param_dtype,
            integers=lambda parameter: None if in_floats(parameter) else self._integers(leaves, parameter),
            generation_config=self.generation_config.to_dict(),
            max_shard_size=max_shard_size,
        )

        def read(parameter: Parameter) -> np.ndarray:
            return to_numpy(parameter, leaves[self._leaf(parameter)])

        if jax.process_count() == 1:
            save(read=read)
        else:
            save_together(save, self.config, self.head, read, jax.process_index() == 0, agree)

    # -- calling --------------------------------------------------------------------------------------------------

    def apply(self, params: Any, dropout_rng: Any, return_dict: bool | None, **arguments: Any) -> Any:
        """The module's answer to `arguments`, with the settings among them that are None resolved."""
        arguments["use_cache"] = self.wants_cache(arguments["use_cache"], not arguments["deterministic"])
        for name in ("output_attentions", "output_hidden_states"):
            arguments[name] = self.setting(name, arguments[name], False)
        if "output_router_logits" in getattr(self, "base_class", type(self)).family_inputs:
            wanted = self.setting("output_router_logits", arguments.get("output_router_logits"), False)
            arguments["output_router_logits"] = wanted
        for name, value in arguments.items():
            if isinstance(value, list) and name != "past_key_values":
                arguments[name] = np.asarray(value)
        if dropout_rng is None and not arguments["deterministic"]:
            for name in DROPOUTS:
                if getattr(self.config, name, 0):
                    raise InputError(f"{name} is {getattr(self.config, name)}: pass `dropout_rng` in training")
        params = self.tree(params)
        padded = None if is_traced(params, arguments) else pad_call(self.config, self.head, arguments)
        if padded is None:
            rngs = None if dropout_rng is None else {"dropout": dropout_rng}
            output = self.module.apply({"params": params}, rngs=rngs, **arguments)
        else:
            arrays, length = padded
            settings = {name: arguments[name] for name in SETTINGS if name in arguments}
            output = self._forward(params, arrays, tuple(settings.items()), self.config.to_json())
            output = cut_output(output, self.head, arrays, length)
        return output if self.setting("return_dict", return_dict, True) else output.to_tuple()

    @cached_property
    def _forward(self) -> Any:
        """The module as a compiled function of parameters, arrays, settings, and the config, which may change."""

        def forward(params: Any, arrays: dict[str, Any], settings: tuple[tuple[str, Any], ...], config: str) -> Any:
            return self.module.apply({"params": params}, **arrays, **dict(settings))

        return jax.jit(forward, static_argnums=(2, 3))

    def __getstate__(self) -> dict[str, Any]:
        """All but the compiled functions, which belong to this object and process."""
        return {name: value for name, value in self.__dict__.items() if name not in COMPILED}

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` positions; dtype by default the model's."""
        return self._on_mesh(
            KVCache.create(self.config, batch_size, max_length, self.dtype if dtype is None else dtype)
        )

    def _on_mesh(self, cache: KVCache) -> KVCache:
        """The cache with its heads split as the parameters are."""
        keys, values = (tuple(constrain(x, self.mesh, x.shape[1]) for x in side) for side in (cache.keys, cache.values))
        return cache.replace(keys=keys, values=values)

    # -- what users of Flax models ask for ------------------------------------------------------------------------

    def num_parameters(self, exclude_embeddings: bool = False) -> int:
        """The number of values in parameters; tied ones count once."""
        left_out = self.config.embedding.name if exclude_embeddings else None
        return sum(parameter.size for parameter in self._parameter_table() if parameter.name != left_out)

    def get_input_embeddings(self) -> Any:
        """The token embedding among the model's own parameters, (vocab, width)."""
        return flatten_dict(self.params)[self._leaf(self.config.embedding)]

    def set_input_embeddings(self, embedding: Any) -> None:
        """Replace the token embedding (and with it a tied head) in the model's own parameters.

        Raises:
            InputError: it has another shape, or there are no parameters.
        """
        self.params = unflatten_dict(flatten_dict(self.params) | {self._leaf(self.config.embedding): embedding})

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> jax.Array:
        """Change the number of rows of the token embedding and of the language-model head; the config follows.

        New rows get initial values, the same in every framework. What was compiled for the old module does not follow.

        Args:
            new_num_tokens: rows; default as many as there are.
            pad_to_multiple_of: round that up to a multiple.

        Returns:
            The new token embedding, as it is in `params`.

        Raises:
            InputError: the model has no parameters of its own.
            ConfigError: there is no such number of rows.
        """
        config, leaves = resized_config(self.config, new_num_tokens, pad_to_multiple_of), flatten_dict(self.params)
        rows = config.vocab_size
        for parameter in config.parameters(self.head):
            if "vocab" in parameter.axes and parameter.tied_to is None:
                old = leaves[self._leaf(parameter)]
                axis = 1 if parameter.kind == "linear" else 0
                kept = min(rows, old.shape[axis])
                added = oriented(parameter, parameter.initial(0, old.dtype)[kept:])
                leaves[self._leaf(parameter)] = jnp.concatenate([old.take(np.arange(kept), axis), added], axis)
        self.config = config
        self.module = self.module.clone(config=config)
        self.params = unflatten_dict(leaves)
        return self.get_input_embeddings()

    def gradient_checkpointing_enable(self) -> None:
        """Recompute blocks in the backward pass rather than keep what is inside them."""
        self.module = self.module.clone(gradient_checkpointing=True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what is inside blocks for the backward pass."""
        self.module = self.module.clone(gradient_checkpointing=False)

    def to_bf16(self, params: Any, mask: Any = None) -> Any:
        """`params` in bfloat16; with `mask`, a tree of bools of the same form, only where it is True."""
        return cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Any, mask: Any = None) -> Any:
        """`params` in float16; with `mask`, a tree of bools of the same form, only where it is True."""
        return cast(params, jnp.float16, mask)

    def to_fp32(self, params: Any, mask: Any = None) -> Any:
        """`params` in float32; with `mask`, a tree of bools of the same form, only where it is True."""
        return cast(params, jnp.float32, mask)


def canonical_state(model: PreTrainedModel, params: Any = None) -> dict[str, np.ndarray]:
    """The values of a model by canonical name, as they are in a checkpoint; tied heads are left out.

    Quantized weights are dequantized.

    Args:
        model: the model.
        params: a tree of its parameters, or of gradients; default its own.

    Raises:
        InputError: there are no parameters, or they do not fit; every problem is named.
    """
    dtype = model.param_dtype
    return {parameter.name: as_floats(array, dtype) for parameter, array in model.read_parameters(params)}


def usable_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of that name.

    Raises:
        ConfigError: it is float64, which JAX would silently make float32 as long as it is not switched on.
    """
    dtype = dtype_of(dtype)
    if dtype == np.float64 and not jax.config.jax_enable_x64:
        raise ConfigError(
            "dtype is float64, which JAX has switched off: call jax.config.update('jax_enable_x64', True) first, "
            "or pass another dtype"
        )
    return dtype


def oriented(parameter: Parameter, array: np.ndarray) -> np.ndarray:
    """A view of the array as Flax has it, or back: linear weights are (in, out) here and (out, in) on disk."""
    return array.T if parameter.kind == "linear" else array


def from_numpy(parameter: Parameter, array: np.ndarray | QuantizedTensor) -> jax.Array | dict[str, jax.Array]:
    """A copy of the values on the default device: a file that changes later changes no JAX array.

    On the CPU, JAX uses memory that is aligned like this as it is. Of a quantized weight, its leaves by name.
    """
    if isinstance(array, QuantizedTensor):
        return to_leaves(array)
    return jax.device_put(aligned_copy(array, transposed=parameter.kind == "linear"))


def _expert(parameter: Parameter) -> int | None:
    """The index of an expert in the leaf of its layer; None for others."""
    return None if parameter.stack is None else parameter.stack[1]


def stacked(leaves: list[Any]) -> Any:
    """Leaves of one shape, or their `jax.ShapeDtypeStruct`s, as one with a first dimension more."""
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)


def to_numpy(parameter: Parameter, leaf: jax.Array) -> np.ndarray:
    """The parameter in a leaf as it is on disk: a copy of a linear weight, the leaf's own memory for the rest."""
    array = to_host(leaf, _expert(parameter))
    return aligned_copy(array, transposed=True) if parameter.kind == "linear" else array


def cast(params: Any, dtype: Any, mask: Any) -> Any:
    """Floating leaves of a tree in another dtype, where `mask` is True."""

    def one(leaf: Any, chosen: Any = True) -> Any:
        return leaf.astype(dtype) if chosen and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, params) if mask is None else jax.tree.map(one, params, mask)
