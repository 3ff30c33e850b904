"""Watching a run: TensorBoard, Weights & Biases and plots."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run

from fastgpt2.cli import plot as plot_command
from fastgpt2.cli import train as command
from fastgpt2.data import TokenData
from fastgpt2.train import (
    Trainer,
)
from tests.train.helpers import (
    make_config,
    make_model,
    run_command,
)


def reported(out: Path) -> dict[str, list[tuple[int, float]]]:
    """The numbers of metrics.jsonl, under the names that loggers get."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        step, part = line.pop("step"), "validation" if "val_loss" in line else "train"
        for name, value in line.items():
            if name != "is_best" and value is not None:
                found.setdefault(f"{part}/{name.removeprefix('val_')}", []).append((step, value))
    return found


def stopped_and_resumed(data: TokenData, out: Path, **fields: Any) -> None:
    """Kill a run after step 9, four steps after its last checkpoint, and resume it."""
    config = make_config(sample_interval=6, eval_interval=6, **fields)
    for report in Trainer(make_model(), data, config, out).run():
        if report.step == 9:
            break
    list(Trainer.resume(out, data).run())


def test_tensorboard_shows_what_metrics_hold(data: TokenData, tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stopped_and_resumed(data, tmp_path, log="tensorboard")
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    held = reported(tmp_path)
    assert shown.keys() == held.keys()
    assert {"train/loss", "train/lr", "train/tokens_per_s", "validation/loss"} <= held.keys()
    for tag, points in held.items():
        assert shown[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], tag
    assert [e.step for e in events.Tensors("sample/text_summary")] == [6, 12]


def test_wandb_is_told_what_metrics_hold(data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a stand-in for the library, because the real one writes files that only its own programs can read."""
    begun: list[dict[str, Any]] = []
    told: dict[tuple[str, int], Any] = {}
    finished: list[bool] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            told.update({(name, step): value for name, value in values.items()})

        def finish(self) -> None:
            finished.append(True)

    def init(**options: Any) -> Run:
        begun.append(options)
        return Run()

    stand_in = types.ModuleType("wandb")
    stand_in.init = init  # type: ignore[attr-defined]
    stand_in.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    stopped_and_resumed(data, tmp_path, log="wandb")
    held = {(name, step): value for name, points in reported(tmp_path).items() for step, value in points}
    assert {key: value for key, value in told.items() if key[0] != "sample"} == held
    assert [step for name, step in told if name == "sample"] == [6, 12]
    assert len(begun) == len(finished) == 2
    assert begun[0]["id"] == begun[1]["id"]  # the same run, resumed
    assert begun[0]["config"]["lr"] == 1e-2


@pytest.mark.slow
def test_wandb_itself_takes_it(data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    stopped_and_resumed(data, tmp_path, log="wandb")
    files = sorted(tmp_path.rglob("run-*.wandb"))
    assert len(files) == 2
    assert all(file.stat().st_size for file in files)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named(
    name: str, data: TokenData, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = rf'log \'{name}\' needs {name}; install it with: pip install "fastgpt2\[{name}\]"'
    with pytest.raises(ImportError, match=message):
        Trainer(make_model(), data, make_config(log=name), tmp_path / "a")
    with pytest.raises(ImportError, match=message):
        run_command(tmp_path / "b", "--data", text, "--vocab-size", 270, "--log", name)
    assert not (tmp_path / "b").exists()


def test_adapters_without_peft_are_refused(data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'lora_rank needs peft; install it with: pip install "fastgpt2\[lora\]"'):
        Trainer(make_model(), data, make_config(lora_rank=2), tmp_path)


def run_plot(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    plot_command.add_arguments(parser)
    return plot_command.run(parser.parse_args([str(a) for a in arguments]))


def test_plots_show_every_line_of_every_run(
    data: TokenData, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    runs = [tmp_path / "x" / "one", tmp_path / "y" / "one", tmp_path / "two"]
    for run in runs:
        list(Trainer(make_model(), data, make_config(), run).run())
    held = [reported(run) for run in runs]
    with open(runs[2] / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # as a run leaves it while it writes
    drawn: list[Any] = []
    savefig = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *a, **options: drawn.append(self) or savefig(self, *a, **options)
    )
    assert run_plot(runs[0]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "metrics.png")
    assert (runs[0] / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert run_plot(*runs, "--out", tmp_path / "all.svg") == 0
    assert b"<svg" in (tmp_path / "all.svg").read_bytes()
    loss, lr, speed = drawn[1].axes
    assert [line.get_label() for line in lr.lines] == [str(runs[0]), str(runs[1]), "two"]
    for panel, names in (
        (loss, ("train/loss", "validation/loss")),
        (lr, ["train/lr"]),
        (speed, ["train/tokens_per_s"]),
    ):
        expected = [points[name] for points in held for name in names]
        assert [line.get_xydata().tolist() for line in panel.lines] == [
            [list(p) for p in points] for points in expected
        ]


def test_plots_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl: no such file; name the folder of a training run"):
        run_plot(run)
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl: is empty; a run writes its first line after"):
        run_plot(run)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\nx\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not a line that a training run wrote"):
        run_plot(run)
    with pytest.raises(ValueError, match=r"all.gif: must end in .png or .svg; name another"):
        run_plot(run, "--out", tmp_path / "all.gif")
    with pytest.raises(ValueError, match="plot: a picture of several runs needs a name; give it with --out FILE"):
        run_plot(run, run)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'plots need matplotlib; install it with: pip install "fastgpt2\[plot\]"'):
        run_plot(run)


def test_torchrun_passes_every_option_on() -> None:
    """torchrun takes, or refuses, every argument that could abbreviate one of its own options."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--log"}
    assert "--log-to" in options
    for option in options:
        given = torch.distributed.run.get_args_parser().parse_args(["-m", "fastgpt2", "train", option])
        assert given.training_script_args == ["train", option]
    assert parser.parse_args(["--out", "x", "--log-to", "wandb"]).log == "wandb"
