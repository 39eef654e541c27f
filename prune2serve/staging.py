"""Outputs appear whole, by rename, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prune2serve.errors import Prune2ServeError


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise when `target` exists and may not be replaced; checked before any work and again at the rename."""
    if target.exists() and not force:
        raise Prune2ServeError(f"{target} exists: choose another --output, or replace it with --force")


@contextmanager
def staged_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target` when the block ends without an error.

    An existing `target` is replaced only with `force`, and only at the very end; it is never a mixture.

    Raises:
        Prune2ServeError: `target` exists without `force`, or the disk is full or refuses to be written.
    """
    refuse_existing(target, force=force)
    staging = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        _sweep(target)
        staging.mkdir(parents=True)
        yield staging
        _sync(staging)
        _swap(staging, target, force=force)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free
            raise Prune2ServeError(
                f"the disk that holds {target} is full ({free} bytes free): free some space or choose another place"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise Prune2ServeError(f"cannot write {target}: {error.strerror}") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what killed processes left beside `target`; what a living process is writing stays."""
    for partial in target.parent.glob(f".{target.name}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if not pid.isdigit() or int(pid) == os.getpid() or not _alive(int(pid)):
            shutil.rmtree(partial, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_text(target: Path, text: str) -> None:
    """Write one file whole: a temporary file beside it, synced, then renamed."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    except OSError as error:
        raise Prune2ServeError(f"cannot write {target}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _swap(staging: Path, target: Path, *, force: bool) -> None:
    if not target.exists():
        staging.rename(target)
        return
    refuse_existing(target, force=force)
    # A directory cannot be renamed over a full one: the old one steps aside first and comes back on failure.
    aside = target.parent / f".{target.name}.replaced-{os.getpid()}"
    target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() and not aside.is_symlink() else aside.unlink()
