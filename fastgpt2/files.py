"""Files that appear whole, on disk, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """`with atomic_file(path) as file:` replaces `path` once the block has ended and its bytes are on disk.

    A process killed within leaves a file named `.NAME.tmpPID`, which `remove_leftovers` clears away.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def link_file(path: Path, link: Path) -> None:
    """Make `link` the same file as `path`, atomically (a copy where the file system has no hard links)."""
    temporary = _temporary(link)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, link)
    _sync_folder(link.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing into `folder`."""
    for path in folder.glob(".*.tmp*"):
        path.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp{os.getpid()}")


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system lets a folder be opened (POSIX)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
