"""Files of bulk generation: prompts in, samples out, and where an interrupted run stopped.

Prompts: `.txt` (a prompt a line), `.jsonl` (objects with "prompt" or "prompt_ids", and an "id" if you like) and
`.fasta` (the header's first word is the id). Samples: `.jsonl`, `.fasta` and `.txt`; each is one record, written in
one piece when it is finished, so that an interrupted run leaves whole records and at most a torn one at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastgpt2.files import atomic_file, remove_leftovers
from fastgpt2.generate import Sample

PROMPT_SUFFIXES = (".txt", ".jsonl", ".fasta")
FASTA_WIDTH = 60
# What `str.splitlines` and other readers break lines at beside \n and \r: escaped, so that a record is one line to all.
_LINE_BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
_TEXT_ESCAPES = {**_LINE_BREAKS, **str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})}

Key = tuple[int, int]  # (prompt index, sample index)


# -- prompts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file: `index` counts the file's prompts from 0, `where` names its file and line in errors."""

    index: int
    content: str | tuple[int, ...]
    where: str
    id: str | None = None


class PromptError(ValueError):
    """A prompt of a file that cannot be used."""


def read_prompts(data: bytes, name: str, suffix: str) -> Iterator[Prompt | PromptError]:
    """The prompts in the contents of a file called `name`, of the kind `suffix`; bad ones as errors, for you to raise.

    Every prompt, good or bad, has its index, so leaving bad ones out does not change what the others become.
    """
    if suffix not in PROMPT_SUFFIXES:
        raise ValueError(f"{name}: a file of prompts must end in {', '.join(PROMPT_SUFFIXES)}; got {suffix!r}")
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    if suffix == ".fasta":
        return _numbered(_fasta_entries(lines), name, _fasta_prompt)
    entries = enumerate(lines, start=1)
    if suffix == ".jsonl":
        return _numbered(((n, line) for n, line in entries if line.strip()), name, _json_prompt)
    return _numbered(entries, name, lambda line: (_decode(line.removesuffix(b"\r")), None))


def _numbered(
    entries: Iterable[tuple[int, bytes]], name: str, parse: Callable[[bytes], tuple[str | tuple[int, ...], str | None]]
) -> Iterator[Prompt | PromptError]:
    for index, (line_number, entry) in enumerate(entries):
        where = f"{name} line {line_number}"
        try:
            content, identifier = parse(entry)
        except ValueError as error:
            yield PromptError(f"{where}: {error}")
        else:
            yield Prompt(index, content, where, identifier)


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8 text; byte {error.start + 1} of the line is not") from None


def _json_prompt(line: bytes) -> tuple[str | tuple[int, ...], str | None]:
    text = _decode(line)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON; {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("must be a flat JSON object; it is nested too deeply") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("prompt_ids" in row):
        raise ValueError('must be an object with either "prompt" or "prompt_ids"')
    identifier = row.get("id")
    if identifier is not None and not isinstance(identifier, (str, int)):
        raise ValueError(f'"id" must be a string or an integer; got {type(identifier).__name__}')
    content: str | tuple[int, ...]
    if "prompt" in row:
        content = row["prompt"]
        if not isinstance(content, str):
            raise ValueError(f'"prompt" must be a string; got {type(content).__name__}')
    else:
        ids = row["prompt_ids"]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError('"prompt_ids" must be a list of integers')
        content = tuple(ids)
    for value in (content, identifier):
        # JSON can spell half a surrogate pair, which no UTF-8 file can hold.
        if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise ValueError("must be Unicode text; it has an unpaired surrogate")
    return content, None if identifier is None else str(identifier)


def _fasta_entries(lines: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each entry's lines with the line number of its header; lines before the first header are an entry too."""
    start, entry = 0, list[bytes]()
    for number, line in enumerate(lines, start=1):
        if line.startswith(b">") and entry:
            yield start, b"\n".join(entry)
            entry = []
        if entry or line.strip():
            start = start if entry else number
            entry.append(line)
    if entry:
        yield start, b"\n".join(entry)


def _fasta_prompt(entry: bytes) -> tuple[str, str | None]:
    header, *lines = _decode(entry).split("\n")
    if not header.startswith(">"):
        raise ValueError('must begin with a header line, ">" and a name')
    return "".join("".join(lines).split()), next(iter(header[1:].split()), None)


# -- samples ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
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


class Format(ABC):
    """How samples are written and read back. `scan` yields (offset past the record, key) for every whole record."""

    @abstractmethod
    def encode(self, row: Row) -> str: ...

    @abstractmethod
    def scan(self, file: BinaryIO) -> Iterator[tuple[int, Key]]: ...


class _Lines(Format):
    """A record is a line; one without its newline is torn."""

    def scan(self, file: BinaryIO) -> Iterator[tuple[int, Key]]:
        offset = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield offset, self.key(line)
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"line {number} is not a sample that this program wrote") from None

    @abstractmethod
    def key(self, line: bytes) -> Key:
        """The key of a whole line; ValueError, KeyError or TypeError for a line of another kind."""


class JsonLines(_Lines):
    """An object a line. Log-probabilities are natural, under the model itself (temperature 1, nothing filtered)."""

    def __init__(self, *, token_ids: bool = False, logprobs: bool = False) -> None:
        self.token_ids, self.logprobs = token_ids, logprobs

    def encode(self, row: Row) -> str:
        sample = row.sample
        fields: dict[str, Any] = {"prompt_index": row.prompt.index, "id": row.prompt.id}
        fields |= {"sample_index": sample.sample_index, "text": row.text, "num_tokens": len(sample.token_ids)}
        fields |= {"finish_reason": sample.finish_reason}
        fields |= {"mean_logprob": row.mean_logprob, "perplexity": row.perplexity}
        if row.prompt.id is None:
            del fields["id"]
        if self.token_ids:
            fields["token_ids"] = sample.token_ids
        if self.logprobs:
            fields["logprobs"] = sample.logprobs
        return json.dumps(fields, ensure_ascii=False).translate(_LINE_BREAKS) + "\n"

    def key(self, line: bytes) -> Key:
        row = json.loads(line)
        return int(row["prompt_index"]), int(row["sample_index"])


class Text(_Lines):
    r"""`prompt index <TAB> sample index <TAB> text`, a sample a line; escapes are \\ \n \r \t and \u with 4 digits."""

    def encode(self, row: Row) -> str:
        return f"{row.prompt.index}\t{row.sample.sample_index}\t{(row.text or '').translate(_TEXT_ESCAPES)}\n"

    def key(self, line: bytes) -> Key:
        prompt_index, sample_index, _ = line.split(b"\t")
        return int(prompt_index), int(sample_index)


def unescape(text: str) -> str:
    r"""The text that a `.txt` record's third column stands for."""
    plain = {"n": "\n", "r": "\r", "t": "\t"}

    def character(match: re.Match[str]) -> str:
        return chr(int(match[1], 16)) if match[1] else plain.get(match[2], match[2])

    return re.sub(r"\\(?:u([0-9a-f]{4})|(.))", character, text)


class Fasta(Format):
    """`>id_sample prompt=0 sample=1 length=120 tokens=40 finish=stop perplexity=5.2`, then the sequence in lines of 60.

    The sequence is the text's letters, `*` and `-`; tokens spelled `<so>`, white space and the rest are left out.
    The length in the header tells a whole record from a torn one.
    """

    _HEADER = re.compile(rb">\S+ prompt=(\d+) sample=(\d+) length=(\d+) ")

    def encode(self, row: Row) -> str:
        sample = row.sample
        sequence = re.sub(r"<[^<>]*>|[^A-Za-z*-]", "", row.text or "")
        name = re.sub(r"\s", "_", row.prompt.id if row.prompt.id is not None else f"prompt{row.prompt.index}")
        perplexity = "nan" if row.perplexity is None else f"{row.perplexity:.4f}"
        header = (
            f">{name}_{sample.sample_index} prompt={row.prompt.index} sample={sample.sample_index} "
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


def output_format(path: Path, *, token_ids: bool = False, logprobs: bool = False) -> Format:
    """The format that an output's name asks for."""
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"{path}: an output must end in {', '.join(OUTPUT_SUFFIXES)}; got {path.suffix!r}")
    if path.suffix == ".jsonl":
        return JsonLines(token_ids=token_ids, logprobs=logprobs)
    if token_ids or logprobs:
        raise ValueError(f"{path}: token ids and log-probabilities need a .jsonl output; got {path.suffix!r}")
    return Fasta() if path.suffix == ".fasta" else Text()


# -- the output file ----------------------------------------------------------------------------------------------


class Output:
    """A file of samples under way: locked against a second writer, appended to one whole record at a time.

    `settings` are what the samples depend on. They are kept beside the file, in `<name>.run.json`, so that a run is
    only ever resumed as itself. `done` holds the keys of the samples that are there already.
    """

    def __init__(
        self,
        path: Path,
        format: Format,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path, self.format = path, format
        self.done: set[Key] = set()
        check_writable(path, resume=resume, overwrite=overwrite)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the life of this object)
        try:
            _lock(self._file, path)
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

    def write(self, row: Row) -> None:
        """Append one sample in one write. OSError, with the file as it was before, when there is no room for it."""
        record = self.format.encode(row).encode("utf-8")
        try:
            written = 0
            while written < len(record):
                written += self._file.write(record[written:]) or 0
        except OSError as error:
            self._file.truncate(self._size)
            raise OSError(
                f"{self.path}: cannot be written ({error.strerror}); its samples are whole, --resume goes on from there"
            ) from error
        self._size += len(record)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Output:
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
            changes = ", ".join(f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in differ)
            raise ValueError(f"{self.path}: was made by another run ({changes}); resume it as it was begun")

    def _read_done(self) -> int:
        end = 0
        with open(self.path, "rb") as file:
            try:
                for end, key in self.format.scan(file):  # noqa: B007 (its last value is the result)
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


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"{path}: another process is writing to it; wait for it or name another file") from None


def digest(data: bytes) -> str:
    """What a file's contents are recognised by."""
    return hashlib.sha256(data).hexdigest()[:16]
