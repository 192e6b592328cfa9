"""A folder that is replaced in one rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from olmozoo.checkpoint.files import WEIGHT_FILES
from olmozoo.errors import CheckpointError
from olmozoo.typing import StrPath


@contextlib.contextmanager
def replacing_folder(folder: StrPath, old: re.Pattern[str] = WEIGHT_FILES) -> Iterator[Path]:
    """Give a staging folder that takes the place of `folder` in one step if the block ends well, and goes if not.

    Files of the old folder other than those called as `old` says are in the staging folder from the start (as hard
    links: replace them, never write into them).

    Raises:
        CheckpointError: something other than a folder is there, or the current folder is that or in that; or the disk
            is full or not writable.
    """
    target = Path(os.path.realpath(folder))
    with contextlib.suppress(FileNotFoundError):  # the current folder may be gone already
        if Path.cwd().is_relative_to(target):
            raise CheckpointError(f"{target} holds the current folder, which would be gone: expected another folder")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is not a folder")
    staging = target.with_name(f".{target.name}.saving-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        if target.exists():
            shutil.copytree(target, staging, symlinks=True, ignore=_named(old, target), copy_function=_link)
        else:
            staging.mkdir()
        yield staging
        _swap(staging, target)
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
        raise CheckpointError(f"{target} was not saved and is as it was before: {what}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _named(pattern: re.Pattern[str], target: Path) -> Callable[[str, list[str]], list[str]]:
    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == target and pattern.fullmatch(name)]

    return ignored


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _remove_abandoned(target: Path) -> None:
    """Clear away the staging folders of processes that were killed; an old folder that one had put aside comes back."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.saving-*"):
        process = path.name.removesuffix("-old").rpartition("-")[2]
        if process != str(os.getpid()) and process.isdigit() and Path(f"/proc/{process}").exists():
            continue
        if path.name.endswith("-old") and not target.exists():
            path.rename(target)  # the process was killed between the two renames of `_swap`
        else:
            shutil.rmtree(path, ignore_errors=True)


def _swap(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; what was there is then at `staging`."""
    if not target.exists():
        staging.rename(target)
    elif not _exchange(staging, target):
        old = target.with_name(f"{staging.name}-old")
        target.rename(old)
        try:
            staging.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step, where the system can (Linux's renameat2); say whether it did."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)
