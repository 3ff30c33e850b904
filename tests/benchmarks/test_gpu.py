"""`make gpu` without a GPU: how it runs parts, shown with stand-ins, and its own parts at toy size."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import gpu, gpu_parts, refill
from benchmarks.gpu import Part, run_own, run_parts
from benchmarks.gpu_parts import PARTS, Found, OwnPart, Place, WrongError
from benchmarks.refill import prefill_and_step
from fastgpt2 import accounting, scheduler
from fastgpt2.decode import DecodeSession, Results
from fastgpt2.files import locked_folder
from fastgpt2.train import Trainer
from fastgpt2_kernels import backends, ops

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
TOY = Place(torch.device("cpu"), is_toy=True)
GPU = Place(torch.device("cuda", 0), is_toy=False)
SLOW = dict.fromkeys(("check", "compile", "training"), pytest.mark.slow)


def python(code: str, seconds: int = 20) -> Part:
    return Part("A stand-in.", seconds, (sys.executable, "-c", code))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in PARTS])
def test_a_part_at_toy_size(name: str) -> None:
    precision, found = torch.get_float32_matmul_precision(), {}
    try:
        PARTS[name].run(TOY, found)
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
            f"open({str(child)!r}, 'w').write(str(p.pid)); print('begun', flush=True)\n"
            "open('{out}/three.figures', 'w').write('{\"ms\": 7}')\n"
            "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('interrupted')",
            seconds=5,
        ),
        "four": python("print('after it')"),
    }
    out = tmp_path / "out"
    assert run_parts(parts, out) == 1
    found = {r["part"]: r["status"] for r in json.loads((out / "results.json").read_text())}
    assert found == {"one": "ok", "two": "failed", "three": "out of time", "four": "ok"}
    assert json.loads((out / "three.json").read_text())["found"] == {"ms": 7}
    assert (out / "one.txt").stat().st_size == gpu.MOST_OUTPUT
    assert (out / "one.txt").read_text().endswith("one is done\n")
    said = (out / "three.txt").read_text()
    assert said.startswith("begun\n")
    assert "interrupted" in said.splitlines(), "it could not say what it knows"
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
    assert run_parts({"three": python("pass")}, out) == 0, "a part that ran out of time runs again"


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


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGKILL)),
    ],
    ids=str,
)
def test_it_can_be_cut_off(tmp_path: Path, number: signal.Signals) -> None:
    """A run is cut off in the middle of a part, which ends too. Earlier results stay. The next run repeats the part."""
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
    while not (text.exists() and text.read_bytes().endswith(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(text.read_text())
    os.kill(cut.pid, number)
    status = cut.wait(30)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    wait_for_end(child)
    left = json.loads((out / "two.json").read_text())["status"]
    assert left == ("running" if number == signal.SIGKILL else "cut off")
    assert "one: ok" in (out / "summary.txt").read_text()
    quick.touch()
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=60)
    assert "one: done before" in done.stdout
    assert "two: ok" in done.stdout


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_what_an_earlier_run_has_left_is_ended(tmp_path: Path) -> None:
    """Only processes of the same folder of results are ended."""
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    left, other = (
        subprocess.Popen(
            command, env={**ENVIRONMENT, gpu.MARK: str(folder)}, stdout=subprocess.PIPE, start_new_session=True
        )
        for folder in (tmp_path / "out", tmp_path / "other")
    )
    try:
        for process in (left, other):
            assert process.stdout is not None
            process.stdout.readline()
        assert run_parts({"one": python("pass")}, tmp_path / "out") == 0
        assert left.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (left, other):
            process.kill()
            process.communicate()


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked_folder(tmp_path):
        assert run_parts({"one": python("pass")}, tmp_path) == 1
    assert "another process is writing to it" in capsys.readouterr().err
    assert not (tmp_path / "one.json").exists()


def test_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.describe_run()["commit"] == "unknown"


# -- one part -------------------------------------------------------------------------------------------------------


def run_with(
    part: Callable[[Place, Found], None], monkeypatch: pytest.MonkeyPatch, out: Path
) -> tuple[int, dict[str, object]]:
    """The exit status of a part of its own process, and what it found."""
    monkeypatch.setitem(PARTS, "xl", OwnPart(1, part))
    status = run_own("xl", True, out)
    return status, json.loads((out / "xl.figures").read_text())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (WrongError("other tokens"), {"wrong": "other tokens", "status": "wrong"}),
        (RuntimeError("out of memory"), {"error": "RuntimeError: out of memory", "status": "failed"}),
    ],
    ids=["wrong", "failed"],
)
def test_a_part_that_ends_in_an_error_keeps_what_it_found(
    error: Exception, told: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(place: Place, found: Found) -> None:
        found["before"] = 1
        raise error

    assert run_with(fails, monkeypatch, tmp_path) == (1, {"before": 1, **told})


def test_a_kernel_that_falls_back_makes_a_part_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def falls_back(place: Place, found: Found) -> None:
        error = backends.KernelFailedError("it does not compile")
        backends.note_failure("causal_attention_packed", place.device, error, (64,))

    monkeypatch.setattr(backends, "_FAILED", {})
    status, found = run_with(falls_back, monkeypatch, tmp_path)
    assert status == 1
    assert found["status"] == "wrong"
    assert "it does not compile" in str(found["wrong"])


def test_a_capture_that_fails_makes_a_part_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no capture")

    def captures(place: Place, found: Found) -> None:
        session: Any = SimpleNamespace(
            num_slots=1, use_pdl=False, use_graphs=True, _graphs={}, _captured=refuse,
            _kernels=SimpleNamespace(errors=(RuntimeError,)),
        )  # fmt: skip
        DecodeSession._capture(session, 1, torch.zeros(1, dtype=torch.int32))

    status, found = run_with(captures, monkeypatch, tmp_path)
    assert status == 1
    assert "no capture" in str(found["wrong"])


def test_a_graph_must_have_been_captured() -> None:
    captured: Any = SimpleNamespace(use_graphs=True, _graphs={1: object()})
    without: list[Any] = [
        SimpleNamespace(use_graphs=True, _graphs={}),
        SimpleNamespace(use_graphs=False, _graphs={1: 1}),
    ]
    gpu_parts._require_graphs(captured)
    for session in without:
        with pytest.raises(WrongError, match="no CUDA graph"):
            gpu_parts._require_graphs(session)


def test_models_on_a_gpu_ask_for_triton_by_name() -> None:
    assert GPU.backend == "triton"
    assert TOY.backend == "auto"


def test_a_result_is_found_whatever_is_printed_after_it(tmp_path: Path) -> None:
    """The result is in a file. A part that ends well without one has failed."""
    noted = (
        """open('{out}/xl.figures', 'w').write('{"ms": 7, "status": "STATUS"}'); print('{"ms": 8}', 'noise at exit')"""
    )
    for status in ("ok", "skipped"):
        assert run_parts({"xl": python(noted.replace("STATUS", status))}, tmp_path, again=True) == 0
        result = json.loads((tmp_path / "xl.json").read_text())
        assert (result["status"], result["found"]) == (status, {"ms": 7})
    assert run_parts({"xl": python("pass")}, tmp_path, again=True) == 1
    assert json.loads((tmp_path / "xl.json").read_text())["status"] == "failed"
    assert not (tmp_path / "xl.figures").exists()


def test_forward_is_timed_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, attend = set(), ops.causal_attention_packed

    def spy(x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        calls.add((torch.is_grad_enabled(), x.requires_grad))
        return attend(x, *args, **options)

    monkeypatch.setattr(ops, "causal_attention_packed", spy)
    PARTS["attention"].run(TOY, {})
    assert calls == {(False, False), (True, True)}


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "gpu_seconds", lambda call, device, repeats: 3.0)
    assert gpu_parts._seconds({"one": lambda: None}, GPU.device, 1) == {"one": 3.0}


def test_only_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's warning that the mode is a prototype is not a wait, and other warnings are not lost."""

    def set_mode(mode: str) -> None:
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing "
                "operations (Triggered internally at Module.cpp:1)",
                stacklevel=1,
            )

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)

    def count() -> int:
        with gpu_parts._counted_synchronisations(GPU.device) as waits:
            for _ in range(3):
                warnings.warn("called a synchronizing CUDA operation (Triggered internally at F.cpp:1)", stacklevel=1)
        return len(waits)

    with pytest.warns(UserWarning, match="prototype") as said:
        assert count() == 3
    assert len(said) == 1


def test_a_fallback_counts_while_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    with pytest.raises(WrongError), gpu_parts.without_fallbacks(), gpu_parts._counted_synchronisations(GPU.device):
        warnings.warn("fastgpt2: sample runs on PyTorch's operators from now on: why", stacklevel=1)


@pytest.mark.parametrize("is_same", [True, False])
def test_only_two_gpus_of_one_kind_must_agree(monkeypatch: pytest.MonkeyPatch, is_same: bool) -> None:
    class Model:
        def __init__(self, place: Place) -> None:
            self.index = place.device.index

        def generate(self, *args: object, **options: object) -> list[SimpleNamespace]:
            return [SimpleNamespace(token_ids=[self.index])]

        def train(self) -> Model:
            return self

    monkeypatch.setattr(gpu_parts, "_decoding_model", lambda place, name: Model(place))
    monkeypatch.setattr(gpu_parts, "train_step", lambda model, tokens: None)
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one" if is_same else str(device))
    found: Found = {}
    if is_same:
        with pytest.raises(WrongError, match="other tokens"):
            PARTS["second_gpu"].run(GPU, found)
    else:
        PARTS["second_gpu"].run(GPU, found)
    assert found["tokens"] == [[0], [1]]


def kernels(run: Callable[[], None]) -> set[tuple[str, str]]:
    """What would be compiled for the kernels that `run` launches."""
    return {(v.source.hash(), str(sorted(v.options.items(), key=str))) for v in ops.find_variants("sm_90", run)}


@pytest.fixture(scope="module")
def compiled_ahead() -> set[tuple[str, str]]:
    pytest.importorskip("triton")
    if backends.interpreter_is_on():
        pytest.skip("Triton's interpreter compiles nothing")
    return set().union(*(kernels(run) for run in gpu_parts._launches(TOY, has_pdl=True).values()))


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "medium",
        "training",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("xl", "precision", "inference_mode", "refill", "repeated")),
    ],
)
def test_the_kernels_of_a_part_are_compiled_before_it(
    name: str, compiled_ahead: set[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # While launches are recorded, the part runs on the CPU with Triton's kernels, which do nothing.
    monkeypatch.setattr(gpu_parts, "_require", lambda holds, what: None)
    monkeypatch.setattr(Trainer, "_mean_loss", lambda trainer: 0.0)
    precision = torch.get_float32_matmul_precision()
    try:
        needed = kernels(lambda: PARTS[name].run(TOY, {}))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert needed
    assert needed <= compiled_ahead


def test_kernels_that_do_not_compile_do_not_keep_others_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_variants(variants: list[str]) -> None:
        if variants == ["medium"]:
            raise RuntimeError("ptxas")
        compiled.extend(variants)

    names = ("attention", "medium", "xl")
    monkeypatch.setattr(gpu_parts, "_launches", lambda place, has_pdl: {name: name for name in names})
    monkeypatch.setattr(ops, "find_variants", lambda target, run: [run])
    monkeypatch.setattr(ops, "compile_variants", compile_variants)
    found: Found = {}
    with pytest.raises(WrongError, match="do not compile: medium"):
        PARTS["compile"].run(TOY._replace(is_toy=False), found)
    assert compiled == ["attention", "xl"]
    assert found["medium: error"] == "RuntimeError: ptxas"


def test_a_model_is_made_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights of gpt2-xl take a CPU half a minute."""
    devices, make = [], gpu_parts.GPT2

    def spy(*args: object, **options: object) -> object:
        devices.append(torch.get_default_device())
        return make(*args, **options)

    monkeypatch.setattr(gpu_parts, "GPT2", spy)
    gpu_parts._model(TOY._replace(device=torch.device("meta")), "gpt2")
    assert devices == [torch.device("meta")]


def test_training_compiles_as_the_trainer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    names, train = [], gpu_parts._train
    compiled: dict[str, list[str]] = {}

    def spy(place: Place, found: Found, name: str, *args: Any) -> None:
        def compile(function: Any) -> Any:
            names.append(function.__name__)
            return function

        names.clear()
        with mock.patch.object(torch, "compile", compile):  # the toy part has its own until it ends
            train(place, found, name, *args)
        compiled[name] = [*names]

    monkeypatch.setattr(gpu_parts, "_train", spy)
    found: Found = {}
    PARTS["training"].run(TOY, found)
    both = ["hidden_states"]
    assert compiled == {"bf16": [], "fp16": [], "bf16, compiled": both, "fp16, compiled": both}
    assert all(found[f"{name}: waits in 3 steps"] == 0 for name in compiled)


def test_the_fixed_cost_of_a_prefill_is_measured() -> None:
    """It stands beside what the scheduler assumes."""
    found: Found = {}
    PARTS["refill"].run(TOY, found)
    assert found["steps that the scheduler assumes"] == scheduler.PREFILL_STEPS["native"]
    assert found["3 rows: fixed cost of a prefill, in steps"] >= 0
    assert found["3 rows: speedup of waiting"] > 0


def test_steps_are_timed_without_waiting_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for kind, owner, name in (("step", DecodeSession, "step"), ("read", Results, "read")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, kind=kind, real=real, **options: events.append(kind) or real(*args, **options)
        )
    prefill_and_step(gpu_parts._model(TOY, "gpt2"), 3)
    assert events[-refill.STEPS - 1 :] == ["step"] * refill.STEPS + ["read"]


def test_the_limits_are_what_the_documents_say() -> None:
    seconds = [part.seconds for part in gpu.all_parts().values()]
    names = list(gpu.all_parts())
    assert names[0] == "compile"
    first = names.index("inference_mode") + 1
    assert sum(seconds[:first]) == 600
    said = " ".join((ROOT / "CONTRIBUTING.md").read_text("utf-8").split())
    assert (
        f"up to `inference_mode` take at most 10 minutes, and all of them at most {math.ceil(sum(seconds) / 60)}"
        in said
    )


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
            assert part.command[2] in ("pytest", "benchmarks")
    tune = gpu.all_parts()["tune"]
    rows = 3
    assert rows * float(tune.command[tune.command.index("--seconds") + 1]) < tune.seconds
    assert {"-v", "--maxfail=20"} <= {*gpu.all_parts()["tests"].command}, "a test that fails is named at once"
