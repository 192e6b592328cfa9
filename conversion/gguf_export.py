"""A canonical checkpoint -> a GGUF file, for llama.cpp.

    python -m conversion.gguf_export SRC OUT.gguf

OLMo, OLMo 2, OLMo 3 and OLMoE, in the checkpoint's own dtype (float64 becomes float32, and norms and routers are
float32, as llama.cpp wants them); llama.cpp's own `llama-quantize` makes smaller ones of it. llama.cpp has no FlexOlmo
and no OPT.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import gguf
import ml_dtypes
import numpy as np
import typer
from rich.table import Table

from conversion.common import (
    DryRun,
    Src,
    Verify,
    canonical_sources,
    compare,
    err,
    out,
    progress,
    run,
    tokenizer_files,
    yarn_fields,
)
from olmozoo.checkpoint.files import FolderHandle
from olmozoo.checkpoint.reader import read_unchanged
from olmozoo.checkpoint.tensors import LazyTensor, MappedFile
from olmozoo.errors import CheckpointError, ConfigError, InputError, raise_problems
from olmozoo.families.config import ModelConfig, read_json
from olmozoo.families.olmo import OlmoConfig
from olmozoo.families.olmo2 import NormedAttentionConfig, Olmo2Config
from olmozoo.families.olmo3 import SLIDING, Olmo3Config
from olmozoo.families.olmoe import OlmoeConfig
from olmozoo.families.parameter import Parameter, by_variable
from olmozoo.text.chat import chat_templates
from olmozoo.typing import Array

Kind = gguf.GGMLQuantizationType
Exportable = OlmoConfig | Olmo2Config | Olmo3Config | OlmoeConfig
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KINDS = {np.dtype(np.float32): Kind.F32, np.dtype(np.float16): Kind.F16, BFLOAT16: Kind.BF16}
FILE_KINDS = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
}


def check_config(config: ModelConfig, where: Path) -> Exportable:
    """The config, where llama.cpp can express it.

    Raises:
        ConfigError: it cannot. One error names every field that is in the way.
    """
    if not isinstance(config, Exportable):
        raise ConfigError(f"{where}: model_type is {config.model_type!r}, expected 'olmo', 'olmo2', 'olmo3' or 'olmoe'")
    expected: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "rope_scaling": (None,),
        "head_dim": (config.hidden_size // config.num_attention_heads,),
    }
    if isinstance(config, Olmo3Config):  # sliding layers have the same theta there, and no scaling
        expected |= {"sliding_rope_theta": (None,), "sliding_rope_scaling": (None,)}
        if yarn_fields(config):
            expected["rope_scaling"] = (config.rope_scaling,)
    if isinstance(config, OlmoeConfig):
        heads = (None, config.num_attention_heads)
        expected |= {"norm_topk_prob": (False,), "clip_qkv": (None,), "num_key_value_heads": heads}
    raise_problems(
        f"{where}: llama.cpp has no such model",
        (
            f"{name} is {getattr(config, name)!r}, expected {' or '.join(map(repr, values))}"
            for name, values in expected.items()
            if getattr(config, name) not in values
        ),
        ConfigError,
    )
    return config


def arch_of(config: Exportable) -> gguf.MODEL_ARCH:
    """The gguf library's name for the family; llama.cpp runs OLMo 3 as OLMo 2 with windows."""
    if isinstance(config, OlmoeConfig):
        return gguf.MODEL_ARCH.OLMOE
    return gguf.MODEL_ARCH.OLMO if isinstance(config, OlmoConfig) else gguf.MODEL_ARCH.OLMO2


def exported(name: str, parameter: Parameter, sources: list[LazyTensor], config: ModelConfig) -> LazyTensor:
    """A tensor as it goes into the file: its name, row order and dtype there; several sources are those of experts."""
    is_wide = sources[0].dtype == np.float64 or parameter.kind == "norm" or parameter.group == "router"
    dtype = np.dtype(np.float32) if is_wide else sources[0].dtype
    # llama.cpp rotates neighbouring pairs in OLMo's heads, and halves in OLMo 2's: only the first needs its rows moved.
    heads = 0
    if isinstance(config, OlmoConfig) and parameter.name.endswith((".q_proj.weight", ".k_proj.weight")):
        heads = config.kv_heads if ".k_proj." in parameter.name else config.num_attention_heads

    def read() -> Array:
        if parameter.stack is not None:
            return np.stack([source.read().astype(dtype, copy=False) for source in sources])
        array = sources[0].read().astype(dtype, copy=False)
        if heads:
            rows, columns = array.shape
            array = array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        return array

    shape = parameter.shape if parameter.stack is None else (len(sources), *parameter.shape)
    return LazyTensor(name, dtype, shape, read)


def plan(config: Exportable, sources: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of the file, in order, by canonical name, under the names that the gguf library has for them.

    Experts of a layer are one tensor there.
    """
    names = gguf.get_tensor_name_map(arch_of(config), config.num_hidden_layers)
    tensors = {}
    for group in by_variable(config.parameters("causal_lm")):
        parameter = group[0]
        # A tied head is left out where llama.cpp then takes the embedding (OLMo), and written where not (OLMo 2).
        if parameter.tied_to is not None and isinstance(config, OlmoConfig):
            continue
        canonical = parameter.name if parameter.stack is None else parameter.stack[0]
        name = names.get_name(canonical, try_suffixes=(".weight",))
        if name is None:
            raise CheckpointError(f"GGUF has no name for {canonical}")
        found = [sources[parameter.tied_to or parameter.name] for parameter in group]
        if len({source.dtype for source in found}) > 1:
            raise CheckpointError(f"the experts of {canonical} must be of one dtype")
        tensors[canonical] = exported(name, parameter, found, config)
    return tensors


def add_config(writer: gguf.GGUFWriter, config: Exportable, name: str, kind: Kind) -> None:
    """Write what llama.cpp needs to know of the model."""
    writer.add_name(name)
    writer.add_file_type(FILE_KINDS[kind])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if isinstance(config, NormedAttentionConfig):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(1e-5)
        if config.clip_qkv is not None:
            writer.add_clamp_kqv(config.clip_qkv)
    if isinstance(config, OlmoeConfig):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if isinstance(config, Olmo3Config):
        if config.sliding_window is not None:
            writer.add_sliding_window(config.sliding_window)
            writer.add_sliding_window_pattern([kind == SLIDING for kind in config.layer_types or ()])
        if yarn := yarn_fields(config):  # the attention factor is computed from the factor there
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(yarn["factor"])
            writer.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_beta_fast(yarn["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(yarn["beta_slow"])


def add_tokenizer(writer: gguf.GGUFWriter, config: ModelConfig, src: Path) -> None:
    """Write the folder's tokenizer; without one, the file is of token ids only.

    Raises:
        CheckpointError: the tokenizer does not fit the model, or llama.cpp cannot split text as it does.
    """
    if not (src / "tokenizer.json").is_file():
        writer.add_tokenizer_model("no_vocab")
        err.print(f"{src} has no tokenizer.json: the file will work on token ids, not text")
        return
    tokenizer_files(src, config)  # for its checks
    data = read_json(src / "tokenizer.json")
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{src / 'tokenizer.json'} is not a byte-level BPE tokenizer, expected one")
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, gguf.TokenType.NORMAL
    for added in data.get("added_tokens") or ():
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(data.get("pre_tokenizer"), src / "tokenizer.json"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())])
    adders: dict[str, Callable[[int], None]] = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, add in adders.items():
        token = getattr(config, f"{name}_token_id")
        first = token[0] if isinstance(token, list) else token
        if first is not None:
            add(first)
    writer.add_add_bos_token(False)
    file = src / "tokenizer_config.json"
    templates = chat_templates(src, read_json(file) if file.is_file() else {})
    if templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in sorted(templates.items())])


def pre_tokenizer(data: Any, where: Path) -> str:
    """llama.cpp's name for how a tokenizer splits text before it merges.

    Raises:
        CheckpointError: it splits as none of the published OLMo tokenizers does.
    """
    steps = data.get("pretokenizers", [data]) if isinstance(data, dict) else []
    for step in steps:
        if step.get("type") == "Split" and "\\p{N}{1,3}" in str(step.get("pattern")):
            return "dbrx"  # OLMo 2: the rule of cl100k
        if step.get("type") == "ByteLevel" and step.get("use_regex", True):
            return "olmo"  # OLMo: the rule of GPT-2
    raise CheckpointError(
        f"{where} splits text by {str(data)[:200]}, expected GPT-2's rule (OLMo) or cl100k's (OLMo 2)"
    )


def write(file: Path, config: Exportable, tensors: list[LazyTensor], source: FolderHandle, verify: bool) -> None:
    """Write a temporary file, one tensor in memory at a time, and rename it when it is complete and checked.

    Raises:
        CheckpointError: the source's tokenizer does not fit, or the source was replaced before its tokenizer was read;
            or what was written differs.
    """
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}.part")  # no link, and no other process, has this name
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[arch_of(config)])
    try:
        largest = max(tensors, key=lambda tensor: tensor.nbytes)
        add_config(writer, config, source.path.resolve().name, KINDS[largest.dtype])
        add_tokenizer(writer, config, source.path)
        source.check()
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, stored_dtype(tensor), tensor.nbytes, KINDS[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress("writing", sum(tensor.nbytes for tensor in tensors)) as advance:
            for tensor in tensors:
                writer.write_tensor_data(advance(tensor.contiguous()).view(stored_dtype(tensor)))
        writer.close()
        if verify:
            written = read_back(part)
            compare((tensor.name, tensor.read, written[tensor.name]) for tensor in tensors)
        os.replace(part, file)
    finally:
        writer.close()
        part.unlink(missing_ok=True)


def stored_dtype(tensor: LazyTensor) -> np.dtype[Any]:
    """The dtype that the gguf library is given: it knows bfloat16 as bytes only."""
    return np.dtype(np.uint16) if tensor.dtype == BFLOAT16 else tensor.dtype


def read_back(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a GGUF file, as the gguf library finds them."""
    dtypes = {kind: dtype for dtype, kind in KINDS.items()}
    opened = MappedFile(file)
    return {
        tensor.name: opened.tensor(
            tensor.name,
            dtypes[tensor.tensor_type],
            tuple(int(size) for size in reversed(tensor.shape)),
            int(tensor.data_offset),
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


def main(
    src: Src,
    out_file: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write, replaced in one step.")],
    dry_run: DryRun = False,
    verify: Verify = True,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if there is such a file.")] = False,
) -> None:
    """Convert a canonical OLMo, OLMo 2, OLMo 3 or OLMoE checkpoint to a GGUF file for llama.cpp."""
    if out_file.suffix != ".gguf":  # such as a file of SRC
        raise InputError(f"OUT is {str(out_file)!r}, expected a name that ends in .gguf")
    if out_file.exists() and not force and not dry_run:
        raise InputError(f"{out_file} exists already: choose another name, or replace it with --force")

    def read_source() -> tuple[FolderHandle, Exportable, dict[str, LazyTensor]]:
        source, config = FolderHandle(src), check_config(ModelConfig.from_folder(src), src)
        return source, config, plan(config, canonical_sources(src, config))

    source, config, tensors = read_unchanged(src, read_source)
    if dry_run:
        table = Table("canonical parameter", "GGUF tensor", "shape", "dtype")
        for name, tensor in tensors.items():
            table.add_row(name, tensor.name, str(list(tensor.shape)), tensor.dtype.name)
        out.print(table, f"dry run: {len(tensors)} tensors, nothing was written")
        return
    write(out_file, config, list(tensors.values()), source, verify)


if __name__ == "__main__":
    run(main)
