"""Files that appear whole, on disk, or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO

# How the name of a folder begins in which a checkpoint's files are written before they take their places.
STAGE_PREFIX = ".saving-"


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


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes were writing into `folder` (of the file called `name` only, where one is given)."""
    leftover = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.tmp\d+")
    for path in folder.iterdir():
        if leftover.fullmatch(path.name):
            path.unlink()
        elif name is None and path.name.startswith(STAGE_PREFIX):
            shutil.rmtree(path)


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
