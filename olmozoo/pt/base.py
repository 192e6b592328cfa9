"""Making, loading and saving PyTorch models: canonical parameters bound to a module's own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from olmozoo.checkpoint.adapters import Source, config_alone, locate, open_merged
from olmozoo.checkpoint.matching import check_floats, find_weights, initial_weights, load_weights
from olmozoo.checkpoint.reader import OpenCheckpoint
from olmozoo.checkpoint.tensors import LazyIntegers, check_shapes, dtype_of
from olmozoo.checkpoint.writer import save_checkpoint, save_together
from olmozoo.errors import InputError, raise_problems
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter, by_variable
from olmozoo.generation.config import GenerationConfig
from olmozoo.modeling import ModelMixin, given_dtype, given_quantization, resized_config, split_options
from olmozoo.outputs import OUTPUTS
from olmozoo.pt.cache import KVCache
from olmozoo.pt.experts import SplitExperts, Stack
from olmozoo.pt.parallel import (
    ACCELERATE,
    dispatch,
    empty_part,
    expert_of,
    highest,
    is_first,
    is_split,
    local,
    local_part,
    mesh_sizes,
    parallelize,
    reshard,
    root_mesh,
    write_expert,
)
from olmozoo.pt.quantization import QuantizedLinear
from olmozoo.quantization import GROUP_SIZE, QuantizedTensor, as_floats
from olmozoo.sharding import layout
from olmozoo.typing import Array, StrPath

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

for output_class in OUTPUTS:  # so that torch.export and DDP see the tensors in them
    torch.export.register_dataclass(output_class, serialized_type_name=f"olmozoo.{output_class.__name__}")


class PreTrainedModel(ModelMixin, nn.Module):
    """Base of every model here.

    Args:
        config: the model's config.
        seed: initial weights are drawn from it, bit for bit the same as in the other frameworks; None leaves them
            without memory (on the meta device).
        dtype: of the parameters; default torch's default dtype.
    """

    wing = "pt"
    gradient_checkpointing = False

    def __init__(self, config: ModelConfig, *, seed: int | None = 0, dtype: torch.dtype | str | None = None) -> None:
        super().__init__()
        config = self.check_config(config)
        self.config = config
        self.generation_config = GenerationConfig.from_model(config)
        device = torch.get_default_device()
        self.register_state_dict_post_hook(drop_tied)
        self.register_load_state_dict_pre_hook(add_tied)
        with torch.device("meta"):
            self.make_layers()
        if seed is not None and device.type != "meta":
            dtype_name = dtype_of(dtype or torch.get_default_dtype())
            self.bind_parameters(initial_weights(config, self.head, seed=seed, dtype=dtype_name), device)
        else:
            self.tie_weights()

    def make_layers(self) -> None:
        """Make the layers from `self.config`."""
        raise NotImplementedError

    # -- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        device: torch.device | str | None = None,
        device_mesh: DeviceMesh | None = None,
        device_map: Any = None,
        max_memory: dict[Any, Any] | None = None,
        offload_folder: StrPath | None = None,
        adapter: str | os.PathLike[str] | None = None,
        quantization: str | None = None,
        group_size: int = GROUP_SIZE,
        **options: Any,
    ) -> Self:
        """A model with the weights of a checkpoint, in evaluation mode.

        On the CPU and in the checkpoint's own dtype the weights are the mapped file itself: nothing is read before it
        is used, and nothing ever changes the file.

        Args:
            path_or_repo: a folder, or a repository on the hub.
            dtype: of the parameters; default the checkpoint's own.
            ignore_mismatched_sizes: start tensors of a wrong shape anew, with a warning, rather than refuse.
            device: where the parameters go; default torch's default device.
            device_mesh: the devices that the model is split over, with dimensions named `fsdp`, `tensor` or `experts`;
                each rank reads its own parts alone. See `olmozoo.pt.parallel`.
            device_map: a device, or "auto" for an accelerator if there is one. With several devices or `max_memory`,
                blocks are spread over the devices by accelerate; also "balanced", "balanced_low_0", "sequential", or a
                device by name of a module.
            max_memory: what each device may hold, such as `{0: "20GB", "cpu": "60GB"}`.
            offload_folder: where weights go that fit on no device.
            adapter: a folder or a repository with a LoRA adapter of PEFT, which is merged into the weights; default one
                that is in the model's folder. See `olmozoo.checkpoint.adapters`.
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
            ConfigError: the config is of another family or has a bad value.
            InputError: the mesh does not fit the model; every problem is named, before anything is downloaded but the
                config. Or devices are given twice.
            CheckpointError: the weights are broken or do not fit the config; every problem is named.
            InputError: there is no such quantization, or its groups do not divide a layer, which is named.
        """
        dtype = given_dtype(dtype, options)
        devices = given_devices(device, device_mesh, device_map, max_memory, offload_folder)
        how = given_quantization(quantization, group_size, options)
        hub, overrides = split_options(options)
        if device_mesh is not None:
            config = config_alone(path_or_repo, cls.config_class, adapter=adapter, hub=hub, **overrides)
            layout(config, cls.head, mesh_sizes(device_mesh), style="pt")
        location = locate(path_or_repo, need="weights", adapter=adapter, **hub)
        source = open_merged(location, cls.config_class, quantization=how, **overrides)
        model = cls._from_checkpoint(source, dtype=dtype, ignore_mismatched_sizes=ignore_mismatched_sizes, **devices)
        model.note_source(path_or_repo, location)
        return model

    @classmethod
    def _from_checkpoint(
        cls,
        source: OpenCheckpoint,
        *,
        dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        device: torch.device | str | None = None,
        device_mesh: DeviceMesh | None = None,
        device_map: Any = None,
        max_memory: dict[Any, Any] | None = None,
        offload_folder: StrPath | None = None,
    ) -> Self:
        """`from_pretrained` of a folder that is open; `device_map` is None, or one over several devices."""
        config, checkpoint = source.config, source.checkpoint
        wanted = checkpoint.dtype if dtype in (None, "auto") else dtype_of(dtype)
        model = cls(config, seed=None)
        settings: Any = {"dtype": wanted, "ignore_mismatched_sizes": ignore_mismatched_sizes}
        if device_mesh is not None or device_map is not None:
            check_floats(checkpoint)
        if device_mesh is None:
            model.bind_parameters(load_weights(checkpoint, config, cls.head, **settings), device, wanted)
        else:
            parallelize(model, device_mesh)
            weights = find_weights(checkpoint, config, cls.head, **settings)
            model.bind_parts(((parameter, read()) for parameter, read in weights), wanted)
        if device_map is not None:
            dispatch(model, device_map, max_memory, offload_folder)
        model.generation_config = GenerationConfig.from_contents(source.generation, config)
        return model.eval()

    def note_source(self, path_or_repo: StrPath, source: Source) -> None:
        """Keep, as `name_or_path`, where the model is from: an adapter of PEFT names it as its base."""
        if source.adapter is None:
            self.name_or_path = self.config.name_or_path = os.fspath(path_or_repo)

    def save_pretrained(self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write config.json, generation_config.json and safetensors into `folder`, in one step.

        Args:
            folder: made if need be; in an old one, other files are kept.
            max_shard_size: bytes a file, as a number or as text such as "5GB".

        Raises:
            InputError: the model has other parameters than its config says, such as adapters that are not merged.
            CheckpointError: the folder could not be written and is as it was before.

        Of a model that is split over a mesh, every rank calls this: parameters are gathered one by one, and the first
        rank writes.
        """
        mesh = root_mesh(self)
        if mesh is not None:
            reshard(self)
        self.check_parameters()
        save = partial(
            save_checkpoint,
            folder,
            self.config,
            self.head,
            dtype=lambda parameter: self.dtype if self._quantized(parameter) else self._find(parameter).dtype,
            integers=self._integers,
            generation_config=self.generation_config.to_dict(),
            max_shard_size=max_shard_size,
        )

        def read(parameter: Parameter) -> np.ndarray:
            return to_numpy(self._find(parameter))

        if mesh is None:
            save(read=read)
        else:
            save_together(save, self.config, self.head, read, is_first(mesh), lambda ok: not highest(not ok, mesh))

    # -- parameters -----------------------------------------------------------------------------------------------

    def bind_parameters(
        self,
        items: Iterable[tuple[Parameter, Array | QuantizedTensor]],
        device: torch.device | str | None = None,
        dtype: Any = "float32",
    ) -> None:
        """Give parameters their values, which keep their dtype, and tie those that are tied.

        On the CPU a parameter shares the memory of its array: pass a copy of what must not change.

        Args:
            items: parameters of the table with their values, as they are in a checkpoint; a layer with a quantized
                weight becomes a `QuantizedLinear`.
            device: where they go; default torch's default device.
            dtype: what layers with quantized weights compute in.
        """
        device = torch.get_default_device() if device is None else device
        compute = getattr(torch, dtype_of(dtype).name)
        for parameter, array in items:
            if isinstance(array, QuantizedTensor):
                path = ".".join(self._parameter_path(parameter)[:-1])
                self.set_submodule(path, QuantizedLinear(array, self.get_submodule(path).bias, compute, device))
            else:
                self._bind(parameter, from_numpy(array).to(device))
        self.tie_weights()

    def bind_parts(self, items: Iterable[tuple[Parameter, Array]], dtype: np.dtype[Any], *, copy: bool = False) -> None:
        """Give the parameters of a model that is split over a mesh this rank's parts of values.

        Args:
            items: parameters of the table with their values; of mapped ones the parts alone are read.
            dtype: what parts are cast to.
            copy: whether parts are copied where they have that dtype already.
        """

        def convert(part: Array) -> Tensor:
            return from_numpy(part.astype(dtype, copy=copy))

        for parameter, array in items:
            stack = self._stack(parameter)
            if stack is None:
                self._bind(parameter, local_part(self._find(parameter), array, convert))
                continue
            if local(stack.weight).is_meta:
                stack.weight = nn.Parameter(empty_part(stack.weight, getattr(torch, dtype_of(dtype).name)))
            write_expert(stack.weight, parameter.stack[1], array, convert)
        self.tie_weights()

    def read_parameters(self) -> Iterator[tuple[Parameter, Array | QuantizedTensor]]:
        """The parameters of the table, without tied ones, with their values as they are in a checkpoint.

        Raises:
            InputError: the model has other parameters than its config says; every problem is named.
        """
        self.check_parameters()
        for parameter in self._parameter_table():
            layer = self._quantized(parameter)
            yield parameter, to_numpy(self._find(parameter)) if layer is None else layer.tensor()

    def check_parameters(self) -> None:
        """Check that the module's parameters are those of the parameter table, and have values.

        Raises:
            InputError: they are not; every problem is named.
        """
        table = [parameter for parameter in self._parameter_table() if not self._quantized(parameter)]
        expected = {".".join(self._parameter_path(p)): p.shape for p in table if self._stack(p) is None}
        for group in by_variable(p for p in table if self._stack(p) is not None):
            expected[".".join(self._variable_path(group[0]))] = (len(group), *group[0].shape)
        bound = {name: self.get_parameter(name) for name in expected}
        known = {id(tensor) for tensor in bound.values()}
        others = {name: tensor for name, tensor in self.named_parameters() if id(tensor) not in known}
        if adapters := [name for name in others if ".lora_" in name or ".modules_to_save." in name]:
            raise InputError(
                f"{len(adapters)} parameters are of adapters that are not merged, such as {adapters[0]}: call "
                "merge_and_unload() of the PEFT model first, or save the adapter alone with its save_pretrained"
            )
        if foreign := [name for name, tensor in bound.items() if type(tensor).__module__.startswith("torchao.")]:
            raise InputError(
                f"{len(foreign)} weights are quantized by torchao, such as {foreign[0]}: save them by torchao, or load "
                "the model with quantization= instead, whose integers are saved"
            )
        headline = f"parameters do not fit the config of {type(self).__name__}"
        found = {name: tuple(tensor.shape) for name, tensor in (bound | others).items()}
        check_shapes(headline, found, expected)
        empty = (f"without values, on the meta device: {name}" for name, tensor in bound.items() if tensor.is_meta)
        raise_problems(headline, empty, InputError)

    def _quantized(self, parameter: Parameter) -> QuantizedLinear | None:
        """The layer of a quantized weight."""
        if self._stack(parameter) is not None:
            return None
        layer = self.get_submodule(".".join(self._parameter_path(parameter)[:-1]))
        return layer if parameter.kind == "linear" and isinstance(layer, QuantizedLinear) else None

    def _integers(self, parameter: Parameter) -> LazyIntegers | None:
        layer = self._quantized(parameter)
        return None if layer is None else LazyIntegers(layer.scheme, layer.scale_dtype, layer.tensor)

    def _stack(self, parameter: Parameter) -> Stack | None:
        """The module with the weights of all experts of a layer, where a mesh splits them."""
        if parameter.stack is None:
            return None
        *path, name, _ = self._variable_path(parameter)
        experts = self.get_submodule(".".join(path))
        return getattr(experts, name) if isinstance(experts, SplitExperts) else None

    def _find(self, parameter: Parameter) -> Tensor:
        stack = self._stack(parameter)
        if stack is not None and parameter.stack is not None:
            return expert_of(stack.weight, parameter.stack[1])
        return self.get_parameter(".".join(self._parameter_path(parameter)))

    def _bind(self, parameter: Parameter, tensor: Tensor) -> None:
        *path, leaf = self._parameter_path(parameter)
        setattr(self.get_submodule(".".join(path)), leaf, nn.Parameter(tensor))

    def tie_weights(self) -> None:
        """Make each tied parameter the one it is tied to."""
        for parameter in self.config.parameters(self.head):
            if parameter.tied_to is not None:
                *path, leaf = self._parameter_path(parameter)
                setattr(self.get_submodule(".".join(path)), leaf, self.get_parameter(parameter.tied_to))

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """The paths of tied parameters, and of what they are tied to; PEFT reads it."""
        tied = [parameter for parameter in self.config.parameters(self.head) if parameter.tied_to is not None]
        return {".".join(self._parameter_path(parameter)): str(parameter.tied_to) for parameter in tied}

    def init_cache(self, batch_size: int, max_length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` positions; dtype by default the model's."""
        return KVCache.create(self.config, batch_size, max_length, self.dtype if dtype is None else dtype)

    # -- what users of PyTorch models ask for ---------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters; where they are spread over several, the one that inputs go to."""
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None)  # of accelerate
        device = getattr(hook, "execution_device", None)
        return next(self.parameters()).device if device is None else torch.device(device)

    @property
    def _no_split_modules(self) -> list[str]:
        """The class of the blocks, which accelerate puts on one device each."""
        return [type(self.base_model.stack.layers[0]).__name__]

    @property
    def base_model(self) -> PreTrainedModel:
        """The decoder without its head; itself for a base model."""
        return self.model if self.head else self

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of values in parameters, those of quantized weights included; tied ones count once."""
        left_out = {id(self.get_input_embeddings().weight)} if exclude_embeddings else set()
        layers = [] if only_trainable else [m for m in self.modules() if isinstance(m, QuantizedLinear)]
        integers = sum(layer.in_features * layer.out_features for layer in layers)
        return integers + sum(
            p.numel() for p in self.parameters() if id(p) not in left_out and (p.requires_grad or not only_trainable)
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.base_model.stack.embed_tokens

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        """Replace the token embedding (and with it a tied head)."""
        self.base_model.stack.embed_tokens = embedding
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language-model head, if there is one."""
        return getattr(self, "lm_head", None)

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Add tags for a model card to `model_tags`, as trl's trainers do."""
        known = getattr(self, "model_tags", [])
        self.model_tags = [*known, *(tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in known)]

    def enable_input_require_grads(self) -> None:
        """Make the output of the token embedding require gradients, as adapters with gradient checkpointing need."""
        hook = self.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_(True))
        self._input_hook = hook

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        self._input_hook.remove()

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute blocks in the backward pass rather than keep what is inside them.

        Args:
            gradient_checkpointing_kwargs: ignored; recomputation is never reentrant.
            every_n_layers: 1, all blocks.
            offload: False; what is kept stays on its device.

        Raises:
            InputError: `every_n_layers` or `offload` is something else.
        """
        if every_n_layers != 1:
            raise InputError(f"every_n_layers is {every_n_layers}, expected 1: all blocks are recomputed")
        if offload:
            raise InputError("offload is True, expected False: what is kept stays on its device")
        self.base_model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what is inside blocks for the backward pass."""
        self.base_model.gradient_checkpointing = False

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Change the number of rows of the token embedding and of the language-model head; the config follows.

        New rows get initial values, the same in every framework, and what was frozen stays so.

        Args:
            new_num_tokens: rows; default as many as there are.
            pad_to_multiple_of: round that up to a multiple.

        Raises:
            InputError: the model is split over a mesh.
        """
        if root_mesh(self) is not None:
            raise InputError("the model is split over a mesh: call resize_token_embeddings before parallelize")
        config = resized_config(self.config, new_num_tokens, pad_to_multiple_of)
        rows = config.vocab_size
        for parameter in config.parameters(self.head):
            if "vocab" in parameter.axes and parameter.tied_to is None:
                old = self._find(parameter)
                kept = min(rows, old.shape[0])
                added = from_numpy(parameter.initial(0, dtype_of(old.dtype))[kept:]).to(old.device)
                self._bind(parameter, torch.cat([old.detach()[:kept], added]))
                self._find(parameter).requires_grad_(old.requires_grad)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
        self.tie_weights()
        self.get_input_embeddings().num_embeddings = rows
        if self.get_output_embeddings() is not None:
            self.get_output_embeddings().out_features = rows
        return self.get_input_embeddings()


def given_devices(
    device: Any, device_mesh: Any, device_map: Any, max_memory: Any = None, offload_folder: Any = None
) -> dict[str, Any]:
    """Where a model goes, as arguments of `_from_checkpoint`; `device_map` is among them if it is over several devices.

    Raises:
        InputError: there are two answers, or a device is not here.
    """
    given = {"device": device, "device_mesh": device_mesh, "device_map": device_map}
    if len(names := [name for name, value in given.items() if value is not None]) > 1:
        raise InputError(f"{' and '.join(names)} are given, expected one of them")
    if device_map is None and not (max_memory is None and offload_folder is None):
        raise InputError("max_memory and offload_folder are for a device_map: pass device_map='auto'")
    if isinstance(device_map, dict) and len(set(device_map.values())) == 1:
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return {"device": device, "device_mesh": device_mesh}
    count = torch.accelerator.device_count()
    if isinstance(device_map, dict) and any(isinstance(x, int) and x >= count for x in device_map.values()):
        raise InputError(f"device_map is {device_map!r}, and there are {count} accelerators here")
    if isinstance(device_map, dict) or (device_map in ACCELERATE and (max_memory is not None or count > 1)):
        spread = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        return {"device": "cpu", **spread}
    if device_map in ACCELERATE:
        device_map = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return {"device": device_map}


def drop_tied(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave tied parameters out of a state dict, as a checkpoint does: safetensors refuses to save shared memory."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, source in model._tied_weights_keys.items():
        if path in parameters and parameters[path] is parameters.get(source):
            state_dict.pop(prefix + path, None)


def add_tied(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add what `drop_tied` left out to a state dict that is being loaded; either name stands for both."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, source in model._tied_weights_keys.items():
        if path in parameters and parameters[path] is parameters.get(source):
            missing = {prefix + path, prefix + source} - state_dict.keys()
            if len(missing) == 1:
                found = prefix + (path if prefix + path in state_dict else source)
                # One parameter for both, so that they are still tied after load_state_dict(..., assign=True).
                value = nn.Parameter(state_dict[found], parameters[path].requires_grad)
                state_dict[found] = state_dict[missing.pop()] = value


def canonical_state(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The values of a model by canonical name, as they are in a checkpoint; tied heads are left out.

    On the CPU the arrays share the memory of the parameters. Quantized weights are dequantized.

    Raises:
        InputError: the model has other parameters than its config says; every problem is named.
    """
    dtype = dtype_of(model.dtype)
    return {parameter.name: as_floats(array, dtype) for parameter, array in model.read_parameters()}


def from_numpy(array: np.ndarray) -> Tensor:
    """The array as a contiguous tensor, sharing its memory where the array is contiguous too."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":  # torch takes NumPy's own dtypes only
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor as an array, sharing its memory where it is on the CPU; a part of one is gathered, by all ranks."""
    if is_split(tensor):
        tensor = tensor.full_tensor()
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(dtype_of(torch.bfloat16))
    return tensor.numpy()
