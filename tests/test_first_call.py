"""Few kernels are compiled at first use, whatever the rows and lengths. All of them can be compiled ahead of time."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastgpt2 import GPT2, GPT2Config, calculate_loss
from fastgpt2.cli import main
from fastgpt2.warmup import ROWS, find_variants
from fastgpt2_kernels import ops

triton = pytest.importorskip("triton")

SMALL = GPT2Config(
    vocab_size=509, context_length=512, hidden_size=64, num_layers=1, num_heads=2, residual_dropout=0.0,
    embedding_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def count(run) -> Counter:
    return Counter(variant.kernel for variant in ops.find_variants("sm_90", run))


def test_generation_of_any_rows_and_lengths(seed: int) -> None:
    """Generation with 1 to 32 rows and prompts of 1 to 200 tokens compiles few variants of each kernel.

    Row counts fall into three classes, each with 5 variants of the linear kernel.
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
        "_begin_step_kernel": 1, "_linear_decode_kernel": 15, "_decode_attention_kernel": 1,
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


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_what_is_compiled_ahead_covers_generation(target: str) -> None:
    """All kernels of a step are found, as a CUDA graph launches them.

    Where the target has programmatic dependent launch, they include the variants that use it.
    """
    found = find_variants(SMALL, target, dtype=torch.float16, rows=ROWS[:2], trains=True)
    names = Counter(variant.kernel for variant in found)
    assert {"_begin_step_kernel", "_sample_kernel", "_decode_attention_kernel", "_attention_bwd_dkdv_kernel"} <= set(
        names
    )
    with_pdl = [v for v in found if v.options.get("launch_pdl")]
    assert bool(with_pdl) == (target in ("sm_90", "sm_120"))
    keys = [
        (v.kernel, str(v.source.signature), str(v.source.constants), str(v.source.attrs), str(v.options)) for v in found
    ]
    assert len(keys) == len(set(keys))


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
