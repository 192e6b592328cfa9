"""Types that many modules share."""

from __future__ import annotations

import os
from typing import Any, TypedDict

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
StrPath = str | os.PathLike[str]


class HubOptions(TypedDict, total=False):
    """How a repository on the hub is read.

    Attributes:
        revision: branch, tag or commit. Default: `main`.
        subfolder: folder inside the repository, or inside the local folder, that holds the files. Default: the top.
        token: hub token; `False` sends none. Default: HF_TOKEN or the token saved by `hf auth login`.
        cache_dir: the cache of downloads. Default: huggingface_hub's own.
        local_files_only: use the cache alone and ask the hub nothing. Default: False.
    """

    revision: str | None
    subfolder: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
