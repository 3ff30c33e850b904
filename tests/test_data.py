"""Training data: corpora, shards of tokens, and batches."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from fastgpt2 import data
from fastgpt2.data import ShardMeta, TokenData, TokenShard, find_documents, write_shards
from fastgpt2.files import atomic_file, create_file, link_file, remove_leftovers, staged_folder
from fastgpt2.tokenizer import END_OF_TEXT, Tokenizer

TOKENIZER = Tokenizer.train(["x = y + 1\n"], 257)


def make_corpus(folder: Path, rng: random.Random, count: int = 12) -> dict[str, str]:
    texts = {}
    for i in range(count):
        path = folder / f"d{i % 3}" / f"f{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{rng.choice('abcé日🙂')} = {rng.randrange(1000)}\n" for _ in range(rng.randrange(1, 60)))
        path.write_text(text, encoding="utf-8")
        texts[path.relative_to(folder).as_posix()] = text
    return texts


def decode(shard: TokenShard) -> str:
    return TOKENIZER.decode(shard.tokens.tolist())


def test_shards_hold_every_document_once_and_split_by_document(tmp_path: Path, seed: int, monkeypatch) -> None:
    monkeypatch.setattr(data, "PIECE_BYTES", 37)  # so that a document has many pieces
    texts = make_corpus(tmp_path / "c", random.Random(seed))
    (tmp_path / "c" / "binary.py").write_bytes(b"a\0b")
    (tmp_path / "c" / "latin.py").write_bytes(b"caf\xe9\n")
    (tmp_path / "c" / "cut.py").write_bytes("é".encode()[:1])
    (tmp_path / "c" / "empty.py").write_bytes(b"")
    (tmp_path / "c" / "other.txt").write_text("no", encoding="utf-8")
    corpus = find_documents([tmp_path / "c"], suffixes=[".py"], val_fraction=0.25, seed=seed)
    assert (len(corpus.train), len(corpus.val), corpus.skipped) == (9, 3, 4)
    meta = write_shards(corpus, TOKENIZER, tmp_path / "out", {"asked": 1})
    shards = TokenData.open(tmp_path / "out")
    assert shards.meta == meta
    assert shards.val is not None
    documents = {}
    for shard, size, num_bytes in (
        (shards.train, meta.train_tokens, meta.train_bytes),
        (shards.val, meta.val_tokens, meta.val_bytes),
    ):
        parts = decode(shard).split(END_OF_TEXT)
        assert parts.pop() == ""
        assert len(shard) == size
        assert sum(len(p.encode()) for p in parts) == num_bytes
        documents[shard.path.name] = parts
    assert Counter(documents["train.bin"] + documents["val.bin"]) == Counter(texts.values())
    assert len(documents["val.bin"]) == 3


def test_the_split_depends_on_the_seed_and_not_on_the_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_corpus(tmp_path / name, random.Random(0), 30)

    def validation(name: str, seed: int) -> list[str]:
        corpus = find_documents([tmp_path / name], val_fraction=0.2, seed=seed)
        return [s.path.relative_to(tmp_path / name).as_posix() for s in corpus.val]

    assert validation("one", 0) == validation("two", 0)
    assert validation("one", 0) != validation("one", 1)


def test_one_file_is_split_at_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {i} é\n" for i in range(100))
    (tmp_path / "all.txt").write_text(text, encoding="utf-8")
    corpus = find_documents([tmp_path / "all.txt"], val_fraction=0.1)
    train, val = ("".join(s.pieces()) for s in (*corpus.train, *corpus.val))
    assert train + val == text
    assert train.endswith("\n")
    assert 0.05 < len(val) / len(text) < 0.15
    assert find_documents([tmp_path / "all.txt"], val_fraction=0).val == []


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_pieces_join_to_the_text_without_lines_too(tmp_path: Path, size: int, monkeypatch) -> None:
    monkeypatch.setattr(data, "PIECE_BYTES", size)
    text = "é日🙂a" * 20 + "\n" + "🙂" * 7
    path = tmp_path / "t.txt"
    path.write_text(text, encoding="utf-8")
    assert "".join(data.Segment(path, 0, len(text.encode())).pieces()) == text


def test_the_standard_library_is_a_corpus() -> None:
    corpus = find_documents([data.STDLIB])
    names = {s.path.name for s in corpus.train + corpus.val}
    assert {"argparse.py", "json", "ast.py"} - {"json"} <= names
    assert len(corpus) > 300
    assert not any({"test", "tests", "site-packages"} & set(s.path.parts) for s in corpus.train)


META = dict.fromkeys(ShardMeta.__dataclass_fields__, 0) | {"request": {}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: find_documents([p / "none"]), "none: no such file or directory"),
        (lambda p: find_documents([p], suffixes=[".py"]), r"no text files ending in .py"),
        (lambda p: find_documents([p / "b.bin"]), r"b.bin: must be UTF-8 text; it has NUL bytes"),
        (lambda p: find_documents([p], val_fraction=1.0), r"val_fraction must be in \[0, 1\); got 1.0"),
        (lambda p: TokenData.open(p), r"train.bin: no such file"),
        (lambda p: TokenShard(p / "b.bin"), r"b.bin: must hold uint16 tokens; its 3 bytes"),
        (lambda p: TokenShard(p / "few.bin").rows(0, 1, 8, 0), r"few.bin: has 2 tokens; a context of 8 needs"),
        (lambda p: data.read_meta(p), r"meta.json: not a meta.json of fastgpt2"),
        (lambda p: data.read_meta(p / "deep"), r"meta.json: not a meta.json of fastgpt2 .maximum recursion"),
        (lambda p: data.read_meta(p / "dtype"), r"meta.json: not a meta.json of fastgpt2 .dtype 'float8'"),
    ],
)  # fmt: skip
def test_bad_data(make, message: str, tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"a\0b")
    (tmp_path / "few.bin").write_bytes(b"\1\0\2\0")
    (tmp_path / "meta.json").write_text("{}", encoding="utf-8")
    for name, content in (("deep", "[" * 99_999), ("dtype", json.dumps(META | {"dtype": "float8"}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(content, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path)


def make_shard(path: Path, size: int) -> TokenShard:
    np.arange(size, dtype="<u2").tofile(path)
    return TokenShard(path)


@pytest.mark.parametrize(("size", "context"), [(1000, 16), (100, 7), (33, 16), (17, 16), (40, 1)])
def test_an_epoch_sees_windows_once_and_targets_are_the_next_tokens(
    tmp_path: Path, size: int, context: int, seed: int
) -> None:
    shard = make_shard(tmp_path / "train.bin", size)
    per_epoch = shard.windows_per_epoch(context)
    starts = []
    for epoch in range(3):
        inputs, targets = shard.rows(epoch * per_epoch, per_epoch, context, seed)
        assert inputs.dtype == torch.int64
        assert torch.equal(inputs + 1, targets)
        assert len(set(inputs.flatten().tolist())) == inputs.numel()  # windows do not overlap
        assert size - 1 - inputs.numel() < 2 * context  # and cover nearly all tokens
        starts.append(inputs[:, 0].tolist())
    if (
        per_epoch > 4 and context > 1
    ):  # each epoch shifts the windows, so they do not always begin at multiples of the context
        offsets = {shard.rows(epoch * per_epoch, 1, context, seed)[0][0, 0].item() % context for epoch in range(20)}
        assert len(offsets) > 1
    if per_epoch > 4:
        assert starts[0] != starts[1] != starts[2]
        assert starts[0] != sorted(starts[0])


def test_rows_are_a_function_of_seed_and_position(tmp_path: Path, seed: int) -> None:
    first, second = make_shard(tmp_path / "a.bin", 500), make_shard(tmp_path / "a.bin", 500)
    whole, _ = first.rows(0, 100, 8, seed)
    parts = [second.rows(start, 10, 8, seed)[0] for start in random.Random(seed).sample(range(0, 100, 10), 10)]
    assert torch.equal(whole.sort(0).values, torch.cat(parts).sort(0).values)
    assert torch.equal(second.rows(37, 20, 8, seed)[0], whole[37:57])
    assert not torch.equal(second.rows(0, 100, 8, seed + 1)[0], whole)


@pytest.mark.parametrize(("size", "max_tokens"), [(100, None), (97, None), (5, None), (100, 30), (2, None), (1, None)])
def test_evaluation_covers_every_token_once_in_order(tmp_path: Path, size: int, max_tokens: int | None) -> None:
    shard = make_shard(tmp_path / "val.bin", size)
    batches = list(shard.evaluation_batches(8, 3, max_tokens))
    targets = [t for _, target in batches for t in target.flatten().tolist()]
    assert targets == list(range(1, min(size, (max_tokens or size) + 1)))
    assert all(torch.equal(x + 1, y) for x, y in batches)
    assert all(x.shape[0] <= 3 for x, _ in batches)


def test_nanogpt_folders_need_no_meta(tmp_path: Path) -> None:
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(20, dtype=np.uint16).tofile(tmp_path / "val.bin")
    shards = TokenData.open(tmp_path)
    assert (len(shards.train), len(shards.val or ()), shards.meta) == (50, 20, None)


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    class Wide:
        vocab_size, eos_token_id = 70_000, 69_999

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[65_536 + len(text)] for text in texts]

    (tmp_path / "a.txt").write_text("abc\n", encoding="utf-8")
    corpus = find_documents([tmp_path / "a.txt"], val_fraction=0)
    write_shards(corpus, Wide(), tmp_path / "out", {})
    assert TokenData.open(tmp_path / "out").train.tokens.tolist() == [65_540, 69_999]


def test_a_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    same = make_shard(tmp_path / "a.bin", 5000).fingerprint()
    assert make_shard(tmp_path / "b.bin", 5000).fingerprint() == same
    assert make_shard(tmp_path / "c.bin", 5001).fingerprint() != same
    changed = np.arange(5000, dtype="<u2")
    changed[4000] = 1
    changed.tofile(tmp_path / "d.bin")
    assert TokenShard(tmp_path / "d.bin").fingerprint() != same


def test_atomic_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def fail_half_way() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    link_file(path, tmp_path / "link")
    for name in (".g.tmp123", ".h.tmp123"):
        (tmp_path / name).write_bytes(b"left by a killed process")
    (tmp_path / ".saving-abc").mkdir()
    (tmp_path / ".saving-abc" / "config.json").touch()
    (tmp_path / ".mine.tmpl").write_bytes(b"of somebody else")
    remove_leftovers(tmp_path, "g")
    assert {p.name for p in tmp_path.iterdir()} == {"f", "link", ".h.tmp123", ".saving-abc", ".mine.tmpl"}
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"f", "link", ".mine.tmpl"}
    assert path.read_bytes() == (tmp_path / "link").read_bytes() == b"new"


def test_atomic_files_are_on_disk_before_they_take_their_name(tmp_path: Path, monkeypatch) -> None:
    """After a power cut the file has the old bytes or the new ones, never contents that were not written in full."""
    events, fsync, replace, link = [], os.fsync, os.replace, os.link

    def synced(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        events.append(f"{Path(new).name} named")
        replace(old, new)

    def linked(old: Path, new: Path) -> None:
        events.append(f"{Path(new).name} named")
        link(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "link", linked)
    with atomic_file(tmp_path / "f") as file:
        file.write(b"new")
    assert events == ["3 bytes", "f named", "folder"]
    events.clear()
    with staged_folder(tmp_path / "s") as stage:
        (stage / "a").write_bytes(b"12")
        (stage / "b").write_bytes(b"1234")
    assert events == ["2 bytes", "4 bytes", "a named", "b named", "folder"]
    events.clear()
    assert create_file(tmp_path / "c", b"12345")
    assert events == ["5 bytes", "c named", "folder"]


@pytest.mark.skipif(os.name == "nt", reason="nobody can lock a folder on Windows")
def test_the_stage_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    killed = tmp_path / ".saving-killed"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    with staged_folder(tmp_path) as living:
        (living / "a").write_bytes(b"1")
        with staged_folder(tmp_path) as stage:
            (stage / "b").write_bytes(b"2")
        assert (living / "a").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_meta_is_written_last(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("abc\n" * 9, encoding="utf-8")
    corpus = find_documents([tmp_path / "a.txt"])
    write_shards(corpus, TOKENIZER, tmp_path / "out", {"n": 1})
    assert json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))["request"] == {"n": 1}

    def fail(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        raise OSError("disk full")

    monkeypatch.setattr(Tokenizer, "encode_batch", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shards(corpus, TOKENIZER, tmp_path / "out", {"n": 2})
    assert data.read_meta(tmp_path / "out") is None


# -- tables -------------------------------------------------------------------------------------------------------

TEXTS = ["x = 1\n", "", 'é, "quoted"', "y\r\nz", "日🙂", "w"]


def write_table(folder: Path, suffix: str, texts: list[str]) -> Path:
    """A table with a row for each text, in a column called "code" (FASTA has no columns)."""
    path = folder / f"rows{suffix}"
    rows = [{"id": str(i), "code": text} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".jsonl":
        path.write_bytes(lines)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif suffix == ".jsonl.zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(lines)
    elif suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "code"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet"])
def test_every_row_of_a_table_is_a_document(suffix: str, tmp_path: Path, seed: int) -> None:
    path = write_table(tmp_path, suffix, TEXTS)
    corpus = find_documents([path], column="code", val_fraction=0.4, seed=seed)
    assert (len(corpus), corpus.num_val, corpus.skipped) == (5, 2, 1)
    meta = write_shards(corpus, TOKENIZER, tmp_path / "out", {})
    shards = TokenData.open(tmp_path / "out")
    assert shards.val is not None
    documents = []
    for shard, size in ((shards.train, meta.train_bytes), (shards.val, meta.val_bytes)):
        parts = decode(shard).split(END_OF_TEXT)
        assert parts.pop() == ""
        assert sum(len(part.encode()) for part in parts) == size
        documents += parts
    assert len(parts) == 2
    assert Counter(documents) == Counter(text for text in TEXTS if text)
    assert find_documents([path], column="code", val_fraction=0.4, seed=seed) == corpus
    # Tables are found by a pattern, together with a text file, and in a folder.
    (tmp_path / "one.txt").write_text("a text\n", encoding="utf-8")
    several = find_documents(
        [str(tmp_path / "rows.*"), tmp_path / "one.txt"], column="code", val_fraction=0.4, seed=seed
    )
    assert (len(several), several.num_val) == (6, 2)
    assert len(find_documents([tmp_path], suffixes=[".txt", suffix], column="code")) == 6


def test_one_row_is_no_validation(tmp_path: Path) -> None:
    corpus = find_documents([write_table(tmp_path, ".jsonl", ["a"])], column="code")
    assert (len(corpus), corpus.num_val) == (1, 0)


def test_fasta_is_a_table_of_sequences(tmp_path: Path) -> None:
    (tmp_path / "s.fasta").write_text(">a\nMK\nV\n>b\nLA\n", encoding="utf-8")
    corpus = find_documents([tmp_path / "s.fasta"], val_fraction=0)
    assert [piece for rows in corpus.train for piece in rows.pieces()] == ["MKV", "LA"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"txt": "a"}\n', 't.jsonl line 1: must be an object with "text"; it has "txt": name'),
        ("t.jsonl", '{"text": "a"}\n{"text": 5}\n', 't.jsonl line 2: "text" must be a string; got int'),
        ("t.jsonl", '{"text": "a"}\n{"text": [5]}\n', 't.jsonl line 2: "text" must be a string; got token ids'),
        ("t.jsonl", "plain text\n", "t.jsonl line 1: must be JSON; Expecting value at column 1"),
        ("t.jsonl", "", "t.jsonl: must have a row with text; it has none"),
        ("t.csv", "a,b\n1,2\n", 't.csv: must have a column "text"; it has a, b: name one with --column'),
        ("t.csv", "text\na\nb,c\n", "t.csv line 3: must have 1 fields, as the header has; it has 2"),
        ("t.csv", "", "t.csv: must have a row with text; it has none"),
        ("t.parquet", "PAR1 and no more", "t.parquet: must be a whole Parquet file; it is not"),
        ("t.jsonl.gz", "no gzip", "t.jsonl.gz: must be a whole .gz file (Not a gzipped file"),
        ("t.jsonl.zst", "no zstd", "t.jsonl.zst: must be a whole .zst file ("),
    ],
)  # fmt: skip
def test_bad_tables(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        find_documents([tmp_path / name])
    assert "\n" not in str(caught.value)
    # In a folder, such a file is skipped.
    (tmp_path / "good.txt").write_text("text\n", encoding="utf-8")
    assert find_documents([tmp_path], val_fraction=0).skipped == 1


def test_a_torn_table_is_no_shorter_one(tmp_path: Path) -> None:
    for suffix in (".jsonl.gz", ".jsonl.zst", ".parquet"):
        path = write_table(tmp_path, suffix, [f"text {i} {'x' * i}" for i in range(2000)])
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"rows.*: must be a whole "):
            find_documents([path], column="code")


def test_a_column_without_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"column='code' is for \.jsonl, \.csv, \.parquet"):
        find_documents([tmp_path / "a.txt"], column="code")
    with pytest.raises(FileNotFoundError, match=r"\*.csv: no file matches this pattern"):
        find_documents([str(tmp_path / "*.csv")])
