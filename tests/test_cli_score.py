"""`fastgpt2 score`: every input and output format, resuming, several processes, bad inputs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fastgpt2 import GPT2, score
from fastgpt2.cli import score as command_line
from fastgpt2.cli.main import main
from fastgpt2.record_files import unescape

TEXTS = ["def add(a, b):", "return a + b", "x\ty", "b):\n    return", "  \\", "Stop"]


@pytest.fixture
def sequences(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [{"text": text, "id": f"s{i}", "source": {"deep": [i]}} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def command(tiny_checkpoint):
    def run(*arguments: object) -> int:
        return main(["score", "--model", str(tiny_checkpoint), "--device", "cpu", *map(str, arguments)])

    return run


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_what_the_library_scores(command, sequences, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert command(sequences, "--out", out, "--logprobs", "--token-ids") == 0
    rows = read_rows(out)
    scores = score(GPT2.from_pretrained(tiny_checkpoint), TEXTS)
    assert [row["text"] for row in rows] == TEXTS
    assert [row["id"] for row in rows] == [f"s{i}" for i in range(len(TEXTS))]
    assert [row["source"] for row in rows] == [{"deep": [i]} for i in range(len(TEXTS))]
    for row, expected in zip(rows, scores, strict=True):
        assert row["logprobs"] == expected.logprobs
        assert row["token_ids"] == list(expected.token_ids[1:])
        assert row["logprob"] == pytest.approx(sum(row["logprobs"]))
        assert row["mean_logprob"] == pytest.approx(row["logprob"] / row["num_tokens"])
        assert row["perplexity"] == pytest.approx(2.718281828459045 ** -row["mean_logprob"])
        assert row["scored"] == "whole"
    count = sum(row["num_tokens"] for row in rows)
    assert f"6 sequences, {count} tokens in " in capsys.readouterr().err
    assert command(sequences, "--logprobs", "--token-ids") == 0
    assert capsys.readouterr().out == out.read_text(encoding="utf-8")


def test_after_the_prompt(command, tiny_checkpoint, tmp_path):
    model = GPT2.from_pretrained(tiny_checkpoint)
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "def", "text": " add"}\n{"prompt_ids": [5], "text": "b"}\n', encoding="utf-8")
    assert command(path, "--out", out, "--after-prompt") == 0
    expected = score(model, [" add", "b"], prefixes=["def", [5]], after_prefix=True)
    assert [row["logprob"] for row in read_rows(out)] == [s.logprob for s in expected]
    assert {row["scored"] for row in read_rows(out)} == {"continuation"}
    assert command(path, "--out", out, "--overwrite") == 0
    expected = score(model, [" add", "b"], prefixes=["def", [5]])
    assert [row["logprob"] for row in read_rows(out)] == [s.logprob for s in expected]
    assert {row["scored"] for row in read_rows(out)} == {"whole"}
    path = tmp_path / "in.fasta"
    path.write_text(">a x\nMKVLA\nGT\n", encoding="utf-8")
    assert command(path, "--out", out, "--overwrite", "--prompt", "def", "--append", "\nx", "--wrap", 3) == 0
    (row,) = read_rows(out)
    (expected,) = score(model, ["MKV\nLAG\nT\nx"], prefixes="def")
    assert (row["id"], row["text"], row["logprob"]) == ("a", "MKVLAGT", expected.logprob)


def test_every_format_out(command, sequences, tmp_path):
    rows = {}
    for suffix in (".jsonl", ".txt", ".fasta"):
        assert command(sequences, "--out", tmp_path / f"out{suffix}") == 0
    rows = read_rows(tmp_path / "out.jsonl")
    for row, line in zip(rows, (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines(), strict=True):
        index, logprob, tokens, perplexity, text = line.split("\t")
        assert (int(index), int(tokens), unescape(text)) == (row["index"], row["num_tokens"], row["text"])
        assert float(logprob) == pytest.approx(row["logprob"], abs=1e-5)
        assert float(perplexity) == pytest.approx(row["perplexity"], abs=1e-3)
    headers = [line for line in (tmp_path / "out.fasta").read_text(encoding="utf-8").splitlines() if line[0] == ">"]
    assert headers[1].startswith(f">s1 index=1 length=8 tokens={rows[1]['num_tokens']} logprob=")


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".fasta"])
def test_a_cut_run_and_shares_make_what_one_run_makes(suffix, command, tmp_path, seed, monkeypatch):
    monkeypatch.setattr(command_line, "GROUP", 4)
    rng = random.Random(seed)
    path, whole, out = tmp_path / "in.jsonl", tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    lines = [json.dumps({"token_ids": [rng.randrange(256) for _ in range(rng.randint(2, 30))]}) for _ in range(30)]
    lines[7] = lines[21] = "{"
    path.write_text("\n".join(lines), encoding="utf-8")
    options = ("--skip-bad", "--batch-tokens", rng.randint(1, 90))
    assert command(path, "--out", whole, *options) == 0
    data = whole.read_bytes()
    # The output is cut off anywhere. The three shares resume it one after the other, and the last one merges.
    out.write_bytes(data[: rng.randrange(len(data) // 2)])
    (tmp_path / f"out{suffix}.run.json").write_bytes((tmp_path / f"whole{suffix}.run.json").read_bytes())
    shares = [0, 1, 2]
    rng.shuffle(shares)
    for number, share in enumerate(shares):
        assert command(path, "--out", out, *options, "--resume", "--shard", f"{share}/3") == 0
        assert (out.read_bytes() == data) == (number == 2)
    assert [file.name for file in tmp_path.glob("*.part-*")] == []
    # One of three shares begins the run, and a single process finishes it.
    out.unlink()
    assert command(path, "--out", out, *options, "--shard", "1/3") == 0
    assert command(path, "--out", out, *options, "--resume") == 0
    assert out.read_bytes() == data


def test_bad_sequences_stop_the_run_or_are_skipped(command, tmp_path, capsys):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"text": "Stop"}\n{"text": 3}\n{"token_ids": [1]}\n{"text": "return"}\n', encoding="utf-8")
    assert command(path, "--out", out) == 2
    assert f'{path} line 2: "text" must be a string; got int\n' in capsys.readouterr().err
    assert command(path, "--out", out, "--skip-bad", "--resume") == 0
    error = capsys.readouterr().err
    assert f"fastgpt2: skipped: score: {path} line 3 has no token with another one before it" in error
    assert [row["index"] for row in read_rows(out)] == [0, 3]


def test_another_run_is_not_resumed(command, sequences, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert command(sequences, "--out", out) == 0
    before = out.read_bytes()
    assert command(sequences, "--out", out) == 2
    assert "exists; continue it with --resume or replace it with --overwrite" in capsys.readouterr().err
    for changes, name in (
        (["--prompt", "x"], "prompt"),
        (["--dtype", "bf16"], "weights"),
        (["--logprobs"], "logprobs"),
    ):
        assert command(sequences, "--out", out, "--resume", *changes) == 2
        assert f"was made by another run ({name} was " in capsys.readouterr().err
        assert command(sequences, "--out", out, "--resume", "--shard", "0/2", *changes) == 2
        assert f"was made by another run ({name} was " in capsys.readouterr().err
    sequences.write_text('{"text": "other"}\n', encoding="utf-8")
    assert command(sequences, "--out", out, "--resume") == 2
    assert "was made by another run (sequences was " in capsys.readouterr().err
    assert out.read_bytes() == before
