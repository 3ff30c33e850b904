"""Atomic writes: a file or folder appears on disk whole, or not at all. Reading what `torch.save` wrote."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import secrets
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastgpt2.messages import first_line

# Prefix of the temporary folder that `staged_folder` yields.
_STAGE_PREFIX = ".saving-"


@contextlib.contextmanager
def atomic_file(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """`with atomic_file(path) as file:` replaces `path` once the block has ended and its bytes are on disk.

    A process killed inside the block leaves a file named `.NAME.tmpPID`, which `remove_leftovers` removes.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with _created(temporary, path) as file:
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

    They move once all of them are on disk. A process killed inside the block leaves its stage behind. The next
    `staged_folder` at the same path removes it: a stage is locked while it is written to, so one without a lock is
    abandoned.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: must be a folder, as a checkpoint is one; it is a file: name another")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_stages(folder)
    stage = Path(tempfile.mkdtemp(prefix=_STAGE_PREFIX, dir=folder))
    try:
        with locked_folder(stage):
            mode = _mode_of_new_files(stage)
            yield stage
            files = sorted(stage.iterdir())
            for file in files:
                os.chmod(file, mode)  # safetensors makes files that nobody else can read
                sync(file)
            for file in files:
                os.replace(file, folder / file.name)
            sync(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def create_file(path: Path, content: bytes) -> bool:
    """Create a file with this content atomically. If the file already exists, leave it alone and return False."""
    # Processes on several machines may do this at the same time, and two of them may have the same process id.
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

    Args:
        file: The descriptor.
        path: What errors call it.
        wait: Wait while another process holds the lock.

    Raises:
        BlockingIOError: Another process holds the lock, and `wait` is False.
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
    """Create the folder if it is missing, and lock it while the block runs; see `lock`."""
    Path(path).mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        yield  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            lock(descriptor, path)
        except OSError as error:
            if error.errno != errno.EBADF:  # NFS only locks files open for writing, and a folder cannot be
                raise
        yield
    finally:
        os.close(descriptor)


def check_archive(path: str | PathLike[str]) -> None:
    """Verify the checksums of a file that `torch.save` wrote.

    A file with compressed records is refused too. `torch.save` never compresses: memory-mapping compressed records
    yields garbage, and a small file could inflate to any size. Files from before PyTorch 1.6 are not archives and have
    no checksums; they pass.

    Raises:
        ValueError: The file is damaged, or has compressed records.
        OSError: The file cannot be opened.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(
                        f"{path}: its records must be uncompressed, as torch.save writes them; {record.filename} is "
                        "compressed: load it and save it again with PyTorch"
                    )
                if record.CRC:  # torch.save leaves it 0 if told not to write checksums
                    with archive.open(record) as file:
                        while file.read(1 << 20):
                            pass
    # Damaged bytes make zipfile raise any of these: RuntimeError for a flag that says "encrypted" and for an unknown
    # version or method, UnicodeDecodeError for a name that is not UTF-8.
    except (OSError, zipfile.BadZipFile, EOFError, UnicodeDecodeError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened; an OSError without a file name comes from a bad offset in the archive
        raise ValueError(f"{path}: is damaged ({first_line(error)}); download or save it again") from error


def load_torch_file(path: str | PathLike[str], *, mmap: bool, what: str, advice: str) -> Any:
    """Load what `torch.save` wrote to a file, onto the CPU, without running code from the file.

    Args:
        path: The file.
        mmap: Map the tensors into memory where the format allows it.
        what: What the error says that the file should be.
        advice: What the error advises if it is something else.

    Raises:
        ValueError: The file is damaged or holds something else.
        OSError: The file cannot be opened.
    """
    try:
        # Only zip archives can be memory-mapped, and files from before PyTorch 1.6 are not zip archives.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened; an OSError without a file name comes from a bad offset in the file
        # PyTorch's own message is a page on how to load the file anyway, by running its code.
        is_unsafe = isinstance(error, pickle.UnpicklingError)
        why = "it holds more than tensors and plain values" if is_unsafe else first_line(error)
        raise ValueError(f"{path}: not a readable {what} ({why}); {advice}") from error


def link_file(path: Path, link: Path) -> None:
    """Atomically make `link` a hard link to `path`, or a copy if the file system has no hard links."""
    temporary = _temporary(link)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, link)
    sync(link.parent)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files that killed processes left in `folder`; with `name`, only those of that file."""
    leftover = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.tmp\d+")
    for path in folder.iterdir():
        if leftover.fullmatch(path.name):
            path.unlink()
        elif name is None and path.name.startswith(_STAGE_PREFIX):
            shutil.rmtree(path)


def _remove_abandoned_stages(folder: Path) -> None:
    """Remove the stages in a folder that are not locked: the processes that wrote them were killed."""
    if os.name == "nt":
        return  # folders cannot be locked there
    for stage in folder.glob(f"{_STAGE_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is locked, has just been removed, or its file system has no locks
            descriptor = os.open(stage, os.O_RDONLY)
            try:
                lock(descriptor, stage)
                shutil.rmtree(stage)
            finally:
                os.close(descriptor)


def _mode_of_new_files(folder: Path) -> int:
    """The mode of new files in a folder. A probe file shows it, because the umask cannot be read without setting it."""
    probe = folder / "mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _created(temporary: Path, path: Path) -> BinaryIO:
    """Open a temporary file for writing; errors name the file that it is to become."""
    try:
        return open(temporary, "wb")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp{os.getpid()}")


def staging_path(path: Path) -> Path:
    """A path beside `path` to prepare or remove the folder at, so that `path` itself is always whole or absent.

    `remove_leftovers` removes what a killed process left there.
    """
    return path.with_name(f"{_STAGE_PREFIX}{path.name}")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
