"""Few kernels are compiled at first use, whatever the rows and lengths. All of them can be compiled ahead of time."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastgpt2 import GPT2, GPT2Config, calculate_loss
from fastgpt2.checkpoint import load_pretrained
from fastgpt2.cli import main
from fastgpt2.cli import warmup as warmup_command
from fastgpt2.cli.options import DTYPES
from fastgpt2.config import SamplingConfig, TrainConfig
from fastgpt2.data import TokenData
from fastgpt2.decode import DecodeSession, acquire_session
from fastgpt2.train import Trainer
from fastgpt2.warmup import find_variants, launched_on, may_have_pdl
from fastgpt2_kernels import ops

triton = pytest.importorskip("triton")

SMALL = GPT2Config(
    vocab_size=509, context_length=512, hidden_size=64, num_layers=1, num_heads=2, residual_dropout=0.0,
    embedding_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def count(run) -> Counter:
    return Counter(variant.kernel for variant in launched_on("sm_90", run))


def test_generation_of_any_rows_and_lengths(seed: int) -> None:
    """Generation with 1 to 32 rows and prompts of 1 to 200 tokens compiles few variants of each kernel.

    Row counts fall into three classes, each with 5 variants of the linear kernel, with and without programmatic
    dependent launch. A session launches both only in its first graph, and then keeps one of them.
    """
    model, rng = GPT2(SMALL, backend="triton").bfloat16().eval(), random.Random(seed)

    def run() -> None:
        for rows in (*range(1, 10), 15, 16, 17, 31, 32):
            prompts = [[rng.randrange(509) for _ in range(rng.randint(1, 200))] for _ in range(rows)]
            model.generate(prompts, max_new_tokens=3, temperature=0.8, top_k=50, stop_token_ids=(7,))

    found = count(run)
    # Two variants: attention with document ends aligned to 16 bytes or not, LayerNorm with a residual or without,
    # sampling from padded rows or from others.
    most = {
        "_attention_fwd_kernel": 2, "_layer_norm_fwd_kernel": 2, "_bias_activation_fwd_kernel": 1, "_sample_kernel": 2,
        "_begin_step_kernel": 1, "_linear_decode_kernel": 30, "_decode_attention_kernel": 1,
    }  # fmt: skip
    assert found.keys() == most.keys()
    assert {name: n for name, n in found.items() if n > most[name]} == {}


def test_training_at_other_lengths_compiles_nothing() -> None:
    model = GPT2(SMALL, backend="triton").train()

    def step(batch: int, length: int) -> None:
        tokens = torch.ones(batch, length + 1, dtype=torch.int64)
        calculate_loss(model, tokens[:, :-1], tokens[:, 1:]).backward()

    first = count(lambda: step(2, 128))
    assert first.keys() >= {"_attention_bwd_dq_kernel", "_layer_norm_bwd_kernel", "_cross_entropy_kernel"}
    more = count(lambda: [step(*sizes) for sizes in ((2, 128), (3, 100), (2, 64), (8, 33))])
    assert more == first
    # With one row, the targets are a view shifted by one, which is not aligned to 16 bytes.
    assert count(lambda: [step(*sizes) for sizes in ((2, 128), (1, 256), (1, 77))]) - first <= Counter(
        {"_cross_entropy_kernel": 1}
    )


def test_what_is_found_leaves_no_trace() -> None:
    model = GPT2(SMALL, backend="triton").eval()
    assert count(lambda: model.generate([[1]], max_new_tokens=2, temperature=0))
    assert "Triton kernels need a GPU" in str(ops.why_not_triton("layer_norm", "cpu"))
    # A second search finds the same variants, so nothing of the first one was kept.
    run = lambda: model.generate([[1]], max_new_tokens=2, temperature=0)  # noqa: E731
    assert count(run) == count(run)


# -- compiled ahead ---------------------------------------------------------------------------------------------------

# What Triton's cache tells variants apart by.
Key = tuple[str, str, str, str, str]


def keys(variants: list) -> set[Key]:
    return {
        (v.kernel, str(v.source.signature), str(v.source.constants), str(v.source.attrs), str(v.options))
        for v in variants
    }


def names(found: set[Key]) -> Counter:
    return Counter(kernel for kernel, *_ in found)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_what_is_compiled_ahead_has_all_kernels(target: str) -> None:
    """All kernels of a step are found, each variant once, and no more than are promised.

    Where the target has programmatic dependent launch, they include the variants that use it.
    """
    found = find_variants(SMALL, target, dtype=torch.float16, train_dtype=torch.bfloat16)
    assert {"_begin_step_kernel", "_sample_kernel", "_decode_attention_kernel", "_attention_bwd_dkdv_kernel"} <= {
        v.kernel for v in found
    }
    with_pdl = [v for v in found if v.options.get("launch_pdl")]
    assert bool(with_pdl) == (target in ("sm_90", "sm_120"))
    assert len(found) == len(keys(found)) <= 92


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_8_bit_weights_a_kernel_has_the_models_cache(dtype: torch.dtype) -> None:
    """Only the native backend decodes 8-bit weights with a bfloat16 cache, whatever the model's dtype."""
    model = GPT2(SMALL, backend="triton").to(dtype).eval()
    dtypes = []
    ops.find_variants(
        "sm_90",
        lambda: dtypes.append(acquire_session(model, 1, SamplingConfig(), (), torch.int8).cache.keys.dtype),
    )
    assert dtypes == [dtype]


def generation_runs(rng: random.Random) -> dict[str, dict]:
    """Arguments of `generate` with random prompts, which have random lengths."""

    def prompts(count: int) -> list[list[int]]:
        return [[rng.randrange(SMALL.vocab_size) for _ in range(rng.randint(1, 100))] for _ in range(count)]

    prefix = [rng.randrange(SMALL.vocab_size) for _ in range(rng.randint(16, 60))]
    # generate's own settings are temperature 0.8 and the model's stop tokens
    runs: dict[str, dict] = {
        "defaults": {"prompts": prompts(1)},
        "greedy": {"prompts": prompts(1), "temperature": 0},
        "stop token": {"prompts": prompts(2), "stop_token_ids": [3]},
        "no stop tokens": {"prompts": prompts(2), "stop_token_ids": []},
        "penalty": {"prompts": prompts(1), "repetition_penalty": 1.1},
        "greedy penalty": {"prompts": prompts(1), "repetition_penalty": 1.1, "temperature": 0},
        "top-k 1": {"prompts": prompts(1), "top_k": 1, "top_p": 0.5},
        "several samples": {"prompts": prompts(3), "num_samples": 3},
        "shared prefixes": {"prompts": [prefix, *(prefix + ids for ids in ([1], [2, 3], [4] * 8, [5] * 30))]},
        "a full context": {"prompts": [[1] * SMALL.context_length, [1] * 511], "context_shift": True},
    }
    filters = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3}
    for size in range(1, 5):
        for chosen in itertools.combinations(filters, size):
            runs[" ".join(chosen)] = {"prompts": prompts(1), **{name: filters[name] for name in chosen}}
    runs |= {f"{count} rows": {"prompts": prompts(count)} for count in (*range(2, 10), 15, 16, 17, 31, 32)}
    return {name: {"temperature": 0.8, "max_new_tokens": rng.randint(2, 4), **run} for name, run in runs.items()}


def some_slow(cases: Iterable[tuple[str, str]], quick: Sequence[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*case, marks=[] if case in quick else [pytest.mark.slow]) for case in cases]


@pytest.mark.parametrize(
    ("target", "weights"),
    some_slow(
        itertools.product(["sm_90", "gfx942"], ["fp32", "bf16", "bf16 int8", "fp32 int8"]),
        quick=[("sm_90", "fp32")],
    ),
)
def test_generation_compiles_nothing_more(target: str, weights: str, seed: int) -> None:
    dtype, int8 = DTYPES[weights[:4]], weights.endswith("int8")
    ahead = keys(find_variants(SMALL, target, dtype=dtype, weight_dtype=torch.int8 if int8 else None))
    model = GPT2(SMALL.replace(num_layers=2), backend="triton").to(dtype).eval()
    for name, run in generation_runs(random.Random(seed)).items():
        options = {**run, "weight_dtype": "int8" if int8 else None}
        real = keys(launched_on(target, lambda options=options: model.generate(**options)))
        assert {"_sample_kernel", "_attention_fwd_kernel"} <= names(real).keys(), name
        assert names(real - ahead) == {}, name


@pytest.mark.parametrize(
    ("target", "dtype"),
    some_slow(
        itertools.product(["sm_90", "gfx942"], ["auto", "fp16", "fp32"]),
        quick=[("sm_90", "auto")],
    ),
)
def test_training_compiles_nothing_more(
    target: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the trainer, and a validation, are covered."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # "auto" is bf16, as on a GPU
    for name in ("train", "val"):
        np.arange(5000, dtype=np.uint16).__mod__(SMALL.vocab_size).tofile(tmp_path / f"{name}.bin")
    config = TrainConfig(dtype=dtype, batch_size=3, accumulate=2)
    model = GPT2(SMALL.replace(context_length=120), backend="triton")
    trainer = Trainer(model, TokenData.open(tmp_path), config, tmp_path / "run")

    def run() -> None:
        trainer._train_step(trainer._wrapped())
        trainer.evaluate()

    ahead = find_variants(
        model.config, target, dtype=torch.float32, train_dtype={**DTYPES, "auto": torch.bfloat16}[dtype]
    )
    real = keys(launched_on(target, run))
    assert {"_cross_entropy_kernel", "_attention_bwd_dq_kernel", "_layer_norm_bwd_kernel"} <= names(real).keys()
    assert names(real - keys(ahead)) == {}


@pytest.mark.parametrize("context", [1, 17])
def test_short_contexts_are_compiled_ahead(context: int) -> None:
    config = SMALL.replace(context_length=context)
    ahead = keys(find_variants(config, "sm_90", dtype=torch.float32, train_dtype=torch.bfloat16))
    assert ("_begin_step_kernel" in names(ahead)) == (context > 1)  # with one position no step follows the prompt
    model = GPT2(config, backend="triton").eval()
    prompts = [[3] * min(16, context), [3] * context, [4]]
    real = keys(launched_on("sm_90", lambda: model.generate(prompts, max_new_tokens=3, temperature=0.8)))
    assert names(real - ahead) == {}


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_recording_decides_as_the_gpu(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A session on the GPU tries programmatic dependent launch exactly where variants with it are recorded."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    session: Any = SimpleNamespace(use_graphs=True, _gpu=torch.device("cuda", 0))
    assert may_have_pdl("sm_{}{}".format(*capability)) == DecodeSession._may_have_pdl(session)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert may_have_pdl("gfx942") == DecodeSession._may_have_pdl(session) == False  # noqa: E712


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asked to compile, instead of compiling it."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(warmup_command, "warm_up", lambda config, target, **options: calls.append(options) or [])
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_default_dtype_is_that_of_generate(dtype: torch.dtype, asked: list, tmp_path: Path) -> None:
    GPT2(SMALL).save_pretrained(tmp_path, dtype=dtype)
    arguments = ["warmup", "--model", str(tmp_path), "--target", "sm_90"]
    assert main(arguments) == 0
    assert asked[-1]["dtype"] == load_pretrained(tmp_path).dtype == dtype
    assert asked[-1]["train_dtype"] is asked[-1]["weight_dtype"] is None
    assert main([*arguments, "--dtype", "fp16", "--weights", "int8", "--train"]) == 0
    assert asked[-1]["dtype"] == torch.float16
    assert asked[-1]["weight_dtype"] == torch.int8
    assert asked[-1]["train_dtype"] == torch.bfloat16
    assert main([*arguments, "--train", "fp32"]) == 0
    assert asked[-1]["train_dtype"] == torch.float32


def test_a_checkpoint_without_embeddings_has_no_dtype(
    tmp_path: Path, asked: list, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT2(SMALL).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert main(["warmup", "--model", str(tmp_path), "--target", "sm_90"]) == 2
    assert "holds no token embeddings" in capsys.readouterr().err
    assert asked == []


@pytest.mark.slow
def test_the_cache_has_what_a_run_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that compiles through Triton's own launcher adds no file to the cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    quick = ("_begin_step_kernel", "_layer_norm_fwd_kernel", "_bias_activation_fwd_kernel")
    ahead = find_variants(SMALL, "sm_90", dtype=torch.float32)
    ops.compile_variants([v for v in ahead if v.kernel in quick], jobs=2)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {f"{name}.cubin" for name in quick} <= {path.name for path in files}

    compiled: list[str] = []
    really = triton.compile

    def compile_for_real(recorded: Any, source: Any, target: Any = None, options: Any = None, **others: Any) -> Any:
        if source.fn.__name__ in quick:
            compiled.append(source.fn.__name__)
            really(source, target=target, options=options, **others)
        return recorded(source, target, options, **others)

    def run() -> None:
        note = triton.compiler.compile
        monkeypatch.setattr(triton.compiler, "compile", functools.partial(compile_for_real, note))
        GPT2(SMALL, backend="triton").eval().generate([[1, 2], [3]], max_new_tokens=3, temperature=0.8)

    launched_on("sm_90", run)
    assert set(compiled) == set(quick)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.slow
@pytest.mark.parametrize(("target", "generation"), [("sm_90", 77), ("gfx942", 62)])
def test_the_help_says_how_many_kernels_gpt2_has(target: str, generation: int) -> None:
    said = " ".join((warmup_command.__doc__ or "").split())
    assert f"{generation} kernels on {target}" in said or f"{generation} on {target}" in said
    assert "Training adds 13." in said
    config = GPT2Config.preset("gpt2")
    for train_dtype, added in ((None, 0), (torch.bfloat16, 13)):
        found = find_variants(config, target, dtype=torch.float32, train_dtype=train_dtype)
        assert len(found) == generation + added


@pytest.mark.slow
def test_warmup_fills_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = ["warmup", "--model", str(tiny_checkpoint), "--target", "sm_90", "--rows", "1", "--jobs", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "begin_step_kernel" in out
    assert "variants for sm_90" in out
    kernels = {path.name for path in tmp_path.rglob("*.cubin")}
    assert {"_begin_step_kernel.cubin", "_sample_kernel.cubin", "_linear_decode_kernel.cubin"} <= kernels
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert main(command) == 0  # everything is in the cache already
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--target", "h100"], "a target must be like sm_90 or gfx942"), (["--rows", "0"], "must be 1 or more")],
)
def test_warmup_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_target_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup"]) == 2
    assert "name a target" in capsys.readouterr().err
