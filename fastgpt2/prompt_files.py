"""Files of prompts: `.txt` (a prompt a line), `.jsonl` and `.fasta`.

A `.jsonl` line is an object with "prompt" or "prompt_ids", and an "id" if you like. Of a `.fasta` entry the header's
first word is the id.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

PROMPT_SUFFIXES = (".txt", ".jsonl", ".fasta")


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file: `index` counts the file's prompts from 0, `where` names its file and line in errors."""

    index: int
    content: str | tuple[int, ...]
    where: str
    id: str | None = None


class PromptError(ValueError):
    """A prompt of a file that cannot be used."""


def check_prompt_suffix(name: str, suffix: str) -> None:
    """ValueError, calling the file `name`, where files of prompts do not end so."""
    if suffix not in PROMPT_SUFFIXES:
        raise ValueError(f"{name}: a file of prompts must end in {', '.join(PROMPT_SUFFIXES)}; got {suffix!r}")


def read_prompts(data: bytes, name: str, suffix: str) -> Iterator[Prompt | PromptError]:
    """The prompts in a file; a bad prompt is yielded as an error, for the caller to raise or to skip.

    Bad prompts are counted too, so skipping them does not change the index of the others.

    Args:
        data: the file's contents.
        name: what errors call the file.
        suffix: one of `PROMPT_SUFFIXES`.
    """
    check_prompt_suffix(name, suffix)
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
    except ValueError:  # Python reads no int of thousands of digits
        raise ValueError("must be JSON; it has an integer of thousands of digits") from None
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


def digest(data: bytes) -> str:
    """A hash of a file's contents, by which a resumed run knows them again."""
    return hashlib.sha256(data).hexdigest()[:16]
