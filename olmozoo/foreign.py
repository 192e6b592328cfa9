"""What a file or folder is instead of what was expected, and what to do about it.

Readers ask here before they report that something is broken: a Git LFS pointer, a web page, a quantized checkpoint, a
config of AI2's own trainer, names that a training program has put a prefix before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

GIT_LFS = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
# What quantizers name their tensors, and the method it tells of.
QUANTIZED_NAMES = {
    "g_idx": "GPTQ",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "SCB": "bitsandbytes, 8 bits",
    "absmax": "bitsandbytes, 4 bits",
    "quant_map": "bitsandbytes, 4 bits",
    "weight_scale": "fp8 or compressed-tensors",
    "weight_scale_inv": "fp8",
    "weight_packed": "compressed-tensors",
}
FIRST_PREFIX = re.compile(r"^(module\.)+")  # of DataParallel and DistributedDataParallel
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # of torch.compile and FSDP


def file_problem(path: Path) -> str | None:
    """What a file is instead of its content; None where nothing of the kind is recognised."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            head = stream.read(256)
    except OSError:
        return None
    if head.startswith(GIT_LFS):
        return f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder, or download it again"
    if WEB_PAGE.match(head):
        return f"{path} is a web page (HTML), not the file: download it again, from the link of its raw content"
    return None


def quantization(folder: Path, names: Iterable[str]) -> str | None:
    """Why a folder cannot be read that is quantized by a known method; None where it is not.

    Args:
        folder: a checkpoint whose tensors do not fit.
        names: of its tensors, or messages about them. Without a quantizer's tensor or an unreadable one among them, a
            quantization_config alone says nothing: it may be left over.
    """
    text = " ".join(names)
    found = [QUANTIZED_NAMES[name] for name in re.findall(r"\b(?:\w+\.)*(\w+)\b", text) if name in QUANTIZED_NAMES]
    method = quantization_method(_config(folder)) or (found[0] if found else None)
    if method is None or not (found or "has dtype" in text or ".bin" in text):
        return None
    return (
        f"{folder} is quantized ({method}), and olmozoo reads floating point, and what compressed-tensors, torchao and "
        "bitsandbytes store in 8 and 4 bits: take the model that was quantized, or let Transformers dequantize it "
        "(model.dequantize().save_pretrained(...)) where it can"
    )


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The method that the quantization_config of a config.json names."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return None
    bits = "4 bits" if settings.get("load_in_4bit") else "8 bits" if settings.get("load_in_8bit") else ""
    return ", ".join(filter(None, (str(settings.get("quant_method") or "no method named"), bits)))


def is_ai2_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of AI2's own trainer, whatever its `model_type`."""
    return {"d_model", "n_layers", "n_heads"} <= config.keys() and "hidden_size" not in config


def plain_names(names: Collection[str]) -> dict[str, str]:
    """Names without what training programs put before or into them; empty where nothing is to be removed.

    A prefix is removed where all names have it.
    """
    plain = {name: WRAPPERS.sub("", name) for name in names}
    if all(FIRST_PREFIX.match(name) for name in plain.values()):
        plain = {name: FIRST_PREFIX.sub("", new) for name, new in plain.items()}
    changed = any(name != new for name, new in plain.items())
    return plain if changed and len(set(plain.values())) == len(plain) else {}


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
