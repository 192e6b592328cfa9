"""Making, loading and saving Keras models: canonical parameters bound to a model's own variables."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from typing import Any, ClassVar, Self

import keras
import numpy as np
import optree
import tensorflow as tf

from olmozoo.checkpoint.adapters import locate, open_merged
from olmozoo.checkpoint.matching import initial_weights, load_weights
from olmozoo.checkpoint.reader import OpenCheckpoint
from olmozoo.checkpoint.tensors import LazyIntegers, aligned, check_shapes, dtype_of
from olmozoo.checkpoint.writer import save_checkpoint
from olmozoo.errors import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter, by_variable
from olmozoo.generation.config import GenerationConfig
from olmozoo.modeling import ModelMixin, given_dtype, given_quantization, resized_config, split_options
from olmozoo.outputs import OUTPUTS, ModelOutput
from olmozoo.quantization import GROUP_SIZE, Quantization, QuantizedTensor, as_floats
from olmozoo.tf.cache import KVCache
from olmozoo.tf.layers import Tensor, WithAdapters, embedding, from_numpy, linear
from olmozoo.tf.parallel import check_distribution
from olmozoo.tf.quantization import QuantizedDense, QuantizedExpertDense, scale_dtype
from olmozoo.typing import Array

LEAVES = {"linear": "kernel", "embedding": "embeddings", "norm": "scale", "bias": "bias"}  # what layers call them


class PreTrainedModel(ModelMixin, keras.Model):
    """Base of every model here. All variables exist once a model is made.

    Args:
        config: the model's config.
        seed: initial weights are drawn from it, bit for bit the same as in the other frameworks; None leaves them
            uninitialized, for a caller that binds them next.
        dtype: a Keras dtype policy or its name, such as "bfloat16" or "mixed_bfloat16", or a dtype; default Keras's
            global policy.
        name: of the model, in the paths of its variables.
        nested: whether this model is a part of another, which makes its variables.

    Raises:
        ConfigError: the config is of another family.
        InputError: `keras.distribution` is set, which does nothing on TensorFlow.
    """

    wing = "tf"
    label_names: ClassVar[tuple[str, ...]] = ()  # the arguments of `call` that give a loss
    gradient_checkpointing = False
    quantized: tuple[Any, ...] | None = None  # mode, config and filters, where `quantize` was called

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None = 0,
        dtype: Any = None,
        name: str | None = None,
        nested: bool = False,
    ) -> None:
        config = self.check_config(config)
        check_distribution()
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.config = config
        self.generation_config = GenerationConfig.from_model(config)
        with global_policy(self.dtype_policy):
            self.make_layers()
        self.built = True
        if not nested:
            self.make_variables()
            if seed is not None:
                self.bind_parameters(initial_weights(config, self.head, seed=seed, dtype=self.variable_dtype))

    def make_layers(self) -> None:
        """Make the layers from `self.config`."""
        raise NotImplementedError

    def make_variables(self) -> None:
        """Build each layer that has a parameter in the table: so they are all there before the first call."""
        for parameter in self._parameter_table():
            layer = self._layer(parameter)
            if layer.built or parameter.kind == "bias":  # a bias comes with its weight
                continue
            with ExitStack() as scopes:  # Keras names variables by the scopes that they are made in
                for step in (self.name, *self._variable_path(parameter)[:-2]):
                    scopes.enter_context(keras.name_scope(step))
                layer.build((None, None) if parameter.kind == "embedding" else (None, None, parameter.shape[-1]))
        for block in self.base_model.stack.blocks:
            block.build((None, None, self.config.hidden_size))

    # -- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        dtype: Any = None,
        ignore_mismatched_sizes: bool = False,
        adapter: str | os.PathLike[str] | None = None,
        quantization: str | None = None,
        group_size: int = GROUP_SIZE,
        **options: Any,
    ) -> Self:
        """A model with the weights of a checkpoint.

        On the CPU and in the checkpoint's own dtype, what is not transposed for Keras (embeddings, norms and biases) is
        the mapped file itself where it lies aligned there: it is read when it is used, and nothing ever changes the
        file.

        Args:
            path_or_repo: a folder, or a repository on the hub.
            dtype: a dtype or a Keras dtype policy, such as "mixed_bfloat16"; default Keras's global policy if
                that is a mixed one, else the checkpoint's own dtype.
            ignore_mismatched_sizes: start tensors of a wrong shape anew, with a warning, rather than refuse.
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
            CheckpointError: the weights are broken or do not fit the config; every problem is named.
            InputError: there is no such quantization, or its groups do not divide a layer, which is named.
        """
        dtype = given_dtype(dtype, options)
        how = given_quantization(quantization, group_size, options)
        hub, overrides = split_options(options)
        found = locate(path_or_repo, need="weights", adapter=adapter, **hub)
        source = open_merged(found, cls.config_class, quantization=how, **overrides)
        return cls._from_checkpoint(source, dtype=dtype, ignore_mismatched_sizes=ignore_mismatched_sizes)

    @classmethod
    def _from_checkpoint(
        cls, source: OpenCheckpoint, *, dtype: Any = None, ignore_mismatched_sizes: bool = False
    ) -> Self:
        """`from_pretrained` of a folder that is open."""
        config, checkpoint = source.config, source.checkpoint
        policy = keras.config.dtype_policy()
        if dtype is None and policy.compute_dtype != policy.variable_dtype:  # a mixed policy that the user has set
            dtype = policy
        model = cls(config, seed=None, dtype=checkpoint.dtype.name if dtype in (None, "auto") else dtype)
        weights = load_weights(
            checkpoint,
            config,
            cls.head,
            dtype=np.dtype(model.variable_dtype),
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        model.bind_parameters(weights)
        model.generation_config = GenerationConfig.from_contents(source.generation, config)
        return model

    def save_pretrained(self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write config.json, generation_config.json and safetensors into `folder`, in one step.

        Args:
            folder: made if need be; in an old one, other files are kept.
            max_shard_size: bytes a file, as a number or as text such as "5GB".

        Raises:
            InputError: the model has LoRA adapters that are not merged, or other variables than its config says, such
                as a head that is no longer tied.
            CheckpointError: the folder could not be written and is as it was before.
        """
        self.check_parameters()
        save_checkpoint(
            folder,
            self.config,
            self.head,
            read=self._read,
            dtype=lambda p: self.variable_dtype if self._quantized(p) else self._find(p).dtype,
            integers=self._integers,
            generation_config=self.generation_config.to_dict(),
            max_shard_size=max_shard_size,
        )

    def save(self, filepath: str | os.PathLike[str], overwrite: bool = True, **options: Any) -> None:
        """Write a `.keras` file, with adapters, trainable flags and the state of a compiled optimizer.

        Args:
            filepath: a name that ends in `.keras`.
            overwrite: whether to replace a file; else Keras asks.
            **options: as in `keras.Model.save`.

        Raises:
            InputError: the name is that of Keras's old HDF5 format, which has no room for a subclassed model.
        """
        if os.fspath(filepath).endswith((".h5", ".hdf5")):
            raise InputError(
                f"{filepath}: Keras cannot load a model of this kind from .h5: save 'model.keras', or the weights "
                "alone with save_weights('model.weights.h5')"
            )
        super().save(filepath, overwrite=overwrite, **options)

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **options: Any,
    ) -> None:
        """Write the forward call in a format that serves without this library.

        By default a TensorFlow SavedModel whose `serve(input_ids, attention_mask)`, of any batch and length and of
        int32 or int64, returns a plain dict of the output without its cache. Its `serving_default` signature, which
        TensorFlow Serving takes, is that of int32.

        Args:
            filepath: the folder or file to write.
            format: as in `keras.Model.export`.
            verbose: whether to print what was written.
            input_signature: of another call than that; as in `keras.Model.export`, as all that follows.
            **options: of the format.
        """
        if format != "tf_saved_model" or input_signature is not None:
            super().export(filepath, format=format, verbose=verbose, input_signature=input_signature, **options)
            return

        shape = (None, None)
        signature = tf.TensorSpec(shape, tf.int32, "input_ids"), tf.TensorSpec(shape, tf.int32, "attention_mask")

        def forward(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            output = self(
                input_ids,
                attention_mask,
                use_cache=False,
                output_attentions=False,
                output_hidden_states=False,
                return_dict=True,
                training=False,
            )
            return dict(output.items())

        # Traced here and once: TensorFlow traces a function of functions anew while it saves.
        traced = tf.function(forward, autograph=False, input_signature=signature).get_concrete_function()

        @tf.function(autograph=False)
        def serve(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return traced(tf.cast(input_ids, tf.int32), tf.cast(attention_mask, tf.int32))

        for dtype in (tf.int32, tf.int64):
            serve.get_concrete_function(*(tf.TensorSpec(shape, dtype, spec.name) for spec in signature))
        archive = keras.export.ExportArchive()
        archive.add_endpoint("serve", serve)
        archive.write_out(os.fspath(filepath), verbose=verbose is not False, **options)

    def quantize(self, mode: str | None = None, config: Any = None, filters: Any = None, **options: Any) -> None:
        """Make kernels integers, as `keras.Model.quantize` does; a `.keras` file of the model loads so.

        It does not where `filters` is a function, nor in the modes that need data.
        """
        super().quantize(mode, config=config, filters=filters, **options)
        if mode in ("int8", "int4") and not callable(filters):
            self.quantized = mode, keras.saving.serialize_keras_object(config), filters

    def get_config(self) -> dict[str, Any]:
        """What `model.save("m.keras")` writes beside the weights."""
        quantized = {"quantized": list(self.quantized)} if self.quantized else {}
        return {
            "config": self.config.to_dict(),
            "generation_config": self.generation_config.to_dict(),
            "name": self.name,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            **quantized,
            **({"integers": integers} if (integers := self._schemes()) else {}),
            **({"lora": self._lora()} if self._lora() else {}),
            **({"frozen": frozen} if (frozen := self._frozen()) else {}),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The model that `get_config` describes, with initial weights."""
        policy = keras.dtype_policies.deserialize(config["dtype"])
        model = cls(cls.config_class.from_dict(config["config"]), name=config["name"], dtype=policy)
        model.generation_config = GenerationConfig.from_dict(config["generation_config"])
        if "quantized" in config:
            mode, how, filters = config["quantized"]
            model.quantize(mode, keras.saving.deserialize_keras_object(how), filters=filters)
        table = {parameter.name: parameter for parameter in model._parameter_table()}
        integers = config.get("integers", {})
        for name in sorted(integers, key=lambda name: -table[name].size):  # as `load_weights` orders them
            scheme, scales = integers[name]
            model._make_quantized(table[name], Quantization(*scheme), scales)
        layers = {name: model._layer(parameter) for name, parameter in table.items()}
        for name, (rank, alpha) in config.get("lora", {}).items():
            layers[name].enable_lora(rank, alpha)
        frozen = config.get("frozen")
        if frozen is not None:
            model.trainable = frozen["model"]
            for name in frozen["layers"]:
                layers[name].trainable = False
            for variable in model.variables:
                variable.trainable = variable.trainable and variable.path not in frozen["variables"]
        return model

    def _schemes(self) -> dict[str, Any]:
        """How each quantized weight is quantized, and the dtype of its scales, by the parameter's name."""
        table = [group[0] for group in by_variable(self._parameter_table())]
        layers = {p.name: layer for p in table if (layer := self._quantized(p)) is not None}
        return {name: [list(astuple(layer.scheme)), layer.scale_dtype] for name, layer in layers.items()}

    def _lora(self) -> dict[str, tuple[int, float]]:
        """The rank and alpha of the LoRA adapters, by the name of the parameter that they adapt."""
        found = {}
        for parameter, *_ in by_variable(self._parameter_table()):
            layer = self._layer(parameter)
            if parameter.kind == "linear" and getattr(layer, "lora_enabled", False):
                found[parameter.name] = layer.lora_rank, layer.lora_alpha
        return found

    def _frozen(self) -> dict[str, Any]:
        """Whether the model is trainable, and which of its layers and variables are not; empty where all are."""
        table = self._parameter_table()
        layers = [parameter.name for parameter in table if not self._layer(parameter).trainable]
        of_table = [variable for parameter in table for variable in self._layer(parameter).weights]
        variables = sorted({variable.path for variable in of_table if not variable.trainable})
        return {"model": self.trainable, "layers": layers, "variables": variables} if variables else {}

    # -- adapters -------------------------------------------------------------------------------------------------

    def enable_lora(
        self, rank: int, lora_alpha: float | None = None, target_names: Iterable[str] | None = None
    ) -> None:
        """Add LoRA adapters (arXiv:2106.09685) to linear layers of the blocks, and freeze all else.

        Compile the model afterwards. `save("m.keras")` keeps the adapters; `merge_lora` adds them to the kernels.

        Args:
            rank: of the adapters.
            lora_alpha: adapters are scaled by lora_alpha / rank; default `rank`.
            target_names: of layers, such as `("q_proj", "v_proj")`; default every linear layer of the blocks, those of
                experts included.

        Raises:
            InputError: there is no layer of such a name.
        """
        layers = {tuple(self._variable_path(p)[:-1]): self._layer(p) for p in self._parameter_table()}
        dense = {path: layer for path, layer in layers.items() if "layers" in path and isinstance(layer, WithAdapters)}
        names = {path[-1] for path in dense}
        wanted = names if target_names is None else set(target_names)
        if unknown := wanted - names:
            raise InputError(f"no layer {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
        for layer in layers.values():
            layer.trainable = False
        for path, layer in dense.items():
            if path[-1] in wanted:
                layer.trainable = True
                layer.enable_lora(rank, lora_alpha)
                if layer.use_bias:
                    layer.bias.trainable = False

    def merge_lora(self) -> None:
        """Add LoRA adapters to the kernels. They stay, at zero, so that training can go on."""
        lora = self._lora()
        for parameter in self._parameter_table():
            if parameter.name in lora:
                self._layer(parameter).merge_lora()

    # -- parameters -----------------------------------------------------------------------------------------------

    def bind_parameters(self, items: Iterable[tuple[Parameter, Array | QuantizedTensor]]) -> None:
        """Give parameters their values.

        A variable may share the memory of its array: pass a copy of what must not change.

        Args:
            items: parameters of the table with their values, as they are in a checkpoint, in the variables' dtype; a
                layer with a quantized weight becomes a `QuantizedDense`.
        """
        for parameter, array in items:
            if isinstance(array, QuantizedTensor):
                layer = self._make_quantized(parameter, array.scheme, scale_dtype(array))
                layer.assign(array, _expert(parameter))
                continue
            variable, tensor = self._find(parameter), from_numpy(aligned(array, transposed=parameter.kind == "linear"))
            if parameter.stack is None:
                variable.assign(tensor)
            else:
                variable.value[parameter.stack[1]].assign(tensor)

    def _make_quantized(self, parameter: Parameter, scheme: Quantization, scales: str) -> QuantizedDense:
        """Replace the layer of a linear weight by one for integers, which keeps its bias.

        An expert's layer is that of all experts, and is replaced once: experts are quantized alike.
        """
        *path, name, _ = self._variable_path(parameter)
        old = self._layer(parameter)
        if isinstance(old, QuantizedExpertDense) and (old.scheme, old.scale_dtype) == (scheme, scales):
            return old
        (out, width), use_bias = parameter.shape, getattr(old, "bias", None) is not None
        with global_policy(self.dtype_policy), ExitStack() as scopes:
            for step in (self.name, *path):
                scopes.enter_context(keras.name_scope(step))
            if parameter.stack is None:
                layer = QuantizedDense(out, width, scheme, scales, use_bias, name)
            else:
                layer = QuantizedExpertDense(self.config.num_experts, out, width, scheme, scales, name)
            layer.build()
        if use_bias:
            layer.bias.assign(old.bias)
        replace_layer(self._at(path), name, layer)
        return layer

    def read_parameters(self) -> Iterator[tuple[Parameter, Array | QuantizedTensor]]:
        """The parameters of the table, without tied ones, with their values as they are in a checkpoint.

        Raises:
            InputError: the model has other variables than its config says; every problem is named.
        """
        self.check_parameters()
        for parameter in self._parameter_table():
            layer = self._quantized(parameter)
            yield parameter, self._read(parameter) if layer is None else layer.tensor(_expert(parameter))

    def check_parameters(self) -> None:
        """Check that the layers with variables are those of the parameter table, and that adapters are merged.

        Raises:
            InputError: they are not; every problem is named.
        """
        table, lora = self._parameter_table(), self._lora()
        unmerged = [p.name for p in table if p.name in lora and np.any(self._layer(p).lora_kernel_b.numpy())]
        if unmerged:
            raise InputError(
                f"{len(unmerged)} layers have LoRA adapters that are not merged, such as {unmerged[0]}: call "
                "merge_lora() first, or keep them with save('model.keras')"
            )
        if foreign := [p.name for p in table if getattr(self._layer(p), "quantization_mode", None)]:
            raise InputError(
                f"{len(foreign)} layers are quantized by Keras, such as that of {foreign[0]}: keep them with "
                "save('model.keras'), or load the model with quantization= instead"
            )
        known = {id(variable) for parameter in table for variable in self._layer(parameter).weights}
        found = {variable.path: tuple(variable.shape) for variable in self.weights if id(variable) not in known}
        table = [parameter for parameter in table if self._quantized(parameter) is None]
        found |= {p.name: tuple(self._find(p).shape)[0 if p.stack is None else 1 :] for p in table}
        expected = {p.name: p.shape[::-1] if p.kind == "linear" else p.shape for p in table}
        check_shapes(f"variables do not fit the config of {type(self).__name__}", found, expected)

    def _layer(self, parameter: Parameter) -> keras.layers.Layer:
        """The layer that has a parameter's variable, which for an expert is the one of all experts.

        A Keras model's `layers` are all its layers, so the blocks of a decoder are in `blocks`.
        """
        return self._at(self._variable_path(parameter)[:-1])

    def _at(self, path: list[str]) -> keras.layers.Layer:
        layer: Any = self
        for step in path:
            layer = layer[int(step)] if step.isdigit() else getattr(layer, "blocks" if step == "layers" else step)
        return layer

    def _quantized(self, parameter: Parameter) -> QuantizedDense | None:
        """The layer of a quantized weight."""
        layer = self._layer(parameter)
        return layer if parameter.kind == "linear" and isinstance(layer, QuantizedDense) else None

    def _integers(self, parameter: Parameter) -> LazyIntegers | None:
        layer = self._quantized(parameter)
        if layer is None:
            return None
        return LazyIntegers(layer.scheme, dtype_of(layer.scale_dtype), lambda: layer.tensor(_expert(parameter)))

    def _find(self, parameter: Parameter) -> keras.Variable:
        """A parameter's variable, under the name that Keras gives the leaf."""
        return getattr(self._layer(parameter), LEAVES[parameter.kind])

    def _read(self, parameter: Parameter) -> np.ndarray:
        tensor = tf.convert_to_tensor(self._find(parameter))
        if parameter.stack is not None:
            tensor = tensor[parameter.stack[1]]
        return (tf.transpose(tensor) if parameter.kind == "linear" else tensor).numpy()

    # -- what users of Keras models ask for -----------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model on ids, on a list of arguments in order, on a dict of them, or on keywords; see `call`."""
        given = {**self.as_keywords(*args), **kwargs}
        arrays = ("past_key_values", "logits_to_keep", "num_logits_to_keep")
        given = {k: np.asarray(v) if isinstance(v, list) and k not in arrays else v for k, v in given.items()}
        return super().__call__(**given)

    def as_keywords(self, *args: Any) -> dict[str, Any]:
        """The arguments of `call` in any of the forms that Keras users give them."""
        if len(args) == 1 and isinstance(args[0], Mapping):
            return dict(args[0])
        if len(args) == 1 and isinstance(args[0], (list, tuple)) and not is_ids(args[0]):
            args = tuple(args[0])
        names = [name for name, p in inspect.signature(self.call).parameters.items() if p.kind is not p.VAR_KEYWORD]
        if len(args) > len(names):
            raise InputError(f"{len(args)} arguments, expected at most {len(names)}: {', '.join(names)}")
        return dict(zip(names, args, strict=False))

    def predict_step(self, data: Any) -> ModelOutput:
        """One batch of `predict`: the output without loss and cache, which cannot be joined over batches."""
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        keywords = {name: x for name, x in self.as_keywords(inputs).items() if name not in self.label_names}
        return self(**{**keywords, "use_cache": False, "return_dict": True}, training=False)

    def __dir__(self) -> list[str]:
        """Without two properties that lead back into the model: Keras would save its variables under their names."""
        return [name for name in super().__dir__() if name not in ("base_model", "stack")]

    @property
    def base_model(self) -> PreTrainedModel:
        """The decoder without its head; itself for a base model."""
        return self.model if self.head else self

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` positions; dtype by default the model's."""
        return KVCache.create(self.config, batch_size, max_length, self.compute_dtype if dtype is None else dtype)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of values in variables, those of quantized weights included; tied ones count once."""
        left_out = {id(v) for v in self.get_input_embeddings().weights} if exclude_embeddings else set()
        layers = [(p, layer) for p in self._parameter_table() if (layer := self._quantized(p)) is not None]
        left_out |= {id(v) for _, layer in layers for v in (layer.values, layer.scale, layer.zero)}
        integers = 0 if only_trainable else sum(parameter.size for parameter, _ in layers)
        weights = self.trainable_weights if only_trainable else self.weights
        return integers + sum(int(np.prod(v.shape)) for v in weights if id(v) not in left_out)

    def get_input_embeddings(self) -> keras.layers.Embedding:
        """The token embedding."""
        return self.base_model.stack.embed_tokens

    def set_input_embeddings(self, layer: keras.layers.Embedding) -> None:
        """Replace the token embedding (and with it a tied head). Its variables are new ones: compile the model anew."""
        replace_layer(self.base_model.stack, "embed_tokens", layer)

    def get_output_embeddings(self) -> keras.layers.Layer | None:
        """The language-model head, if there is one: a `Dense`, or the token embedding where it is tied."""
        return getattr(self, "lm_head", None) or (self.get_input_embeddings() if self.head == "causal_lm" else None)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute blocks in the backward pass rather than keep what is inside them."""
        self.base_model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what is inside blocks for the backward pass."""
        self.base_model.gradient_checkpointing = False

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> keras.layers.Embedding:
        """Change the number of rows of the token embedding and of the language-model head; the config follows.

        New rows get initial values, the same in every framework, and what was frozen stays so. The variables are new
        ones: compile the model anew.

        Args:
            new_num_tokens: rows; default as many as there are.
            pad_to_multiple_of: round that up to a multiple.
        """
        config = resized_config(self.config, new_num_tokens, pad_to_multiple_of)
        rows = config.vocab_size
        resized = [p for p in config.parameters(self.head) if "vocab" in p.axes and p.tied_to is None]
        values, trainable = {}, {}
        for parameter in resized:
            kept = self._read(parameter)[:rows]
            values[parameter] = np.concatenate([kept, parameter.initial(0, kept.dtype)[len(kept) :]])
            trainable[parameter] = self._layer(parameter).trainable
        self.config = self.base_model.config = config
        with global_policy(self.dtype_policy):
            self.set_input_embeddings(embedding(*config.embedding.shape, name="embed_tokens"))
            if getattr(self, "lm_head", None) is not None:
                replace_layer(self, "lm_head", linear(rows, False, name="lm_head"))
        self.make_variables()
        self.bind_parameters(values.items())
        for parameter, flag in trainable.items():
            self._layer(parameter).trainable = flag
        return self.get_input_embeddings()


def _expert(parameter: Parameter) -> int | None:
    """The index of an expert in the variable of its layer; None for others."""
    return None if parameter.stack is None else parameter.stack[1]


def is_ids(value: Any) -> bool:
    """Whether this is rows of ids as lists, and not a list of arguments."""
    return all(isinstance(row, (list, tuple)) and all(isinstance(i, (int, np.integer)) for i in row) for row in value)


def canonical_state(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The values of a model by canonical name, as they are in a checkpoint; tied heads are left out.

    Quantized weights are dequantized.

    Raises:
        InputError: the model has other variables than its config says; every problem is named.
    """
    dtype = dtype_of(model.variable_dtype)
    return {parameter.name: as_floats(array, dtype) for parameter, array in model.read_parameters()}


@contextmanager
def global_policy(policy: keras.DTypePolicy) -> Iterator[None]:
    """Make `policy` that of every layer made meanwhile."""
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)


def replace_layer(parent: keras.Layer, name: str, layer: keras.Layer) -> None:
    """Replace a layer of `parent`. Keras alone would go on counting the variables of the old one."""
    tracker = parent._tracker  # no public way; see test_resize_token_embeddings
    is_locked = tracker.locked  # once its layer has been built
    tracker.unlock()
    tracker.untrack(getattr(parent, name))
    setattr(parent, name, layer)
    if is_locked:
        tracker.lock()


def register_outputs() -> None:
    """Make outputs structures: of `keras.tree` (as in `predict`) and of `tf.nest` (as in `tf.function`).

    Their parts are the fields that are set.
    """

    def flatten(output: ModelOutput) -> tuple[tuple[Any, ...], tuple[type[ModelOutput], tuple[str, ...]]]:
        return output.to_tuple(), (type(output), tuple(output.keys()))

    def unflatten(kind: tuple[type[ModelOutput], tuple[str, ...]], values: Any) -> ModelOutput:
        return kind[0](**dict(zip(kind[1], values, strict=True)))

    for output in OUTPUTS:
        optree.register_pytree_node(output, flatten, unflatten, namespace="keras")
        output.__tf_flatten__ = lambda self: flatten(self)[::-1]
        output.__tf_unflatten__ = staticmethod(unflatten)


register_outputs()
