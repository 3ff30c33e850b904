"""Training data: texts are encoded into token shards, and batches of a shard depend on (seed, step) alone.

A data folder holds `train.bin` and `val.bin` in nanoGPT's format: bare little-endian uint16 tokens, or uint32 for
vocabularies of more than 65536. Folders that fastgpt2 wrote also hold a `meta.json`.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import math
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt2.files import atomic_file, remove_leftovers
from fastgpt2.input_files import (
    DOCUMENTS,
    HUB,
    TABLE_SUFFIXES,
    Columns,
    EntryError,
    Source,
    find_sources,
    read_entries,
    split_suffix,
)
from fastgpt2.messages import first_line, shown
from fastgpt2.tokenizer import Tokenizer

STDLIB = "stdlib"  # `--data stdlib` means the source files of the running Python's standard library
_STDLIB_EXCLUDED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"}
_ALWAYS_EXCLUDED = {"__pycache__", ".git", ".hg", ".svn"}
# Text is read and encoded in pieces of about this size, cut at line ends, so that a file need not fit in memory.
PIECE_BYTES = 1 << 20


# -- documents ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """Bytes start .. end of a UTF-8 file: a whole document, or one side of a single file's train/validation split."""

    path: Path
    start: int
    end: int

    count = 1  # number of documents

    def documents(self) -> Iterator[Iterator[str]]:
        """Yield the one document, as an iterator over its pieces."""
        yield self.pieces()

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces of about `PIECE_BYTES`, cut after a line's end if there is one."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            left, kept = self.end - self.start, b""
            while left:
                block = file.read(min(PIECE_BYTES, left))
                if not block:
                    raise OSError(f"{self.path}: {left} bytes shorter than when it was listed; start again")
                left -= len(block)
                block = kept + block
                cut = _cut(block) if left else len(block)
                kept = block[cut:]
                if cut:
                    yield block[:cut].decode("utf-8")


def _cut(block: bytes) -> int:
    """Where to cut a block: after its last newline, or else before its last character, which may be incomplete."""
    newline = block.rfind(b"\n") + 1
    if newline:
        return newline
    cut = len(block)
    while cut and len(block) - cut < 4:
        cut -= 1
        if block[cut] & 0xC0 != 0x80:  # the first byte of a character
            return cut
    return 0


@dataclass(frozen=True)
class Rows:
    """One side of a table's train/validation split; every row is a document.

    Rows whose hash is at most `most` are for validation, the others for training.
    """

    source: Source
    column: str
    seed: int
    most: int
    is_val: bool
    count: int

    def documents(self) -> Iterator[Iterator[str]]:
        """Yield each document, as an iterator over a single piece."""
        for index, text in _texts(self.source, self.column):
            if text and (_row_hash(self.seed, self.source, index) <= self.most) == self.is_val:
                yield iter((text,))

    def pieces(self) -> Iterator[str]:
        """Yield the text of every document."""
        for document in self.documents():
            yield from document


def _texts(source: Source, column: str) -> Iterator[tuple[int, str]]:
    """Yield (index, text) of every row of a table. The first row without text raises."""
    for entry in read_entries([source], Columns(column)):
        if isinstance(entry, EntryError):
            raise entry
        if not isinstance(entry.content, str):
            raise ValueError(f'{entry.where}: "{column}" must be a string; got token ids')
        yield entry.index, entry.content


def _row_hash(seed: int, source: Source, index: int) -> int:
    code = hashlib.blake2b(f"{seed}:{Path(source.name).name}:{index}".encode(), digest_size=8)
    return int.from_bytes(code.digest(), "big")


@dataclass(frozen=True)
class Corpus:
    """The documents of a corpus, split into training and validation.

    Attributes:
        train: The training documents.
        val: The validation documents.
        skipped: How many files of directories and rows of tables were skipped because they hold no text.
    """

    train: list[Segment | Rows]
    val: list[Segment | Rows]
    skipped: int

    def __len__(self) -> int:
        return sum(part.count for part in (*self.train, *self.val))

    @property
    def num_val(self) -> int:
        """The number of validation documents."""
        return sum(part.count for part in self.val)


def find_documents(
    sources: Sequence[str | PathLike[str]],
    *,
    suffixes: Sequence[str] = (),
    column: str | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
) -> Corpus:
    """List the documents of a corpus and split them into training and validation.

    A text file is one document. In .jsonl, .csv, .parquet and .fasta files every row is one; `input_files` says how
    they may be compressed. A file that is named directly must be readable. In a directory, files that are binary, empty
    or not UTF-8, and tables without the column, are skipped and counted.

    Validation documents are chosen by a hash of the seed, the name and the row, so the choice does not depend on where
    the corpus is stored. A corpus of one text file is split at a line end, and its last part is for validation.

    Args:
        sources: Files, patterns, directories, `stdlib` or `hf://` data sets.
        suffixes: Take only files of a directory that end in one of these; all files if there is none.
        column: The column of tables that holds the text, "text" by default.
        val_fraction: The share of documents for validation, in [0, 1); if it is above 0, at least one document is.
        seed: Seed of the split.

    Returns:
        The documents of both sides.

    Raises:
        ValueError: There are no text files, a named file is not UTF-8 text, or an argument does not fit.
        OSError: A source does not exist or cannot be read.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"find_documents: val_fraction must be in [0, 1); got {val_fraction}")
    named: dict[Path, str] = {}
    tables: dict[str, Source] = {}
    skipped = 0
    train: list[Segment | Rows] = []
    val: list[Segment | Rows] = []

    def add_table(source: Source) -> None:
        nonlocal skipped
        if source.name not in tables:
            sides, num_empty = _split_table(source, column or DOCUMENTS.text, val_fraction, seed)
            tables[source.name] = source
            skipped += num_empty
            train.append(sides[0])
            val.append(sides[1])

    for source in _expanded(sources):
        if str(source).startswith(HUB) or (_is_table(source) and Path(source).is_file()):
            for table in find_sources([str(source)], "a file to train on"):
                add_table(table)
            continue
        for path, name in _list_files(source, suffixes):
            if _is_table(path):
                try:
                    add_table(*find_sources([str(path)]))
                except (ValueError, OSError):
                    skipped += 1
                continue
            try:
                problem = _why_not_text(path)
            except OSError as error:
                problem = f"cannot be read ({error.strerror})"
            if problem is None:
                named.setdefault(path, name)
            elif Path(source) == path:
                raise ValueError(f"{path}: must be UTF-8 text; it {problem}")
            else:
                skipped += 1
    train, val = ([side for side in sides if side.count] for sides in (train, val))
    if column is not None and not tables:
        raise ValueError(f"find_documents: column={column!r} is for {', '.join(TABLE_SUFFIXES)} and {HUB}; got none")
    if not named and not train:
        kinds = f" ending in {', '.join(suffixes)}" if suffixes else ""
        raise ValueError(f"no text files{kinds} in {', '.join(map(str, sources))} ({skipped} skipped)")
    documents = [Segment(path, 0, path.stat().st_size) for path in named]
    if len(documents) == 1 and not tables:
        head, tail = _split_file(documents[0], val_fraction)
        return Corpus([head], [tail] if tail.end > tail.start else [], skipped)
    count = min(len(documents) - 1, max(1, round(len(documents) * val_fraction))) if val_fraction and documents else 0
    ranked = sorted(documents, key=lambda d: hashlib.sha256(f"{seed}:{named[d.path]}".encode()).digest())
    chosen = {document.path for document in ranked[:count]}
    train = [*(d for d in documents if d.path not in chosen), *train]
    return Corpus(train, [*(d for d in documents if d.path in chosen), *val], skipped)


def _expanded(sources: Sequence[str | PathLike[str]]) -> Iterator[str | PathLike[str]]:
    """Yield the sources, with every pattern replaced by the files that match it."""
    for source in sources:
        name = str(source)
        if re.search(r"[*?\[]", name) and not name.startswith(HUB) and not Path(name).exists():
            paths = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
            if not paths:
                raise FileNotFoundError(f"{name}: no file matches this pattern")
            yield from paths
        else:
            yield source


def _is_table(path: str | PathLike[str]) -> bool:
    return split_suffix(str(path))[0] in TABLE_SUFFIXES


def _split_table(source: Source, column: str, val_fraction: float, seed: int) -> tuple[tuple[Rows, Rows], int]:
    """Read a table once; returns ((training rows, validation rows), number of empty rows)."""
    hashes = []
    num_empty = 0
    for index, text in _texts(source, column):
        if text:
            hashes.append(_row_hash(seed, source, index))
        else:
            num_empty += 1
    if not hashes:
        raise ValueError(f"{source.name}: must have a row with text; it has none")
    most = -1
    if val_fraction and len(hashes) > 1:
        hashes.sort()
        most = hashes[min(len(hashes) - 1, max(1, round(len(hashes) * val_fraction))) - 1]
    num_val = sum(code <= most for code in hashes)
    return (
        Rows(source, column, seed, most, False, len(hashes) - num_val),
        Rows(source, column, seed, most, True, num_val),
    ), num_empty


def _list_files(source: str | PathLike[str], suffixes: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yield (path, name within the corpus) of every file of a source, sorted."""
    excluded = _ALWAYS_EXCLUDED
    if source == STDLIB:
        root, excluded, suffixes = Path(sysconfig.get_path("stdlib")), excluded | _STDLIB_EXCLUDED, (".py",)
    else:
        root = Path(source)
    if root.is_file():
        yield root, root.name
        return
    if not root.is_dir():
        if root.exists():  # a device or a pipe: it may have no end
            raise ValueError(f"{root}: must be a folder or an ordinary file; it is neither")
        raise FileNotFoundError(f"{root}: no such file or directory")
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in excluded)
        for name in sorted(files):
            path = Path(folder, name)
            if (not suffixes or name.endswith(tuple(suffixes))) and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _why_not_text(path: Path) -> str | None:
    """Why a file is not UTF-8 text, as the end of a sentence; None if it is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    with open(path, "rb") as file:
        while block := file.read(PIECE_BYTES):
            size += len(block)
            if b"\0" in block:
                return "has NUL bytes"
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return f"has bytes that are not UTF-8 ({error.reason})"
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "ends within a character"
    return None if size else "is empty"


def _split_file(document: Segment, val_fraction: float) -> tuple[Segment, Segment]:
    """Split a single file at the first line end past 1 - val_fraction of its bytes; returns (train, validation)."""
    cut = document.end
    if val_fraction:
        with open(document.path, "rb") as file:
            file.seek(math.floor(document.end * (1 - val_fraction)))
            file.readline()
            cut = file.tell()
    return Segment(document.path, 0, cut), Segment(document.path, cut, document.end)


# -- shards -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardMeta:
    """The contents of `meta.json`: sizes of the shards, in tokens and in bytes of UTF-8 text, and their origin."""

    dtype: str
    vocab_size: int
    train_tokens: int
    val_tokens: int
    train_bytes: int
    val_bytes: int
    documents: int
    skipped: int
    request: dict[str, Any]


def write_shards(
    corpus: Corpus, tokenizer: Tokenizer, folder: str | PathLike[str], request: dict[str, Any]
) -> ShardMeta:
    """Encode a corpus into token shards. Every document ends with `<|endoftext|>` if the tokenizer has that token.

    The corpus is streamed: only about `PIECE_BYTES` of text and its tokens are in memory at a time. Each file is
    written atomically, `meta.json` last.

    Args:
        corpus: The documents.
        tokenizer: Encodes them.
        folder: The data folder; it is created if it is missing.
        request: What the caller asked for; kept in `meta.json`.

    Returns:
        What `meta.json` says.

    Raises:
        OSError: A document cannot be read, or a shard cannot be written.
        ValueError: A document cannot be encoded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    (folder / "meta.json").unlink(missing_ok=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    counts = {}
    for split, segments in (("train", corpus.train), ("val", corpus.val)):
        with atomic_file(folder / f"{split}.bin") as file:
            num_tokens = num_bytes = 0
            for ids, size in _encode(segments, tokenizer):
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                num_tokens += len(ids)
                num_bytes += size
        counts[f"{split}_tokens"] = num_tokens
        counts[f"{split}_bytes"] = num_bytes
    meta = ShardMeta(
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        documents=len(corpus),
        skipped=corpus.skipped,
        request=request,
        **counts,
    )
    with atomic_file(folder / "meta.json") as file:
        file.write((json.dumps(asdict(meta), indent=2) + "\n").encode())
    return meta


def _encode(segments: Iterable[Segment | Rows], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids, bytes of text) of every piece of the documents; a batch of pieces is encoded at a time."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(_marked_pieces(segments)):
        for ids, (text, is_end) in zip(tokenizer.encode_batch([text for text, _ in batch]), batch, strict=True):
            yield ids + separator if is_end else ids, len(text.encode())


def _marked_pieces(segments: Iterable[Segment | Rows]) -> Iterator[tuple[str, bool]]:
    """Yield (piece, whether it is the last one of its document)."""
    for segment in segments:
        for document in segment.documents():
            last = ""
            for piece in document:
                if last:
                    yield last, False
                last = piece
            yield last, True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Group pieces into batches of at least `PIECE_BYTES` characters; the last one may be smaller."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= PIECE_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


# -- batches ------------------------------------------------------------------------------------------------------


class TokenShard:
    """A memory-mapped .bin file of tokens, and the windows that a training run reads from it.

    Args:
        path: The file.
        dtype: The dtype of its tokens, "uint16" or "uint32".

    Raises:
        ValueError: The file's size is not a whole number of tokens.
    """

    def __init__(self, path: str | PathLike[str], dtype: str = "uint16") -> None:
        self.path = Path(path)
        size, itemsize = self.path.stat().st_size, np.dtype(dtype).itemsize
        if size % itemsize:
            raise ValueError(
                f"{self.path}: must hold {dtype} tokens; its {size} bytes are not a multiple of {itemsize}"
            )
        # An empty file cannot be mapped.
        self.tokens = np.memmap(self.path, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
        self._permutation: tuple[tuple[int, int, int], np.ndarray, int] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def fingerprint(self) -> str:
        """A hash of the size and of 64 blocks spread over the file.

        It recognizes different data within milliseconds, however large the file is.
        """
        digest = hashlib.sha256(str(len(self)).encode())
        block = 1 << 14
        for start in np.linspace(0, max(0, len(self) - block), 64, dtype=np.int64):
            digest.update(self.tokens[start : start + block].tobytes())
        return digest.hexdigest()[:16]

    def windows_per_epoch(self, context: int) -> int:
        """The number of windows that an epoch visits.

        Args:
            context: The tokens of a window.

        Raises:
            ValueError: The file has too few tokens for a window and its targets.
        """
        if len(self) < context + 1:
            raise ValueError(
                f"{self.path}: has {len(self)} tokens; a context of {context} needs at least {context + 1}: "
                "give more text or a smaller context"
            )
        return max(1, (len(self) - 1) // context - 1)

    def rows(self, first: int, count: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of rows first .. first + count of the endless sequence of training rows.

        An epoch visits each of its non-overlapping windows once. Their order and the offset of the first one are drawn
        from (seed, epoch), so windows begin at other tokens in every epoch. An epoch sees every token once, apart from
        about one context's worth at the ends of the file. Windows drawn with replacement would miss a third of the
        tokens.

        Args:
            first: The first row.
            count: The number of rows.
            context: The tokens of a row.
            seed: Seed of order and offsets.

        Returns:
            Inputs and targets, both (count, context) int64.
        """
        per_epoch = self.windows_per_epoch(context)
        window_BT = np.empty((count, context + 1), dtype=np.int64)
        for i, row in enumerate(range(first, first + count)):
            epoch, index = divmod(row, per_epoch)
            order, offset = self._epoch(epoch, per_epoch, context, seed)
            start = offset + int(order[index]) * context
            window_BT[i] = self.tokens[start : start + context + 1]
        window = torch.from_numpy(window_BT)
        return window[:, :-1], window[:, 1:]

    def _epoch(self, epoch: int, per_epoch: int, context: int, seed: int) -> tuple[np.ndarray, int]:
        key = (seed, epoch, context)
        if self._permutation is None or self._permutation[0] != key:
            rng = np.random.default_rng([seed, epoch])
            slack = len(self) - 1 - per_epoch * context
            offset = int(rng.integers(min(context, slack + 1)))
            self._permutation = key, rng.permutation(per_epoch), offset
        return self._permutation[1], self._permutation[2]

    def evaluation_batches(
        self, context: int, batch_size: int, max_tokens: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs, targets) in which every token of the shard but the first is a target exactly once, in order.

        Args:
            context: The tokens of a row; the last row may be shorter.
            batch_size: The most rows of a batch.
            max_tokens: Use only the first tokens of the shard; None uses all.
        """
        stop = min(len(self), max_tokens + 1 if max_tokens is not None else len(self))
        full = (stop - 1) // context
        for first in range(0, full, batch_size):
            last = min(first + batch_size, full)
            flat = torch.from_numpy(self.tokens[first * context : last * context + 1].astype(np.int64))
            yield flat[:-1].view(-1, context), flat[1:].view(-1, context)
        if stop - 1 > full * context:
            rest = torch.from_numpy(self.tokens[full * context : stop].astype(np.int64))[None]
            yield rest[:, :-1], rest[:, 1:]


@dataclass(frozen=True)
class TokenData:
    """The shards of a data folder; `meta` is None for folders that nanoGPT prepared."""

    train: TokenShard
    val: TokenShard | None
    meta: ShardMeta | None

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> TokenData:
        folder = Path(folder)
        if not (folder / "train.bin").is_file():
            raise FileNotFoundError(f"{folder / 'train.bin'}: no such file; a data folder holds train.bin and val.bin")
        meta = read_meta(folder)
        dtype = meta.dtype if meta else "uint16"
        val = folder / "val.bin"
        return cls(TokenShard(folder / "train.bin", dtype), TokenShard(val, dtype) if val.is_file() else None, meta)


def is_data_folder(path: str | PathLike[str]) -> bool:
    return (Path(path) / "train.bin").is_file()


def read_meta(folder: str | PathLike[str]) -> ShardMeta | None:
    path = Path(folder) / "meta.json"
    if not path.exists():
        return None
    try:
        meta = ShardMeta(**json.loads(path.read_text(encoding="utf-8")))
        if meta.dtype not in ("uint16", "uint32") or type(meta.vocab_size) is not int:
            raise ValueError(f"dtype {shown(meta.dtype)}, vocab_size {shown(meta.vocab_size)}")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a meta.json of fastgpt2 ({first_line(error)}); prepare the data again"
        ) from error
    return meta
