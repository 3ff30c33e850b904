"""A file in a run's folder is halved, emptied or removed. The run resumes to the same result, or names the file."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from fastgpt2.cli import main

STEPS = 10
# metrics.jsonl holds times. The text is read only once, and the tokenizer in data/ only by a new run.
_NOT_COMPARED = {"run/metrics.jsonl", "text.txt", "run/data/tokenizer.json", "run/data/tokenizer_config.json"}
_NOT_COMPARED |= {"run/data/meta.json"}


def train(folder: Path, *more: str) -> tuple[int, str]:
    """Begin or resume a run in `folder`. Return its exit status and its stderr."""
    arguments = ["train", "--data", "text.txt", "--out", "run", "--steps", str(STEPS), "--batch-size", "2", "--resume"]
    arguments += ["--layers", "1", "--heads", "2", "--hidden-size", "8", "--context", "16", "--vocab-size", "280"]
    arguments += ["--eval-interval", "2", "--checkpoint-interval", "2", "--lr", "0.05", *more]
    said = io.StringIO()
    before = os.getcwd()
    os.chdir(folder)  # relative, because a resumed run must name its data by the same path
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return main(arguments), said.getvalue()
    finally:
        os.chdir(before)


def contents(folder: Path) -> dict[str, object]:
    """The contents of a run's files, by name."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        # Pickles of equal values can differ in their bytes: they also record which values are the same object.
        name: _plain(torch.load(path)) if path.suffix == ".pt" else path.read_bytes()
        for name, path in files.items()
        if name not in _NOT_COMPARED
    }


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else getattr(value, "tolist", lambda: value)()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """The folder of a run that stopped at step 6, and the files of the same run without a stop."""
    from fastgpt2.train import Trainer

    folder = tmp_path_factory.mktemp("runs")
    half, whole = folder / "half", folder / "whole"
    for run in (half, whole):
        run.mkdir()
        (run / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 200, encoding="utf-8")
    assert train(whole)[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_agree_to_stop", lambda self: self.step == 6)
        train(half)
    assert (half / "run/checkpoints/step-00000006.pt").exists()
    return half, contents(whole)


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(data[: len(data) // 2] if how == "half" else b"")


HOWS = ("half", "empty", "missing")


def test_a_run_that_lost_a_file_goes_on_or_says_so(stopped, tmp_path: Path, seed: int) -> None:
    """Every file is damaged once, in one of three ways."""
    _check(stopped[0], stopped[1], tmp_path, lambda rng: [rng.choice(HOWS)], random.Random(seed))


@pytest.mark.slow
def test_a_run_that_lost_a_file_in_any_way_goes_on_or_says_so(stopped, tmp_path: Path, seed: int) -> None:
    _check(stopped[0], stopped[1], tmp_path, lambda rng: list(HOWS), random.Random(seed))


def _check(half: Path, whole: dict[str, object], tmp_path: Path, hows, rng: random.Random) -> None:
    names = sorted(path.relative_to(half).as_posix() for path in half.rglob("*") if path.is_file())
    assert len(names) > 12
    for name in names:
        for how in hows(rng):
            case = tmp_path / "case"
            shutil.rmtree(case, ignore_errors=True)
            shutil.copytree(half, case)
            spoil(case / name, how)
            status, said = train(case)
            if status == 0:
                got = contents(case)
                wrong = [n for n in whole if got.get(n) != whole[n]]
                assert not wrong, f"{name} {how}: these files differ at the end: {wrong}"
            else:
                assert status == 2, f"{name} {how}: {said}"
                sentence = said.splitlines()[-1]
                assert sentence.startswith("fastgpt2: ")
                assert os.path.basename(name).split(".")[0].split("-")[0] in sentence, f"{name} {how}: {sentence}"
