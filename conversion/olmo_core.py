"""OLMo-core <-> a canonical folder.

    python -m conversion.olmo_core SRC DST               # config.json and model_and_optim/ -> a folder every wing loads
    python -m conversion.olmo_core SRC DST --reverse       # a canonical folder -> config.json and model_and_optim/

Reading needs neither OLMo-core nor PyTorch; `--reverse` needs PyTorch, whose classes the format's index is made of.

The experts of a layer are one matrix there, one under the other. `w2` has each as (in, out). `w1` and `w3` have each as
(in, out) where the layer's `name` is `default`, and as (out, in) where it is `dropless`. The router is flat.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from conversion.common import (
    LAYER,
    DryRun,
    Dst,
    Force,
    Reverse,
    Rule,
    ShardSize,
    Src,
    TokenizerPath,
    Verify,
    canonical_sources,
    check_tied,
    from_canonical,
    run,
    to_canonical,
    yarn_factor,
    yarn_fields,
)
from conversion.sharded import METADATA, read_distributed, write_distributed
from conversion.tensors import by_rows, reshaped
from olmozoo.checkpoint.files import CONFIG, FolderHandle, remove, write_json
from olmozoo.checkpoint.reader import read_unchanged
from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import CheckpointError, ConfigError, InputError, raise_problems
from olmozoo.families.config import ModelConfig, is_number, read_json
from olmozoo.families.flexolmo import FlexOlmoConfig
from olmozoo.families.olmo import OlmoConfig
from olmozoo.families.olmo2 import NormedAttentionConfig, Olmo2Config
from olmozoo.families.olmo3 import FULL, SLIDING, Olmo3Config
from olmozoo.families.olmoe import ExpertsConfig, OlmoeConfig
from olmozoo.typing import Array

FOLDER = "model_and_optim"
PREFIX = "model."  # of names in the index; the optimizer's have another
DEFAULT_LENGTH = 4096  # max_position_embeddings where a config.json does not say: what OLMo 2 was trained with

_BLOCK, _LAYER = f"blocks.{LAYER}.", f"model.layers.{LAYER}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."
_EXPERTS = _BLOCK + "feed_forward_moe.experts.mlp."
_ROUTER = _BLOCK + "feed_forward_moe.router.weight"
_RULES: tuple[Rule, ...] = (
    ("embeddings.weight", ("model.embed_tokens.weight",)),
    *((f"{_BLOCK}attention.w_{letter}.weight", (f"{_ATTENTION}{letter}_proj.weight",)) for letter in "qkv"),
    (_BLOCK + "attention.w_out.weight", (_ATTENTION + "o_proj.weight",)),
    (_BLOCK + "attention.q_norm.weight", (_ATTENTION + "q_norm.weight",)),
    (_BLOCK + "attention.k_norm.weight", (_ATTENTION + "k_norm.weight",)),
    (_BLOCK + "feed_forward.w1.weight", (_MLP + "gate_proj.weight",)),
    (_BLOCK + "feed_forward.w2.weight", (_MLP + "down_proj.weight",)),
    (_BLOCK + "feed_forward.w3.weight", (_MLP + "up_proj.weight",)),
    ("lm_head.norm.weight", ("model.norm.weight",)),
    ("lm_head.w_out.weight", ("lm_head.weight",)),
)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The table of names for a model; of experts, the foreign tensors are as `core_sources` gives them."""
    found = list(_RULES)
    if isinstance(config, NormedAttentionConfig):
        for norm, sublayer in zip(config.block_norms, ("attention", "feed_forward"), strict=True):
            found.append((f"{_BLOCK}{sublayer}_norm.weight", (f"{_LAYER}{norm}.weight",)))
    if isinstance(config, ExpertsConfig):
        found.append((_ROUTER, (_MLP + "gate.weight",)))
        for foreign, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            experts = (f"{_MLP}experts.{expert}.{name}.weight" for expert in range(config.num_experts))
            found.append((_EXPERTS + foreign, tuple(experts)))
    return tuple(found)


# -- configs ----------------------------------------------------------------------------------------------------------

RMS = ("rms", "fused_rms", "cute_rms")
_ABSENT = (None, False)
# What a config must say to be one that these models can express: path below `model` -> the values allowed. `None` is
# what a path that is not there has.
_ALWAYS: dict[str, tuple[Any, ...]] = {
    "block_pattern": (None,),
    "embedding_norm": (None,),
    "embed_scale": (None, 1.0),
    "block.attention_residual_alpha": (None, 1.0),
    "block.feed_forward_residual_alpha": (None, 1.0),
    "lm_head.bias": (False,),
    "attention.type": ("attention", None),
    "attention.name": ("default", None),
    "attention.bias": (False,),
    "attention.gate": (None,),
    "attention.use_head_qk_norm": _ABSENT,
    "attention.qk_norm_per_head_gains": _ABSENT,
    "attention.scalable_softmax": _ABSENT,
    "attention.attention_sinks": _ABSENT,
    "attention.rope.name": ("default", "fused", None),
    "attention.rope.no_global_rope": _ABSENT,
    "attention.rope.partial_rotary_factor": (1.0, None),
}
_DENSE: dict[str, tuple[Any, ...]] = {
    "name": ("default", None),
    "block.feed_forward_moe": (None,),
    "block.feed_forward.name": ("default", None),
    "block.feed_forward.bias": (False,),
    "block.feed_forward.activation": ("silu", None),
}
_SPARSE: dict[str, tuple[Any, ...]] = {
    "name": ("moe", "default", None),
    "block.feed_forward": (None,),
    "block.feed_forward_moe.name": ("default", "dropless", None),
    "block.feed_forward_moe.shared_mlp": (None,),
    "block.feed_forward_moe.router.name": ("default", None),
    "block.feed_forward_moe.router.gating_function": ("softmax", None),
    "block.feed_forward_moe.router.normalize_expert_weights": (None, 1.0),
    "block.feed_forward_moe.router.uniform_expert_assignment": _ABSENT,
    "block.feed_forward_moe.router.bias_gamma": (None,),
}
_ALIKE: dict[str, tuple[Any, ...]] = {  # of families whose layers are all of one kind
    "block_overrides": (None, {}),
    "attention.sliding_window": (None,),
    "attention.rope.scaling": (None,),
}
_NORMED: dict[str, tuple[Any, ...]] = {
    f"{norm}.{field}": values
    for norm in ("block.layer_norm", "attention.qk_norm", "lm_head.layer_norm")
    for field, values in {"name": RMS, "bias": (False,), "elementwise_affine": (True, None)}.items()
} | {"attention.clip_qkv": (None,)}
_OLMO: dict[str, tuple[Any, ...]] = {
    f"{norm}.{field}": values
    for norm in ("block.layer_norm", "lm_head.layer_norm")
    for field, values in {"name": ("default",), "elementwise_affine": (False,), "eps": (1e-5, None)}.items()
} | {"attention.qk_norm": (None,)}
_WANTED = {
    "olmo": _DENSE | _ALIKE | _OLMO,
    "olmo2": _DENSE | _ALIKE | _NORMED,
    "olmo3": _DENSE | _NORMED,
    "olmoe": _SPARSE | _ALIKE | _NORMED,
    "flex_olmo": _SPARSE | _ALIKE | _NORMED,
}
Core = OlmoConfig | Olmo2Config | Olmo3Config | OlmoeConfig | FlexOlmoConfig
BLOCKS: dict[str, type[Core]] = {  # by the name of a block: norms before or after the sublayers, one MLP or experts
    "default": OlmoConfig,
    "reordered_norm": Olmo2Config,
    "moe": OlmoeConfig,
    "moe_reordered_norm": FlexOlmoConfig,
}
YARN = "olmo_core.nn.rope.YaRNRoPEScalingConfig"
_YARN_FIELDS = {  # theirs, and ours
    "factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "old_context_len": "original_max_position_embeddings",
}
_YARN_DEFAULTS = {"factor": 8.0, "beta_fast": 32, "beta_slow": 1, "old_context_len": 8192}


class Fields:
    """The `model` section of a config.json, read by path; `attention` is where its version keeps the block's mixer."""

    def __init__(self, data: dict[str, Any], where: Path) -> None:
        model = data.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("block"), dict):
            raise ConfigError(f"{where} has no section 'model' with a 'block'")
        block = model["block"]
        self.mixer = "sequence_mixer" if "sequence_mixer" in block else "attention"
        self.data, self.problems = model, list[str]()

    def path(self, path: str) -> str:
        """The full path of a field, for messages."""
        return f"block.{self.mixer}.{path.removeprefix('attention.')}" if path.startswith("attention.") else path

    def __getitem__(self, path: str) -> Any:
        value: Any = self.data
        for key in self.path(path).split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def require(self, wanted: dict[str, tuple[Any, ...]], family: str) -> None:
        """Note each field that has none of the values it may have."""
        for path, values in wanted.items():
            if self[path] not in values:
                allowed = " or ".join(map(repr, values))
                self.problems.append(f"model.{self.path(path)} is {self[path]!r}, expected {allowed} for {family}")

    def number(self, path: str, default: int | float | None = None) -> Any:
        """A positive number; a note, and 1, where it is none."""
        value = default if self[path] is None else self[path]
        if not is_number(value) or value is None or value <= 0:
            self.problems.append(f"model.{self.path(path)} is {value!r}, expected a positive number")
            return 1
        return value


def to_config(data: dict[str, Any], where: Path, length: int | None) -> ModelConfig:
    """The canonical config of an OLMo-core one, by the name of its blocks; OLMo 2's with a window are OLMo 3's.

    Args:
        data: the contents of config.json.
        where: that file.
        length: max_position_embeddings; default what the file says of the length of training sequences.

    Raises:
        ConfigError: no OLMo can express it. One error names every field that is in the way.
    """
    model = Fields(data, where)
    block = model["block.name"]
    family = BLOCKS.get(block if isinstance(block, str) else "", OlmoConfig)
    if family is Olmo2Config and model["attention.sliding_window"] is not None:
        family = Olmo3Config
    if block not in BLOCKS:
        known = ", ".join(f"{name!r} ({cls.name})" for name, cls in BLOCKS.items())
        model.problems.append(f"model.block.name is {block!r}, expected one of {known}")
    model.require(_ALWAYS | _WANTED[family.model_type], family.name)
    heads, hidden = model.number("attention.n_heads"), model.number("d_model")
    if model["attention.head_dim"] not in (None, hidden // heads):
        model.problems.append(
            f"model.{model.path('attention.head_dim')} is {model['attention.head_dim']!r}, expected {hidden // heads}"
        )
    fields = {
        "vocab_size": model.number("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": model.number(
            f"block.feed_forward{'_moe' if issubclass(family, ExpertsConfig) else ''}.hidden_size"
        ),
        "num_hidden_layers": model.number("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": model.number("attention.n_kv_heads", heads),
        "rope_theta": float(model.number("attention.rope.theta", 500_000)),
        "tie_word_embeddings": model["tie_word_embeddings"] or False,
        "attention_bias": False,
        "max_position_embeddings": length or _trained_length(data),
        **_special_tokens(data),
    }
    if issubclass(family, ExpertsConfig):
        router = "block.feed_forward_moe.router"
        fields["num_experts"] = model.number("block.feed_forward_moe.num_experts")
        fields["num_experts_per_tok"] = model.number(f"{router}.top_k", 1)
        fields["norm_topk_prob"] = model[f"{router}.normalize_expert_weights"] is not None  # the sum of magnitudes
    if issubclass(family, NormedAttentionConfig):
        eps = model.number("block.layer_norm.eps", 1e-5)
        same = (eps, None) if eps == 1e-5 else (eps,)
        model.require(dict.fromkeys(("attention.qk_norm.eps", "lm_head.layer_norm.eps"), same), family.name)
        fields["rms_norm_eps"] = eps
    else:
        fields["clip_qkv"] = model["attention.clip_qkv"]
    if model["attention.rope"] is None:
        model.problems.append(f"model.{model.path('attention.rope')} is None, expected rotary positions")
    if family is Olmo3Config:
        fields |= _layer_fields(model, fields["num_hidden_layers"])
    raise_problems(f"{where} is not one of a model of the OLMo family", model.problems, ConfigError)
    return family.from_dict(fields)


def _layer_fields(model: Fields, layers: int) -> dict[str, Any]:
    """The fields of an OLMo 3 that are by the type of layer."""
    windows, scalings = _windows(model, layers), _scalings(model, layers)
    sizes = sorted({window for window in windows if window != -1})
    if len(sizes) > 1:
        path = model.path("attention.sliding_window")
        model.problems.append(f"model.{path} has the windows {sizes}, expected one size")
    types = [FULL if window == -1 else SLIDING for window in windows]
    found = {}
    for kind in (FULL, SLIDING):
        of_kind = [scaling for scaling, other in zip(scalings, types, strict=True) if other == kind]
        if any(scaling != of_kind[0] for scaling in of_kind):
            model.problems.append(f"model.block_overrides: rope.scaling differs between layers with {kind}")
        found[kind] = _yarn(model, of_kind[0]) if of_kind else None
    return {
        "layer_types": types,
        "sliding_window": sizes[0] if sizes else None,
        "rope_scaling": found[FULL],
        "sliding_rope_scaling": found[SLIDING],
    }


def _windows(model: Fields, layers: int) -> list[int]:
    """The window of each layer, its own position included; -1 where attention is full."""
    path = "attention.sliding_window"
    pattern = model[f"{path}.pattern"]
    if not isinstance(pattern, list) or not pattern or any(type(w) is not int or w == 0 or w < -1 for w in pattern):
        model.problems.append(f"model.{model.path(path)}.pattern is {pattern!r}, expected positive numbers and -1")
        return [-1] * layers
    first, last = (model[f"{path}.force_full_attention_on_{end}_layer"] is not False for end in ("first", "last"))
    windows = [pattern[(layer - first) % len(pattern)] for layer in range(layers)]
    for forced, layer in ((first, 0), (last, layers - 1)):
        if forced:
            windows[layer] = -1
    return windows


def _scalings(model: Fields, layers: int) -> list[Any]:
    """`rope.scaling` of each layer: the block's, or that of a block that overrides it and is the same but for that."""
    found = [model["attention.rope.scaling"]] * layers
    overrides = model["block_overrides"] or {}

    def without_scaling(block: Any) -> tuple[Any, Any]:
        block = copy.deepcopy(block)
        try:
            return block, block[model.mixer]["rope"].pop("scaling", None)
        except (KeyError, TypeError, AttributeError):
            return None, None

    plain, _ = without_scaling(model["block"])
    for layer, block in overrides.items() if isinstance(overrides, dict) else [("", overrides)]:
        other, scaling = without_scaling(block)
        if not str(layer).isdecimal() or int(layer) >= layers or other != plain:
            model.problems.append(f"model.block_overrides.{layer} differs from model.block in more than rope.scaling")
        else:
            found[int(layer)] = scaling
    return found


def _yarn(model: Fields, scaling: Any) -> dict[str, Any] | None:
    """A `rope_scaling` of one of OLMo-core."""
    if scaling is None:
        return None
    if not isinstance(scaling, dict) or scaling.get("_CLASS_") != YARN:
        model.problems.append(f"rope.scaling is {scaling!r}, expected one of {YARN}")
        return None
    found = {ours: scaling.get(theirs, _YARN_DEFAULTS[theirs]) for theirs, ours in _YARN_FIELDS.items()}
    if not is_number(found["factor"]) or found["factor"] <= 1:
        model.problems.append(f"rope.scaling.factor is {found['factor']!r}, expected more than 1")
        return None
    return {"rope_type": "yarn", **found, "attention_factor": yarn_factor(found["factor"])}


def _trained_length(data: dict[str, Any]) -> int:
    for section, field in (("train_module", "max_sequence_length"), ("dataset", "sequence_length")):
        found = data.get(section)
        if isinstance(found, dict) and type(found.get(field)) is int and found[field] > 0:
            return int(found[field])
    return DEFAULT_LENGTH


def _special_tokens(data: dict[str, Any]) -> dict[str, Any]:
    dataset = data.get("dataset")
    tokenizer = dataset.get("tokenizer") if isinstance(dataset, dict) else None
    found = tokenizer if isinstance(tokenizer, dict) else {}
    return {name: found.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def from_config(config: ModelConfig, where: Path, dtype: str) -> dict[str, Any]:
    """The contents of the config.json that means a canonical config: the inverse of `to_config`.

    Raises:
        ConfigError: it is not one of the OLMo family that OLMo-core can express. One error names every field.
    """
    if not isinstance(config, Core):
        known = ", ".join(map(repr, _WANTED))
        raise ConfigError(f"{where}: model_type is {config.model_type!r}, expected one of {known}")
    yarn = yarn_fields(config) if isinstance(config, Olmo3Config) else None
    expected: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "rope_scaling": (None, config.rope_scaling if yarn else None),
        "head_dim": (config.hidden_size // config.num_attention_heads,),
        "rope_theta": (int(config.rope_theta),),
    }
    if isinstance(config, Olmo3Config):
        expected |= {"sliding_rope_theta": (None,), "sliding_rope_scaling": (None,)}
    if isinstance(config, OlmoeConfig):  # there, the limit is applied before the norms of queries and keys
        expected["clip_qkv"] = (None,)
    problems = [
        f"{name} is {getattr(config, name)!r}, expected {' or '.join(map(repr, values))}"
        for name, values in expected.items()
        if getattr(config, name) not in values
    ]
    raise_problems(f"{where}: this program writes no such OLMo-core config", problems, ConfigError)
    norm: dict[str, Any] = {"name": "default", "eps": 1e-5, "elementwise_affine": False, "bias": False}
    if isinstance(config, NormedAttentionConfig):
        norm = {"name": "rms", "eps": config.rms_norm_eps, "bias": False}
    norm |= {"dtype": dtype, "_CLASS_": "olmo_core.nn.layer_norm.LayerNormConfig"}
    attention = {
        "type": "attention",
        "name": "default",
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.kv_heads,
        "bias": False,
        "clip_qkv": config.clip_qkv if isinstance(config, OlmoConfig) else None,
        "rope": {"name": "default", "theta": int(config.rope_theta), "_CLASS_": "olmo_core.nn.rope.RoPEConfig"},
        "qk_norm": norm if isinstance(config, NormedAttentionConfig) else None,
        "dtype": dtype,
        "_CLASS_": "olmo_core.nn.attention.AttentionConfig",
    }
    if isinstance(config, Olmo3Config):
        attention["sliding_window"] = _core_window(config)
    is_sparse = isinstance(config, ExpertsConfig)
    mlp: dict[str, Any] = {
        "hidden_size": config.intermediate_size,
        "name": "default",
        "bias": False,
        "dtype": dtype,
        "_CLASS_": "olmo_core.nn.feed_forward.FeedForwardConfig",
    }
    if isinstance(config, ExpertsConfig):
        mlp = _core_experts(config, dtype)
    family: type[ModelConfig] = Olmo2Config if isinstance(config, Olmo3Config) else type(config)
    block: dict[str, Any] = {
        "name": next(name for name, of_block in BLOCKS.items() if issubclass(family, of_block)),
        "sequence_mixer": attention,
        "layer_norm": norm,
        "feed_forward_moe" if is_sparse else "feed_forward": mlp,
        "_CLASS_": "olmo_core.nn.transformer.config.TransformerBlockConfig",
    }
    model = {
        "name": "moe" if is_sparse else "default",
        "d_model": config.hidden_size,
        "vocab_size": config.vocab_size,
        "n_layers": config.num_hidden_layers,
        "block": block,
        "lm_head": {
            "name": "default",
            "layer_norm": norm,
            "bias": False,
            "dtype": dtype,
            "_CLASS_": "olmo_core.nn.lm_head.LMHeadConfig",
        },
        "dtype": dtype,
        "tie_word_embeddings": config.tie_word_embeddings,
        "_CLASS_": "olmo_core.nn.transformer.config.TransformerConfig",
    }
    if yarn:
        scaled = copy.deepcopy(block)
        scaling = {theirs: yarn[ours] for theirs, ours in _YARN_FIELDS.items()}
        scaled["sequence_mixer"]["rope"]["scaling"] = scaling | {"_CLASS_": YARN}
        model["block_overrides"] = {str(i): scaled for i, window in enumerate(config.windows) if window is None}
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    dataset = {
        "sequence_length": config.max_position_embeddings,
        "tokenizer": {"vocab_size": config.vocab_size, **tokens},
    }
    return {"model": model, "dataset": dataset}


def _core_experts(config: ExpertsConfig, dtype: str) -> dict[str, Any]:
    """The `feed_forward_moe` of a block: of the kind that drops no token."""
    return {
        "name": "dropless",
        "num_experts": config.num_experts,
        "hidden_size": config.intermediate_size,
        "router": {
            "name": "default",
            "top_k": config.num_experts_per_tok,
            "normalize_expert_weights": 1.0 if config.norm_topk_prob else None,
            "gating_function": "softmax",
            "_CLASS_": "olmo_core.nn.moe.router.MoERouterConfig",
        },
        "dtype": dtype,
        "_CLASS_": "olmo_core.nn.moe.moe.MoEConfig",
    }


def _core_window(config: Olmo3Config) -> dict[str, Any]:
    """The `sliding_window` of a block, whose pattern is as short as can be."""
    windows = [-1 if window is None else window for window in config.windows]
    count = len(windows)
    period = next(n for n in range(1, count + 1) if windows == (windows[:n] * count)[:count])
    return {
        "pattern": windows[:period],
        "force_full_attention_on_first_layer": False,
        "force_full_attention_on_last_layer": False,
        "_CLASS_": "olmo_core.nn.attention.SlidingWindowAttentionConfig",
    }


# -- the program ------------------------------------------------------------------------------------------------------


def core_sources(src: Path, config: ModelConfig) -> dict[str, LazyTensor]:
    """The tensors of an OLMo-core checkpoint, less a tied head that was saved all the same.

    Routers are (experts, in), and each expert's weights, one under the other, (out, in).

    Raises:
        CheckpointError: there is no checkpoint, or it is broken.
    """
    folders = [folder for folder in (src / FOLDER, src) if (folder / METADATA).is_file()]
    if not folders:
        raise CheckpointError(f"{src} has no OLMo-core checkpoint: expected {FOLDER}/{METADATA}")
    found = read_distributed(folders[0], PREFIX)
    if config.tie_word_embeddings and "lm_head.w_out.weight" in found:
        head = "lm_head.w_out.weight"
        check_tied(found.pop(head), found.get("embeddings.weight"), head)
    if isinstance(config, ExpertsConfig):
        kind = Fields(read_json(src / CONFIG), src / CONFIG)["block.feed_forward_moe.name"]
        found = _experts(found, config, ("w2",) if kind == "dropless" else ("w1", "w2", "w3"), flat_routers=False)
    return found


def _experts(
    tensors: dict[str, LazyTensor], config: ExpertsConfig, transposed: tuple[str, ...], flat_routers: bool
) -> dict[str, LazyTensor]:
    """Tensors by name, the named ones of experts with each expert transposed, and routers flat or (experts, in).

    Those that do not fit stay as they are.
    """
    count, width = config.num_experts, config.hidden_size
    result = dict(tensors)
    for layer in map(str, range(config.num_hidden_layers)):
        for name in (_EXPERTS.replace(LAYER, layer) + kind for kind in transposed):
            if name in tensors and len(tensors[name].shape) == 2 and tensors[name].shape[0] % count == 0:
                result[name] = transposed_blocks(tensors[name], count)
        name = _ROUTER.replace(LAYER, layer)
        router = tensors.get(name)
        if router is not None and not flat_routers and router.shape == (count * width,):
            result[name] = reshaped(router, (count, width))
        elif router is not None and flat_routers:
            shape = (count * width,)
            result[name] = dataclasses.replace(router, shape=shape, read=partial(_flat, router), read_rows=None)
    return result


def _flat(tensor: LazyTensor) -> Array:
    return tensor.read().reshape(-1)


def transposed_blocks(tensor: LazyTensor, count: int) -> LazyTensor:
    """A matrix (count * a, b) of blocks one under the other, with each transposed: (count * b, a)."""
    size, width = tensor.shape[0] // count, tensor.shape[1]

    def rows(start: int, stop: int) -> Array:
        if (start, stop) == (0, count * width):
            return tensor.read().reshape(count, size, width).swapaxes(1, 2).reshape(count * width, size)
        first, last = start // width, -(-stop // width)
        blocks = [tensor.rows(block * size, (block + 1) * size).T for block in range(first, last)]
        return np.concatenate(blocks)[start - first * width : stop - first * width]

    return by_rows(tensor.name, tensor.file, tensor.dtype, (count * width, size), rows)


def main(
    src: Src,
    dst: Dst,
    reverse: Reverse = False,
    tokenizer: TokenizerPath = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="max_position_embeddings, where config.json does not say; default 4096.")
    ] = None,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    verify: Verify = True,
    force: Force = False,
) -> None:
    """Convert an OLMo-core checkpoint to a canonical folder, or back."""
    if not reverse:

        def read_core() -> tuple[FolderHandle, ModelConfig, dict[str, LazyTensor]]:
            source = FolderHandle(src)
            config = to_config(read_json(src / CONFIG), src / CONFIG, max_sequence_length)
            return source, config, core_sources(src, config)

        source, config, sources = read_unchanged(src, read_core)
        to_canonical(
            sources,
            rules(config),
            config,
            source,
            dst,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            verify=verify,
            force=force,
        )
        return
    if tokenizer or max_sequence_length:
        raise InputError(
            "--tokenizer and --max-sequence-length are for the way to a canonical folder, not for --reverse"
        )

    def read_canonical() -> tuple[ModelConfig, dict[str, LazyTensor]]:
        config = ModelConfig.from_folder(src)
        from_config(config, src, "float32")  # what cannot be expressed is refused before tensors are read
        return config, canonical_sources(src, config)

    config, sources = read_unchanged(src, read_canonical)

    def write(folder: Path, tensors: list[LazyTensor]) -> None:
        remove(folder / CONFIG)
        remove(folder / FOLDER)
        write_json(folder / CONFIG, from_config(config, src, tensors[0].dtype.name))
        if isinstance(config, ExpertsConfig):  # which are dropless
            named = {tensor.name: tensor for tensor in tensors}
            tensors = list(_experts(named, config, ("w2",), flat_routers=True).values())
        write_distributed(folder / FOLDER, tensors, PREFIX.removesuffix("."))

    from_canonical(
        src,
        dst,
        rules(config),
        config,
        sources,
        write,
        lambda folder: core_sources(folder, config),
        dry_run=dry_run,
        verify=verify,
        force=force,
    )


if __name__ == "__main__":
    run(main)
