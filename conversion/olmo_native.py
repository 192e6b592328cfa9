"""AI2's native trainer (ai2-olmo) <-> a canonical folder.

    python -m conversion.olmo_native SRC DST               # the trainer's checkpoint -> a folder every wing loads
    python -m conversion.olmo_native SRC DST --reverse       # a canonical folder -> config.yaml and model.pt

SRC is any kind of checkpoint the trainer has written: unsharded (model.safetensors or model.pt), sharded
(torch.distributed.checkpoint's .metadata, rankN.pt, model/rankN.pt), or a folder of the first release (hf_olmo: a
config.json with d_model), with old spellings of names as well as new ones.
"""

from __future__ import annotations

import contextlib
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from conversion.archives import as_tensor, read_archive
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
)
from conversion.pickles import decode_key, encode_key
from conversion.sharded import METADATA, read_distributed, read_ranks
from olmozoo.checkpoint.files import FolderHandle, index_entries, remove
from olmozoo.checkpoint.formats import FORMATS, pytorch, safetensors
from olmozoo.checkpoint.reader import read_unchanged
from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import CheckpointError, ConfigError, InputError, raise_problems
from olmozoo.families.config import ModelConfig, is_number, read_json, read_yaml
from olmozoo.families.olmo import OlmoConfig
from olmozoo.families.olmo2 import Olmo2Config
from olmozoo.foreign import is_ai2_config

CONFIG = "config.yaml"
HF_CONFIG = "config.json"  # of hf_olmo
UNSHARDED = "model.pt"
NEOX_EOS = 50279  # what 0 means in old configs of models with the GPT-NeoX tokenizer

# -- names ------------------------------------------------------------------------------------------------------------

_BLOCK, _LAYER = f"transformer.blocks.{LAYER}.", f"model.layers.{LAYER}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."
_SHARED: tuple[Rule, ...] = (
    ("transformer.wte.weight", ("model.embed_tokens.weight",)),
    (_BLOCK + "attn_out.weight", (_ATTENTION + "o_proj.weight",)),
    (_BLOCK + "q_norm.weight", (_ATTENTION + "q_norm.weight",)),
    (_BLOCK + "k_norm.weight", (_ATTENTION + "k_norm.weight",)),
    (_BLOCK + "attn_norm.weight", (_LAYER + "post_attention_layernorm.weight",)),
    (_BLOCK + "ff_proj.weight", (_MLP + "up_proj.weight", _MLP + "gate_proj.weight")),
    (_BLOCK + "ff_out.weight", (_MLP + "down_proj.weight",)),
    (_BLOCK + "ff_norm.weight", (_LAYER + "post_feedforward_layernorm.weight",)),
    ("transformer.ln_f.weight", ("model.norm.weight",)),
    ("transformer.ff_out.weight", ("lm_head.weight",)),
)
_QKV = tuple(_ATTENTION + f"{letter}_proj.weight" for letter in "qkv")
RULES: dict[str, tuple[Rule, ...]] = {  # by block_type
    "sequential": (*_SHARED, (_BLOCK + "att_proj.weight", _QKV)),
    "llama": (
        *_SHARED,
        *((_BLOCK + f"{letter}_proj.weight", (name,)) for letter, name in zip("qkv", _QKV, strict=True)),
    ),
}


def modern_names(sources: dict[str, LazyTensor], block_type: str) -> dict[str, LazyTensor]:
    """The tensors under the names of today's trainer, whatever spelling they were saved under.

    Raises:
        CheckpointError: two spellings of one name are there.
    """
    plain = {name: name.replace("_fsdp_wrapped_module.", "") for name in sources}
    grouped = [re.fullmatch(r"transformer\.block_groups\.0\.(\d+)\.attn_out\.weight", name) for name in plain.values()]
    group_size = sum(match is not None for match in grouped)

    def flat(match: re.Match[str]) -> str:
        return f"transformer.blocks.{int(match[1]) * group_size + int(match[2])}."

    found: dict[str, LazyTensor] = {}
    for name, new in plain.items():
        new = re.sub(r"^transformer\.block_groups\.(\d{1,9})\.(\d{1,9})\.", flat, new)
        names = [new]
        if block_type == "sequential" and re.fullmatch(r"transformer\.blocks\.\d+\.norm\.weight", new):
            names = [new.replace(".norm.", ".attn_norm."), new.replace(".norm.", ".ff_norm.")]  # one norm was both
        for new in names:
            if new in found:
                raise CheckpointError(f"{sources[name].file}: {name} is {new}, which is there under another name too")
            found[new] = sources[name]
    return found


# -- files ------------------------------------------------------------------------------------------------------------


def read_tensors(src: Path) -> dict[str, LazyTensor]:
    """The tensors of a native checkpoint of any kind, under the names they have there.

    Those of a folder that AI2's hf_olmo has saved have a leading `model.`, which is removed.

    Raises:
        CheckpointError: there is no checkpoint, or it is broken.
    """
    if is_hf_olmo(src):
        return {name.removeprefix("model."): tensor for name, tensor in read_hf_olmo(src).items()}
    if (src / safetensors.FILE).is_file():
        file = src / safetensors.FILE
        found = safetensors.read_tensors(file)
        return {name if "." in name else decode_key(name, str(file)): tensor for name, tensor in found.items()}
    if (src / UNSHARDED).is_file():
        return read_bin(src / UNSHARDED)
    for folder in (src / "model_and_optim", src / "model", src):
        if (folder / METADATA).is_file():
            return read_distributed(folder, "model.")
        if any(folder.glob("rank*.pt")):
            return read_ranks(folder)
    raise CheckpointError(
        f"{src} has no native checkpoint: expected {safetensors.FILE}, {UNSHARDED}, {METADATA}, rankN.pt or "
        "model/rankN.pt"
    )


def is_hf_olmo(src: Path) -> bool:
    """Whether this is a folder of hf_olmo, AI2's first release: a config.json with the trainer's fields."""
    return not (src / CONFIG).exists() and (src / HF_CONFIG).is_file() and is_ai2_config(read_json(src / HF_CONFIG))


def read_hf_olmo(src: Path) -> dict[str, LazyTensor]:
    """The tensors of a folder of hf_olmo, in one file or in shards."""
    for format in FORMATS[:2]:  # safetensors and .bin
        read = safetensors.read_tensors if format.file == safetensors.FILE else read_bin
        index = src / f"{format.file}.index.json"
        if (src / format.file).is_file():
            return read(src / format.file)
        if index.is_file():
            shards = [read(src / shard) for shard in sorted(set(index_entries(index).values()))]
            return {name: tensor for shard in shards for name, tensor in shard.items()}
    raise CheckpointError(f"{src} has no weights: expected {FORMATS[0].file}, {FORMATS[1].file} or an index of shards")


def read_bin(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file of `torch.save`, by name."""
    state = read_archive(file)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{file} does not hold a mapping from names to tensors")
    return {name: as_tensor(value, name) for name, value in state.items()}


def read_config(src: Path) -> dict[str, Any]:
    """The `model` section of a folder's config.yaml, with the trainer's own defaults for what it leaves out.

    Raises:
        ConfigError: the file is absent or broken, or a field is of a wrong type.
    """
    file = src / CONFIG
    if is_hf_olmo(src):
        file = src / HF_CONFIG
        return checked_config({"model": read_json(file)}, file)
    return checked_config(read_yaml(file, yaml.safe_load), file)


def checked_config(data: Any, file: Path) -> dict[str, Any]:
    """The `model` section of a config with the trainer's defaults; see `read_config`."""
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict):
        raise ConfigError(f"{file} has no section 'model'")
    found = {**DEFAULTS, **model}
    large = [name for name in FIELDS if isinstance(found.get(name), int) and found[name].bit_length() > 64]
    raise_problems(f"{file} has integers that no model has", large, ConfigError)
    problems = []
    for name, kind in FIELDS.items():
        value = found[name]
        if kind is float and isinstance(value, str):  # YAML 1.1 takes 1e-5, without a dot, for text
            with contextlib.suppress(ValueError):
                value = found[name] = float(value)
        fits = is_number(value) if kind is float else type(value) is kind
        if not fits and not (value is None and name in OPTIONAL):
            problems.append(f"model.{name} is {reprlib.repr(value)}, expected {kind.__name__}")
    raise_problems(f"{file} has wrong values", problems, ConfigError)
    return found


# -- configs ----------------------------------------------------------------------------------------------------------

# The fields that decide what the model computes: their types, and the trainer's defaults (olmo/config.py, ModelConfig).
DEFAULTS: dict[str, Any] = {
    "d_model": 768,
    "n_heads": 12,
    "n_kv_heads": None,
    "clip_qkv": None,
    "n_layers": 12,
    "mlp_ratio": 4,
    "mlp_hidden_size": None,
    "activation_type": "swiglu",
    "block_type": "sequential",
    "alibi": False,
    "rope": False,
    "rope_theta": 10_000,
    "multi_query_attention": None,
    "attention_layer_norm": False,
    "embedding_layer_norm": False,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "layer_norm_eps": 1e-5,
    "attention_layer_norm_with_affine": True,
    "max_sequence_length": 1024,
    "include_bias": True,
    "bias_for_layer_norm": None,
    "scale_logits": False,
    "vocab_size": 50257,
    "embedding_size": 50304,
    "weight_tying": True,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
    "norm_after": False,
}
_UNTYPED = {"n_kv_heads": int, "mlp_hidden_size": int, "multi_query_attention": bool, "bias_for_layer_norm": bool}
_NUMBERS = {"clip_qkv": float, "rope_theta": float, "layer_norm_eps": float}
FIELDS: dict[str, type] = {name: type(value) for name, value in DEFAULTS.items()} | _UNTYPED | _NUMBERS

OPTIONAL = {name for name, value in DEFAULTS.items() if value is None} | {"embedding_size"}

# What a native config must say to be one that these models can express: field -> the values allowed.
_ALWAYS = {
    "activation_type": ("swiglu",),
    "alibi": (False,),
    "rope": (True,),
    "embedding_layer_norm": (False,),
    "include_bias": (False,),
    "scale_logits": (False,),
}
_OLMO = {
    "block_type": ("sequential", "llama"),
    "attention_layer_norm": (False,),
    "layer_norm_type": ("default", "low_precision"),
    "layer_norm_with_affine": (False,),
    "layer_norm_eps": (1e-5,),
}
_OLMO2 = {
    "block_type": ("sequential",),
    "attention_layer_norm": (True,),
    "attention_layer_norm_with_affine": (True,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "clip_qkv": (None,),
}


def to_config(model: dict[str, Any], where: Path) -> ModelConfig:
    """The canonical config of a native one; the one with `norm_after` is OLMo 2.

    Raises:
        ConfigError: neither OLMo nor OLMo 2 can express it. One error names every field that is in the way.
    """
    family = Olmo2Config if model["norm_after"] else OlmoConfig
    wanted = _ALWAYS | (_OLMO2 if model["norm_after"] else _OLMO)
    problems = [
        f"model.{name} is {model[name]!r}, expected {' or '.join(map(repr, values))} for {family.name}"
        for name, values in wanted.items()
        if model[name] not in values
    ]
    kv_heads = model["n_kv_heads"] or (1 if model["multi_query_attention"] else model["n_heads"])
    if model["n_kv_heads"] and model["multi_query_attention"] is not None:
        said = 1 if model["multi_query_attention"] else model["n_heads"]
        if said != kv_heads:
            problems.append(f"model.n_kv_heads is {kv_heads}, expected {said} by model.multi_query_attention")
    inner = model["mlp_ratio"] * model["d_model"] if model["mlp_hidden_size"] is None else model["mlp_hidden_size"]
    if inner % 2:
        problems.append(f"model.mlp_hidden_size is {inner}, expected an even number: half of it is the gate")
    raise_problems(f"{where / CONFIG} is not one of an OLMo or OLMo 2 model", problems, ConfigError)

    rows = model["vocab_size"] if model["embedding_size"] is None else model["embedding_size"]
    eos = model["eos_token_id"]
    data = {
        "vocab_size": rows,
        "hidden_size": model["d_model"],
        "intermediate_size": inner // 2,
        "num_hidden_layers": model["n_layers"],
        "num_attention_heads": model["n_heads"],
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": model["max_sequence_length"],
        "rope_theta": float(model["rope_theta"]),
        "tie_word_embeddings": model["weight_tying"],
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": NEOX_EOS if eos == 0 and rows > NEOX_EOS else eos,
        "pad_token_id": model["pad_token_id"],
    }
    data |= {"rms_norm_eps": model["layer_norm_eps"]} if model["norm_after"] else {"clip_qkv": model["clip_qkv"]}
    return family.from_dict(data)


def from_config(config: ModelConfig, where: Path) -> dict[str, Any]:
    """The `model` section of the config.yaml that means a canonical config: the inverse of `to_config`.

    Raises:
        ConfigError: the trainer cannot express it. One error names every field that is in the way.
    """
    if not isinstance(config, (OlmoConfig, Olmo2Config)):
        raise ConfigError(f"{where}: model_type is {config.model_type!r}, expected 'olmo' or 'olmo2'")
    expected: dict[str, Any] = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "rope_scaling": (None,),
        "head_dim": (config.hidden_size // config.num_attention_heads,),
        "rope_theta": (int(config.rope_theta),),
    }
    problems = [
        f"{name} is {getattr(config, name)!r}, expected {' or '.join(map(repr, values))}"
        for name, values in expected.items()
        if getattr(config, name) not in values
    ]
    eos = config.eos_token_id
    if not isinstance(eos, int):
        problems.append(f"eos_token_id is {eos!r}, expected one number")
    raise_problems(f"{where}: the native trainer has no such model", problems, ConfigError)
    second = isinstance(config, Olmo2Config)
    return DEFAULTS | {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.kv_heads,
        "clip_qkv": None if isinstance(config, Olmo2Config) else config.clip_qkv,
        "n_layers": config.num_hidden_layers,
        "mlp_hidden_size": 2 * config.intermediate_size,
        "rope": True,
        "rope_theta": int(config.rope_theta),
        "attention_layer_norm": second,
        "layer_norm_type": "rms" if second else "default",
        "layer_norm_with_affine": second,
        "layer_norm_eps": config.rms_norm_eps if isinstance(config, Olmo2Config) else 1e-5,
        "attention_layer_norm_with_affine": second,
        "max_sequence_length": config.max_position_embeddings,
        "include_bias": False,
        "bias_for_layer_norm": False,
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "weight_tying": config.tie_word_embeddings,
        "eos_token_id": eos,
        "pad_token_id": eos if config.pad_token_id is None else config.pad_token_id,
        "norm_after": second,
    }


# -- the program ------------------------------------------------------------------------------------------------------


def native_sources(src: Path, model: dict[str, Any]) -> dict[str, LazyTensor]:
    """The tensors of a native checkpoint under today's names, less a tied head that was saved all the same."""
    found = modern_names(read_tensors(src), model["block_type"])
    head = "transformer.ff_out.weight"
    if model["weight_tying"] and head in found:
        check_tied(found.pop(head), found.get("transformer.wte.weight"), head)
    return found


def main(
    src: Src,
    dst: Dst,
    reverse: Reverse = False,
    tokenizer: TokenizerPath = None,
    max_shard_size: ShardSize = "5GB",
    form: Annotated[
        Literal["pt", "safetensors"], typer.Option("--format", help="What --reverse writes; the trainer loads both.")
    ] = "pt",
    dry_run: DryRun = False,
    verify: Verify = True,
    force: Force = False,
) -> None:
    """Convert a checkpoint of AI2's native trainer to a canonical folder, or back."""
    if not reverse:

        def read_native() -> tuple[FolderHandle, dict[str, Any], ModelConfig, dict[str, LazyTensor]]:
            source, model = FolderHandle(src), read_config(src)
            return source, model, to_config(model, src), native_sources(src, model)

        source, model, config, sources = read_unchanged(src, read_native)
        to_canonical(
            sources,
            RULES[model["block_type"]],
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
    if tokenizer:
        raise InputError("--tokenizer is for the way to a canonical folder, not for --reverse")

    def read_canonical() -> tuple[dict[str, Any], ModelConfig, dict[str, LazyTensor]]:
        config = ModelConfig.from_folder(src)
        return from_config(config, src), config, canonical_sources(src, config)

    model, config, sources = read_unchanged(src, read_canonical)

    def write(folder: Path, tensors: list[LazyTensor]) -> None:
        remove(folder / CONFIG)
        remove(folder / UNSHARDED)
        (folder / CONFIG).write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
        if form == "pt":
            pytorch.write(folder / UNSHARDED, tensors)
        else:
            safetensors.write(
                folder / safetensors.FILE, [tensor.renamed(encode_key(tensor.name)) for tensor in tensors]
            )

    from_canonical(
        src,
        dst,
        RULES["sequential"],
        config,
        sources,
        write,
        lambda folder: native_sources(folder, read_config(folder)),
        dry_run=dry_run,
        verify=verify,
        force=force,
    )


if __name__ == "__main__":
    run(main)
