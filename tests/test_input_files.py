"""Texts in: every format, columns, compression, patterns, and bad entries that keep their places."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastgpt2.input_files import PROMPTS, Entry, EntryError, Source, read_entries


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
