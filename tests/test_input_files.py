"""Input files: formats, columns, compression and patterns. Bad entries keep their index."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from fastgpt2.input_files import PROMPTS, SEQUENCES, Entry, EntryError, Source, digest, find_sources, read_entries


def read_prompts(data: bytes, name: str, suffix: str) -> Iterator[Entry | EntryError]:
    return read_entries([Source(name, suffix, data=data)], PROMPTS)


def test_text_prompts():
    data = "\ufeffone\r\n\ntwo\u2028words\n".encode()
    prompts = list(read_prompts(data, "p.txt", ".txt"))
    assert [(p.index, p.content, p.where) for p in prompts] == [
        (0, "one", "p.txt line 1"),
        (1, "", "p.txt line 2"),
        (2, "two\u2028words", "p.txt line 3"),
    ]


def test_json_prompts_and_bad_ones_keep_their_places():
    lines = ['{"prompt": "a", "id": 7}', "", '{"prompt_ids": [1, 2]}', "{oops", '{"prompt": "z", "id": "last"}']
    found = list(read_prompts("\n".join(lines).encode(), "p.jsonl", ".jsonl"))
    assert [(p.index, p.content, p.id) for p in found if isinstance(p, Entry)] == [
        (0, "a", "7"),
        (1, (1, 2), None),
        (3, "z", "last"),
    ]
    assert [str(p) for p in found if isinstance(p, EntryError)] == [
        "p.jsonl line 4: must be JSON; Expecting property name enclosed in double quotes at column 2"
    ]


def test_fasta_prompts():
    data = b"\n>sp|P1|A some words\nMKV\nLA\n\n>b\n"
    assert [(p.index, p.id, p.content, p.where) for p in read_prompts(data, "p.fasta", ".fasta")] == [
        (0, "sp|P1|A", "MKVLA", "p.fasta line 2"),
        (1, "b", "", "p.fasta line 6"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", 'must be an object with either "prompt" or "prompt_ids"'),
        (
            b'{"prompts": 1}',
            'must be an object with either "prompt" or "prompt_ids"; it has "prompts": name another column with '
            "--column",
        ),
        (b'{"prompt": "a", "prompt_ids": []}', 'must be an object with either "prompt" or "prompt_ids"'),
        (b'{"prompt": 3}', '"prompt" must be a string; got int'),
        (b'{"prompt_ids": [1, true]}', '"prompt_ids" must be a list of integers'),
        (b'{"prompt": "a", "id": [1]}', '"id" must be a string or an integer; got list'),
        (b'{"prompt": "\\ud800"}', "must be Unicode text; it has an unpaired surrogate"),
        (b'{"prompt": "\xff"}', "must be UTF-8 text; byte 13 of the line is not"),
        (b'{"prompt_ids": [1' + b"0" * 5000 + b"]}", "must be JSON; it has an integer of thousands of digits"),
        (b"[" * 100_000, "must be a flat JSON object; it is nested too deeply"),
    ],
)
def test_bad_json_prompts(line, message):
    (error,) = read_prompts(line + b"\n", "p.jsonl", ".jsonl")
    assert isinstance(error, EntryError)
    assert str(error) == f"p.jsonl line 1: {message}"


def test_fasta_without_header():
    first, second = read_prompts(b"MKV\n>a\nMK\n", "p.fasta", ".fasta")
    assert str(first) == 'p.fasta line 1: must begin with a header line, ">" and a name'
    assert isinstance(second, Entry)
    assert second.index == 1


# -- tables, compression, patterns --------------------------------------------------------------------------------

ROWS = [
    {"id": 7, "prompt": 'a\n"é,', "note": None},
    {"id": 8, "prompt": "", "note": "x"},
    {"id": 9, "prompt": "日", "note": "y"},
]


def write_rows(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if suffix == ".csv":
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix == ".jsonl.zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if suffix.endswith(".gz") else lines)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet"])
def test_tables(suffix, tmp_path):
    sources = find_sources([str(write_rows(tmp_path, suffix))])
    entries = list(read_entries(sources, PROMPTS, with_fields=True))
    assert [(e.index, e.id, e.content) for e in entries] == [(i, str(r["id"]), r["prompt"]) for i, r in enumerate(ROWS)]
    assert [e.fields["note"] or None for e in entries] == [None, "x", "y"]
    _, *notes = read_entries(sources, PROMPTS.named("note"))
    assert [e.content for e in notes] == ["x", "y"]
    with pytest.raises(ValueError, match="must hold at most 3 bytes; it has more: split it"):
        list(read_entries(sources, PROMPTS, most_bytes=3))


def test_columns_of_token_ids_and_prefixes(tmp_path):
    path = tmp_path / "t.parquet"
    rows = [{"ids": [1, 2], "prompt": "a", "x": 1}, {"ids": None, "prompt": None, "x": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = read_entries(find_sources([str(path)]), SEQUENCES.named("ids"))
    assert (first.content, first.prefix) == ((1, 2), "a")
    assert str(second) == f'{path} row 2: "ids" must be a string; got NoneType'
    first, _ = read_entries(find_sources([str(path)]), SEQUENCES.named("x"))
    assert str(first) == f'{path} row 1: "x" must be a string; got int'
    with pytest.raises(ValueError, match='must have a column "before", which --prompt-column names'):
        list(read_entries(find_sources([str(path)]), SEQUENCES.named("ids", "before")))
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "before": null}\n{"text": "b"}\n', encoding="utf-8")
    first, second = read_entries(find_sources([str(path)]), SEQUENCES.named(None, "before"))
    assert (first.content, first.prefix) == ("a", None)
    assert str(second) == f'{path} line 2: must have "before", which --prompt-column names'


def test_patterns_count_on(tmp_path):
    for name in ("b.txt", "a.txt", "c.csv"):
        (tmp_path / name).write_text("one\ntwo\n", encoding="utf-8")
    sources = find_sources([str(tmp_path / "*.txt")])
    entries = list(read_entries(sources, PROMPTS))
    assert [(e.index, e.where) for e in entries] == [
        (2 * i + j, f"{tmp_path / name} line {j + 1}") for i, name in enumerate(("a.txt", "b.txt")) for j in range(2)
    ]
    assert digest(sources) != digest(sources[:1])
    (tmp_path / "[x].txt").write_text("a name like a pattern\n", encoding="utf-8")
    assert len(find_sources([str(tmp_path / "[x].txt")])) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"a,b\n1,2\n", 't.csv: must have a column "prompt"; it has a, b: name one with --column'),
        ("t.csv", b'"a\nb",c\n1,2\n', 't.csv: must have a column "prompt"; it has a b, c: name one with --column'),
        ("t.csv", b"prompt,prompt\n1,2\n", "t.csv: its columns must have different names; got prompt, prompt"),
        ("t.csv", b'prompt\n"a\n', "t.csv line 2: must be CSV (unexpected end of data"),
        ("t.csv", b"prompt\n\xff\n", "t.csv: must be UTF-8 text; it is not after line "),
        ("t.parquet", b"PAR1", "t.parquet: must be a whole Parquet file; it is not ("),
        ("t.parquet", b"", "t.parquet: must be a whole Parquet file; it is not ("),
        ("t.txt.gz", b"\x1f\x8b", "t.txt.gz: must be a whole .gz file ("),
        ("t.parquet.gz", b"", "a .parquet file is already compressed; its name must end in .parquet"),
        (
            "t.doc",
            b"",
            "t.doc: an input must end in .txt, .jsonl, .csv, .parquet, .fasta, .fa, or be hf://OWNER/NAME; got",
        ),
        ("t.zst", b"", "t.zst: an input must end in .txt"),
    ],
)
def test_files_that_cannot_be_used(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        list(read_entries(find_sources([str(tmp_path / name)]), PROMPTS))
    assert "\n" not in str(caught.value)


def test_without_the_extra(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "t.parquet").touch()
    (tmp_path / "t.txt.zst").touch()
    for name in (str(tmp_path / "t.parquet"), str(tmp_path / "t.txt.zst"), "hf://some/data"):
        with pytest.raises(ImportError, match=re.escape('; install it with: pip install "fastgpt2[data]"')):
            list(read_entries(find_sources([name]), PROMPTS))


class _DataSet(list):
    """A stand-in for what `datasets.load_dataset` returns, with the parts that are used."""

    _fingerprint = "f00"
    column_names = ("prompt", "id", "other")

    def select_columns(self, names):
        return _DataSet({name: row[name] for name in names} for row in self)


def test_data_sets_of_a_hub(monkeypatch):
    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        if split == "none":
            raise ValueError('Unknown split "none".\nThere are others.')
        return _DataSet([{"prompt": "a", "id": 1, "other": b""}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (entry,) = read_entries(find_sources(["hf://owner/name"]), PROMPTS)
    assert (entry.content, entry.id, entry.where) == ("a", "1", "hf://owner/name row 1")
    assert digest(find_sources(["hf://owner/name:test"]))
    assert asked == [("owner/name", "train"), ("owner/name", "test")]
    with pytest.raises(ValueError, match=r'hf://o/n:none: cannot be loaded \(Unknown split "none"\)'):
        list(read_entries(find_sources(["hf://o/n:none"]), PROMPTS))


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".txt", b"x" * 5000, "line 1: must have at most 1,000 bytes"),
        (".jsonl", b'{"prompt": "' + b"x" * 5000, "line 1: must have at most 1,000 bytes"),
        (".fasta", b">a\n" + b"MKV\n" * 2000, "line 251: an entry must have at most 1,000 bytes"),
        (".fasta", b"\n" * 5000, "line 1001: an entry must have at most 1,000 bytes"),
        (".csv", b"prompt,x\n" + b"," * 5000, "line 2: a row must have at most 1,000 characters"),
        (".csv", b'prompt,x\n"' + b"a\n" * 5000, "line 497: a row must have at most 1,000 characters"),
        (".jsonl", b"\n" * 5000, ": must hold at most 3,000 bytes; it has more: split it"),
        (".txt", b"\n" * 5000, ": must hold at most 3,000 bytes; it has more: split it"),
        (".csv", b"prompt\n" + b"\n" * 5000, ": must hold at most 3,000 bytes; it has more: split it"),
    ],
)
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_small_file_cannot_fill_the_memory(suffix, content, message, compression, tmp_path, monkeypatch):
    """A file is read row by row. The size of a row is limited, and so is the uncompressed size of the whole file."""
    monkeypatch.setattr("fastgpt2.input_files._MOST_LINE_BYTES", 1000)
    path = tmp_path / f"t{suffix}{compression}"
    if compression == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if compression else content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{'' if message[0] == ':' else ' '}{message}")):
        list(read_entries(find_sources([str(path)]), PROMPTS, most_bytes=3000))


def test_a_parquet_file_whose_texts_are_not_utf8(tmp_path):
    path = tmp_path / "t.parquet"
    texts = pyarrow.array([b"a", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: must be UTF-8 text; it is not after row 0")) as caught:
        list(read_entries(find_sources([str(path)]), PROMPTS))
    assert type(caught.value) is ValueError


def test_a_parquet_file_with_categories(tmp_path):
    """Columns that pandas calls categorical, of texts and of numbers."""
    path = tmp_path / "t.parquet"
    texts, numbers = pyarrow.array(["a", None, "b", "a"]), pyarrow.array([7, 8, 7, None])
    table = pyarrow.table({"prompt": texts.dictionary_encode(), "n": numbers.dictionary_encode()})
    pyarrow.parquet.write_table(table.filter([True, False, True, True]), path)
    entries = list(read_entries(find_sources([str(path)]), PROMPTS, with_fields=True))
    assert [entry.content for entry in entries] == ["a", "b", "a"]
    assert [entry.fields["n"] for entry in entries] == [7, 7, None]


@pytest.mark.parametrize("repeated", [True, False])
def test_a_small_parquet_file_cannot_fill_the_memory(repeated, tmp_path, monkeypatch):
    """200 MB of long texts in a file of a few KB are read some 64 MiB at a time."""
    path = tmp_path / "long.parquet"
    texts = ["x" * 400_000 + ("" if repeated else str(i)) for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), path, compression="zstd", write_batch_size=8)
    assert path.stat().st_size < 100_000
    sources, before = find_sources([str(path)]), pyarrow.total_allocated_bytes()
    number, most = 0, 0
    for entry in read_entries(sources, PROMPTS):
        assert entry.content == texts[number]
        number += 1
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert number == 500
    assert most < 150e6
    monkeypatch.setattr("fastgpt2.input_files._MOST_LINE_BYTES", 1000)
    with pytest.raises(ValueError, match=re.escape(f"{path} row 1: must have at most 1,000 characters")):
        next(read_entries(sources, PROMPTS))
