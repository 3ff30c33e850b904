"""What a decoding step has beside attention: linear maps of a few rows, the choice of a token; and the whole step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.generate import TOY
from benchmarks.harness import Call, Case, Contender, LeftOutError, Settings
from benchmarks.models import shared, shared_twin
from benchmarks.peers import need_gpu, need_triton
from fastgpt2 import GPT2Config, KVCache, SamplingConfig
from fastgpt2.accounting import cache_bytes_per_token, forward_flops_per_token, weight_bytes
from fastgpt2.decode import DecodeSession, NewRow, why_not_decode
from fastgpt2_kernels import ops

Make = Callable[..., Call]


def cases(settings: Settings) -> Iterator[Case]:
    config = TOY if settings.scale == "toy" else GPT2Config.preset("gpt2")
    dtypes = ("bfloat16", "float32") if settings.scale != "toy" else ("float32",)
    for R in settings.pick((1, 8, 32), (1, 32), (3,)):
        for dtype in dtypes:
            for name, layer in LINEARS.items():
                if settings.scale != "quick" or name == "up":
                    yield _linear_case(settings, config, name, layer, R, dtype)
        for name, sampling in SAMPLINGS.items():
            if settings.scale != "quick" or name in ("greedy", "top-p"):
                yield _sample_case(settings, config, name, sampling, R)
    for R in settings.pick((1, 8, 32, 128) if settings.on_gpu else (1, 8, 32), (1,), (2,)):
        for dtype in dtypes:
            yield _step_case(settings, config, R, settings.pick(512, 512, 8), dtype)


def _contenders(makers: dict[str, Make], settings: Settings, *arguments: object) -> list[Contender]:
    return [
        Contender(label, functools.partial(make, settings, *arguments), label.startswith("ours"), label == "eager")
        for label, make in makers.items()
    ]


# -- linear maps --------------------------------------------------------------------------------------------------


class LinearShape(NamedTuple):
    """Outputs and inputs in widths, and what goes before and after the product."""

    outputs: int
    inputs: int
    layer_norm: bool = False
    activation: str = "linear"
    residual: bool = False


LINEARS = {
    "qkv": LinearShape(3, 1, layer_norm=True),
    "up": LinearShape(4, 1, layer_norm=True, activation="gelu_new"),
    "down": LinearShape(1, 4, residual=True),
}


class LinearInputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    norm: ops.LayerNormWeights | None
    residual: Tensor | None


def _linear_case(
    settings: Settings, config: GPT2Config, name: str, layer: LinearShape, R: int, dtype: str
) -> Case:  # fmt: skip
    N, K = layer.outputs * config.hidden_size, layer.inputs * config.hidden_size
    element = getattr(torch, dtype).itemsize
    return Case(
        name=f"linear_decode {name}",
        shape={"R": R, "N": N, "K": K},
        dtype=dtype,
        contenders=_contenders(
            {"eager": _eager_linear, "ours triton": _triton_linear, "ours torch": _torch_linear, "fused ops": _fused},
            settings,
            layer,
        ),
        inputs=functools.partial(_linear_inputs, settings, layer, R, N, K, dtype),
        exact=functools.partial(_exact_linear, layer),
        flops=2.0 * R * N * K,
        bytes=element * (N * K + R * (N + K)),
        measures_memory=False,
    )


def _linear_inputs(settings: Settings, layer: LinearShape, R: int, N: int, K: int, dtype: str) -> LinearInputs:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    kind = getattr(torch, dtype)
    x, weight, bias, gain, shift, residual = (
        t.to(settings.device, kind)
        for t in (draw(R, K), draw(N, K) / K**0.5, draw(N), 1 + 0.1 * draw(K), draw(K), draw(R, N))
    )
    norm = ops.LayerNormWeights(gain, shift, 1e-5) if layer.layer_norm else None
    return LinearInputs(x, weight, bias, norm, residual if layer.residual else None)


def _plain_linear(layer: LinearShape, inputs: LinearInputs) -> Tensor:
    x, weight, bias, norm, residual = inputs
    if norm is not None:
        x = F.layer_norm(x, (x.shape[1],), norm.weight, norm.bias, norm.eps)
    y = ops.ACTIVATIONS[layer.activation](x @ weight.T + bias)
    return y if residual is None else y + residual


def _exact_linear(layer: LinearShape, inputs: LinearInputs) -> list[Tensor]:
    wide = [None if t is None else t.double() for t in (inputs.x, inputs.weight, inputs.bias, inputs.residual)]
    norm = inputs.norm and ops.LayerNormWeights(inputs.norm.weight.double(), inputs.norm.bias.double(), 1e-5)
    return [_plain_linear(layer, LinearInputs(wide[0], wide[1], wide[2], norm, wide[3]))]


@torch.no_grad()
def _eager_linear(settings: Settings, layer: LinearShape, inputs: LinearInputs) -> Call:
    return lambda: [_plain_linear(layer, inputs)]


def _ours_linear(backend: str, layer: LinearShape, inputs: LinearInputs) -> Call:
    x, weight, bias, norm, residual = inputs
    return lambda: [
        ops.linear_decode(
            x, weight, bias, layer_norm=norm, activation=layer.activation, residual=residual, backend=backend
        )
    ]


def _triton_linear(settings: Settings, layer: LinearShape, inputs: LinearInputs) -> Call:
    need_triton(settings, "linear_decode")
    return _ours_linear("triton", layer, inputs)


def _torch_linear(settings: Settings, layer: LinearShape, inputs: LinearInputs) -> Call:
    return _ours_linear("torch", layer, inputs)


def _fused(settings: Settings, layer: LinearShape, inputs: LinearInputs) -> Call:
    """PyTorch's operators with what each can fuse: addmm with its bias."""
    x, weight, bias, norm, residual = inputs

    def call() -> list[Tensor]:
        y = x if norm is None else F.layer_norm(x, (x.shape[1],), norm.weight, norm.bias, norm.eps)
        y = F.linear(y, weight, bias)
        y = F.gelu(y, approximate="tanh") if layer.activation == "gelu_new" else y
        return [y if residual is None else y.add_(residual)]

    return call


# -- sampling -----------------------------------------------------------------------------------------------------

SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.95},
}


def _sample_case(settings: Settings, config: GPT2Config, name: str, sampling: dict[str, float], R: int) -> Case:
    return Case(
        name=f"sample {name}",
        shape={"R": R, "V": config.vocab_size},
        dtype="float32",
        contenders=_contenders(
            {"sorted": _sorted_sample, "ours triton": _triton_sample, "ours torch": _torch_sample}, settings, sampling
        ),
        inputs=functools.partial(_logits, settings, config, R),
        disagrees=functools.partial(_bad_sample, sampling),
        bytes=4.0 * R * config.vocab_size,
        measures_memory=False,
    )


def _logits(settings: Settings, config: GPT2Config, R: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(R, config.vocab_size, generator=generator)).to(settings.device)


def _kept(logits: Tensor, sampling: dict[str, float]) -> Tensor:
    """Which tokens may be chosen, by sorting, as transformers does it."""
    probs = (logits.double() / max(sampling.get("temperature", 1.0), 1e-9)).softmax(-1)
    ranked, order = probs.sort(-1, descending=True)
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if sampling.get("temperature") == 0:
        kept[:, 1:] = False
    if "top_k" in sampling:
        kept[:, int(sampling["top_k"]) :] = False
    if "top_p" in sampling:
        kept &= ranked.cumsum(-1) - ranked < sampling["top_p"] + 1e-6  # within rounding of the border
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _bad_sample(sampling: dict[str, float], logits: Tensor, contender: Contender, result: list[Tensor]) -> str | None:
    """Different generators draw differently: every token must be one that may be chosen."""
    chosen = result[0].long()[:, None]
    outside = ~_kept(logits, sampling).gather(-1, chosen)
    return f"row {int(outside.nonzero()[0, 0])} chose a token that the filters leave out" if outside.any() else None


def _sorted_sample(settings: Settings, sampling: dict[str, float], logits: Tensor) -> Call:
    def call() -> list[Tensor]:
        if sampling.get("temperature") == 0:
            return [logits.argmax(-1)]
        scores = logits / sampling.get("temperature", 1.0)
        if "top_k" in sampling:
            least = scores.topk(int(sampling["top_k"])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if "top_p" in sampling:
            ascending, order = scores.sort(-1)
            drop = ascending.softmax(-1).cumsum(-1) <= 1 - sampling["top_p"]
            drop[:, -1] = False
            scores = scores.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)
        return [torch.multinomial(scores.softmax(-1), 1)[:, 0]]

    return call


def _ours_sample(backend: str, sampling: dict[str, float], logits: Tensor) -> Call:
    R = logits.shape[0]
    keys = ops.row_keys(0, list(range(R)), [0] * R).to(logits.device)
    positions = torch.zeros(R, dtype=torch.int32, device=logits.device)
    options = {**sampling, "keys": keys, "positions": positions, "backend": backend}
    return lambda: [ops.sample(logits, **options)[0]]


def _triton_sample(settings: Settings, sampling: dict[str, float], logits: Tensor) -> Call:
    need_triton(settings, "sample")
    return _ours_sample("triton", sampling, logits)


def _torch_sample(settings: Settings, sampling: dict[str, float], logits: Tensor) -> Call:
    return _ours_sample("torch", sampling, logits)


# -- the whole step -----------------------------------------------------------------------------------------------


class StepInputs(NamedTuple):
    """R prompts of one length, each to be followed by its last token once more."""

    prompts: list[list[int]]
    config: GPT2Config
    dtype: torch.dtype


def _step_case(settings: Settings, config: GPT2Config, R: int, length: int, dtype: str) -> Case:
    kind = getattr(torch, dtype)
    return Case(
        name="decode step",
        shape={"R": R, "T": length},
        dtype=dtype,
        contenders=_contenders(
            {
                "transformers": _transformers_step,
                "ours": _session_step,
                "ours without graphs": functools.partial(_session_step, use_graphs=False),
                "ours torch": _torch_step,
            },
            settings,
        ),
        inputs=functools.partial(_step_inputs, config, R, length, kind),
        disagrees=_bad_step,
        flops=R * forward_flops_per_token(config, length),
        bytes=weight_bytes(config, kind) + R * length * cache_bytes_per_token(config, kind),
        tokens=R,
        end_to_end=True,
        measures_memory=False,
    )


def _step_inputs(config: GPT2Config, R: int, length: int, dtype: torch.dtype) -> StepInputs:
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(config.vocab_size, (R, length - 2), generator=generator).tolist()
    return StepInputs(prompts, config, dtype)


def _bad_step(inputs: StepInputs, contender: Contender, result: list[int]) -> str | None:
    """The tokens' logits must be the largest, but for a rounding of the dtype at logits of this size."""
    model = shared(Settings(device="cpu"), inputs.config, torch.float32)
    with torch.no_grad():
        prompt = inputs.prompts[0]
        logits = model(torch.tensor([[*prompt, prompt[-1]]]))[0, -1]
    regret = float(logits.max() - logits[result[0]])
    budget = 16 * torch.finfo(inputs.dtype).eps * float(logits.abs().max())
    return f"row 0: its logit is {regret:.3g} below the best, the budget is {budget:.3g}" if regret > budget else None


@torch.no_grad()
def _filled(settings: Settings, inputs: StepInputs) -> tuple[object, KVCache]:
    model = shared(settings, inputs.config, inputs.dtype)
    R, T = len(inputs.prompts), len(inputs.prompts[0])
    dtype = KVCache.best_dtype(inputs.dtype, model.device)
    cache = KVCache(inputs.config, R, T + 2, dtype=dtype, device=model.device)
    for row, ids in enumerate(inputs.prompts):
        plan = ops.plan_rows([row], [T], [0], model.device)
        model.extend(torch.tensor(ids, device=model.device), plan, cache)
    return model, cache


def _session_step(settings: Settings, inputs: StepInputs, use_graphs: bool = True) -> Call:
    model, cache = _filled(settings, inputs)
    if (reason := why_not_decode(model)) is not None:
        need_gpu(settings)
        raise LeftOutError(f"absent: {reason}")
    session = DecodeSession(model, cache, SamplingConfig(temperature=0), use_graphs=use_graphs)
    rows = range(len(inputs.prompts))
    session.begin(
        [NewRow(row, inputs.prompts[row], (0, 0), 2**30) for row in rows],
        torch.zeros(len(rows), inputs.config.vocab_size, device=model.device),
    )
    last = torch.tensor([ids[-1] for ids in inputs.prompts], dtype=torch.int32, device=model.device)
    R, T = len(rows), len(inputs.prompts[0])

    def call() -> list[int]:
        session.slots.lengths[:R] = T  # the same step again
        session.slots.status[:R] = ops.FRESH
        session.slots.tokens[:R] = last
        return session.step(list(rows)).read()[0][:R]

    return call


def _torch_step(settings: Settings, inputs: StepInputs) -> Call:
    model, cache = _filled(settings, inputs)
    packed = model.pack()
    R, T = len(inputs.prompts), len(inputs.prompts[0])
    last = torch.tensor([ids[-1] for ids in inputs.prompts], device=model.device)

    @torch.no_grad()
    def call() -> list[int]:
        cache.lengths = [T] * R
        plan = ops.plan_rows(range(R), [1] * R, cache.lengths, model.device)
        return model.lm_head(model.extend(last, plan, cache, packed=packed), packed=packed).argmax(-1).tolist()

    return call


@torch.no_grad()
def _transformers_step(settings: Settings, inputs: StepInputs) -> Call:
    model = shared_twin(settings, inputs.config, inputs.dtype)
    ids = torch.tensor(inputs.prompts, device=settings.device)
    past = model(ids, use_cache=True).past_key_values

    @torch.no_grad()
    def call() -> list[int]:
        chosen = model(ids[:, -1:], past_key_values=past, use_cache=True).logits[:, -1].argmax(-1).tolist()
        past.crop(-1)
        return chosen

    return call
