"""A canonical checkpoint with fewer key/value heads: each new head is the mean of the heads that it replaces.

    python -m conversion.mha_to_gqa SRC DST --kv-heads N

Query heads that shared a key/value head's group keep sharing it, so the heads pooled together are neighbours (GQA,
arXiv:2305.13245, section 2.1). The result is a start for further training, not an equal model, unless the heads of each
group were equal before.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from conversion.common import (
    DryRun,
    Dst,
    Force,
    ShardSize,
    Src,
    Verify,
    canonical_sources,
    check_dst,
    out,
    run,
    write_canonical,
)
from olmozoo.checkpoint.convert import settings_files
from olmozoo.checkpoint.reader import read_unchanged
from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import ConfigError, InputError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Parameter
from olmozoo.families.rotary import RotaryConfig
from olmozoo.typing import Array

POOLED = re.compile(r"\.self_attn\.(k_proj\.(weight|bias)|v_proj\.(weight|bias)|k_norm\.weight)$")


def pooled_config(src: Path, kv_heads: int) -> tuple[RotaryConfig, RotaryConfig]:
    """The config of a folder, and the same with fewer key/value heads.

    Raises:
        ConfigError: the family has no key/value heads of its own.
        InputError: `kv_heads` does not divide what there is.
    """
    config = ModelConfig.from_folder(src)
    if not isinstance(config, RotaryConfig):
        raise ConfigError(f"{src}: model_type is {config.model_type!r}, which has no num_key_value_heads")
    if kv_heads < 1 or config.kv_heads % kv_heads:
        raise InputError(f"--kv-heads is {kv_heads}, expected a divisor of num_key_value_heads = {config.kv_heads}")
    return config, config.replace(num_key_value_heads=kv_heads)


def main(
    src: Src,
    dst: Dst,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads of the result: a divisor of what SRC has.")],
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    verify: Verify = True,
    force: Force = False,
) -> None:
    """Make a multi-head checkpoint into one with fewer key/value heads, by the mean of each group."""
    check_dst(src, dst, force or dry_run)

    def read_source() -> tuple[RotaryConfig, RotaryConfig, dict[str, LazyTensor], dict[str, bytes]]:
        config, smaller = pooled_config(src, kv_heads)
        return config, smaller, canonical_sources(src, config), settings_files(src)

    config, smaller, sources, files = read_unchanged(src, read_source)
    group = config.kv_heads // kv_heads
    if dry_run:
        table = Table("parameter", "from", "to")
        for parameter in smaller.parameters("causal_lm"):
            if POOLED.search(parameter.name):
                table.add_row(parameter.name, str(list(sources[parameter.name].shape)), str(list(parameter.shape)))
        out.print(table, f"dry run: {table.row_count} parameters would be pooled by {group}, nothing was written")
        return

    def read(parameter: Parameter) -> Array:
        source = sources[parameter.name]
        if not POOLED.search(parameter.name):
            return source.read()
        result = np.empty(parameter.shape, source.dtype)
        width = config.head_dim
        for head in range(kv_heads):
            heads = source.rows(head * group * width, (head + 1) * group * width)
            mean = heads.reshape(group, width, *parameter.shape[1:]).mean(axis=0, dtype=np.float64)
            result[head * width : (head + 1) * width] = mean.astype(source.dtype)
        return result

    def dtype(parameter: Parameter) -> np.dtype[Any]:
        return sources[parameter.name].dtype

    total = sum(tensor.nbytes for tensor in sources.values())
    write_canonical(dst, smaller, read, dtype, total, files=files, max_shard_size=max_shard_size, verify=verify)


if __name__ == "__main__":
    run(main)
