"""Files of samples: `.jsonl`, `.fasta` and `.txt`, and where an interrupted run stopped.

Each sample is one record, written in one piece when it is finished. So an interrupted run leaves whole records and at
most a torn one at the end.
"""

from __future__ import annotations

import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastgpt2.files import atomic_file, lock, remove_leftovers
from fastgpt2.generate import Sample
from fastgpt2.messages import shown
from fastgpt2.prompt_files import Prompt

FASTA_WIDTH = 60
# What `str.splitlines` and other readers break lines at beside \n and \r: escaped, so that a record is one line to all.
_LINE_BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
_TEXT_ESCAPES = {**_LINE_BREAKS, **str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})}

Key = tuple[int, int]  # (prompt index, sample index)


@dataclass(frozen=True)
class SampleRecord:
    """A sample as it is written."""

    prompt: Prompt
    sample: Sample
    text: str | None

    @property
    def mean_logprob(self) -> float:
        return sum(self.sample.logprobs) / len(self.sample.logprobs)

    @property
    def perplexity(self) -> float | None:
        """exp(-mean log-probability) of the new tokens; None where that is no finite number."""
        return math.exp(-self.mean_logprob) if abs(self.mean_logprob) < 700 else None


class SampleFormat(ABC):
    """How samples are written and read back. `scan` yields (offset past the record, key) for every whole record."""

    @abstractmethod
    def encode(self, record: SampleRecord) -> str: ...

    @abstractmethod
    def scan(self, file: BinaryIO) -> Iterator[tuple[int, Key]]: ...


class _Lines(SampleFormat):
    """A record is a line; one without its newline is torn."""

    def scan(self, file: BinaryIO) -> Iterator[tuple[int, Key]]:
        offset = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield offset, self.key(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"line {number} is not a sample that this program wrote") from None

    @abstractmethod
    def key(self, line: bytes) -> Key:
        """The key of a whole line; ValueError, KeyError or TypeError for a line of another kind."""


class JsonLines(_Lines):
    """An object a line. Log-probabilities are natural, under the model itself (temperature 1, nothing filtered)."""

    def __init__(self, *, token_ids: bool = False, logprobs: bool = False) -> None:
        self.token_ids, self.logprobs = token_ids, logprobs

    def encode(self, record: SampleRecord) -> str:
        sample = record.sample
        fields: dict[str, Any] = {"prompt_index": record.prompt.index, "id": record.prompt.id}
        fields |= {"sample_index": sample.sample_index, "text": record.text, "num_tokens": len(sample.token_ids)}
        fields |= {"finish_reason": sample.finish_reason}
        fields |= {"mean_logprob": record.mean_logprob, "perplexity": record.perplexity}
        if record.prompt.id is None:
            del fields["id"]
        if self.token_ids:
            fields["token_ids"] = sample.token_ids
        if self.logprobs:
            fields["logprobs"] = sample.logprobs
        return json.dumps(fields, ensure_ascii=False).translate(_LINE_BREAKS) + "\n"

    def key(self, line: bytes) -> Key:
        row = json.loads(line)
        prompt_index, sample_index = row["prompt_index"], row["sample_index"]
        if type(prompt_index) is not int or type(sample_index) is not int:
            raise TypeError  # "1", 1.0 and true are none that this program writes
        return prompt_index, sample_index


class Text(_Lines):
    r"""`prompt index <TAB> sample index <TAB> text`, a sample a line; escapes are \\ \n \r \t and \u with 4 digits."""

    def encode(self, record: SampleRecord) -> str:
        return f"{record.prompt.index}\t{record.sample.sample_index}\t{(record.text or '').translate(_TEXT_ESCAPES)}\n"

    def key(self, line: bytes) -> Key:
        prompt_index, sample_index, _ = line.split(b"\t")
        if not (prompt_index.isdigit() and sample_index.isdigit()):
            raise ValueError  # `int` takes "+1", " 1" and "1_0" too
        return int(prompt_index), int(sample_index)


def unescape(text: str) -> str:
    r"""The text that a `.txt` record's third column stands for."""
    plain = {"n": "\n", "r": "\r", "t": "\t"}

    def character(match: re.Match[str]) -> str:
        return chr(int(match[1], 16)) if match[1] else plain.get(match[2], match[2])

    return re.sub(r"\\(?:u([0-9a-f]{4})|(.))", character, text)


class Fasta(SampleFormat):
    """`>id_sample prompt=0 sample=1 length=120 tokens=40 finish=stop perplexity=5.2`, then the sequence in lines of 60.

    The sequence is the text's letters, `*` and `-`; tokens spelled `<so>`, white space and the rest are left out.
    The length in the header tells a whole record from a torn one.
    """

    _HEADER = re.compile(rb">\S+ prompt=(\d+) sample=(\d+) length=(\d+) ")

    def encode(self, record: SampleRecord) -> str:
        sample = record.sample
        sequence = re.sub(r"<[^<>]*>|[^A-Za-z*-]", "", record.text or "")
        name = re.sub(r"\s", "_", record.prompt.id if record.prompt.id is not None else f"prompt{record.prompt.index}")
        perplexity = "nan" if record.perplexity is None else f"{record.perplexity:.4f}"
        header = (
            f">{name}_{sample.sample_index} prompt={record.prompt.index} sample={sample.sample_index} "
            f"length={len(sequence)} tokens={len(sample.token_ids)} "
            f"finish={sample.finish_reason} perplexity={perplexity}"
        )
        lines = (sequence[start : start + FASTA_WIDTH] for start in range(0, len(sequence), FASTA_WIDTH))
        return "\n".join((header, *lines)) + "\n"

    def scan(self, file: BinaryIO) -> Iterator[tuple[int, Key]]:
        offset, number = 0, 0
        while line := file.readline():
            number += 1
            header = self._HEADER.match(line)
            if not line.endswith(b"\n"):
                return
            if header is None:
                raise ValueError(f"line {number} is not a header that this program wrote")
            missing, size = int(header[3]), len(line)
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
            yield offset, (int(header[1]), int(header[2]))


OUTPUT_SUFFIXES = (".jsonl", ".fasta", ".txt")


def sample_format(path: Path, *, token_ids: bool = False, logprobs: bool = False) -> SampleFormat:
    """The format that an output's name asks for."""
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"{path}: an output must end in {', '.join(OUTPUT_SUFFIXES)}; got {path.suffix!r}")
    if path.suffix == ".jsonl":
        return JsonLines(token_ids=token_ids, logprobs=logprobs)
    if token_ids or logprobs:
        raise ValueError(f"{path}: token ids and log-probabilities need a .jsonl output; got {path.suffix!r}")
    return Fasta() if path.suffix == ".fasta" else Text()


# -- a file that is being written --------------------------------------------------------------------------------


class SampleFile:
    """A file of samples that is being written: no second process can write to it, and records are appended whole.

    `settings` are what the samples depend on. They are kept beside the file, in `<name>.run.json`, and a run is resumed
    only with the settings it began with. `done` holds the keys of the samples that are there already. A file with
    samples that are not `wanted` is not resumed.
    """

    def __init__(
        self,
        path: Path,
        format: SampleFormat,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        wanted: Callable[[Key], bool] = lambda key: True,
    ) -> None:
        self.path, self.format, self._wanted = path, format, wanted
        self.done: set[Key] = set()
        check_writable(path, resume=resume, overwrite=overwrite)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the life of this object)
        try:
            lock(self._file.fileno(), path)
            remove_leftovers(path.parent, self._settings_path.name)
            size = os.path.getsize(path)
            if resume and size:
                self._check_settings(settings)
                self._size = self._read_done()
            else:
                # Emptied before the settings are written: whatever is in the file was made with the settings beside it.
                self._size = 0
            if self._size < size:
                self._file.truncate(self._size)
            if not self._size:
                with atomic_file(self._settings_path) as file:
                    file.write((json.dumps(dict(settings), indent=2) + "\n").encode())
        except BaseException:
            self.close()
            raise

    def write(self, record: SampleRecord) -> None:
        """Append one sample in one write. OSError, with the file as it was before, when there is no room for it."""
        encoded = self.format.encode(record).encode("utf-8")
        try:
            written = 0
            while written < len(encoded):
                written += self._file.write(encoded[written:]) or 0
        except OSError as error:
            self._file.truncate(self._size)
            raise OSError(
                f"{self.path}: cannot be written ({error.strerror}); its samples are whole, --resume goes on from there"
            ) from error
        self._size += len(encoded)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _settings_path(self) -> Path:
        return self.path.with_name(self.path.name + ".run.json")

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._settings_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"{self.path}: cannot be resumed, {self._settings_path.name} with its settings is not beside it; "
                "choose another output"
            ) from None
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(f"{self._settings_path}: is not a run's settings; choose another output")
        now = json.loads(json.dumps(dict(settings)))
        differ = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if differ:
            changes = ", ".join(f"{n} was {shown(before.get(n))} and is {shown(now.get(n))}" for n in differ)
            raise ValueError(f"{self.path}: was made by another run ({changes}); resume it as it was begun")

    def _read_done(self) -> int:
        end = 0
        with open(self.path, "rb") as file:
            try:
                for end, key in self.format.scan(file):  # noqa: B007 (its last value is the result)
                    if not self._wanted(key):
                        raise ValueError(f"it holds sample {shown(key[1])} of prompt {shown(key[0])}, not of this run")
                    self.done.add(key)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}; it cannot be resumed") from None
        return end


def check_writable(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse, before any work, an output that could not be opened or that holds something."""
    if resume and overwrite:
        raise ValueError("--resume keeps what the output holds and --overwrite drops it; give one of them")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in the folder {path.parent}, which does not exist"
        raise ValueError(f"{path}: {what}; name a file in a folder that exists")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: must be an ordinary file; it is not")
    if path.exists() and path.stat().st_size and not (resume or overwrite):
        raise FileExistsError(f"{path}: exists; continue it with --resume or replace it with --overwrite")
