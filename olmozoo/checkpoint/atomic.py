"""A folder that is written to a temporary folder beside it and then renamed into place."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from olmozoo.errors import CheckpointError
from olmozoo.typing import StrPath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT)
HOLDER = 400  # bytes that say who holds a lock


@contextlib.contextmanager
def atomic_folder(folder: StrPath, replaced: re.Pattern[str]) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` when the block succeeds, and removed when it fails.

    Files of the old folder are hard-linked into the temporary one, except those whose names match `replaced`: replace
    them, never write into them. Everything is flushed to disk before the rename, so that a crash or a power failure
    leaves either the old folder or the new one. Saves to one folder run one after the other, whatever thread or process
    they are in.

    Args:
        folder: the target; made with its parents if need be.
        replaced: names of old files that do not stay.

    Raises:
        CheckpointError: something other than a folder is there, or it contains the current folder; or the disk is full
            or not writable.
    """
    if "\0" in os.fspath(folder):
        raise CheckpointError(f"{os.fspath(folder)!r} is not a path: it has a null character")
    target = Path(os.path.realpath(folder))
    with contextlib.suppress(FileNotFoundError):  # the current folder may have been deleted
        if Path.cwd().is_relative_to(target):
            raise CheckpointError(f"{target} contains the current folder, which would be replaced: choose another")
    if os.path.exists(target) and not target.is_dir():  # a name that is too long is an error of the first step below
        raise CheckpointError(f"{target} is not a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}.lock")):
            _remove_abandoned(target)
            staging = target.with_name(f".{target.name}.saving-{uuid.uuid4().hex[:12]}")
            try:
                staging.mkdir()
                mode = stat.S_IMODE((target if target.exists() else staging).stat().st_mode)
                if target.exists():
                    _link_files(target, staging, replaced)
                yield staging
                staging.chmod(mode)
                _flush(staging)
                _swap(staging, target)
                _flush_folder(target.parent)
            finally:
                _remove_tree(staging)
    except OSError as error:
        what = "the disk is full" if error.errno in FULL else (error.strerror or str(error))
        raise CheckpointError(f"{target} was not saved and is unchanged: {what}") from error


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock, which is a file that says who holds it; it does not stay behind.

    Args:
        path: of the file.
        wait: whether to wait for the thread or process that holds it.

    Raises:
        BlockingIOError: another one holds it and is not waited for; the text says which.
    """
    if fcntl is None:
        lock = filelock.FileLock(path, timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise BlockingIOError("another process") from error
        try:
            yield
        finally:
            lock.release()
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.pread(descriptor, HOLDER, 0).decode("utf-8", "replace")
            os.close(descriptor)
            raise BlockingIOError(holder or "another process") from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # removed by the previous holder: lock the new file
    with contextlib.suppress(OSError):  # the disk may be full
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode()[:HOLDER], 0)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _link_files(target: Path, staging: Path, replaced: re.Pattern[str]) -> None:
    """Hard-link the files that stay into `staging`, which is writable until it is complete."""

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == target and replaced.fullmatch(name)]

    shutil.copytree(target, staging, symlinks=True, ignore=ignored, copy_function=_link, dirs_exist_ok=True)
    staging.chmod(staging.stat().st_mode | stat.S_IRWXU)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed saves left, the lock being held; an old folder that one had moved aside comes back."""
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.saving-*")):
        if path.name.endswith("-old") and not target.exists():
            path.rename(target)  # killed between the two renames of `_swap`
        else:
            _remove_tree(path)


def _remove_tree(folder: Path) -> None:
    """Remove a folder, also where its folders are not writable; nothing is raised where that fails."""
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
        for path, folders, _ in os.walk(folder):
            for name in folders:
                if not Path(path, name).is_symlink():
                    Path(path, name).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flush the new files of a folder, and the folder itself, to disk."""
    for path, _, names in os.walk(folder):
        for name in names:
            file = Path(path, name)
            if not file.is_symlink() and file.stat().st_nlink == 1:  # the others were there before
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        _flush_folder(Path(path))


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # has no such call for folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(staging: Path, target: Path) -> None:
    """Put `staging` where `target` is; the old folder is then at `staging`."""
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
        _remove_tree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step where the system can (Linux's renameat2); return whether it did."""
    try:
        renameat2: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
