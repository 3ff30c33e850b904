"""The progress line of `generate` and `score`: complete on a terminal, and absent elsewhere."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable

import pytest

from fastgpt2.cli import progress as progress_module
from fastgpt2.cli import score as score_command
from fastgpt2.cli.main import main
from fastgpt2.cli.progress import Progress

LINE = re.compile(
    r"(\d+)%\|.*\| (\d+)/(\d+) (\w+) \[\d+:\d+<.*, ([\d,]+) left, ([\d,]+) tokens/s, (\d+) rows? in flight"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[tuple[int, int, str, int, int, int]]:
        """(done, total, unit, left, tokens per second, rows in flight) every time that the line was drawn."""
        found = [match for part in re.split(r"[\r\n]", self.getvalue()) if (match := LINE.search(part))]
        return [(int(m[2]), int(m[3]), m[4], int(m[5]), int(m[6].replace(",", "")), int(m[7])) for m in found]


@pytest.fixture
def on_terminal(monkeypatch) -> Callable[[], Terminal]:
    """`on_terminal()` makes stderr a terminal. The test itself must call it, after pytest has replaced stderr."""
    monkeypatch.setattr(progress_module, "_INTERVAL", 0.0)

    def make() -> Terminal:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    return make


def test_the_line_counts(on_terminal):
    terminal = on_terminal()
    with Progress(5, 1, "sample") as progress:
        progress.add((0, 0), 1)
        progress.add((0, 1), 1)
        progress.add((0, 0), 3, ends=True)
        progress.leave_out()
        progress.add((1, 0), 2, ends=True)
    states = [(done, total, left, rows) for done, total, _, left, _, rows in terminal.lines()]
    assert states[-1] == (3, 4, 1, 1)
    for state in ((1, 5, 4, 1), (1, 5, 4, 2), (2, 5, 3, 1)):
        assert state in states
    assert all(rate > 0 for *_, rate, _ in terminal.lines())


def test_every_look_is_of_one_moment(on_terminal):
    terminal = on_terminal()
    with Progress(30, 0, "sample") as progress:
        for row in range(30):
            if row % 3 == 0:
                time.sleep(0.11)  # long enough that tqdm by itself would draw
            progress.add((row, 0), 1, ends=True)
    assert {done + left for done, _, _, left, _, _ in terminal.lines()} == {30}


def test_generate_and_score_on_a_terminal(on_terminal, tiny_checkpoint, tmp_path, monkeypatch):
    terminal = on_terminal()
    monkeypatch.setattr(score_command, "GROUP", 2)
    (tmp_path / "p.txt").write_text("def\nreturn\nx\n", encoding="utf-8")
    model, paths = (
        ["--model", str(tiny_checkpoint), "--device", "cpu"],
        [str(tmp_path / n) for n in ("p.txt", "o.jsonl")],
    )
    options = ["--num-samples", "2", "--max-new-tokens", "5", "--batch-size", "4", "--stop-token-id", "1"]
    assert main(["generate", *model, "--prompts", paths[0], "--out", paths[1], *options]) == 0
    lines = terminal.lines()
    assert {(total, unit) for _, total, unit, *_ in lines} == {(6, "samples")}
    assert all(done + left == 6 for done, _, _, left, _, _ in lines)
    assert max(rows for *_, rows in lines) == 4
    assert (lines[-1][0], lines[-1][-1]) == (6, 0)
    terminal.truncate(0)
    (tmp_path / "s.jsonl").write_text('{"text": "a b"}\n{"text": "x y"}\n{}\n{"text": "a b c"}\n', encoding="utf-8")
    score = ["score", *model, str(tmp_path / "s.jsonl"), "--skip-bad", "--out", str(tmp_path / "scores.jsonl")]
    assert main([*score, "--shard", "1/2"]) == 0
    assert terminal.lines()[-1][:4] == (1, 1, "sequences", 0)
    terminal.truncate(0)
    assert main([*score, "--shard", "0/2"]) == 0
    lines = terminal.lines()
    assert max(rows for *_, rows in lines) == 2
    assert lines[-1][:4] == (2, 2, "sequences", 0)


def test_nothing_without_a_terminal(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("def a\nreturn a\n", encoding="utf-8")
    model, out = ["--model", str(tiny_checkpoint), "--device", "cpu"], tmp_path / "o.jsonl"
    assert main(["generate", *model, "--prompts", str(tmp_path / "p.txt"), "--out", str(out)]) == 0
    assert main(["score", *model, str(tmp_path / "p.txt"), "--out", str(tmp_path / "s.jsonl")]) == 0
    err = capsys.readouterr().err
    assert [line.split(":")[0] for line in err.splitlines()] == ["fastgpt2"] * 2
    assert "\r" not in err
