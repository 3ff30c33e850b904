"""Damaged files are read, or refused in one sentence that names them. The process neither ends nor prints anything."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.reliability import fuzz

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and resource limits")


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_files_are_read_or_refused(name: str, seed: int) -> None:
    results = fuzz.run(name, seed, cases=30 if name == "training" else 100)
    assert not [result for result in results if result.startswith("FAULT")], results
    assert name == "prompts" or set(results) != {"read"}, "every damaged file was read, so perhaps none was damaged"


@pytest.mark.parametrize("number", [75, 110])
def test_damaged_tables_that_were_mishandled_once(number: int) -> None:
    """Case 75: statistics of a Parquet file that ended the process. Case 110: a CSV header with a line break."""
    results = fuzz.run("prompts", 5, first=number, cases=1)
    assert not [result for result in results if result.startswith("FAULT")], results


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_many_damaged_files_are_read_or_refused(name: str, seed: int) -> None:
    results = fuzz.run(name, seed, cases=10**9, seconds=20)
    assert not [result for result in results if result.startswith("FAULT")], results


def _raise(folder: Path) -> None:
    raise KeyError("step")


def _long(folder: Path) -> None:
    raise ValueError(f"{folder}: two\nlines")


def _nameless(folder: Path) -> None:
    raise ValueError("cannot be read")


def _print(folder: Path) -> None:
    os.write(2, b"thread panicked")


def _abort(folder: Path) -> None:
    os.abort()


def _hang(folder: Path) -> None:
    import time

    time.sleep(60)


@pytest.mark.parametrize(
    ("reader", "what"),
    [
        (_raise, "KeyError"),
        (_long, "must be one sentence"),
        (_nameless, "must be one sentence"),
        (_print, "printed"),
        (_abort, "ended the process"),
        (_hang, "took longer"),
    ],
)
def test_the_fuzzer_sees_a_reader_with_that_mistake(reader, what: str, seed: int, monkeypatch) -> None:
    monkeypatch.setattr(fuzz, "CASE_SECONDS", 0.5)
    monkeypatch.setitem(fuzz.TARGETS, "mistake", fuzz.Target(fuzz._save_prompts, reader, ("p.txt",)))
    (result,) = fuzz.run("mistake", seed, cases=1)
    assert result.startswith("FAULT")
    assert what in result
