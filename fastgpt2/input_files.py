"""One reader for every input format: prompts, sequences to score and training texts.

- `.txt` holds one text per line.
- `.jsonl` holds one JSON object per line.
- `.csv` begins with a header.
- `.parquet` files and data sets of the hub (`hf://owner/name` or `hf://owner/name:split`) have columns.
- `.fasta` and `.fa` hold sequences; the first word of a header is the id.

`.gz` or `.zst` may follow any suffix but `.parquet`. `.parquet`, `.zst` and `hf://` need the extra `fastgpt2[data]`.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from fastgpt2.messages import first_line, listed

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet", ".fasta", ".fa")
# Formats whose rows have columns. Training treats each row of them as a document, and a `.txt` file as one document.
TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet", ".fasta", ".fa")
COMPRESSIONS = (".gz", ".zst")
HUB = "hf://"

_MOST_LINE_BYTES = 1 << 28
_BATCH_BYTES = 64 << 20  # about how many bytes of Parquet rows are in memory at a time
_HASH_BYTES = 1 << 20

Content = str | tuple[int, ...]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read.

    Attributes:
        text: The text. If `ids` is None, this column may hold token ids instead.
        ids: Token ids, in place of the text.
        prefix: The text before it, if there is one.
        prefix_ids: The token ids before it, in place of `prefix`.
    """

    text: str
    ids: str | None = None
    prefix: str | None = None
    prefix_ids: str | None = None

    def named(self, text: str | None, prefix: str | None = None) -> Columns:
        """These columns, with the user's names in place of the defaults."""
        columns = self if text is None else Columns(text, None, self.prefix, self.prefix_ids)
        return columns if prefix is None else Columns(columns.text, columns.ids, prefix, None)

    @property
    def all(self) -> list[str]:
        return [name for name in (self.text, self.ids, self.prefix, self.prefix_ids, "id") if name is not None]


PROMPTS = Columns("prompt", "prompt_ids")
SEQUENCES = Columns("text", "token_ids", "prompt", "prompt_ids")
DOCUMENTS = Columns("text")


@dataclass(frozen=True)
class Entry:
    """One text, or its token ids, from an input.

    Attributes:
        index: The entry's number in the whole input, from 0.
        content: The text or the token ids.
        where: The file and line, for errors.
        id: The entry's id, if it has one.
        prefix: The text or token ids before it, if there are any.
        fields: The whole row of a table, if it was asked for.
    """

    index: int
    content: Content
    where: str
    id: str | None = None
    prefix: Content | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


class EntryError(ValueError):
    """An entry that cannot be used. It still has an index, so skipping it does not renumber the others."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Source:
    """One input file, or a data set of the hub.

    Attributes:
        name: The path, or `hf://owner/name`.
        suffix: The suffix that names the format.
        compression: The suffix after it, ".gz" or ".zst", or "".
        data: The contents, if they came from standard input.
    """

    name: str
    suffix: str
    compression: str = ""
    data: bytes | None = None

    def open(self) -> BinaryIO:
        """Open the source's bytes, without decompressing them."""
        return io.BytesIO(self.data) if self.data is not None else open(self.name, "rb")


def find_sources(names: Iterable[str], what: str = "an input") -> list[Source]:
    """Find the sources that paths, patterns such as `data/*.jsonl.gz` and names of data sets refer to.

    Args:
        names: Paths, patterns and `hf://` names.
        what: What errors call such an input.

    Returns:
        The sources in order; the files of a pattern are sorted.

    Raises:
        ValueError: A suffix is not supported, or a path is not an ordinary file.
        OSError: A file does not exist or cannot be read, or no file matches a pattern.
    """
    sources = []
    for name in names:
        if name.startswith(HUB):
            sources.append(Source(name, HUB))
            continue
        paths = [name]
        if re.search(r"[*?\[]", name) and not Path(name).exists():
            paths = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
            if not paths:
                raise FileNotFoundError(f"{name}: no file matches this pattern")
        for path in paths:
            suffix, compression = split_suffix(path)
            if suffix not in SUFFIXES:
                raise ValueError(
                    f"{path}: {what} must end in {', '.join(SUFFIXES)}, or be {HUB}OWNER/NAME; got {suffix!r}"
                )
            if compression and suffix == ".parquet":
                raise ValueError(f"{path}: a .parquet file is already compressed; its name must end in .parquet")
            if Path(path).is_dir():
                raise IsADirectoryError(f"{path}: is a folder; name its files, as {path}/*{suffix}")
            if Path(path).exists() and not Path(path).is_file():
                raise ValueError(f"{path}: must be an ordinary file; it is not")
            with open(path, "rb"):  # raises now, not later, if the file cannot be read
                sources.append(Source(path, suffix, compression))
    return sources


def split_suffix(name: str) -> tuple[str, str]:
    """Split a file name's end into (suffix of the format, suffix of the compression or "")."""
    path = Path(name)
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    return (Path(path.stem).suffix if compression else path.suffix), compression


def digest(sources: Sequence[Source]) -> str:
    """A hash of the sources' contents, by which a resumed run recognizes its input."""
    code = hashlib.sha256()
    for source in sources:
        if source.suffix == HUB:
            data = _load_dataset(source.name)
            code.update(f"{len(data)} {data._fingerprint}".encode())
            continue
        size = 0
        with source.open() as file:
            while block := file.read(_HASH_BYTES):
                code.update(block)
                size += len(block)
        code.update(f"{size} {source.suffix} {source.compression}".encode())
    return code.hexdigest()[:16]


def read_entries(
    sources: Sequence[Source], columns: Columns, *, most_bytes: int | None = None, with_fields: bool = False
) -> Iterator[Entry | EntryError]:
    """Yield the entries of the sources in order, without holding a whole file in memory.

    A bad entry is yielded as an error, which the caller may raise or skip. It takes an index like any other entry.

    Args:
        sources: The sources to read.
        columns: The columns to read from tables.
        most_bytes: The most bytes that all sources together may hold; None for no limit.
        with_fields: Whether to give every entry its whole row.

    Raises:
        ValueError: A file cannot be used at all: it lacks a column, is cut off, or goes past `most_bytes`.
        ImportError: The format needs an extra that is not installed.
    """
    index, size = 0, 0
    for source in sources:
        for where, row, num_bytes in _READERS[source.suffix](source, columns, with_fields):
            size += num_bytes
            if most_bytes is not None and size > most_bytes:
                raise ValueError(f"{source.name}: must hold at most {most_bytes:,} bytes; it has more: split it")
            if row is None:
                continue
            try:
                if isinstance(row, ValueError):
                    raise row
                content, identifier, prefix = _parse(row, columns)
            except ValueError as error:
                yield EntryError(index, f"{where}: {error}")
            else:
                yield Entry(index, content, where, identifier, prefix, row if with_fields else {})
            index += 1


# -- formats ------------------------------------------------------------------------------------------------------

# (where the row is, the row as a mapping or the error that says why it is bad, about how many bytes it has). None takes
# the place of a row where bytes hold none, such as a blank line. These bytes count too, because a small compressed file
# may hold gigabytes of blank lines, or one row of gigabytes: `_MOST_LINE_BYTES` limits a row, `most_bytes` all of them.
_Row = tuple[str, "Mapping[str, Any] | ValueError | None", int]


def _read_text(source: Source, columns: Columns, with_fields: bool) -> Iterator[_Row]:
    for number, line in _lines(source):
        yield f"{source.name} line {number}", _caught(_text_row, line, columns), len(line) + 1


def _text_row(line: bytes, columns: Columns) -> Mapping[str, Any]:
    return {columns.text: _decode(line.removesuffix(b"\r"))}


def _read_json_lines(source: Source, columns: Columns, with_fields: bool) -> Iterator[_Row]:
    for number, line in _lines(source):
        row = _caught(_json_row, line, columns) if line.strip() else None
        yield f"{source.name} line {number}", row, len(line) + 1


def _json_row(line: bytes, columns: Columns) -> Mapping[str, Any]:
    text = _decode(line)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON; {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("must be a flat JSON object; it is nested too deeply") from None
    except ValueError:  # Python does not parse integers of thousands of digits
        raise ValueError("must be JSON; it has an integer of thousands of digits") from None
    either = f'must be an object with either "{columns.text}" or "{columns.ids}"'
    if not isinstance(row, dict):
        raise ValueError(either if columns.ids else f'must be an object with "{columns.text}"')
    # JSON escapes can spell half a surrogate pair, which UTF-8 cannot encode.
    if "\\u" in text and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
        raise ValueError("must be Unicode text; it has an unpaired surrogate")
    return row


def _read_fasta(source: Source, columns: Columns, with_fields: bool) -> Iterator[_Row]:
    for number, entry in _fasta_entries(source.name, _lines(source)):
        yield f"{source.name} line {number}", _caught(_fasta_row, entry, columns), len(entry)


def _fasta_row(entry: bytes, columns: Columns) -> Mapping[str, Any]:
    header, *lines = _decode(entry).split("\n")
    if not header.startswith(">"):
        raise ValueError('must begin with a header line, ">" and a name')
    identifier = next(iter(header[1:].split()), None)
    return {"id": identifier, columns.text: "".join("".join(lines).split())}


def _fasta_entries(name: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number of its header, lines) of every entry. Lines before the first header form an entry too."""
    start, entry, size = 0, list[bytes](), 0
    for number, line in lines:
        if line.startswith(b">") and entry:
            yield start, b"\n".join(entry)
            entry, size = [], 0
        size += len(line) + 1
        if size > _MOST_LINE_BYTES:
            raise ValueError(f"{name} line {number}: an entry must have at most {_MOST_LINE_BYTES:,} bytes")
        if entry or line.strip():
            start = start if entry else number
            entry.append(line)
    if entry:
        yield start, b"\n".join(entry)


def _read_csv(source: Source, columns: Columns, with_fields: bool) -> Iterator[_Row]:
    csv.field_size_limit(max(csv.field_size_limit(), _MOST_LINE_BYTES))
    with _decompressed(source) as file:
        text = _CsvText(source.name, file)
        rows = csv.reader(text, strict=True)
        try:
            header = next(rows, [])
            if not header:
                return
            _check_columns(source.name, header, columns)
            if len(set(header)) < len(header):
                raise ValueError(f"{source.name}: its columns must have different names; got {listed(header)}")
            for row in rows:
                size, text.size = text.size, 0
                where = f"{source.name} line {rows.line_num}"
                if not row:
                    yield where, None, size
                    continue
                if len(row) != len(header):
                    wrong = ValueError(f"must have {len(header)} fields, as the header has; it has {len(row)}")
                    yield where, wrong, size
                else:
                    yield where, dict(zip(header, row, strict=True)), size
        except csv.Error as error:
            raise ValueError(f"{source.name} line {rows.line_num}: must be CSV ({first_line(error)})") from None
        except UnicodeDecodeError:
            raise ValueError(f"{source.name}: must be UTF-8 text; it is not after line {rows.line_num}") from None


class _CsvText:
    """The lines of a CSV file. `size` counts the characters of a row, and is limited. `_read_csv` sets it back to 0."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name, self._number, self.size = name, 0, 0
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(_MOST_LINE_BYTES + 1):
            self._number += 1
            self.size += len(line)
            if self.size > _MOST_LINE_BYTES:
                raise ValueError(
                    f"{self._name} line {self._number}: a row must have at most {_MOST_LINE_BYTES:,} characters"
                )
            yield line


def _read_parquet(source: Source, columns: Columns, with_fields: bool) -> Iterator[_Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _needs_extra(source.name, ".parquet needs pyarrow") from None
    number = 0
    try:
        metadata = pyarrow.parquet.read_metadata(source.name)
        schema = metadata.schema.to_arrow_schema()
        _check_columns(source.name, schema.names, columns)
        wanted = schema.names if with_fields else [name for name in columns.all if name in schema.names]
        for group in range(metadata.num_row_groups):
            about = metadata.row_group(group)
            # Not the sizes of its columns: where their statistics are damaged, pyarrow ends the process.
            batch_size = _rows_at_once(about.total_byte_size // max(1, about.num_rows))
            # A few bytes can repeat a long text a million times. Read as a dictionary, a column holds each text once.
            texts = [name for name in wanted if pyarrow.types.is_string(schema.field(name).type)]
            texts = texts if about.total_byte_size < _BATCH_BYTES else []
            with pyarrow.parquet.ParquetFile(source.name, metadata=metadata, read_dictionary=texts) as file:
                for batch in file.iter_batches(batch_size, row_groups=[group], columns=wanted):
                    for row in _parquet_rows(batch):
                        number += 1
                        size = sum(len(x) for x in row.values() if isinstance(x, (str, bytes, list)))
                        if size > _MOST_LINE_BYTES:
                            raise ValueError(
                                f"{source.name} row {number}: must have at most {_MOST_LINE_BYTES:,} characters"
                            )
                        yield f"{source.name} row {number}", row, size + 1
    except UnicodeDecodeError:
        raise ValueError(f"{source.name}: must be UTF-8 text; it is not after row {number:,}") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source.name}: must be a whole Parquet file; it is not ({first_line(error)})") from None


def _rows_at_once(bytes_per_row: int) -> int:
    """How many rows to hold in memory: a small compressed file may have rows of many megabytes."""
    return max(1, min(1024, _BATCH_BYTES // max(1, bytes_per_row)))


def _parquet_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch. A dictionary holds each text once, so its rows are expanded a few at a time."""
    import pyarrow
    import pyarrow.compute

    values = [column.dictionary for column in batch.columns if isinstance(column, pyarrow.DictionaryArray)]
    lengths = [pyarrow.compute.binary_length(x) for x in values if pyarrow.types.is_string(x.type)]
    step = _rows_at_once(sum(pyarrow.compute.max(length).as_py() or 0 for length in lengths))
    for start in range(0, batch.num_rows, step):
        columns = [
            column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
            for column in batch.slice(start, step).columns
        ]
        yield from pyarrow.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()


def _read_dataset(source: Source, columns: Columns, with_fields: bool) -> Iterator[_Row]:
    data = _load_dataset(source.name)
    _check_columns(source.name, data.column_names, columns)
    if not with_fields:
        data = data.select_columns([name for name in columns.all if name in data.column_names])
    for number, row in enumerate(data, start=1):
        yield f"{source.name} row {number}", row, 0


def _load_dataset(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise _needs_extra(name, "data sets of a hub need the library datasets") from None
    path, _, split = name.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset(path, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:  # from the hub, from a bad name or from the network
        raise ValueError(f"{name}: cannot be loaded ({first_line(error)})") from error


_READERS: dict[str, Callable[[Source, Columns, bool], Iterator[_Row]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".fasta": _read_fasta,
    ".fa": _read_fasta,
    HUB: _read_dataset,
}


# -- rows ---------------------------------------------------------------------------------------------------------


def _parse(row: Mapping[str, Any], columns: Columns) -> tuple[Content, str | None, Content | None]:
    """Return (content, id, prefix) of a row; ValueError if a field is missing or has the wrong type."""
    content = _content(row, columns.text, columns.ids)
    if content is None:
        either = f'"{columns.text}" or "{columns.ids}"' if columns.ids else f'"{columns.text}"'
        there = ", ".join(f'"{name}"' for name in row) or "nothing"
        raise ValueError(
            f"must be an object with {'either ' if columns.ids else ''}{either}; it has {there}: "
            "name another column with --column"
        )
    identifier = row.get("id")
    if identifier is not None and (isinstance(identifier, bool) or not isinstance(identifier, (str, int))):
        raise ValueError(f'"id" must be a string or an integer; got {type(identifier).__name__}')
    prefix = None
    if columns.prefix is not None:
        if columns.prefix_ids is None and columns.prefix not in row:
            raise ValueError(f'must have "{columns.prefix}", which --prompt-column names')
        if not (row.get(columns.prefix) is None and row.get(columns.prefix_ids or "") is None):
            prefix = _content(row, columns.prefix, columns.prefix_ids)
    return content, None if identifier is None else str(identifier), prefix


def _content(row: Mapping[str, Any], text: str, ids: str | None) -> Content | None:
    """The text or token ids of a row; None if it has neither."""
    if ids is not None and text in row and row.get(ids) is not None:
        if row[text] is not None:
            raise ValueError(f'must be an object with either "{text}" or "{ids}"')
        return _token_ids(row[ids], ids)
    if text in row:
        if isinstance(row[text], str):
            return cast(str, row[text])
        if ids is None and isinstance(row[text], list):
            return _token_ids(row[text], text)
        raise ValueError(f'"{text}" must be a string; got {type(row[text]).__name__}')
    return _token_ids(row[ids], ids) if ids is not None and ids in row else None


def _token_ids(ids: object, name: str) -> tuple[int, ...]:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError(f'"{name}" must be a list of integers')
    return tuple(ids)


def _check_columns(name: str, there: Sequence[str], columns: Columns) -> None:
    if columns.text not in there and (columns.ids is None or columns.ids not in there):
        names = listed([" ".join(column.split())[:60] for column in there])
        raise ValueError(f'{name}: must have a column "{columns.text}"; it has {names}: name one with --column')
    if columns.prefix is not None and columns.prefix_ids is None and columns.prefix not in there:
        raise ValueError(f'{name}: must have a column "{columns.prefix}", which --prompt-column names')


# -- bytes --------------------------------------------------------------------------------------------------------


def _caught(make: Callable[[bytes, Columns], Mapping[str, Any]], data: bytes, columns: Columns) -> Any:
    """Return the row, or the ValueError that says why it is bad."""
    try:
        return make(data, columns)
    except ValueError as error:
        return error


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line without its newline). A byte-order mark at the start of the file is dropped."""
    with _decompressed(source) as file:
        number = 0
        while line := file.readline(_MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > _MOST_LINE_BYTES:
                raise ValueError(f"{source.name} line {number}: must have at most {_MOST_LINE_BYTES:,} bytes")
            yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).removesuffix(b"\n")


@contextlib.contextmanager
def _decompressed(source: Source) -> Iterator[BinaryIO]:
    """Open a source's decompressed bytes; ValueError if the compressed file is damaged or cut off."""
    try:
        with source.open() as file:
            if source.compression == ".gz":
                with gzip.open(file) as plain:
                    yield cast(BinaryIO, plain)
            elif source.compression == ".zst":
                try:
                    import pyarrow
                except ImportError:
                    raise _needs_extra(source.name, ".zst needs pyarrow") from None
                with pyarrow.CompressedInputStream(file, "zstd") as plain:
                    yield cast(BinaryIO, io.BufferedReader(plain))
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{source.name}: must be a whole {source.compression} file ({first_line(error)})") from None
    except OSError as error:
        if source.compression != ".zst" or error.errno is not None:
            raise
        raise ValueError(f"{source.name}: must be a whole .zst file ({first_line(error)})") from None


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8 text; byte {error.start + 1} of the line is not") from None


def _needs_extra(name: str, why: str) -> ImportError:
    return ImportError(f'{name}: {why}; install it with: pip install "fastgpt2[data]"')
