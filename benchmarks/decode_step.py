"""The parts of a decoding step other than attention: linear layers of a few rows, and sampling. Then the whole step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.generate import CHECKED_ROWS, EPS, TOY
from benchmarks.harness import Call, Case, Contender, LeftOutError, Settings, error_of, out_of_budget
from benchmarks.models import fresh, shared, shared_twin
from benchmarks.peers import need_triton
from fastgpt2 import GPT2, GPT2Config, KVCache, SamplingConfig
from fastgpt2.accounting import cache_bytes_per_token, forward_flops_per_token, weight_bytes
from fastgpt2.decode import DecodeSession, NewRow, why_not_decode
from fastgpt2_kernels import ops, reference

Make = Callable[..., Call]


def cases(settings: Settings) -> Iterator[Case]:
    # The same configuration as in generate.py, so that both share a model.
    config = TOY if settings.scale == "toy" else GPT2Config.preset("gpt2", bos_token_id=None, eos_token_id=None)
    dtypes = ("bfloat16", "float32") if settings.scale != "toy" else ("float32",)
    for R in settings.pick((1, 8, 32), (1, 8), (3,)):
        for dtype in dtypes:
            for name, layer in LINEARS.items():
                if settings.scale != "quick" or name == "up":
                    for is_int8 in (False, True):
                        yield _linear_case(settings, config, name, layer, R, dtype, is_int8)
        for name, sampling in SAMPLINGS.items():
            if settings.scale != "quick" or name in ("greedy", "top-p"):
                yield _sample_case(settings, config, name, sampling, R)
    for R in settings.pick((1, 8, 32, 128) if settings.on_gpu else (1, 8, 32), (1,), (2,)):
        for dtype in dtypes:
            yield _step_case(settings, config, R, settings.pick(512, 128, 8), dtype)


def _contenders(makers: dict[str, Make], settings: Settings, *arguments: object) -> list[Contender]:
    return [
        Contender(label, functools.partial(make, settings, *arguments), label.startswith("ours"), label == "eager")
        for label, make in makers.items()
    ]


# -- linear layers ------------------------------------------------------------------------------------------------


class LinearShape(NamedTuple):
    """A linear layer, and what is fused before and after its product.

    `outputs` and `inputs` are multiples of the model's width; 0 outputs stands for the vocabulary.
    """

    outputs: int
    inputs: int
    layer_norm: bool = False
    activation: str = "linear"
    residual: bool = False
    bias: bool = True


LINEARS = {
    "qkv": LinearShape(3, 1, layer_norm=True),
    "projection": LinearShape(1, 1, residual=True),
    "up": LinearShape(4, 1, layer_norm=True, activation="gelu_new"),
    "down": LinearShape(1, 4, residual=True),
    "head": LinearShape(0, 1, layer_norm=True, bias=False),
}


class LinearInputs(NamedTuple):
    """x (R, K); weight (N, K), which is int8 if there is a scale (N,)."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    norm: ops.LayerNormWeights | None
    residual: Tensor | None


def _linear_case(
    settings: Settings, config: GPT2Config, name: str, layer: LinearShape, R: int, dtype: str, is_int8: bool
) -> Case:
    N, K = layer.outputs * config.hidden_size or config.vocab_size, layer.inputs * config.hidden_size
    element = getattr(torch, dtype).itemsize
    weight_size = N * K + 4 * N if is_int8 else N * K * element
    return Case(
        name=f"linear_decode {name}{' int8' if is_int8 else ''}",
        shape={"R": R, "N": N, "K": K},
        dtype=dtype,
        contenders=_contenders(
            {"eager": _eager_linear, "ours triton": _triton_linear, "ours torch": _torch_linear, "fused ops": _fused},
            settings,
            layer,
        ),
        inputs=functools.partial(_linear_inputs, settings, layer, R, N, K, dtype, is_int8),
        exact=functools.partial(_exact_linear, layer),
        flops=2.0 * R * N * K,
        bytes=weight_size + element * R * (K + N * (1 + layer.residual)),
        measures_memory=False,
    )


def _linear_inputs(
    settings: Settings, layer: LinearShape, R: int, N: int, K: int, dtype: str, is_int8: bool
) -> LinearInputs:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, weight, bias, gain, shift, residual = (
        t.to(settings.device, getattr(torch, dtype))
        for t in (draw(R, K), draw(N, K) / K**0.5, draw(N), 1 + 0.1 * draw(K), draw(K), draw(R, N))
    )
    weight, scale = ops.quantize_rows(weight) if is_int8 else (weight, None)
    norm = ops.LayerNormWeights(gain, shift, 1e-5) if layer.layer_norm else None
    return LinearInputs(x, weight, scale, bias if layer.bias else None, norm, residual if layer.residual else None)


def _plain_linear(layer: LinearShape, inputs: LinearInputs) -> Tensor:
    x, weight, scale, bias, norm, residual = inputs
    if norm is not None:
        x = F.layer_norm(x, (x.shape[1],), norm.weight, norm.bias, norm.eps)
    y = x @ weight.to(x.dtype).T
    if scale is not None:
        y = y * scale.to(y.dtype)
    if bias is not None:
        y = y + bias
    y = ops.ACTIVATIONS[layer.activation](y)
    return y if residual is None else y + residual


def _exact_linear(layer: LinearShape, inputs: LinearInputs) -> list[Tensor]:
    x, weight, scale, bias, norm, residual = inputs
    x, weight, scale, bias, residual = (None if t is None else t.double() for t in (x, weight, scale, bias, residual))
    norm = norm and ops.LayerNormWeights(norm.weight.double(), norm.bias.double(), norm.eps)
    return [_plain_linear(layer, LinearInputs(x, weight, scale, bias, norm, residual))]


def _eager_linear(settings: Settings, layer: LinearShape, inputs: LinearInputs) -> Call:
    return lambda: [_plain_linear(layer, inputs)]


def _ours_linear(backend: str, layer: LinearShape, inputs: LinearInputs) -> Call:
    x, weight, scale, bias, norm, residual = inputs
    return lambda: [
        ops.linear_decode(
            x, weight, bias, weight_scale=scale, layer_norm=norm, activation=layer.activation, residual=residual,
            backend=backend,
        )
    ]  # fmt: skip


def _triton_linear(settings: Settings, layer: LinearShape, inputs: LinearInputs) -> Call:
    need_triton(settings, "linear_decode")
    return _ours_linear("triton", layer, inputs)


def _torch_linear(settings: Settings, layer: LinearShape, inputs: LinearInputs) -> Call:
    return _ours_linear("torch", layer, inputs)


def _fused(settings: Settings, layer: LinearShape, inputs: LinearInputs) -> Call:
    """PyTorch's operators, fused as far as they can be: the product adds the bias."""
    x, weight, scale, bias, norm, residual = inputs
    if scale is not None:
        raise LeftOutError("absent: PyTorch has no public operator for int8 weights")

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
    """Which tokens the filters keep. It sorts, as transformers does."""
    probs = (logits.double() / max(sampling.get("temperature", 1.0), 1e-9)).softmax(-1)
    ranked, order = probs.sort(-1, descending=True)
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if sampling.get("temperature") == 0:
        kept[:, 1:] = False
    if "top_k" in sampling:
        kept[:, int(sampling["top_k"]) :] = False
    if "top_p" in sampling:
        kept &= ranked.cumsum(-1) - ranked < sampling["top_p"] + 1e-6  # a token at the border may round either way
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _bad_sample(sampling: dict[str, float], logits: Tensor, contender: Contender, result: list[Tensor]) -> str | None:
    """Why a sample is wrong, or None.

    A peer draws from a random generator of its own, so its token must only be one that the filters keep. Ours draw from
    keys: the token must be the one that float64 draws, except at a near tie, and have the right log-probability.
    """
    ids, *logprobs = result
    if ids.shape != logits.shape[:1]:
        return f"expected one token for each of {len(logits)} rows; got {tuple(ids.shape)}"
    chosen = ids.long()[:, None]
    outside = ~_kept(logits, sampling).gather(-1, chosen)
    if outside.any():
        return f"row {int(outside.nonzero()[0, 0])} chose a token that the filters drop"
    if not contender.is_ours:
        return None
    rounded, exact = (_scores(sampling, t) for t in (logits, logits.double()))
    regret = (exact.amax(-1) - exact.gather(-1, chosen)[:, 0]).max().item()
    is_kept = rounded.isfinite() & exact.isfinite()
    rounding = (rounded.double() - exact)[is_kept].abs().max().item()
    scale = exact[is_kept].abs().max().item()
    budget = 2 * 2 * (rounding + EPS["float32"] * scale)  # a difference of two scores, each within the 2x rule
    if not regret <= budget:
        return f"a token's score is {regret:.3g} below the best, the budget is {budget:.3g}"
    plain, want = (t.log_softmax(-1).gather(-1, chosen)[:, 0] for t in (logits, logits.double()))
    return out_of_budget(error_of(logprobs, [want]), error_of([plain], [want]), [want], "float32")


def _scores(sampling: dict[str, float], logits: Tensor) -> Tensor:
    """The scores whose argmax is the sampled token: plain expressions, with the noise that our kernels draw."""
    if sampling.get("temperature") == 0:
        return logits
    settings = {"temperature": 1.0, **sampling}
    full = {
        name: torch.full(logits.shape[:1], value, device=logits.device, dtype=torch.int32 if name == "top_k" else None)
        for name, value in settings.items()
    }
    return reference.sampling_scores(logits, **full, **_draws(logits))


def _draws(logits: Tensor) -> dict[str, Tensor]:
    R = logits.shape[0]
    keys = ops.row_keys(0, list(range(R)), [0] * R).to(logits.device)
    return {"keys": keys, "positions": torch.zeros(R, dtype=torch.int32, device=logits.device)}


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
    options = {**sampling, **_draws(logits), "backend": backend}
    return lambda: list(ops.sample(logits, **options))


def _triton_sample(settings: Settings, sampling: dict[str, float], logits: Tensor) -> Call:
    need_triton(settings, "sample")
    return _ours_sample("triton", sampling, logits)


def _torch_sample(settings: Settings, sampling: dict[str, float], logits: Tensor) -> Call:
    return _ours_sample("torch", sampling, logits)


# -- the whole step -----------------------------------------------------------------------------------------------


class StepInputs(NamedTuple):
    """R prompts of one length. The step's input is the last token of each prompt, once more."""

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
                "ours without PDL": functools.partial(_session_step, use_pdl=False),
                "ours torch": _torch_step,
            },
            settings,
        ),
        inputs=functools.partial(_step_inputs, config, R, length, kind),
        disagrees=functools.partial(_bad_step, settings),
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


def _bad_step(settings: Settings, inputs: StepInputs, contender: Contender, result: list[int]) -> str | None:
    """Why a step's tokens are wrong, or None. Each must nearly have the best logit in float64, as in generate.py."""
    vocab_size, R, dtype = inputs.config.vocab_size, len(inputs.prompts), str(inputs.dtype).removeprefix("torch.")
    if len(result) != R or not all(0 <= token < vocab_size for token in result):
        return f"expected a token id below {vocab_size} for each of {R} rows; got {result}"
    for row in range(R) if settings.on_gpu else sorted({0, R - 1})[:CHECKED_ROWS]:
        ids = (*inputs.prompts[row], inputs.prompts[row][-1])
        exact = _last_logits(settings, inputs.config, torch.float64, ids)
        rounding = (_last_logits(settings, inputs.config, inputs.dtype, ids).double() - exact).abs().max().item()
        budget = 2 * 2 * (rounding + EPS[dtype] * exact.abs().max().item())
        regret = (exact.max() - exact[result[row]]).item()
        if not regret <= budget:
            return f"row {row}: its logit is {regret:.3g} below the best, the budget is {budget:.3g}"
    return None


@functools.lru_cache(maxsize=1024)
@torch.no_grad()
def _last_logits(settings: Settings, config: GPT2Config, dtype: torch.dtype, ids: tuple[int, ...]) -> Tensor:
    """transformers' logits after the last of `ids`, (V,)."""
    model = shared_twin(settings, config, dtype)
    return model(torch.tensor([ids], device=settings.device), logits_to_keep=1).logits[0, -1].clone()


@torch.no_grad()
def _filled(model: GPT2, inputs: StepInputs) -> KVCache:
    R, T = len(inputs.prompts), len(inputs.prompts[0])
    dtype = KVCache.best_dtype(inputs.dtype, model.device)
    cache = KVCache(inputs.config, R, T + 2, dtype=dtype, device=model.device)
    for row, ids in enumerate(inputs.prompts):
        plan = ops.plan_rows([row], [T], [0], model.device)
        model.extend(torch.tensor(ids, device=model.device), plan, cache)
    return cache


def _session_step(settings: Settings, inputs: StepInputs, use_graphs: bool = True, use_pdl: bool | None = None) -> Call:
    need_triton(settings, "decode_step")
    filler = shared(settings, inputs.config, inputs.dtype)
    model = filler
    if not settings.on_gpu:  # the interpreter runs only if it is asked for by name
        model = fresh(settings, inputs.config, inputs.dtype)
        model.backend = "triton"
    elif use_pdl is False and (torch.version.hip or torch.cuda.get_device_capability()[0] < 9):
        raise LeftOutError("absent: this GPU has no programmatic dependent launch")
    if (reason := why_not_decode(model)) is not None:
        raise LeftOutError(f"absent: {reason}")
    session = DecodeSession(
        model, _filled(filler, inputs), SamplingConfig(temperature=0), use_graphs=use_graphs, use_pdl=use_pdl
    )
    rows = range(len(inputs.prompts))
    session.begin(
        [NewRow(row, inputs.prompts[row], (0, 0), 2**30) for row in rows],
        torch.zeros(len(rows), inputs.config.vocab_size, device=model.device),
    )
    last = torch.tensor([ids[-1] for ids in inputs.prompts], dtype=torch.int32, device=model.device)
    R, T = len(rows), len(inputs.prompts[0])

    def call() -> list[int]:
        session.slots.lengths[:R] = T  # repeats the same step
        session.slots.status[:R] = ops.FRESH
        session.slots.tokens[:R] = last
        return session.step(list(rows)).read()[0][:R]

    return call


def _torch_step(settings: Settings, inputs: StepInputs) -> Call:
    model = shared(settings, inputs.config, inputs.dtype)
    if settings.on_gpu:  # "auto" would choose Triton
        model = fresh(settings, inputs.config, inputs.dtype)
        model.backend = "torch"
    cache = _filled(model, inputs)
    R, T = len(inputs.prompts), len(inputs.prompts[0])
    last = torch.tensor([ids[-1] for ids in inputs.prompts], device=model.device)

    @torch.no_grad()
    def call() -> list[int]:
        cache.lengths = [T] * R
        plan = ops.plan_rows(range(R), [1] * R, cache.lengths, model.device)
        return model.logits(model.extend(last, plan, cache)).argmax(-1).tolist()

    return call


@torch.no_grad()
def _transformers_step(settings: Settings, inputs: StepInputs) -> Call:
    model = shared_twin(settings, inputs.config, inputs.dtype)
    ids = torch.tensor(inputs.prompts, device=settings.device)
    past = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def call() -> list[int]:
        chosen = model(ids[:, -1:], past_key_values=past, use_cache=True).logits[:, -1].argmax(-1).tolist()
        past.crop(-1)
        return chosen

    return call
