"""A repository's tokenizer files, read into a `tokenizers.Tokenizer`, and written."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from olmozoo.checkpoint.atomic import atomic_folder
from olmozoo.errors import CheckpointError, OlmozooError
from olmozoo.families.config import MOST, read_json
from olmozoo.foreign import file_problem
from olmozoo.hub import CHAT_TEMPLATES, TOKENIZER_FILES
from olmozoo.typing import StrPath

# The attributes of a tokenizer that name a special token.
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Older files list further special tokens under the first name, newer ones under the second.
EXTRA = ("additional_special_tokens", "extra_special_tokens")
# A vocabulary may skip ids, but tables by id are in memory.
SPREAD = 16
# Keys of tokenizer_config.json that are in other files, or tell of the machine that wrote it.
_NOT_WRITTEN = (
    *("added_tokens_decoder", "chat_template", "add_bos_token", "add_eos_token", "tokenizer_file", "vocab_file"),
    *("merges_file", "special_tokens_map_file", "name_or_path", "is_local", "local_files_only", "backend"),
)


@contextlib.contextmanager
def library_errors(kind: type[OlmozooError], message: str) -> Iterator[None]:
    """Raise what the tokenizers library raises as an error of ours.

    Its exceptions have no class of their own, and a panic of its Rust code is a BaseException.
    """
    try:
        yield
    except OlmozooError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{message}: {error}") from error
        raise


def read_files(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str], list[str], dict[str, Any]]:
    """What the files of a repository say.

    Returns:
        The tokenizer itself, the texts of its special tokens by the names in `SPECIAL`, the texts of further special
        tokens, and the contents of tokenizer_config.json.

    Raises:
        CheckpointError: there are no tokenizer files, or they are broken or contradict each other.
        ConfigError: one of the JSON files beside them is not readable.
    """
    settings, config = (_optional(folder / name) for name in ("tokenizer_config.json", "config.json"))
    names = _special_names(folder, settings)
    backend = _backend(folder, settings)
    with library_errors(CheckpointError, f"{folder}: the added tokens are not readable"):
        extra = _add_tokens(backend, folder, settings, names)
        special = _special_tokens(backend, names, config)
        backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special.values()])
    vocabulary = backend.get_vocab()
    token, highest = max(vocabulary.items(), key=lambda item: item[1], default=("", 0))
    if highest >= SPREAD * len(vocabulary) + 1000:
        raise CheckpointError(f"{folder}: token {token!r} has the id {highest}, in a vocabulary of {len(vocabulary)}")
    # A tokenizer.json has its rules in it. Beside a vocabulary, and where the files say nothing, OPT begins with bos.
    gpt2 = "GPT2" in str(settings.get("tokenizer_class"))
    adds = settings.get("add_bos_token", config.get("model_type") == "opt")
    silent = not (folder / "tokenizer.json").is_file() or (backend.post_processor is None and not settings)
    if adds and silent and (config.get("model_type") == "opt" or gpt2):
        _lead_with(backend, special.get("bos_token"), folder)
    return backend, special, extra, settings


def write_files(
    folder: StrPath, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], templates: Mapping[str, str]
) -> tuple[str, ...]:
    """Write a tokenizer's files, as Transformers reads them too; those of an older tokenizer are replaced.

    Args:
        folder: made if need be; other files in it stay.
        backend: written as tokenizer.json.
        settings: of tokenizer_config.json; the special tokens in it are written to special_tokens_map.json too.
        templates: chat templates by name.

    Returns:
        The paths of the files.

    Raises:
        CheckpointError: the folder could not be written and is as it was before, the name of a template is no file
            name, or a text is not valid Unicode.
    """
    kept = {name: value for name, value in settings.items() if name not in _NOT_WRITTEN}
    special = {name: settings[name] for name in SPECIAL if settings.get(name) is not None}
    files = {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
    }
    for name, template in templates.items():
        if not re.fullmatch(r"[\w. -]+", name) or name.startswith("."):
            raise CheckpointError(f"chat template {name!r} cannot be saved: its name is no file name")
        files["chat_template.jinja" if name == "default" else f"{CHAT_TEMPLATES}/{name}.jinja"] = template
    older = re.compile(rf"({'|'.join(map(re.escape, (CHAT_TEMPLATES, *TOKENIZER_FILES)))})\Z")
    try:
        encoded = {name: content.encode() for name, content in files.items()}
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the tokenizer cannot be saved: its files are not valid Unicode: {error}") from error
    with atomic_folder(folder, older) as staging:
        for name, content in encoded.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content)
    return tuple(os.path.join(folder, name) for name in files)


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _backend(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    files = whole if whole.is_file() else f"{vocab} with {merges.name}"
    if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
        others = ", ".join(sorted(os.listdir(folder)))
        raise CheckpointError(f"{folder} has no tokenizer.json, nor vocab.json with merges.txt; it holds {others}")
    for file in (whole, vocab, merges):
        if problem := file_problem(file):
            raise CheckpointError(problem)
    with library_errors(CheckpointError, f"{files} is not a readable tokenizer"):
        if whole.is_file():
            backend = tokenizers.Tokenizer.from_file(str(whole))
        else:
            backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
            prefix = bool(settings.get("add_prefix_space", False))
            backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
            backend.decoder = tokenizers.decoders.ByteLevel()
        backend.encode("")
    backend.no_padding()
    backend.no_truncation()
    return backend


def _special_names(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the files say of special tokens, by `SPECIAL` and `EXTRA`.

    A tokenizer_config.json with an `added_tokens_decoder` is of the newer kind and rules; before that,
    special_tokens_map.json did.
    """
    older = _optional(folder / "special_tokens_map.json")
    both = {**older, **settings} if "added_tokens_decoder" in settings else {**settings, **older}
    return {name: both[name] for name in (*SPECIAL, *EXTRA) if name in both}


def _added_token(value: Any, file: str, special: bool = True) -> tokenizers.AddedToken:
    """A token as the files have it: its text, or an object with its text and how it is matched."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not special, "special": special}
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise CheckpointError(f"{file} has the token {value!r}, expected a text or an object with its content")
    try:
        return tokenizers.AddedToken(value["content"], **{name: bool(value.get(name, flags[name])) for name in flags})
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{file} has the token {value['content']!r}, which is not valid Unicode") from error


def _add_tokens(
    backend: tokenizers.Tokenizer, folder: Path, settings: dict[str, Any], names: dict[str, Any]
) -> list[str]:
    """Add the tokens that the files beside the vocabulary list; the vocabulary's own keep what it says of them.

    Returns:
        The texts of the special tokens without a name.
    """
    listed = [names[name] for name in SPECIAL if names.get(name) is not None]
    unnamed = len(listed)
    for name in EXTRA:
        more = names.get(name) or []
        if not isinstance(more, list | dict):
            raise CheckpointError(f"{folder}: {name} is {more!r}, expected a list of tokens or an object of them")
        listed += more.values() if isinstance(more, dict) else more
    named = [_added_token(value, f"{folder}: a special token") for value in listed]
    special = {token.content for token in named}

    where = "tokenizer_config.json" if "added_tokens_decoder" in settings else "added_tokens.json"
    if where == "added_tokens.json":
        entries = [(i, text) for text, i in _optional(folder / where).items()]
    else:
        added = settings["added_tokens_decoder"]
        if not isinstance(added, dict):
            raise CheckpointError(f"{folder / where}: added_tokens_decoder is {added!r}, expected an object")
        entries = list(added.items())
    try:
        entries = sorted((int(i), value) for i, value in entries)  # the library numbers them in the order they come
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{folder / where} lists added tokens without integers as ids: {error}") from error
    for i, value in entries:
        token = _added_token(value, where, special=isinstance(value, str) and value in special)
        backend.add_tokens([token])
        if (found := backend.token_to_id(token.content)) != i:
            raise CheckpointError(
                f"{folder / where} gives the token {token.content!r} the id {i}, but the vocabulary makes it {found}"
            )
    backend.add_special_tokens(named)
    return list(dict.fromkeys(token.content for token in named[unnamed:]))


def _special_tokens(backend: tokenizers.Tokenizer, names: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """The texts of the special tokens, by name."""
    special = {}
    for name in SPECIAL:
        if name in names:
            value = names[name]
            text = value["content"] if isinstance(value, dict) else value
        elif not names:
            # OPT's own class knows these where its config.json leaves them out.
            known = {"bos_token": 2, "eos_token": 2, "pad_token": 1} if config.get("model_type") == "opt" else {}
            ids = config.get(f"{name}_id", known.get(name))
            first = ids[0] if isinstance(ids, list) and ids else ids
            text = backend.id_to_token(first) if isinstance(first, int) and 0 <= first <= MOST else None
        else:
            text = None
        if text is not None:
            special[name] = text
    return special


def _lead_with(backend: tokenizers.Tokenizer, bos: str | None, folder: Path) -> None:
    """Begin every text with bos, unless the tokenizer does so already."""
    if bos is None:
        raise CheckpointError(f"{folder} begins its texts with a bos token, but none of its files names that")
    i = backend.token_to_id(bos)
    if backend.encode("").ids[:1] == [i]:
        return
    lead = tokenizers.processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, i)]
    )
    own = backend.post_processor
    backend.post_processor = lead if own is None else tokenizers.processors.Sequence([own, lead])
