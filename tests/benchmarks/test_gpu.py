"""`make gpu` without a GPU: how it runs parts, shown with stand-ins, and its own parts at toy size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Part, run_parts
from benchmarks.gpu_parts import PARTS, Place

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def python(code: str, seconds: int = 20) -> Part:
    return Part("A stand-in.", seconds, (sys.executable, "-c", code))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", PARTS)
def test_a_part_at_toy_size(name: str) -> None:
    precision = torch.get_float32_matmul_precision()
    try:
        found = PARTS[name][1](Place(torch.device("cpu"), is_toy=True))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert found
    assert "skipped" not in found
    json.dumps(found)


def test_results_stay_and_are_not_made_twice(tmp_path: Path) -> None:
    """One part is done, one fails, and one runs out of time, which also ends its child process. Long output is cut."""
    child = tmp_path / "child"
    parts = {
        "one": python(f"print('x' * {2 * gpu.MOST_OUTPUT}); print('one is done')"),
        "two": python("raise SystemExit(3)"),
        "three": python(
            "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(9)'])\n"
            f"open({str(child)!r}, 'w').write(str(p.pid)); print('begun', flush=True); time.sleep(60)",
            seconds=2,
        ),
        "four": python("print('after it')"),
    }
    out = tmp_path / "out"
    assert run_parts(parts, out) == 1
    found = {r["part"]: r["status"] for r in json.loads((out / "results.json").read_text())}
    assert found == {"one": "ok", "two": "failed", "three": "out of time", "four": "ok"}
    assert (out / "one.txt").stat().st_size == gpu.MOST_OUTPUT
    assert (out / "one.txt").read_text().endswith("one is done\n")
    assert (out / "three.txt").read_text() == "begun\n"
    deadline = time.monotonic() + 10
    while is_alive(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(child.read_text()))
    summary = (out / "summary.txt").read_text()
    assert all(f"{name}: " in summary for name in parts)
    (out / "four.txt").unlink()
    assert run_parts({name: parts[name] for name in ("one", "four")}, out) == 0
    assert not (out / "four.txt").exists(), "the part was run again"
    assert run_parts({"four": parts["four"]}, out, again=True) == 0
    assert (out / "four.txt").exists()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_results_of_another_version_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"one": python("pass")}
    assert run_parts(parts, tmp_path) == 0
    (tmp_path / "one.txt").unlink()
    monkeypatch.setattr(gpu, "describe_run", lambda: {"commit": "another", "versions": {}, "machine": {}})
    assert run_parts(parts, tmp_path) == 0
    assert (tmp_path / "one.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=str)
def test_it_can_be_cut_off(tmp_path: Path, number: signal.Signals) -> None:
    """A run is cut off in the middle of a part. Earlier results stay, and the next run begins with that part."""
    quick, out = tmp_path / "quick", tmp_path / "out"
    slow = (
        f"import os, time; print(os.getpid(), flush=True)\nwhile not os.path.exists({str(quick)!r}): time.sleep(0.05)"
    )
    code = f"""
import sys
from pathlib import Path
from benchmarks.gpu import Part, run_parts
parts = {{"one": Part("", 20, (sys.executable, "-c", "")), "two": Part("", 90, (sys.executable, "-c", {slow!r}))}}
sys.exit(run_parts(parts, Path({str(out)!r})))
"""
    command = [sys.executable, "-c", code]
    cut = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
    text = out / "two.txt"
    deadline = time.monotonic() + 60
    while not (text.exists() and text.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(cut.pid, number)
    status = cut.wait(30)
    assert status == (130 if number == signal.SIGINT else -number)
    left = json.loads((out / "two.json").read_text())["status"]
    assert left == ("cut" if number == signal.SIGINT else "running")
    assert "one: ok" in (out / "summary.txt").read_text()
    quick.touch()  # this also ends what a killed run left behind
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=60)
    assert "one: done before" in done.stdout
    assert "two: ok" in done.stdout


def test_a_part_that_is_wrong_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(place: Place) -> dict:
        raise gpu.WrongError("other tokens")

    monkeypatch.setitem(PARTS, "xl", (1, wrong))
    assert gpu.run_own("xl", is_toy=True) == 1
    assert gpu.last_object(capsys.readouterr().out) == {"status": "wrong", "found": {"wrong": "other tokens"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "There is no GPU here: `make gpu` needs one that PyTorch finds.\n"


def test_a_part_through_the_command(tmp_path: Path) -> None:
    """The command line runs the part in a process of its own, and writes its results into the folder."""
    assert gpu.main(["precision", "--toy", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "precision.json").read_text())
    assert result["status"] == "ok"
    assert result["found"].keys() == {"highest", "high", "tf32", "ieee"}
    with pytest.raises(SystemExit):
        gpu.main(["nothing", "--toy", "--out", str(tmp_path)])


def test_the_other_commands_exist() -> None:
    """Parts that are other commands accept the arguments that they are given."""
    for name, part in gpu.all_parts().items():
        if name not in PARTS:
            assert part.command[:2] == (sys.executable, "-m")
            assert part.command[2] in ("fastgpt2", "pytest", "benchmarks")
