"""Selecting generated or scored records: reads a `.jsonl` file, writes the records to keep in any output format."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from fastgpt2.files import atomic_file
from fastgpt2.messages import shown
from fastgpt2.record_files import LINE_BREAKS, decimals, escape, fasta_entry, letters

OUTPUT_SUFFIXES = (".jsonl", ".fasta", ".txt", ".csv", ".parquet")
BY = {"perplexity": 1.0, "logprob": -1.0}  # a field, and the sign that makes smaller values better
_ROW_GROUP = 4096


@dataclass(frozen=True)
class Selection:
    """Which records to keep. The conditions apply in the order of the arguments.

    Args:
        special: Spellings of special tokens to remove from the texts. White space around a text is then removed too.
        drop_truncated: Whether to drop samples that ended at the length limit.
        min_length: The least number of characters of a text, as it is written to the output.
        max_length: The most characters of a text, as it is written to the output.
        dedupe: Whether to keep only the first of several equal texts.
        keep_best: How many of the remaining records to keep, best first: a number, or a percentage such as `5%`.
        by: What makes a record better: a lower "perplexity" or a higher "logprob".

    Raises:
        ValueError: An argument is out of range.
    """

    special: tuple[str, ...] = ()
    drop_truncated: bool = False
    min_length: int | None = None
    max_length: int | None = None
    dedupe: bool = False
    keep_best: str | None = None
    by: str = "perplexity"

    def __post_init__(self) -> None:
        for name in ("min_length", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"Selection: {name} must be at least 0; got {value}")
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(
                f"Selection: min_length must be at most max_length; got {self.min_length} and {self.max_length}"
            )
        if self.by not in BY:
            raise ValueError(f"Selection: by must be one of {', '.join(BY)}; got {self.by!r}")
        if self.keep_best is not None:
            self.count_of(0)

    def count_of(self, total: int) -> int:
        """How many of `total` records `keep_best` keeps. A percentage is rounded up."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)%|(\d{1,18})", self.keep_best or "100%")
        if match is not None and match[2] and int(match[2]) > 0:
            return min(total, int(match[2]))
        if match is not None and match[1] and 0 < Fraction(match[1]) <= 100:
            return math.ceil(Fraction(match[1]) * total / 100)
        raise ValueError(
            f"Selection: keep_best must be a number from 1 on or a percentage up to 100%; got {shown(self.keep_best)}"
        )


@dataclass(frozen=True)
class Selected:
    """The counts of a selection: records read, records kept, and records dropped for each reason."""

    read: int
    kept: int
    truncated: int
    length: int
    double: int


def check_output(path: Path) -> None:
    """Raise ValueError if `select` cannot write this format, and ImportError if its library is missing."""
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"{path}: an output must end in {', '.join(OUTPUT_SUFFIXES)}; got {path.suffix!r}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ImportError(
                f'{path}: .parquet needs pyarrow; install it with: pip install "fastgpt2[data]"'
            ) from None


def select(source: Path, out: Path, selection: Selection) -> Selected:
    """Write the records to keep to an output, atomically.

    The file is read twice. The first pass only remembers each record's offset and rank; the second copies the records
    to keep.

    Args:
        source: A `.jsonl` file of records.
        out: The output; its suffix chooses the format.
        selection: Which records to keep.

    Returns:
        How many records were read, kept and dropped.

    Raises:
        ValueError: A line is not a record, or lacks a field that the selection needs.
        ImportError: The output is a `.parquet` file and pyarrow is not installed.
        OSError: The output cannot be written.
    """
    check_output(out)
    if source.suffix != ".jsonl":
        raise ValueError(f"{source}: records to select from must be a .jsonl file; got {source.suffix!r}")
    if out.exists() and out.samefile(source):
        raise ValueError(f"{source}: holds the records and cannot be the output; choose another")
    chooser = _Chooser(selection, out.suffix)
    with open(source, "rb") as file:
        kept = chooser.choose(file, str(source))
        try:
            with atomic_file(out) as output:
                _WRITERS[out.suffix](output, chooser.rows(file, kept), chooser.columns)
        except OSError as error:
            raise OSError(f"{out}: cannot be written ({error.strerror}); {source} holds all records") from error
    left_out = chooser.left_out
    return Selected(chooser.read, len(kept), left_out["truncated"], left_out["length"], left_out["double"])


class _Chooser:
    """Decides which records to keep, and counts why the others are dropped."""

    def __init__(self, selection: Selection, suffix: str) -> None:
        self.selection, self.suffix = selection, suffix
        self.read = 0
        self.left_out = {"truncated": 0, "length": 0, "double": 0}
        self.columns: dict[str, set[str]] = {}  # the kinds of values of each field
        spellings = sorted(selection.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, spellings))) if spellings else None

    def choose(self, file: BinaryIO, name: str) -> list[int]:
        """The offsets of the records to keep, in the order of the output."""
        found: list[tuple[float, int]] = []
        seen: set[bytes] = set()
        start = 0
        for number, line in enumerate(file, start=1):
            offset, start = start, start + len(line)
            where = f"{name} line {number}"
            row = _parsed(line, where)
            self.read += 1
            reason = self._why_not(row, where, seen)
            if reason is not None:
                self.left_out[reason] += 1
                continue
            rank = 0.0
            if self.selection.keep_best is not None:
                value = _field(row, self.selection.by, where, (int, float, type(None)))
                # A missing number, such as a perplexity that overflowed, ranks last.
                rank = math.inf if value is None or math.isnan(value) else BY[self.selection.by] * value
            found.append((rank, offset))
            if self.suffix in (".csv", ".parquet"):
                for field, value in row.items():
                    self.columns.setdefault(field, set()).add(_kind(value))
        if self.selection.keep_best is not None:
            found.sort(key=lambda pair: pair[0])  # a stable sort: equal ranks keep their order
        return [offset for _, offset in found[: self.selection.count_of(len(found))]]

    def _why_not(self, row: dict[str, Any], where: str, seen: set[bytes]) -> str | None:
        """Why a record is dropped, before `keep_best`; None if it is kept."""
        chosen = self.selection
        if chosen.drop_truncated and _field(row, "finish_reason", where, (str,)) == "length":
            return "truncated"
        if chosen.min_length is not None or chosen.max_length is not None or chosen.dedupe:
            text = self._written(_field(row, "text", where, (str,)))
            most = math.inf if chosen.max_length is None else chosen.max_length
            if not (chosen.min_length or 0) <= len(text) <= most:
                return "length"
            if chosen.dedupe:
                code = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
                if code in seen:
                    return "double"
                seen.add(code)
        return None

    def _stripped(self, text: str) -> str:
        return text if self._special is None else self._special.sub("", text).strip()

    def _written(self, text: str) -> str:
        """The text as it is written to the output."""
        return letters(self._stripped(text)) if self.suffix == ".fasta" else self._stripped(text)

    def rows(self, file: BinaryIO, offsets: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield the records at these offsets, with special tokens removed from their texts."""
        for offset in offsets:
            file.seek(offset)
            row = json.loads(file.readline())
            if isinstance(row.get("text"), str):
                row["text"] = self._stripped(row["text"])
            yield row


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a record, a JSON object; it is not")
    return row


def _field(row: dict[str, Any], name: str, where: str, kinds: tuple[type, ...]) -> Any:
    if name not in row:
        raise ValueError(f'{where}: has no "{name}" to select by; generate or score the records anew')
    value = row[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        what = "a string" if kinds == (str,) else "a number"
        raise ValueError(f'{where}: "{name}" must be {what}; got {type(value).__name__}')
    return value


# -- formats ------------------------------------------------------------------------------------------------------

Columns = dict[str, set[str]]


def _write_json(file: BinaryIO, rows: Iterator[dict[str, Any]], columns: Columns) -> None:
    for row in rows:
        file.write((json.dumps(row, ensure_ascii=False).translate(LINE_BREAKS) + "\n").encode())


def _write_text(file: BinaryIO, rows: Iterator[dict[str, Any]], columns: Columns) -> None:
    for row in rows:
        file.write(f"{escape(str(row.get('text') or ''))}\n".encode())


def _write_fasta(file: BinaryIO, rows: Iterator[dict[str, Any]], columns: Columns) -> None:
    for row in rows:
        sequence = letters(str(row.get("text") or ""))
        place = row.get("prompt_index", row.get("index", 0))
        name = str(row.get("id") or f"{'prompt' if 'prompt_index' in row else 'sequence'}{place}")
        fields: dict[str, object] = {"length": len(sequence)}
        for field, key in (("num_tokens", "tokens"), ("finish_reason", "finish")):
            if field in row:
                fields[key] = row[field]
        for field in ("logprob", "perplexity"):
            if field in row:
                if not isinstance(row[field], (int, float, type(None))):
                    kind = type(row[field]).__name__
                    raise ValueError(f'select: "{field}" of {name} must be a number; got {kind}')
                fields[field] = decimals(row[field])
        if "scored" in row:
            fields["scored"] = row["scored"]
        file.write(
            fasta_entry(f"{name}_{row['sample_index']}" if "sample_index" in row else name, fields, sequence).encode()
        )


def _write_csv(file: BinaryIO, rows: Iterator[dict[str, Any]], columns: Columns) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = (row.get(name) for name in columns)
        writer.writerow(json.dumps(v, ensure_ascii=False) if isinstance(v, (list, dict)) else v for v in values)
    text.detach()


def _write_parquet(file: BinaryIO, rows: Iterator[dict[str, Any]], columns: Columns) -> None:
    import pyarrow
    import pyarrow.parquet

    types = {
        "int": pyarrow.int64(),
        "float": pyarrow.float64(),
        "str": pyarrow.string(),
        "bool": pyarrow.bool_(),
        "ints": pyarrow.list_(pyarrow.int64()),
        "floats": pyarrow.list_(pyarrow.float64()),
    }
    kinds = {name: _common(found) for name, found in columns.items()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in kinds.items()])

    def value(row: dict[str, Any], name: str) -> Any:
        item = row.get(name)
        return (
            json.dumps(item, ensure_ascii=False) if kinds[name] == "str" and not isinstance(item, str | None) else item
        )

    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append({name: value(row, name) for name in kinds})
            if len(batch) == _ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pyarrow.Table.from_pylist(batch, schema))


def _kind(value: object) -> str:
    if isinstance(value, list):
        inner = {_kind(item) for item in value}
        return "ints" if inner <= {"int"} else "floats" if inner <= {"int", "float"} else "other"
    is_wide = isinstance(value, int) and not -(1 << 63) <= value < 1 << 63
    name = {type(None): "none", bool: "bool", int: "int", float: "float", str: "str"}.get(type(value), "other")
    return "other" if is_wide else name


def _common(kinds: set[str]) -> str:
    """The narrowest column type that holds all of these kinds; text if there is no other."""
    kinds = kinds - {"none"}
    for both, wide in (({"int", "float"}, "float"), ({"ints", "floats"}, "floats")):
        if kinds == both:
            return wide
    (only,) = kinds if len(kinds) == 1 else ("str",)
    return "str" if only == "other" else only


_WRITERS = {
    ".jsonl": _write_json,
    ".fasta": _write_fasta,
    ".txt": _write_text,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
