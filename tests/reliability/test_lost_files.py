"""A file of a run's folder is cut to half, emptied or lost: the run goes on to the same end, or says what is wrong."""

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
# metrics.jsonl holds times; the text is read only once, and the data's copy of the tokenizer only by a run that begins.
_NOT_COMPARED = {"run/metrics.jsonl", "text.txt", "run/data/tokenizer.json", "run/data/tokenizer_config.json"}
_NOT_COMPARED |= {"run/data/meta.json"}


def train(folder: Path, *more: str) -> tuple[int, str]:
    """(exit status, what the run says on stderr) of a run that is begun or resumed in `folder`."""
    arguments = ["train", "--data", "text.txt", "--out", "run", "--steps", str(STEPS), "--batch-size", "2", "--resume"]
    arguments += ["--layers", "1", "--heads", "2", "--hidden-size", "8", "--context", "16", "--vocab-size", "280"]
    arguments += ["--eval-interval", "2", "--checkpoint-interval", "2", "--lr", "0.05", *more]
    said = io.StringIO()
    before = os.getcwd()
    os.chdir(folder)  # a run is resumed with the data that it began with, and that includes their path
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return main(arguments), said.getvalue()
    finally:
        os.chdir(before)


def contents(folder: Path) -> dict[str, object]:
    """What the files of a run hold, by name."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        # How a pickle spells equal values depends on which of them are one object.
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
    """(a run that a signal has stopped at step 6, the files of the run that went through)."""
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
    """Each file once, in one of the three ways."""
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
                assert not wrong, f"{name} {how}: ended with other {wrong}"
            else:
                assert status == 2, f"{name} {how}: {said}"
                sentence = said.splitlines()[-1]
                assert sentence.startswith("fastgpt2: ")
                assert os.path.basename(name).split(".")[0].split("-")[0] in sentence, f"{name} {how}: {sentence}"
