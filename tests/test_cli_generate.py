"""`fastgpt2 generate`: prompts from the terminal and from files, every format, resuming, bad inputs."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from fastgpt2 import GPT2
from fastgpt2.cli.main import main
from fastgpt2.generate import generate
from fastgpt2.record_files import unescape
from fastgpt2.tokenizer import Tokenizer
from tests.helpers import without_rounding

PROMPTS = ["def add", "return a +", "", "x", "b):\n    return"]


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": text, "id": f"p{i}"}) + "\n" for i, text in enumerate(PROMPTS)), encoding="utf-8"
    )
    return path


@pytest.fixture
def command(tiny_checkpoint, prompts_file):
    """`command(...)` runs `fastgpt2 generate` on the tiny model, with 3 samples of up to 8 tokens per prompt."""

    def run(*arguments: object) -> int:
        options = ["--num-samples", 3, "--max-new-tokens", 8, "--seed", 5, "--device", "cpu"]
        return main(["generate", "--model", str(tiny_checkpoint), *map(str, (*options, *arguments))])

    return run


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_what_the_library_generates(command, tiny_checkpoint, prompts_file, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert command("--prompts", prompts_file, "--out", out, "--token-ids", "--logprobs", "--temperature", 1) == 0
    rows = sorted(read_rows(out), key=lambda row: (row["prompt_index"], row["sample_index"]))
    expected = generate(GPT2.from_pretrained(tiny_checkpoint), PROMPTS, num_samples=3, max_new_tokens=8, seed=5)
    assert [row["token_ids"] for row in rows] == [sample.token_ids for sample in expected]
    assert [row["text"] for row in rows] == [sample.text for sample in expected]
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(5) for _ in range(3)]
    for row, sample in zip(rows, expected, strict=True):
        assert row["logprobs"] == pytest.approx(sample.logprobs, abs=1e-4)
    num_tokens = sum(row["num_tokens"] for row in rows)
    assert f"15 samples, {num_tokens} tokens in " in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".jsonl", ".fasta", ".txt"])
def test_resume_makes_what_an_uninterrupted_run_makes(suffix, command, prompts_file, tmp_path, seed, capsys):
    rng = random.Random(seed)
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    assert command("--prompts", prompts_file, "--out", whole) == 0
    data = whole.read_bytes()
    end = re.compile(rb"\n(?=>|\Z)" if suffix == ".fasta" else rb"\n")
    # One cut is within the first record. With another batch size, another record may then be finished first.
    for cut in (rng.randrange(20), *rng.sample(range(len(data)), 3)):
        out.write_bytes(data[:cut])
        settings = (tmp_path / f"whole{suffix}.run.json").read_bytes()
        (tmp_path / f"out{suffix}.run.json").write_bytes(settings)
        assert command("--prompts", prompts_file, "--out", out, "--resume", "--batch-size", rng.randint(1, 20)) == 0
        written, expected = (sorted(end.split(without_rounding(d))) for d in (out.read_bytes(), data))
        assert written == expected
    before = out.read_bytes()
    assert command("--prompts", prompts_file, "--out", out, "--resume") == 0
    assert out.read_bytes() == before
    assert "0 samples, 0 tokens" in capsys.readouterr().err


def test_another_run_is_not_resumed(command, prompts_file, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert command("--prompts", prompts_file, "--out", out) == 0
    before = out.read_bytes()
    for changes, name in (
        (["--seed", 6], "seed"),
        (["--top-k", 3], "top_k"),
        (["--num-samples", 4], "num_samples"),
        (["--dtype", "bf16"], "weights"),
        (["--logprobs"], "logprobs"),
        (["--with-prompt"], "with_prompt"),
    ):
        assert command("--prompts", prompts_file, "--out", out, "--resume", *changes) == 2
        assert f"was made by another run ({name} was " in capsys.readouterr().err
    lines = out.read_text(encoding="utf-8")
    out.write_text(lines + '{"prompt_index": 0, "sample_index": 3}\n', encoding="utf-8")
    assert command("--prompts", prompts_file, "--out", out, "--resume") == 2
    assert (
        "it holds sample 3 of prompt 0, which is not part of this run; it cannot be resumed" in capsys.readouterr().err
    )
    out.write_text(lines, encoding="utf-8")
    prompts_file.write_text('{"prompt": "other"}\n', encoding="utf-8")
    assert command("--prompts", prompts_file, "--out", out, "--resume") == 2
    assert "was made by another run (prompts was " in capsys.readouterr().err
    assert out.read_bytes() == before
    assert command("--prompts", prompts_file, "--out", out) == 2
    assert "exists; continue it with --resume or replace it with --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert command("--prompts", prompts_file, "--out", out, "--overwrite") == 0
    assert len(read_rows(out)) == 3


def test_another_tokenizer_is_not_resumed(command, tiny_checkpoint, prompts_file, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(tiny_checkpoint, folder)
    options = ("--model", folder, "--prompts", prompts_file, "--out", out)
    assert command(*options) == 0
    before = out.read_bytes()
    Tokenizer.train(["another text"], 260).save(folder)
    assert command(*options, "--resume") == 2
    assert "was made by another run (tokenizer was " in capsys.readouterr().err
    assert out.read_bytes() == before


def test_bad_prompts_stop_the_run_before_it_begins_or_are_skipped(command, tmp_path, capsys):
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    good = [{"prompt": "def"}, {"prompt": "x"}]
    too_long, bad_id = {"prompt_ids": [1] * 65}, {"prompt_ids": [1, 10**6]}
    lines = [json.dumps(good[0]), json.dumps(too_long), "{", json.dumps(bad_id), json.dumps(good[1])]
    path.write_text("\n".join(lines), encoding="utf-8")
    out.write_text("precious\n", encoding="utf-8")
    assert command("--prompts", path, "--out", out, "--overwrite") == 2
    assert capsys.readouterr().err == (
        f"fastgpt2: generate: {path} line 2 has 65 tokens; the context holds 64; shorten the prompt, or "
        "truncate it on the left\n"
    )
    assert out.read_text(encoding="utf-8") == "precious\n"
    assert command("--prompts", path, "--out", out, "--overwrite", "--skip-bad") == 0
    errors = capsys.readouterr().err
    for start in (f"generate: {path} line 2 has", f"{path} line 3: must be JSON"):
        assert f"skipped: {start}" in errors
    assert f"skipped: generate: {path} line 4 holds the token id 1000000; ids must be in [0, " in errors
    rows = {(row["prompt_index"], row["sample_index"]): row["text"] for row in read_rows(out)}
    assert set(rows) == {(p, s) for p in (0, 4) for s in range(3)}
    path.write_text("\n".join([lines[0], lines[1], lines[4]]), encoding="utf-8")
    assert command("--prompts", path, "--out", out, "--overwrite", "--truncate", "left") == 0
    assert {row["prompt_index"] for row in read_rows(out)} == {0, 1, 2}
    # Skipped prompts do not change the others: the same prompt at the same index gives the same samples.
    path.write_text(
        "\n".join([lines[0], '{"prompt": "a"}', '{"prompt": "b"}', '{"prompt": "c"}', lines[4]]), encoding="utf-8"
    )
    assert command("--prompts", path, "--out", out, "--overwrite") == 0
    again = {(row["prompt_index"], row["sample_index"]): row["text"] for row in read_rows(out)}
    assert {key: again[key] for key in rows} == rows


def test_one_prompt_streams_to_the_screen(command, tiny_checkpoint, capsys):
    arguments = ("def add", "--num-samples", 1, "--temperature", 0)
    assert command(*arguments) == 0
    printed = capsys.readouterr()
    (sample,) = generate(GPT2.from_pretrained(tiny_checkpoint), ["def add"], max_new_tokens=8, temperature=0)
    assert printed.out == f"def add{sample.text}\n"
    assert "1 sample, " in printed.err


def test_samples_longer_than_the_context(command, tiny_checkpoint, prompts_file, tmp_path, capsys):
    model, out = GPT2.from_pretrained(tiny_checkpoint), tmp_path / "out.jsonl"
    longest = model.config.context_length + 30
    arguments = ("--max-new-tokens", longest, "--temperature", 1, "--stop-token-id", 0, "--context-shift")
    options = {"max_new_tokens": longest, "seed": 5, "stop_token_ids": [0], "context_shift": True}
    assert command("--prompts", prompts_file, "--out", out, "--token-ids", *arguments) == 0
    expected = generate(model, PROMPTS, num_samples=3, **options)
    assert [row["token_ids"] for row in read_rows(out)] == [sample.token_ids for sample in expected]
    assert max(len(sample.token_ids) for sample in expected) == longest
    assert command("--prompts", prompts_file, "--out", out, "--resume", "--token-ids", *arguments[:-1]) == 2
    assert "context_shift was True and is False" in capsys.readouterr().err
    assert command("def add", "--num-samples", 1, *arguments) == 0
    assert capsys.readouterr().out == f"def add{expected[0].text}\n"


def test_several_samples_on_the_screen(command, capsys):
    assert command("def", "--num-samples", 2) == 0
    out = capsys.readouterr().out
    assert "=== prompt 0, sample 0\ndef" in out
    assert "=== prompt 0, sample 1\ndef" in out


def test_prompts_from_standard_input(command, tmp_path, monkeypatch, capsys):
    class Input:
        buffer = io.BytesIO(b"def\nreturn\n")

    out = tmp_path / "out.txt"
    monkeypatch.setattr(sys, "stdin", Input)
    assert command("--prompts", "-", "--out", out, "--with-prompt") == 0
    texts = {
        line.split("\t")[0]: unescape(line.split("\t")[2]) for line in out.read_text(encoding="utf-8").splitlines()
    }
    assert texts["0"].startswith("def")
    assert texts["1"].startswith("return")
    Input.buffer = io.BytesIO(b"def add")
    assert command("-", "--num-samples", 1) == 0
    assert capsys.readouterr().out.startswith("def add")


def test_stop_strings_and_tokens(command, prompts_file, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ("--prompts", prompts_file, "--out", out, "--overwrite", "--token-ids", "--temperature", 2)
    assert command(*options) == 0
    text = max((row["text"] for row in read_rows(out)), key=len)
    assert command(*options, "--stop", text[2:4], "--stop", text[4]) == 0
    stopped = [row for row in read_rows(out) if row["finish_reason"] == "stop"]
    cut = min(text.find(text[2:4]), text.find(text[4]))
    assert any(row["text"] == text[:cut] for row in stopped)
    assert not any(text[2:4] in row["text"] or text[4] in row["text"] for row in read_rows(out))
    token = next(row["token_ids"][1] for row in read_rows(out) if row["num_tokens"] > 2)
    assert command(*options, "--stop-token-id", token) == 0
    assert any(row["token_ids"][-1] == token for row in read_rows(out) if row["finish_reason"] == "stop")


def test_without_tokenizer_ids_in_ids_out(command, tiny_checkpoint, tmp_path, capsys):
    folder = tmp_path / "model"
    model = GPT2.from_pretrained(tiny_checkpoint)
    model.tokenizer = None
    model.save_pretrained(folder)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt_ids": [5, 6]}\n', encoding="utf-8")
    assert command("--model", folder, "--prompts", prompts, "--out", out, "--token-ids") == 0
    rows = read_rows(out)
    assert all(row["text"] is None and row["token_ids"] for row in rows)
    for arguments, message in (
        (["--out", tmp_path / "out.txt"], "needs text, but the model"),
        ([], "has no tokenizer to show text with; use --out FILE.jsonl"),
    ):
        assert command("--model", folder, "--prompts", prompts, *arguments) == 2
        assert message in capsys.readouterr().err
    assert command("--model", folder, "def") == 2
    assert "the prompt is text, but the model has no tokenizer" in capsys.readouterr().err
