"""Greedy generation end to end: prompts of equal and of mixed lengths, and the time to the first token.

Every engine gets the same random weights. A contender is right if every token that it chooses has nearly the best logit
in float64: it may be below the best one by at most twice the error budget of the contender's dtype. So a near tie may
go either way in any dtype, but a wrong cache or mask does not pass. The budget of int8 comes from the plain expression
with weights (per output) and activations (per token) rounded to 8 bits.

Two yardsticks are timed in the same turns. For one row: reading the bytes of the weights once per token, and nothing
else. For mixed lengths: ours on prompts of equal length, with as many tokens in all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import engines
from benchmarks.harness import Call, Case, Contender, Settings
from benchmarks.models import fresh, shared, shared_twin
from benchmarks.peers import need_gpu
from fastgpt2 import GPT2Config
from fastgpt2.accounting import cache_bytes_per_token, forward_flops_per_token, weight_bytes

TOY = GPT2Config(vocab_size=67, context_length=48, hidden_size=32, num_layers=2, num_heads=2, initializer_range=0.2)
CHECKED_ROWS = 2
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10, "int8": 2.0**-7}


class Inputs(NamedTuple):
    prompts: list[list[int]]
    new_tokens: int
    config: GPT2Config


def cases(settings: Settings) -> Iterator[Case]:
    config = TOY if settings.scale == "toy" else GPT2Config.preset("gpt2", bos_token_id=None, eos_token_id=None)
    length, new = settings.pick((64, 128), (64, 8), (8, 4))
    for R in settings.pick((1, 8, 32, 64) if settings.on_gpu else (1, 8, 32), (1, 4), (2,)):
        yield _case(settings, config, "generate", [length] * R, new, READ if R == 1 and not settings.on_gpu else None)
    for R in settings.pick((8, 32), (2,), (3,)):
        # From about a quarter of `length` to seven quarters, with `length` as their mean.
        lengths = [length + int((2 * r + 1 - R) * 3 * length / (4 * R)) for r in range(R)]
        yield _case(settings, config, "generate mixed", lengths, new, EQUAL)
    yield _case(settings, config, "first token", [settings.pick(512, 128, 16)], 1)


def _case(
    settings: Settings, config: GPT2Config, name: str, lengths: list[int], new: int, yardstick: str | None = None
) -> Case:
    prompt_tokens, R = sum(lengths), len(lengths)
    steps = new - 1  # the prompt's forward pass gives the first token
    flops = forward_flops_per_token(config, max(lengths) + new) * (prompt_tokens + R * steps)
    # The head runs only on a prompt's last token.
    flops -= 2.0 * config.vocab_size * config.hidden_size * (prompt_tokens - R)
    cached = sum(R * i + prompt_tokens for i in range(1, new))

    def least_bytes(dtype: str) -> float:
        kind = getattr(torch, dtype)
        return weight_bytes(config, kind) * (1 + steps) + cache_bytes_per_token(config, kind) * cached

    return Case(
        name=name,
        shape={"R": R, "T": max(lengths), "new": new},
        dtype="float32",
        contenders=[
            Contender(label, functools.partial(build, settings, dtype), label in OURS, dtype=dtype)
            for label, dtypes, build in [*CONTENDERS, *(y for y in YARDSTICKS if y[0] == yardstick)]
            for dtype in dtypes
            if settings.scale != "toy" or dtype == "float32"
        ],
        inputs=functools.partial(_inputs, config, lengths, new),
        disagrees=functools.partial(_disagrees, settings),
        flops=flops,
        bytes=least_bytes,
        tokens=R * new,
        end_to_end=True,
        measures_memory=settings.scale != "quick",
        isolated=settings.scale != "toy",
    )  # fmt: skip


def _inputs(config: GPT2Config, lengths: list[int], new: int) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return Inputs(prompts, new, config)


def _equal(inputs: Inputs) -> Inputs:
    """As many prompts with as many tokens in all, but of one length."""
    R = len(inputs.prompts)
    return _inputs(inputs.config, [sum(map(len, inputs.prompts)) // R] * R, inputs.new_tokens)


# -- agreement ----------------------------------------------------------------------------------------------------


def _disagrees(settings: Settings, inputs: Inputs, contender: Contender, result: list[list[int]]) -> str | None:
    if contender.name == READ:
        return None
    if contender.name == EQUAL:
        inputs = _equal(inputs)
    counts = [len(ids) for ids in result]
    if counts != [inputs.new_tokens] * len(inputs.prompts):
        return f"expected {inputs.new_tokens} new tokens for each of {len(inputs.prompts)} rows; got {counts}"
    dtype = contender.dtype or "float32"
    for row in sorted({0, len(result) - 1})[:CHECKED_ROWS]:
        prompt, ids = inputs.prompts[row], result[row]
        sequence = tuple(prompt + ids[:-1])
        exact = exact_logits(settings, inputs.config, sequence)[len(prompt) - 1 :]
        rounding = rounding_of(settings, inputs.config, tuple(prompt), dtype)
        budget = 2 * 2 * (rounding + EPS[dtype] * exact.abs().max().item())
        regret = exact.max(-1).values - exact.gather(-1, torch.tensor(ids, device=exact.device)[:, None])[:, 0]
        if regret.max() > budget:
            at = int(regret.argmax())
            return f"row {row}, token {at}: its logit is {regret[at]:.3g} below the best, the budget is {budget:.3g}"
    return None


@functools.lru_cache(maxsize=16)  # each result takes up to 80 MB
@torch.no_grad()
def exact_logits(settings: Settings, config: GPT2Config, ids: tuple[int, ...]) -> Tensor:
    """The logits (T, V) of a sequence in float64."""
    model = shared_twin(settings, config, torch.float64)
    return model(torch.tensor([ids], device=settings.device)).logits[0]


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def rounding_of(settings: Settings, config: GPT2Config, ids: tuple[int, ...], dtype: str) -> float:
    """The largest error of the plain expression's logits in `dtype`."""
    if dtype == "int8":
        model = engines.rounded_to_int8(shared_twin(settings, config, torch.float32))
    else:
        model = shared_twin(settings, config, getattr(torch, dtype))
    logits = model(torch.tensor([ids], device=settings.device)).logits[0]
    return (logits.double() - exact_logits(settings, config, ids)).abs().max().item()


# -- contenders ---------------------------------------------------------------------------------------------------


def _ours(settings: Settings, dtype: str, inputs: Inputs, backend: str = "auto") -> Call:
    if backend == "torch":
        need_gpu(settings)  # only there does "auto" choose Triton
    # 8-bit weights are made from those of a float32 model.
    weight_dtype, dtype = ("int8", "float32") if dtype == "int8" else (None, dtype)
    model = shared(settings, inputs.config, getattr(torch, dtype))
    if backend != "auto":
        model = fresh(settings, inputs.config, getattr(torch, dtype))
        model.backend = backend

    def call() -> list[list[int]]:
        rows = len(inputs.prompts)
        samples = model.generate(
            inputs.prompts,
            max_new_tokens=inputs.new_tokens,
            temperature=0,
            batch_size=rows,
            weight_dtype=weight_dtype,
        )
        return [sample.token_ids for sample in samples]

    return call


def _ours_equal(settings: Settings, dtype: str, inputs: Inputs) -> Call:
    return _ours(settings, dtype, _equal(inputs))


def _read(settings: Settings, dtype: str, inputs: Inputs) -> Call:
    """Read as many bytes as the weights have, once per token."""
    numbers = torch.ones(int(weight_bytes(inputs.config, getattr(torch, dtype))) // 4, device=settings.device)

    def call() -> None:
        for _ in range(inputs.new_tokens):
            numbers.sum()

    return call


def _transformers(settings: Settings, dtype: str, inputs: Inputs) -> Call:
    model = shared_twin(settings, inputs.config, getattr(torch, dtype))
    ids, mask = (t.to(settings.device) for t in engines.left_padded(inputs.prompts))

    def call() -> list[list[int]]:
        new = inputs.new_tokens
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        return out[:, ids.shape[1] :].tolist()

    return call


Build = Callable[[Settings, str, Any], Call]
CONTENDERS: list[tuple[str, tuple[str, ...], Build]] = [
    ("transformers", ("float32", "bfloat16"), _transformers),
    ("ours", ("float32", "bfloat16", "int8"), _ours),
    ("ours torch", ("bfloat16",), functools.partial(_ours, backend="torch")),
    ("onnxruntime", ("float32", "int8"), engines.onnxruntime),
    ("ctranslate2", ("float32", "bfloat16", "int8"), engines.ctranslate2),
    ("llama.cpp", ("float32", "bfloat16"), engines.llama_cpp),
    ("openvino", ("float32", "bfloat16", "int8"), engines.openvino),
    ("vllm", ("bfloat16",), engines.vllm),
]
READ, EQUAL = "weights read", "ours, equal lengths"
YARDSTICKS: list[tuple[str, tuple[str, ...], Build]] = [
    (READ, ("float32", "bfloat16", "int8"), _read),
    (EQUAL, ("float32", "bfloat16", "int8"), _ours_equal),
]
# The speedup over a peer never refers to these.
OURS = ("ours", "ours torch", READ, EQUAL)
