"""The benchmark suite at toy size: every module runs, wrong contenders are not timed, results can be saved and read."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import signal

import pytest
import torch

from benchmarks import MODULES, __main__, compile_report, report, step_profile, tune, workers
from benchmarks.generate import TOY
from benchmarks.harness import (
    Case,
    Contender,
    LeftOutError,
    Result,
    Settings,
    load,
    peak_in_child,
    resident_peak,
    run_case,
)
from fastgpt2 import GPT2, GPT2Config
from fastgpt2_kernels import ops
from fastgpt2_kernels.native.decode import PHASES

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(scale="toy", seconds=0.0, memory=False, folder=str(tmp_path))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_runs(module, settings):
    cases = load(module, settings)
    assert len({case.title for case in cases}) == len(cases)
    for case in cases:
        results = run_case(module, case, settings)
        assert [r.contender for r in results] == [c.name for c in case.contenders]
        for r in results:
            # A peer may be absent; ours and what is always installed may not.
            assert r.status.startswith(("ok", "absent: ", "needs a GPU", "skipped: ")), (r.contender, r.status)
            if r.is_ours and "triton" not in r.contender and "compiled" not in r.contender:
                assert r.status in ("ok", "needs a GPU")
            if r.status == "ok":
                assert 0 < r.p20 <= r.median <= r.p80
                assert r.ratio_base > 0
                assert r.cold_seconds > 0
                assert r.share > 0 or r.dtype == "int8"
        assert sum(r.status == "ok" and r.is_ours for r in results) >= 1


@pytest.mark.parametrize("scale", ["quick", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_names_of_their_own(device, scale):
    """Nothing is allocated before a case runs, so the large ones, too, can be listed anywhere."""
    for module in MODULES:
        titles = [case.title for case in load(module, Settings(device=device, scale=scale))]
        assert len(set(titles)) == len(titles) > 0


# -- agreement ----------------------------------------------------------------------------------------------------


class Counted:
    """Counts the calls of a contender whose result is wrong by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = factor, 0

    def build(self, x: torch.Tensor):
        def call():
            self.calls += 1
            return [x * x * self.factor]

        return call


def square_case(*contenders: Contender, **fields) -> Case:
    x = torch.randn(8)
    exact = lambda x: [x.double() ** 2]  # noqa: E731
    return Case("square", {"N": 8}, "float32", contenders=contenders, inputs=lambda: x, exact=exact, **fields)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_contender_is_caught_before_timing(factor, settings):
    right, wrong = Counted(1.0), Counted(factor)
    case = square_case(Contender("plain", right.build, is_plain=True), Contender("ours", wrong.build, is_ours=True))
    good, bad = run_case("toy", case, settings)
    assert good.status == "ok"
    assert bad.status.startswith("wrong: ")
    assert bad.median is None
    assert wrong.calls == 1 < right.calls


def test_a_wrong_plain_expression_is_caught_too(settings):
    """The plain expression's error is the others' yardstick, so it must not be huge itself."""
    case = square_case(Contender("plain", Counted(1.1).build, is_plain=True))
    assert run_case("toy", case, settings)[0].status.startswith("wrong: ")


@pytest.mark.parametrize("error", ["a token of another row", "a token too few"])
def test_wrong_tokens_are_caught(error, settings):
    """A wrong token is noticed in every row that is checked, even at the last token."""
    case = load("generate", settings)[0]
    ours = next(c for c in case.contenders if c.name == "ours")

    def build(inputs):
        rows = ours.build(inputs)()
        rows[-1][-1] = (rows[-1][-1] + 1) % inputs.config.vocab_size
        return lambda: rows if error == "a token of another row" else [row[:-1] for row in rows]

    wrong = dataclasses.replace(ours, build=build)
    (result,) = run_case("generate", dataclasses.replace(case, contenders=[wrong]), settings)
    assert result.status.startswith("wrong: ")
    assert result.median is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sample temperature", lambda result, logits: [torch.zeros_like(result[0]), result[1]]),
        ("sample temperature", lambda result, logits: [result[0], result[1] + 0.01]),
        ("sample top-k", lambda result, logits: [logits.argmax(-1), result[1]]),
        ("sample greedy", lambda result, logits: [result[0][:1], result[1][:1]]),
        ("decode step", lambda tokens, inputs: [*tokens[:-1], (tokens[-1] + 1) % inputs.config.vocab_size]),
        ("decode step", lambda tokens, inputs: tokens[:1]),
    ],
    ids=["any token", "its log-probability", "never drawn", "a row too few", "the last row", "a token too few"],
)
def test_wrong_choices_are_caught(name, change, settings):
    case = next(case for case in load("decode_step", settings) if case.name == name)
    ours = next(c for c in case.contenders if c.name == "ours torch")

    def build(inputs):
        call = ours.build(inputs)
        return lambda: change(call(), inputs)

    both = [ours, dataclasses.replace(ours, build=build)]
    right, wrong = run_case("decode_step", dataclasses.replace(case, contenders=both), settings)
    assert right.status == "ok"
    assert wrong.status.startswith("wrong: ")


def test_who_cannot_run_is_a_row(settings):
    def absent(inputs):
        raise LeftOutError("absent: no such package")

    def broken(inputs):
        raise RuntimeError("no kernel\nfor this shape")

    case = square_case(
        Contender("plain", Counted(1.0).build, is_plain=True), Contender("a", absent), Contender("b", broken)
    )
    results = run_case("toy", case, settings)
    assert [r.status for r in results] == ["ok", "absent: no such package", "failed: RuntimeError: no kernel"]
    text = "\n".join(report.table(results))
    assert "a: absent: no such package" in text
    assert "b: failed: RuntimeError: no kernel" in text


def test_who_fails_later_is_a_row_too(settings):
    """A contender fails at its second call. A case whose inputs do not fit the machine gives one row."""

    def build(x):
        calls = iter([[x * x]])
        return lambda: next(calls)

    def too_large():
        raise MemoryError("8 TB")

    case = square_case(Contender("plain", Counted(1.0).build, is_plain=True), Contender("once", build))
    assert [r.status for r in run_case("toy", case, settings)] == ["ok", "failed: StopIteration: ?"]
    (row,) = run_case("toy", dataclasses.replace(case, inputs=too_large), settings)
    assert (row.contender, row.status) == ("all", "failed: MemoryError: 8 TB")


def test_cases_for_a_gpu_are_named(settings):
    results = run_case("toy", square_case(needs_gpu=True), settings)
    assert [r.status for r in results] == ["needs a GPU"]
    assert "square N=8 (float32)" in "\n".join(report.without_gpu(results))


# -- processes of their own ---------------------------------------------------------------------------------------


def wrong_here(parent, x):
    return lambda: [x * x * (os.getpid() != parent)]


def wrong_square(x):
    return lambda: [x * x * 1.01]


def raises_later(x):
    calls = []

    def call():
        calls.append(x)
        if len(calls) > 1:
            raise MemoryError("no room for 9 GB")
        return [x * x]

    return call


def is_absent(x):
    raise LeftOutError("absent: not installed")


def dies(parent, x):
    return lambda: os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != parent else [x * x]


@pytest.fixture
def no_workers(forkserver):
    workers.close()
    yield
    workers.close()


def test_contenders_in_processes_of_their_own(settings, no_workers):
    """If one contender fails, the others' results stay. Only those that continue keep their process."""
    before = set(multiprocessing.active_children())
    plain, dying = (functools.partial(build, os.getpid()) for build in (wrong_here, dies))
    builds = {"plain": plain, "late": raises_later, "absent": is_absent, "dies": dying, "wrong": wrong_square}
    contenders = [Contender(name, build, is_plain=name == "plain") for name, build in builds.items()]
    for _ in range(2):  # the process also serves the next case, or is replaced if it is gone
        results = {r.contender: r for r in run_case("toy", square_case(*contenders, isolated=True), settings)}
        assert results["plain"].status == "ok"
        assert results["plain"].median > 0
        assert results["late"].status == "failed: MemoryError: no room for 9 GB"
        assert results["absent"].status == "absent: not installed"
        assert results["dies"].status == f"failed: its process ended with exit code {-signal.SIGKILL}"
        assert results["wrong"].status.startswith("wrong: ")
    processes = set(multiprocessing.active_children()) - before
    assert len(processes) == 2
    workers.close()
    assert not any(process.is_alive() for process in processes)


def test_generation_in_processes_of_their_own(settings, no_workers):
    """The suite's own contenders and inputs can be sent to the process, and their results come back."""
    case = dataclasses.replace(load("generate", settings)[0], isolated=True)
    chosen = [c for c in case.contenders if c.name in ("transformers", "ours")]
    results = run_case("generate", dataclasses.replace(case, contenders=chosen), settings)
    assert [r.status for r in results] == ["ok"] * len(chosen)
    assert load("generate", dataclasses.replace(settings, scale="quick"))[0].isolated


# -- memory -------------------------------------------------------------------------------------------------------


def test_peak_memory_is_what_a_call_needs_beside_its_result():
    pytest.importorskip("psutil")

    def call():
        large = torch.ones(20_000_000)
        return [large[:5_000_000] + 1, large.sum()]

    peak, resident = resident_peak(call)
    assert 75e6 < peak < 95e6
    assert resident > peak


def test_peak_memory_in_a_process_of_its_own(settings):
    pytest.importorskip("psutil")
    case = load("cross_entropy", settings)[0]
    peaks = peak_in_child("cross_entropy", settings, case.title, 0)
    assert peaks is not None
    assert 0 <= peaks[0] < 50e6 < peaks[1]


# -- files --------------------------------------------------------------------------------------------------------


def measured(contender: str = "ours", **fields) -> Result:
    values = {"median": 1.0, "p20": 0.99, "p80": 1.01, "base": "eager", "ratio_base": 2.0, "ratio_base_p20": 1.98}
    values |= {"ratio_base_p80": 2.02, "machine": {"device": "x"}} | fields
    identity = {"module": "toy", "case": "square", "shape": {"N": 8}, "dtype": "float32", "contender": contender}
    return Result(**{**identity, "status": "ok", "is_ours": True, **values})


def test_results_survive_their_file(tmp_path):
    results = [measured(), measured("liger", status="absent: why", median=None)]
    path = tmp_path / "results.jsonl"
    report.write_json(results[:1], path)
    report.write_json(results[1:], path)
    assert report.read_json(path) == results
    path.write_text(path.read_text(encoding="utf-8") + '{"module": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 3"):
        report.read_json(path)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "same"),
        # The machine was slow in this run, but the base was just as slow.
        ({"median": 2.0, "p20": 1.98, "p80": 2.02}, "same"),
        ({"ratio_base": 1.5, "ratio_base_p20": 1.48, "ratio_base_p80": 1.52}, "slower"),
        ({"ratio_base": 2.5, "ratio_base_p20": 2.4, "ratio_base_p80": 2.6}, "faster"),
        # Just as much slower, but the ranges overlap.
        ({"ratio_base": 1.5, "ratio_base_p20": 1.4, "ratio_base_p80": 1.99}, "same"),
        # The other run has another base, so only the seconds can be compared.
        ({"base": "sdpa", "median": 2.0, "p20": 1.98, "p80": 2.02}, "slower"),
        ({"base": "sdpa", "ratio_base": 9.0}, "same"),
        ({"status": "failed: why"}, "broken"),
    ],
)
def test_comparison_knows_noise(change, verdict):
    (found,) = report.compare([measured()], [measured(**change)])
    assert found[0] == verdict


def test_comparison_names_what_came_and_went(tmp_path, capsys):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    report.write_json([measured("a"), measured("b", status="absent: why")], old)
    report.write_json([measured("b"), measured("c")], new)
    assert __main__.main(["compare", str(old), str(new)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 gone, 1 mended, 1 new"
    report.write_json([measured("a", ratio_base=1.0, ratio_base_p80=1.1, ratio_base_p20=0.9)], new)
    assert __main__.main(["compare", str(old), str(new)]) == 1


def test_the_front(tmp_path, capsys):
    """A run of one case writes its lines, prints its table, and says what needs a GPU; --tune, too."""
    path = tmp_path / "results.jsonl"
    only = "cached_attention R=1 H=12 S=128 D=64 float32"
    arguments = ["decode", "--quick", "--seconds", "0.01", "--only", only, "--json", str(path), "--device", "cpu"]
    assert __main__.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "ours torch float32" in printed
    assert {r.contender for r in report.read_json(path)} == {c.name for c in load("decode", Settings())[0].contenders}
    if not torch.cuda.is_available():
        assert "Needs a GPU" in printed
        assert __main__.main(["attention", "--tune"]) == 2
        assert "--tune needs a GPU" in capsys.readouterr().out


# -- tuning -------------------------------------------------------------------------------------------------------


def test_tuning_checks_every_candidate(settings):
    """Of rows (factor, repeats), the fastest correct one is chosen. Wrong and broken ones are rejected."""
    row = (1.0, 400)

    def ours(x):
        def call():
            factor, repeats = row
            if repeats == 0:
                raise RuntimeError("out of registers")
            for _ in range(repeats):
                result = x * x * factor
            return [result]

        return call

    class Using:
        def __init__(self, new):
            self.new = new

        def __enter__(self):
            nonlocal row
            self.old, row = row, self.new

        def __exit__(self, *error):
            nonlocal row
            row = self.old

    case = square_case(
        Contender("eager", Counted(1.0).build, is_plain=True), Contender("ours triton", ours, is_ours=True)
    )
    candidates = [(1.0, 4), (1.0, 2000), (1.5, 1), (1.0, 0)]
    tuned = tune.tune(tune.Tunable("key", (1.0, 400), candidates, Using, case), settings, seconds=60.0)
    assert tuned.best == (1.0, 4)
    assert tuned.after < tuned.before
    assert tuned.tried == 5
    assert set(tuned.refused) == {(1.5, 1), (1.0, 0)}
    assert any("key: (1.0, 4),  # " in line for line in tune.lines(tuned))
    assert row == (1.0, 400)
    # Without time only the present row is timed.
    late = tune.tune(tune.Tunable("key", (1.0, 400), candidates, Using, case), settings, seconds=-1.0)
    assert late.tried == 1
    assert any("the present row stays" in line for line in tune.lines(late))


# -- reports ------------------------------------------------------------------------------------------------------


def test_programs_on_a_multiprocessor():
    """Computed by hand for each limit: registers, shared memory, and 64 warps."""
    row = {"target": "sm_80", "warps": 4, "registers": 255, "shared": 32768}
    assert compile_report.programs(row) == 2  # 512 // 256 = 2 warps per partition
    assert compile_report.programs(row | {"registers": 32}) == 4  # 167936 // (32768 + 1024)
    assert compile_report.programs(row | {"registers": 32, "shared": 0}) == 16  # 64 warps
    assert (
        compile_report.programs(row | {"registers": 100, "shared": 0, "warps": 8}) == 2
    )  # 512 // 104 = 4 warps per partition
    assert compile_report.programs(row | {"target": "gfx942", "registers": 128, "shared": 40000}) == 1


def test_the_compile_report_is_read_as_it_is_written(monkeypatch, tmp_path):
    row = {"target": "sm_90", "case": "attention x", "warps": 4, "registers": 190, "shared": 1024, "spills": 0}
    row |= {"tensor_core": 3, "wide_loads": 4, "wide_stores": 5, "seconds": 1.0, "triton": "3.9.0"}
    path = tmp_path / "REPORT.md"
    monkeypatch.setattr(compile_report, "REPORT", path)
    path.write_text("\n".join(compile_report.markdown([row])) + "\n", encoding="utf-8")
    assert compile_report.committed() == ("3.9.0", {("sm_90", "attention x"): compile_report.cells(row)})


def test_plots_show_every_contender(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    limits = {"float32": {"flops": 1e11, "bandwidth": 1e10}}
    machine = {"device": "x", "limits": limits}
    results = [
        measured(
            name, case=case, shape={"B": 1, "T": T}, median=T / 1e5, tflops=0.01, intensity=T / 10, machine=machine,
            peak_bytes=T * 10**5, tokens_per_second=1e5 / T if case == "generate" else None, is_ours=name == "ours",
        )
        for case in ("attention backward", "generate")
        for name in ("ours", "sdpa <flash>")
        for T in (256, 512)
    ]  # fmt: skip
    written = plots.draw(results, tmp_path / "plots")
    names = ["roofline.svg", "attention_backward.svg", "attention_backward_memory.svg", "generate.svg"]
    assert [path.name for path in written] == names
    for path in written:
        assert path.read_text(encoding="utf-8").rstrip().endswith("</svg>")
        # matplotlib draws text as glyphs, and writes its words into a comment beside them.
        assert "ours" in path.read_text(encoding="utf-8")
        assert "sdpa &lt;flash&gt;" in path.read_text(encoding="utf-8") or "sdpa <flash>" in path.read_text(
            encoding="utf-8"
        )


def test_bars_show_a_shared_base_once(tmp_path, monkeypatch):
    """transformers in float32 occurs in the cases of both dtypes. Its first figure is shown."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    from benchmarks import plots

    drawn = []
    monkeypatch.setattr(Axes, "bar_label", lambda self, bars, labels, **_: drawn.append(labels))
    rows = [measured(name, tokens_per_second=n) for name, n in (("base", 5.0), ("ours", 3.0), ("base", 4.0))]
    plots.draw(rows, tmp_path)
    assert drawn == [["3", "5"]]


def test_the_profile_of_a_step():
    if (reason := ops.why_not_native("decode_step", torch.device("cpu"))) is not None:
        pytest.skip(reason)
    found = step_profile.profile(GPT2(TOY).eval(), 2, "float32", prompt=3, new=20, turns=1)
    assert [*found] == [*PHASES, "host"]
    assert all(found[name] > 0 for name in ("embedding", "qkv", "attention", "other linear layers", "head", "sampling"))
    assert min(found.values()) >= 0
    first = step_profile.profile_prefill(GPT2(TOY).eval(), 20, "float32", turns=1)
    assert [*first] == [*found]
    assert all(first[name] > 0 for name in ("embedding", "qkv", "attention", "other linear layers", "head", "host"))
    assert min(first.values()) >= 0


def test_the_limits_of_a_step():
    """For GPT-2 124M, reading 124M numbers bounds one row, and matrix products bound a long prompt."""
    config, rates = GPT2Config.preset("gpt2"), {"float32": 1e11, "bfloat16": 2e11}
    one = step_profile.limits(config, 1, 1, "float32", 4e10, rates)
    assert sum(one.values()) == pytest.approx(1e3 * 123.6e6 * 4 / 4e10, rel=0.01)
    first = step_profile.limits(config, 1, 256.5, "bfloat16", 4e10, rates, prompt=512)
    assert first["other linear layers"] == pytest.approx(1e3 * 2 * 63.7e6 * 512 / 2e11, rel=0.01)
    assert first["attention"] == pytest.approx(1e3 * 4 * 512 * 256.5 * 768 * 12 / 1e11)
