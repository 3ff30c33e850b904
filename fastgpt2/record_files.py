"""Files of records that can be resumed after an interruption, and that several processes can write together.

A record is appended in one write as soon as it is finished. An interrupted run therefore leaves whole records, and at
most one torn record at the end of a file.

A single process writes to the output itself. Several processes, each with its `Shard` of the work, write to
`OUTPUT.part-0`, `OUTPUT.part-1` and so on; the process that finishes last merges all records into the output. A
finished output is sorted by the records' keys, in whatever order they were finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from fastgpt2.files import atomic_file, create_file, lock, remove_leftovers
from fastgpt2.messages import shown

FASTA_WIDTH = 60

Key = tuple[int, int]  # (prompt index, sample index) of a sample, (index, 0) of a scored sequence
R = TypeVar("R")

# Line breaks other than \n and \r that `str.splitlines` and other readers split at. They are escaped, so that every
# reader sees a record as one line.
LINE_BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"}

_TEXT_ESCAPES = {**LINE_BREAKS, **str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})}


class RecordFormat(ABC, Generic[R]):
    """How records are written and read back."""

    @abstractmethod
    def encode(self, record: R) -> str:
        """The text of a record, with its final newline."""

    @abstractmethod
    def scan(self, file: BinaryIO) -> Iterator[tuple[int, Key]]:
        """Yield (offset of its end, key) for every whole record; ValueError for contents in another format."""

    @abstractmethod
    def describe(self, key: Key) -> str:
        """What errors call the record with this key."""


class Lines(RecordFormat[R]):
    """A format with one record per line. A line without a newline is a torn record."""

    what: str  # what errors call a record

    def scan(self, file: BinaryIO) -> Iterator[tuple[int, Key]]:
        offset = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield offset, self.key(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"line {number} is not {self.what} that this program wrote") from None

    @abstractmethod
    def key(self, line: bytes) -> Key:
        """The key of a whole line; ValueError, KeyError or TypeError for a line in another format."""


def escape(text: str) -> str:
    r"""Escape a text's line breaks, tabs and backslashes as \n, \r, \t, \\ and \u with 4 digits."""
    return text.translate(_TEXT_ESCAPES)


def unescape(text: str) -> str:
    r"""Undo `escape`."""
    plain = {"n": "\n", "r": "\r", "t": "\t"}

    def character(match: re.Match[str]) -> str:
        return chr(int(match[1], 16)) if match[1] else plain.get(match[2], match[2])

    return re.sub(r"\\(?:u([0-9a-f]{4})|(.))", character, text)


class FastaRecords(RecordFormat[R]):
    """A format in which a record is a header and a sequence in lines of `FASTA_WIDTH` characters.

    The header holds the sequence's length, which tells a whole record from a torn one.
    """

    header: re.Pattern[bytes]  # its groups are the key (one or two numbers) and the length

    def scan(self, file: BinaryIO) -> Iterator[tuple[int, Key]]:
        offset, number = 0, 0
        while line := file.readline():
            number += 1
            header = self.header.match(line)
            if not line.endswith(b"\n"):
                return
            if header is None:
                raise ValueError(f"line {number} is not a header that this program wrote")
            *key, missing = map(int, header.groups())
            size = len(line)
            while missing > 0:
                line = file.readline()
                number += 1
                if not line.endswith(b"\n"):
                    return
                if line.startswith(b">") or len(line) - 1 != min(missing, FASTA_WIDTH):
                    raise ValueError(f"line {number} is not the sequence that its header announces")
                missing -= len(line) - 1
                size += len(line)
            offset += size
            yield offset, (key[0], key[1] if len(key) > 1 else 0)


def fasta_entry(name: str, fields: Mapping[str, object], sequence: str) -> str:
    """A FASTA entry: a header with the name and the fields, and the sequence below it."""
    name = re.sub(r"\s", "_", name)
    header = " ".join([f">{name}", *(f"{key}={value}" for key, value in fields.items())])
    lines = (sequence[start : start + FASTA_WIDTH] for start in range(0, len(sequence), FASTA_WIDTH))
    return "\n".join((header, *lines)) + "\n"


def letters(text: str) -> str:
    """Keep only a text's letters, `*` and `-`. Special tokens such as `<so>`, white space and the rest are removed."""
    return re.sub(r"<[^<>]*>|[^A-Za-z*-]", "", text)


def decimals(number: float | None) -> str:
    """A number with four decimals, or "nan" for None."""
    return "nan" if number is None else f"{number:.4f}"


@dataclass(frozen=True)
class Shard:
    """One process's share of the work: the pieces whose number modulo `count` is `index`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse I/N: `2/4` is the third of four shards. Raises ValueError for other texts."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(f"a shard must be I/N with 0 <= I < N, as 0/4 .. 3/4; got {shown(text)}")
        return cls(int(match[1]), int(match[2]))

    def has(self, piece: int) -> bool:
        """Whether the piece with this number belongs to this share."""
        return piece % self.count == self.index


class RecordFile(Generic[R]):
    """An output that is being written. It is locked against a second process, and records are appended whole.

    The settings are kept beside the output in `<name>.run.json`. A run can be resumed, or joined by a process with
    another shard, only with the settings it began with.

    Args:
        path: The output.
        format: How records are written and read back.
        settings: Everything that the records depend on.
        resume: Keep the records that the output holds, and add those that are missing.
        overwrite: Drop what the output holds.
        wanted: Whether a key belongs to this run; an output with other keys is not resumed.
        shard: This process's share of the work.

    Attributes:
        done: The keys of all records that have been written so far, by any process.

    Raises:
        ValueError: The output belongs to another run, or the arguments contradict each other.
        OSError: The output exists already, cannot be opened, or is being written by another process.
    """

    def __init__(
        self,
        path: Path,
        format: RecordFormat[R],
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        wanted: Callable[[Key], bool] = lambda key: True,
        shard: Shard = Shard(),
    ) -> None:
        self.path, self.format, self.shard, self._wanted = path, format, shard, wanted
        self.done: set[Key] = set()
        check_writable(path, resume=resume, overwrite=overwrite, shard=shard)
        self._own = path if shard.count == 1 else _part(path, shard.index)
        self._file = open(self._own, "ab", buffering=0)  # noqa: SIM115 (open for the life of this object)
        try:
            lock(self._file.fileno(), self._own)
            for name in (path.name, self._settings_path.name):
                if shard.count == 1:  # with several, the other processes may be writing theirs
                    remove_leftovers(path.parent, name)
            there = [file for file in (path, *_parts(path)) if file.exists() and file.stat().st_size]
            if shard.count > 1:
                self._join(settings, is_begun=bool(there))
            elif resume and there:
                self._check_settings(settings)
            else:
                # Emptied before the settings are written, so that records never lie beside settings of another run.
                self._file.truncate(0)
                for part in _parts(path):
                    part.unlink()
                with atomic_file(self._settings_path) as file:
                    file.write(_encoded(settings))
            self._size = self._read_done(self._own)
            self._file.truncate(self._size)
            for other in (path, *_parts(path)):
                if other != self._own:
                    self._read_done(other)
        except BaseException:
            self.close()
            raise

    def write(self, record: R) -> None:
        """Append a record in one write.

        Args:
            record: The record.

        Raises:
            OSError: The record cannot be written, for example because the disk is full. The file is then unchanged.
        """
        encoded = self.format.encode(record).encode("utf-8")
        try:
            written = 0
            while written < len(encoded):
                written += self._file.write(encoded[written:]) or 0
        except OSError as error:
            self._file.truncate(self._size)
            raise OSError(
                f"{self._own}: cannot be written ({error.strerror}); its records are whole, --resume goes on from there"
            ) from error
        self._size += len(encoded)

    def finish(self, is_complete: Callable[[set[Key]], bool] = lambda keys: True) -> bool:
        """Merge all processes' records into the output, sorted by key.

        Args:
            is_complete: Tells whether a set of keys is all that the run should have.

        Returns:
            False while records of other processes are missing. Nothing is merged then.

        Raises:
            OSError: The output cannot be written. No record is lost.
        """
        with contextlib.ExitStack() as held:
            if self._own != self.path:
                # Merging replaces the output, and so its lock, before it removes the parts. The lock of the settings
                # keeps other processes from merging in between.
                held.enter_context(_locked(self._settings_path))
                held.enter_context(_locked(self.path))
            files = [file for file in (self.path, *_parts(self.path)) if file.exists()]
            records = {}  # a killed merge may leave a record twice; the copies are equal
            last: Key | None = None
            in_order = True
            for number, path in enumerate(files):
                with open(path, "rb") as file:
                    start = 0
                    for end, key in self.format.scan(file):
                        in_order = in_order and (last is None or last < key)
                        records[key] = number, start, end
                        last, start = key, end
            if not is_complete(set(records)):
                return False
            if len(files) > 1 or not in_order:
                self._merge(files, [records[key] for key in sorted(records)])
        return True

    def _merge(self, files: list[Path], records: list[tuple[int, int, int]]) -> None:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(open(path, "rb")) for path in files]
            try:
                with atomic_file(self.path) as output:
                    for number, start, end in records:
                        opened[number].seek(start)
                        output.write(opened[number].read(end - start))
            except OSError as error:
                raise OSError(
                    f"{self.path}: cannot be put in order ({error.strerror}); all of its records are there, --resume "
                    "tries again"
                ) from error
        for path in files:
            if path != self.path:
                path.unlink()

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def __enter__(self) -> RecordFile[R]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _settings_path(self) -> Path:
        return settings_path(self.path)

    def _join(self, settings: Mapping[str, Any], is_begun: bool) -> None:
        """Begin the run, or join it if another process has begun it. Settings are written before any record."""
        if is_begun or not create_file(self._settings_path, _encoded(settings)):
            self._check_settings(settings)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"{self.path}: cannot be resumed, because {self._settings_path.name} with its settings is missing; "
                "choose another output"
            ) from None
        except (ValueError, RecursionError):
            before = None
        if not isinstance(before, dict):
            raise ValueError(f"{self._settings_path}: must hold a run's settings; it does not: choose another output")
        now = json.loads(json.dumps(dict(settings)))
        differ = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if differ:
            changes = ", ".join(f"{n} was {shown(before.get(n))} and is {shown(now.get(n))}" for n in differ)
            raise ValueError(
                f"{self.path}: was made by another run ({changes}); resume it with the settings it began with"
            )

    def _read_done(self, path: Path) -> int:
        """Add the keys of a file's whole records to `done`; returns the offset past the last one."""
        end = 0
        try:
            with open(path, "rb") as file:
                for end, key in self.format.scan(file):  # noqa: B007 (its last value is the result)
                    if not self._wanted(key):
                        raise ValueError(f"it holds {self.format.describe(key)}, which is not part of this run")
                    self.done.add(key)
        except FileNotFoundError:  # it does not exist, or has just been merged
            return 0
        except ValueError as error:
            raise ValueError(f"{path}: {error}; it cannot be resumed") from None
        return end


def settings_path(path: Path) -> Path:
    """The path of the file beside an output that holds the settings of its run."""
    return path.with_name(path.name + ".run.json")


def check_writable(path: Path, *, resume: bool, overwrite: bool, shard: Shard = Shard()) -> None:
    """Raise, before any work is done, if the output cannot be opened or would be overwritten without `overwrite`."""
    if resume and overwrite:
        raise ValueError("--resume keeps what the output holds and --overwrite drops it; give one of them")
    if overwrite and shard.count > 1:
        raise ValueError(
            f"--overwrite could drop what another process has written; remove {path} and leave the option out"
        )
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in the folder {path.parent}, which does not exist"
        raise ValueError(f"{path}: {what}; name a file in a folder that exists")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: must be an ordinary file; it is not")
    own = [_part(path, shard.index)] if shard.count > 1 else _parts(path)
    for file in (path, *own):
        if file.exists() and file.stat().st_size and not (resume or overwrite):
            raise FileExistsError(f"{file}: exists; continue it with --resume or replace it with --overwrite")


def _part(path: Path, index: int) -> Path:
    return path.with_name(f"{path.name}.part-{index}")


def _parts(path: Path) -> list[Path]:
    """The existing part files of an output, in order."""
    name = re.compile(re.escape(path.name) + r"\.part-(\d+)")
    found = [(int(match[1]), file) for file in path.parent.iterdir() if (match := name.fullmatch(file.name))]
    return [file for _, file in sorted(found)]


def _encoded(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(settings), indent=2) + "\n").encode()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file while the block runs, after waiting for other processes. The file is created if it is missing."""
    while True:
        with open(path, "ab") as file:
            lock(file.fileno(), path, wait=True)
            try:
                is_same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                is_same = False
            if is_same:  # another process may have replaced the file while this one waited for the lock
                yield
                return
