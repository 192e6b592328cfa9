"""From a checkpoint's name to a local folder: a folder stays as it is, `org/name` comes from the hub or its cache.

Only the files that are needed are downloaded, all of them from one commit. The environment variables of
huggingface_hub (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, ...) keep their meaning.
"""

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Unpack

from olmozoo.errors import CheckpointError, HubError, InputError
from olmozoo.typing import HubOptions, StrPath

Need = Literal["config", "weights", "tokenizer", "model", "adapter"]
HUB_ARGUMENTS = tuple(HubOptions.__annotations__)
WORKERS = 8  # shards that are downloaded at once

# What each need takes of the files that exist. The essential file is the last one (or the weights, which come after
# it): a download that broke off never leaves it behind without the others, so that its presence in the cache says that
# the rest is there too.
_CONFIG = ("generation_config.json", "config.json")
TOKENIZER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("merges.txt", "vocab.json", "tokenizer.json"),
)
CHAT_TEMPLATES = "additional_chat_templates"  # the folder of a tokenizer's chat templates beside the default one
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_FILES: dict[Need, tuple[str, ...]] = {
    "config": (ADAPTER_CONFIG, *_CONFIG),
    "weights": (ADAPTER_CONFIG, *_CONFIG),
    "tokenizer": ("config.json", *TOKENIZER_FILES),
    "model": (*TOKENIZER_FILES, ADAPTER_CONFIG, *_CONFIG),
    "adapter": (*TOKENIZER_FILES, "generation_config.json", ADAPTER_CONFIG),
}
# The first of these that exists is the set of weights.
_WEIGHTS = tuple(
    name
    for single in ("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")
    for name in (single, f"{single}.index.json")
)


def resolve(path_or_repo: StrPath, *, need: Need, **hub: Unpack[HubOptions]) -> Path:
    """Return the local folder that holds what is needed of a checkpoint, downloading it where necessary.

    Args:
        path_or_repo: a folder, or the id of a hub repository (`org/name` or `name`). A folder that exists wins.
        need: `"config"` (config.json, and generation_config.json if there is one), `"weights"` (those and one set of
            weights: safetensors before .bin before what Transformers 4 wrote for TensorFlow and Flax, a single file
            before shards), `"tokenizer"` (its files and config.json), `"model"` (the weights, and the files of the
            tokenizer if there are any) or `"adapter"` (adapter_config.json with its weights, and the tokenizer).
            Where a repository has an adapter, that comes with the weights, or in place of config and weights.
        **hub: see `olmozoo.typing.HubOptions`. For a local folder, all but `subfolder` are ignored.

    Returns:
        The folder itself, or the snapshot of the commit in the cache; with `subfolder`, that folder inside it. When the
        hub cannot be reached, the cached snapshot of the revision, if it holds all that is needed.

    Raises:
        HubError: neither a folder nor a repository; missing or gated repository; missing revision, subfolder or file;
            no answer from the hub and no complete copy in the cache.
        CheckpointError: the index of a sharded checkpoint is broken or names a file outside its folder.
        InputError: `subfolder` leads out of the checkpoint.
    """
    text = os.fspath(path_or_repo)
    folder = Path(os.path.expanduser(text))
    subfolder, cache_dir = hub.get("subfolder"), hub.get("cache_dir")
    inside = PurePosixPath(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise InputError(f"subfolder {subfolder!r} leads out of {text!r}: expected a relative folder inside it")
    if text and os.path.isdir(folder):  # False, too, for what no path can be
        if not os.path.isdir(folder / inside):
            raise HubError(f"{folder} has no subfolder {subfolder!r}")
        return folder / inside
    _check_repo_id(path_or_repo, folder)
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    request = _Request(text, need, hub.get("revision"), inside, cache)
    if hub.get("local_files_only"):
        return _from_cache(request, "local_files_only=True forbids asking the hub")
    return _from_hub(request, hub.get("token"))


@dataclass(frozen=True)
class _Request:
    repo: str
    need: Need
    revision: str | None
    inside: PurePosixPath
    cache_dir: Path | None

    def __str__(self) -> str:
        subfolder = f", subfolder {self.inside.as_posix()!r}" if self.inside.parts else ""
        return f"{self.repo!r} (revision {self.revision or 'main'!r}{subfolder})"


def _check_repo_id(path_or_repo: StrPath, folder: Path) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in an __all__

    if os.path.isfile(folder):
        raise HubError(f"{folder} is a file: expected the checkpoint folder that holds it")
    if not isinstance(path_or_repo, str):
        raise HubError(f"no such folder: {folder}")
    try:
        validate_repo_id(path_or_repo)
    except HFValidationError as error:
        raise HubError(f"{path_or_repo!r} is neither a folder nor the id of a hub repository (org/name)") from error


def _from_hub(request: _Request, token: str | bool | None) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repo, revision, inside = request.repo, request.revision, request.inside
    # The client's failures have no common base (HTTP library, OSError, the RuntimeErrors of hf-xet), hence Exception.
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT, token=token)
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            reason = f"cannot list the files of {request}: {_reason(error, repo)}"
            raise HubError(f"there is no folder {repo!r}, and {reason}") from error
        return _from_cache(request, _reason(error, repo), error)
    sha = info.sha
    if sha is None:
        raise HubError(f"{constants.ENDPOINT} does not say which commit {request} is at")

    def fetch(name: str) -> Path:
        try:
            file = (inside / name).as_posix()
            return Path(hf_hub_download(repo, file, revision=sha, cache_dir=request.cache_dir, token=token))
        except Exception as error:
            raise HubError(f"cannot download {name} of {request}: {_reason(error, repo)}") from error

    paths = [PurePosixPath(file.rfilename) for file in info.siblings or ()]
    inner = [path.relative_to(inside) for path in paths if path.is_relative_to(inside)]
    names = {path.as_posix() for path in inner if path.parent.as_posix() in (".", CHAT_TEMPLATES)}
    folder = _collect(request.need, names, fetch, lambda missing: HubError(f"{request} has no {missing}"))
    if revision != sha:
        _remember(folder.parents[len(inside.parts) + 1] / "refs" / (revision or "main"), sha)
    return folder


def _from_cache(request: _Request, reason: str, cause: Exception | None = None) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    def lack(missing: str) -> HubError:
        cache = request.cache_dir or constants.HF_HUB_CACHE
        reasons = f"there is no folder {request.repo!r}, {reason}, and the cache {cache} has no {missing} of {request}"
        error = HubError(reasons)
        error.__cause__ = cause
        return error

    # Any of the files leads to the snapshot of the revision. None of them: nothing of use is there.
    files = [(request.inside / name).as_posix() for name in _FILES[request.need]]
    found = [try_to_load_from_cache(request.repo, file, request.cache_dir, request.revision) for file in files]
    folder = next((Path(file).parent for file in found if isinstance(file, str)), None)
    inner = folder.rglob("*") if folder else ()
    names = {path.relative_to(folder or path).as_posix() for path in inner if path.is_file()}
    return _collect(request.need, names, lambda name: (folder or Path()) / name, lack)


def _collect(need: Need, names: set[str], fetch: Callable[[str], Path], lack: Callable[[str], HubError]) -> Path:
    """Fetch what is needed of the files `names` of one folder, and return the local copy of that folder."""
    if need == "tokenizer" and "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise lack("tokenizer.json, nor vocab.json with merges.txt")
    adapter = [name for name in ADAPTER_WEIGHTS if name in names][:1] if ADAPTER_CONFIG in names else []
    if need == "adapter" and not adapter:
        raise lack(f"{ADAPTER_CONFIG} with {' or '.join(ADAPTER_WEIGHTS)}")
    if need not in ("tokenizer", "adapter") and "config.json" not in names and not adapter:
        raise lack("config.json")
    weights = [name for name in _WEIGHTS if name in names][:1] if need in ("weights", "model") else []
    if need in ("weights", "model") and not weights and not adapter:
        raise lack(f"weights (any of {', '.join(_WEIGHTS)})")
    if need in ("weights", "model", "adapter"):
        weights = [*adapter, *weights]
    templates = [n for n in sorted(names) if PurePosixPath(n).match(f"{CHAT_TEMPLATES}/*.jinja")]
    wanted = [
        *(templates if need in ("tokenizer", "model", "adapter") else ()),
        *(n for n in _FILES[need] if n in names),
    ]
    files = [fetch(name) for name in (*wanted, *weights)]
    if weights and weights[-1].endswith(".index.json"):
        shards = _shards(files[-1])
        if absent := [shard for shard in shards if shard not in names]:
            raise lack(f"{', '.join(absent)}, which {weights[-1]} names")
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(fetch, shards))
    return files[-1].parent


def _shards(index: Path) -> list[str]:
    """The file names in the weight_map of a sharded checkpoint's index, each a plain name in the index's folder."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not an index: expected JSON with a weight_map of tensors to files"
        ) from error
    if not entries:
        raise CheckpointError(f"{index} names no tensor in its weight_map")
    for tensor, shard in entries:
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\:\0"):
            raise CheckpointError(f"{index}: tensor {tensor!r} is in {shard!r}: expected a file name without a folder")
    return sorted({shard for _, shard in entries})


def _remember(ref: Path, sha: str) -> None:
    """Note in the cache which commit a revision is at, for when the hub is out of reach.

    Only now that the snapshot is complete: after a failed update the cache still leads to the commit before it.
    """
    draft = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # the cache may be read-only
        if not ref.is_file() or ref.read_text() != sha:
            ref.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(sha)
            draft.replace(ref)


def _reason(error: Exception, repo: str) -> str:
    """What a failure of the client means for the user, and what to do about it."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client's "not in the cache either" hides what the hub answered
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo}"
        return f"the repository is gated: request access at {page}, then give a token (token=..., or HF_TOKEN)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository; if it is private, give a token (token=..., or HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such branch, tag or commit"
    first_line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, errors.HfHubHTTPError):
        return f"{constants.ENDPOINT} refused with HTTP status {error.response.status_code} ({first_line})"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return f"the cache cannot be written ({type(error).__name__}: {first_line})"
    return f"{constants.ENDPOINT} could not be reached or broke off ({type(error).__name__}: {first_line})"
