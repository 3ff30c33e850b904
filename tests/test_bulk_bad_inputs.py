"""`generate` and `score` refuse bad inputs of bulk work in one sentence with status 2, and lose nothing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastgpt2 import GPT2, record_files
from fastgpt2.cli import score as score_command
from fastgpt2.cli.main import main
from fastgpt2.files import lock

COLUMNS = {"generate": "prompt", "score": "text"}
ROWS = ["def add", "return a", "x = 1", "y = 2"]


@pytest.fixture(params=COLUMNS)
def command(request) -> str:
    return request.param


@pytest.fixture
def run(command, tiny_checkpoint, capsys, monkeypatch) -> Callable[..., tuple[int, str]]:
    """`run(path, out)` runs the command on an input. It returns the status and what was printed."""
    monkeypatch.setattr(score_command, "GROUP", 2)  # so that each of two shares has work

    def call(path: Path, out: Path, *more: object, model: Path = tiny_checkpoint) -> tuple[int, str]:
        words = [command, "--prompts", path] if command == "generate" else [command, path]
        if command == "generate":
            words += ["--max-new-tokens", 5]
        status = main([str(word) for word in (*words, "--model", model, "--device", "cpu", "--out", out, *more)])
        return status, capsys.readouterr().err

    return call


def table(path: Path, column: str) -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in ROWS), encoding="utf-8")
    return path


def parquet(path: Path, rows: dict[str, list[object]]) -> Path:
    parquet_module = pytest.importorskip("pyarrow.parquet")
    parquet_module.write_table(pytest.importorskip("pyarrow").table(rows), path)
    return path


def missing_column(folder: Path, column: str) -> tuple[Path, str]:
    return parquet(folder / "in.parquet", {"words": ROWS}), f'in.parquet: must have a column "{column}"; it has words'


def mixed_types(folder: Path, column: str) -> tuple[Path, str]:
    path = folder / "in.jsonl"
    path.write_text(f'{{"{column}": "a b"}}\n{{"{column}": 5}}\n', encoding="utf-8")
    return path, f'in.jsonl line 2: "{column}" must be a string; got int'


def mixed_ids(folder: Path, column: str) -> tuple[Path, str]:
    ids = {"prompt": "prompt_ids", "text": "token_ids"}[column]
    path = folder / "in.jsonl"
    path.write_text(f'{{"{ids}": [1, 2]}}\n{{"{ids}": [1, "x"]}}\n', encoding="utf-8")
    return path, f'in.jsonl line 2: "{ids}" must be a list of integers'


def numbers(folder: Path, column: str) -> tuple[Path, str]:
    return parquet(folder / "in.parquet", {column: [1.5, 2.5]}), f'row 1: "{column}" must be a string; got float'


def empty_file(folder: Path, column: str) -> tuple[Path, str]:
    (folder / "in.jsonl").touch()
    return (
        folder / "in.jsonl",
        f"in.jsonl: must hold at least one {'prompt' if column == 'prompt' else 'sequence'}; it holds none",
    )


def empty_table(folder: Path, column: str) -> tuple[Path, str]:
    return parquet(folder / "in.parquet", {column: []}), "in.parquet: must hold at least one "


def cut_parquet(folder: Path, column: str) -> tuple[Path, str]:
    path = parquet(folder / "in.parquet", {column: ROWS * 50})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path, "in.parquet: must be a whole Parquet file; it is not ("


@pytest.mark.parametrize(
    "spoil", [missing_column, mixed_types, mixed_ids, numbers, empty_file, empty_table, cut_parquet]
)
def test_files_that_cannot_be_used(spoil, command, run, tmp_path):
    path, message = spoil(tmp_path, COLUMNS[command])
    status, said = run(path, tmp_path / "out.jsonl")
    assert status == 2
    errors = [
        line for line in said.splitlines() if " tokens/s" not in line
    ]  # without the summary of what was done before the error
    assert len(errors) == 1
    assert errors[0].startswith("fastgpt2: ")
    assert message in errors[0]


def test_a_second_writer(command, run, tmp_path):
    path, out = table(tmp_path / "in.jsonl", COLUMNS[command]), tmp_path / "out.jsonl"
    for name, more in (("out.jsonl", ()), ("out.jsonl.part-1", ("--shard", "1/2"))):
        with open(tmp_path / name, "ab") as file:
            lock(file.fileno(), tmp_path / name)
            status, said = run(path, out, "--resume", *more)
        assert status == 2
        assert said.startswith(f"fastgpt2: {tmp_path / name}: another process is writing to it")
        assert said.count("\n") == 1
    assert run(path, out, "--resume")[0] == 0


def test_a_disk_that_is_full_in_the_merge(command, run, tmp_path, monkeypatch):
    path, out = table(tmp_path / "in.jsonl", COLUMNS[command]), tmp_path / "out.jsonl"
    assert run(path, tmp_path / "whole.jsonl")[0] == 0
    assert run(path, out, "--shard", "1/2")[0] == 0

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    @contextlib.contextmanager
    def full(target: Path) -> Iterator[Full]:
        yield Full()

    with monkeypatch.context() as patch:
        patch.setattr(record_files, "atomic_file", full)
        status, said = run(path, out, "--shard", "0/2")
    assert status == 2
    assert said.splitlines()[-1] == (
        f"fastgpt2: {out}: cannot be put in order (No space left on device); all of its records are there, --resume "
        "tries again"
    )
    assert run(path, out, "--shard", "0/2", "--resume")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("what", ["model", "setting"])
def test_shares_with_another_model_or_setting(what, command, run, tiny_checkpoint, tmp_path):
    path, out = table(tmp_path / "in.jsonl", COLUMNS[command]), tmp_path / "out.jsonl"
    assert run(path, out, "--shard", "0/2")[0] == 0
    before = out.with_name("out.jsonl.part-0").read_bytes()
    if what == "model":
        other = GPT2.from_pretrained(tiny_checkpoint)
        other.lm_head.weight.data[0] += 1
        other.save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "tokenizer.json").write_bytes((tiny_checkpoint / "tokenizer.json").read_bytes())
        status, said = run(path, out, "--shard", "1/2", model=tmp_path / "other")
        name = "weights"
    else:
        status, said = run(path, out, "--shard", "1/2", "--logprobs")
        name = "logprobs"
    assert status == 2
    assert said.startswith(f"fastgpt2: {out}: was made by another run ({name} was ")
    assert said.endswith("; resume it with the settings it began with\n")
    assert said.count("\n") == 1
    assert out.with_name("out.jsonl.part-0").read_bytes() == before
