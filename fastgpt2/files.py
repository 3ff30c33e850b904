"""Files that appear whole, on disk, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from fastgpt2.messages import first_line

# How the name of a `staged_folder` begins.
_STAGE_PREFIX = ".saving-"


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
    sync(path.parent)


@contextlib.contextmanager
def staged_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """`with staged_folder(path) as stage:` writes files into `stage`; at the end of the block they move into `path`.

    They move when all of them are on disk. A process killed within leaves a folder, which the next `staged_folder` at
    `path` clears away: a stage is locked while somebody writes into it.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a checkpoint is a folder, and this is a file; name another")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_stages(folder)
    stage = Path(tempfile.mkdtemp(prefix=_STAGE_PREFIX, dir=folder))
    try:
        with locked_folder(stage):
            yield stage
            files = sorted(stage.iterdir())
            for file in files:
                sync(file)
            for file in files:
                os.replace(file, folder / file.name)
            sync(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def create_file(path: Path, content: bytes) -> bool:
    """Make a file with this content at once; False where there is one of that name already, which stays."""
    # Processes of several machines may do this at once, and two of them may have one number.
    temporary = path.with_name(f"{_temporary(path).name}{secrets.randbelow(10**12):012}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def lock(file: int, path: str | PathLike[str], *, wait: bool = False) -> None:
    """Lock an open file or folder until it is closed.

    Where another process has locked it, BlockingIOError, calling it `path`; or wait for that process.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise BlockingIOError(f"{path}: another process is writing to it; wait for it or name another") from None


@contextlib.contextmanager
def locked_folder(path: str | PathLike[str]) -> Iterator[None]:
    """Make the folder where it is not there, and lock it while the block runs; see `lock`."""
    Path(path).mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        yield  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            lock(descriptor, path)
        except OSError as error:
            if error.errno != errno.EBADF:  # NFS locks only what is open for writing, which a folder cannot be
                raise
        yield
    finally:
        os.close(descriptor)


def check_archive(path: str | PathLike[str]) -> None:
    """Check the checksums of a file that `torch.save` wrote; ValueError where its bytes have changed since.

    A file with compressed records is refused too. `torch.save` writes none: memory maps of them hold garbage, and a
    small file could inflate to any size. Files of PyTorch before 1.6 are no archives and have no checksums.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(
                        f"{path}: its records must be uncompressed, as torch.save writes them; {record.filename} is "
                        "compressed: load and save it with PyTorch"
                    )
                if record.CRC:  # torch.save leaves it 0 where it was told to write no checksums
                    with archive.open(record) as file:
                        while file.read(1 << 20):
                            pass
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file itself cannot be opened; without a name it is a place that the bytes name
        raise ValueError(f"{path}: is damaged ({first_line(error)}); fetch or write it anew") from error


def link_file(path: Path, link: Path) -> None:
    """Make `link` the same file as `path`, atomically (a copy where the file system has no hard links)."""
    temporary = _temporary(link)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, link)
    sync(link.parent)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes were writing into `folder` (of the file called `name` only, where one is given)."""
    leftover = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.tmp\d+")
    for path in folder.iterdir():
        if leftover.fullmatch(path.name):
            path.unlink()
        elif name is None and path.name.startswith(_STAGE_PREFIX):
            shutil.rmtree(path)


def _remove_abandoned_stages(folder: Path) -> None:
    """Remove the stages in a folder that nobody holds a lock on: their processes were killed."""
    if os.name == "nt":
        return  # nobody can lock a folder there
    for stage in folder.glob(f"{_STAGE_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is locked, has just gone, or its file system has no locks
            descriptor = os.open(stage, os.O_RDONLY)
            try:
                lock(descriptor, stage)
                shutil.rmtree(stage)
            finally:
                os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp{os.getpid()}")


def staging_path(path: Path) -> Path:
    """Where a folder is made, or removed, that is to be whole or not there; `remove_leftovers` clears it away."""
    return path.with_name(f"{_STAGE_PREFIX}{path.name}")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
