"""What a folder of prepared data says of itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from olmozoo.checkpoint.files import write_json
from olmozoo.errors import CheckpointError, ConfigError
from olmozoo.families.config import read_json
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.typing import StrPath

IDS, MASK, MANIFEST, TOKENIZER = "input_ids.npy", "label_mask.npy", "manifest.json", "tokenizer"
FORMAT = 1
ITEM_SIZES = {"uint16": 2, "uint32": 4}


@dataclass(frozen=True)
class Manifest:
    """The contents of a manifest.json.

    Attributes:
        format: of the manifest, 1.
        length: tokens of an instance.
        dtype: of input_ids.npy: "uint16" or "uint32".
        vocab_size: of the tokenizer: the highest id and one.
        eos_token_id: ends a document.
        pad_token_id: fills instances up.
        tokenizer: where the tokenizer is from.
        tokenizer_sha256: `tokenizer_hash` of it.
        template: of chats: "tulu", "tokenizer" for the tokenizer's own, or None if there are no chats.
        template_sha256: the SHA-256 of that Jinja template in UTF-8, or None.
        packing: "none", "concat" or "best-fit".
        documents: the number of documents read by kind: "text", "prompt", "chat".
        dropped: the number of documents without a token to learn, which are left out.
        truncated: the number of documents that were cut to `length`.
        instances: the number of rows.
        tokens: the number of tokens without padding.
        targets: the number of tokens to learn; the first one of a row is predicted by nothing and not counted.
        sources: the files read, as {"path": ..., "bytes": ...}.
    """

    format: int
    length: int
    dtype: str
    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    tokenizer: str
    tokenizer_sha256: str
    template: str | None
    template_sha256: str | None
    packing: str
    documents: Mapping[str, int]
    dropped: int
    truncated: int
    instances: int
    tokens: int
    targets: int
    sources: list[dict[str, Any]]

    def save(self, folder: Path) -> None:
        """Write manifest.json into a folder."""
        write_json(folder / MANIFEST, asdict(self))


_NUMBERS = ("format", "length", "vocab_size", "eos_token_id", "pad_token_id", "dropped", "truncated", "instances")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_NUMBERS, "tokens", "targets"), (int,)),
    **dict.fromkeys(("dtype", "tokenizer", "tokenizer_sha256", "packing"), (str,)),
    **dict.fromkeys(("template", "template_sha256"), (str, type(None))),
    "documents": (dict,),
    "sources": (list,),
}


def read_manifest(folder: StrPath) -> Manifest:
    """The manifest of a folder that `prepare` wrote, checked against the sizes of the arrays beside it.

    Raises:
        CheckpointError: the folder has no manifest, a field of it is missing or wrong, or the arrays are of other sizes
            than it says.
    """
    path = Path(os.path.expanduser(folder)) / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {MANIFEST}: expected a folder that `olmozoo prepare` wrote")
    try:
        data = read_json(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    for field in fields(Manifest):
        if field.name not in data:
            raise CheckpointError(f"{path} has no field {field.name}")
        value = data[field.name]
        kinds = _TYPES[field.name]
        if type(value) not in kinds or (kinds == (int,) and not 0 <= value < 1 << 62):
            expected = "a number from 0 on" if kinds == (int,) else " or ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(f"{path}: {field.name} is {repr(value)[:60]}, expected {expected}")
    manifest = Manifest(**{field.name: data[field.name] for field in fields(Manifest)})
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: format is {manifest.format}, expected {FORMAT}: prepare the data again")
    if manifest.dtype not in ITEM_SIZES:
        raise CheckpointError(f"{path}: dtype is {manifest.dtype!r}, expected {' or '.join(ITEM_SIZES)}")
    if manifest.vocab_size > 1 << 8 * ITEM_SIZES[manifest.dtype]:
        raise CheckpointError(f"{path}: dtype is {manifest.dtype}, too small for a vocabulary of {manifest.vocab_size}")
    tokens = manifest.instances * manifest.length
    for file, size in ((IDS, tokens * ITEM_SIZES[manifest.dtype]), (MASK, tokens)):
        array = path.parent / file
        if not array.is_file():
            raise CheckpointError(f"{path.parent} has no {file}")
        if (found := array.stat().st_size) != size:
            raise CheckpointError(
                f"{array} has {found:,} bytes, expected {size:,}: {MANIFEST} has {manifest.instances:,} instances "
                f"of {manifest.length:,} tokens, ids in {manifest.dtype} and masks in bool"
            )
    return manifest


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """The SHA-256 of a tokenizer's tokens and ids, in hexadecimal. Where it is the same, ids mean the same."""
    vocabulary = sorted(tokenizer.backend.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
