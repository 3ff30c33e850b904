"""Selecting records: the best, the complete ones, each text once, in every format."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path

import pyarrow.parquet
import pytest

from fastgpt2.cli.main import main
from fastgpt2.record_files import unescape
from fastgpt2.selection import Selection, select


def make_rows(rng: random.Random, count: int) -> list[dict]:
    return [
        {
            "prompt_index": i,
            "sample_index": 0,
            "text": "".join(rng.choice("MK \n<end>é") for _ in range(rng.randrange(6))),
            "num_tokens": rng.randint(1, 9),
            "finish_reason": rng.choice(("stop", "length")),
            "logprob": -rng.randint(1, 9) / 4,
            "perplexity": rng.choice((None, rng.randint(1, 9) / 2)),
        }
        for i in range(count)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain(rows: list[dict], chosen: Selection, *, fasta: bool = False) -> list[dict]:
    """The same selection in the simplest possible code."""
    rows = [dict(row) for row in rows]
    if chosen.drop_truncated:
        rows = [row for row in rows if row["finish_reason"] != "length"]
    for row in rows:
        for spelling in chosen.special:
            row["text"] = row["text"].replace(spelling, "")
        if chosen.special:
            row["text"] = row["text"].strip()
    written = [re.sub("<[^<>]*>|[^A-Za-z*-]", "", row["text"]) if fasta else row["text"] for row in rows]
    least, most = chosen.min_length or 0, chosen.max_length if chosen.max_length is not None else 10**9
    pairs = [(text, row) for text, row in zip(written, rows, strict=True) if least <= len(text) <= most]
    if chosen.dedupe:
        pairs = [pair for i, pair in enumerate(pairs) if pair[0] not in [text for text, _ in pairs[:i]]]
    rows = [row for _, row in pairs]
    if chosen.keep_best is not None:
        worst = float("inf")
        if chosen.by == "perplexity":
            rows.sort(key=lambda row: worst if row["perplexity"] is None else row["perplexity"])
        else:
            rows.sort(key=lambda row: -row["logprob"])
        number = chosen.keep_best
        count = -(-len(rows) * int(number[:-1]) // 100) if number.endswith("%") else int(number)
        rows = rows[:count]
    return rows


@pytest.mark.parametrize("suffix", [".jsonl", ".fasta"])
def test_what_is_kept(suffix, tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(40):
        rows = make_rows(rng, rng.randrange(40))
        low, high = sorted(rng.randrange(6) for _ in range(2))
        chosen = Selection(
            special=rng.choice(((), ("<end>",))),
            drop_truncated=rng.random() < 0.5,
            min_length=rng.choice((None, low)),
            max_length=rng.choice((None, high)),
            dedupe=rng.random() < 0.5,
            keep_best=rng.choice((None, "1", "7", "100", "5%", "33%", "100%")),
            by=rng.choice(("perplexity", "logprob")),
        )
        source, out = write(tmp_path / "in.jsonl", rows), tmp_path / f"out{suffix}"
        counts = select(source, out, chosen)
        expected = plain(rows, chosen, fasta=suffix == ".fasta")
        assert (counts.read, counts.kept) == (len(rows), len(expected))
        if suffix == ".jsonl":
            assert read(out) == expected
        else:
            headers = [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith(">")]
            assert [int(re.match(r">prompt(\d+)_0 ", line)[1]) for line in headers] == [
                row["prompt_index"] for row in expected
            ]


def test_every_format(tmp_path, seed):
    rows = make_rows(random.Random(seed), 20)
    rows[3]["token_ids"], rows[4]["token_ids"] = [1, 2], [1, 2.5]
    rows[5]["mixed"], rows[6]["mixed"] = 1, "x"
    rows[7]["whole"], rows[8]["whole"] = 1, 2
    source = write(tmp_path / "in.jsonl", rows)
    for suffix in (".txt", ".csv", ".parquet"):
        select(source, tmp_path / f"out{suffix}", Selection())
    lines = (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()
    assert [unescape(line) for line in lines] == [row["text"] for row in rows]
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["text"] for row in table] == [row["text"] for row in rows]
    assert [float(row["logprob"]) for row in table] == [row["logprob"] for row in rows]
    assert table[3]["token_ids"] == "[1, 2]"
    back = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    for got, row in zip(back, rows, strict=True):
        assert {name: got[name] for name in row if name != "mixed"} == {n: v for n, v in row.items() if n != "mixed"}
    assert (back[5]["mixed"], back[6]["mixed"]) == ("1", "x")


def test_the_command(tmp_path, capsys):
    rows = [
        {"index": i, "text": text, "perplexity": p, "logprob": -p}
        for i, (text, p) in enumerate((("M<so>KV", 3.0), ("MKV", 2.0), ("M", 1.0), ("MKVL", 4.0)))
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.fasta"
    assert main(["select", str(source), str(out), "--keep-best", "2", "--min-length", "2", "--dedupe"]) == 0
    assert [line.split()[0] for line in out.read_text(encoding="utf-8").splitlines()] == [
        ">sequence0",
        "MKV",
        ">sequence3",
        "MKVL",
    ]
    assert f"{out} has 2 of the 4 records in {source} (1 of the wrong length, 1 duplicate)" in capsys.readouterr().err
    assert main(["select", str(source), str(out)]) == 2
    assert "exists; replace it with --overwrite" in capsys.readouterr().err
    assert main(["select", str(source), str(out), "--strip-special", "--overwrite"]) == 2
    assert "cannot be read; name them with --special TEXT" in capsys.readouterr().err
    out = tmp_path / "out.jsonl"
    assert main(["select", str(source), str(out), "--strip-special", "--special", "<so>"]) == 0
    assert read(out)[0]["text"] == "MKV"
    (tmp_path / "in.jsonl.run.json").write_text('{"special_tokens": ["KV"]}', encoding="utf-8")
    assert main(["select", str(source), str(out), "--strip-special", "--overwrite"]) == 0
    assert [row["text"] for row in read(out)] == ["M<so>", "M", "M", "ML"]
