"""Random test cases of every operator, forward and backward, on a backend or as the plain PyTorch expression.

Every backend is compared with the plain expression in float64. The plain expression's own error, in the dtype under
test, sets how large the backend's error may be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.checking.poison import is_untouched, within_poison

# These take the place of a backend: the expression written out in PyTorch, and PyTorch's own fused operator.
PLAIN, FUSED = "plain", "fused"
Results = Sequence[Tensor]


class Inputs:
    """Random tensors between margins of NaN.

    The numbers are rounded to the dtype `rounded` and then returned in `dtype`, so every dtype gets the same numbers.
    """

    def __init__(
        self, seed: int, device: torch.device | str, dtype: torch.dtype, rounded: torch.dtype | None = None
    ) -> None:
        self.seed, self.device, self.dtype, self.rounded = seed, torch.device(device), dtype, rounded or dtype
        self._buffers: list[Tensor] = []

    def __call__(self, index: int, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Input number `index` of the case, a leaf. `dtype` is for an input that is not of the dtype under test."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        values = (torch.randn(shape, generator=generator) * scale).to(dtype or self.rounded)
        wide = self.dtype if dtype is None else torch.promote_types(dtype, self.dtype)
        return self._kept(values.to(wide)).requires_grad_()

    def integers(self, numbers: Sequence[int] | Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
        return self._kept(torch.as_tensor(numbers, dtype=dtype))

    def _kept(self, values: Tensor) -> Tensor:
        inside, buffer = within_poison(values.to(self.device))
        self._buffers.append(buffer)
        return inside

    def are_untouched(self) -> bool:
        """Whether nothing was written outside the inputs."""
        return all(map(is_untouched, self._buffers))


class Case(NamedTuple):
    """A case of an operator.

    run: takes the inputs and a backend or `PLAIN`, and returns results and gradients.
    dtypes: the dtypes that it runs in; None means all.
    has_fused: `run` also takes `FUSED`. Its error then counts like that of the plain expression.
    """

    operator: str
    title: str
    run: Callable[[Inputs, str], Results]
    dtypes: tuple[torch.dtype, ...] | None = None
    has_fused: bool = False


def _gradients(outs: Tensor | tuple[Tensor, ...], inputs: Inputs, *leaves: Tensor) -> Results:
    """The results, and the gradients of the leaves for random gradients of the results."""
    outs = (outs,) if isinstance(outs, Tensor) else outs
    weights = [inputs(900 + i, *out.shape).detach().to(out.dtype) for i, out in enumerate(outs)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, weights)]


def _causal_attention(inputs: Inputs, backend: str, T: int, S: int, D: int) -> Results:
    q, k, v = inputs(0, 2, 2, T, D), inputs(1, 2, 2, S, D), inputs(2, 2, 2, S, D)
    if backend == PLAIN:
        return _gradients(reference.causal_attention(q, k, v), inputs, q, k, v)
    if backend == FUSED:
        mask = reference.causal_mask(T, S, q.device)
        return _gradients(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), inputs, q, k, v)
    return _gradients(ops.causal_attention(q, k, v, backend=backend), inputs, q, k, v)


def _causal_attention_packed(inputs: Inputs, backend: str, kind: str, T: int = 43, H: int = 2, D: int = 16) -> Results:
    C = H * D
    B = 1 if kind == "documents" else 2
    qkv = inputs(0, B, T, 3 * C)
    lengths = inputs.integers([T, 17]) if kind == "lengths" else None
    cu_seqlens = inputs.integers([0, 5, 6, T]) if kind == "documents" else None
    seed = inputs.integers([7, 3], torch.int64) if kind == "dropout" else None
    p = 0.0 if seed is None else 0.25
    if backend not in (PLAIN, FUSED):
        out = ops.causal_attention_packed(
            qkv, H, lengths=lengths, cu_seqlens=cu_seqlens, dropout_p=p, dropout_seed=seed, backend=backend
        )
        return _gradients(out, inputs, qkv)
    mask = None if cu_seqlens is None else reference.document_mask(cu_seqlens, T)
    keep = None if seed is None else reference.dropout_keep(seed, B, H, T, T, p)
    q, k, v = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    if backend == FUSED:
        mask = reference.causal_mask(T, T, qkv.device) & (True if mask is None else mask)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        out = reference.causal_attention(q, k, v, mask=mask, keep=keep, dropout_p=p)
    out = out.transpose(1, 2).flatten(2)
    if lengths is not None:
        padding = torch.arange(T, device=lengths.device) >= lengths[:, None]
        out = out.masked_fill(padding[..., None], 0.0)
    return _gradients(out, inputs, qkv)


def _decode_attention(inputs: Inputs, backend: str, several: bool, H: int = 2, D: int = 16, S: int = 200) -> Results:
    held, counts = [0, 190, 130], [3, 8, 1] if several else [1, 1, 1]
    N = sum(counts)
    qkv, keys, values = (inputs(i, *s).detach() for i, s in enumerate([(N, 3 * H * D), *[(4, H, S, D)] * 2]))
    lengths = inputs.integers([held[1], held[0], 0, held[2]])
    rows: dict[str, Any] = {
        "starts": inputs.integers([0, counts[0], counts[0] + counts[1]]),
        "counts": inputs.integers(counts),
        "slots": inputs.integers([1, 0, 3]),
    }
    if backend == PLAIN:
        out = reference.decode_attention(qkv, keys, values, lengths, **rows)
    else:
        out = ops.decode_attention(qkv, keys, values, lengths, **rows, backend=backend)
    return [out, keys, values]


def _cached_attention(inputs: Inputs, backend: str, H: int = 2, D: int = 16, S: int = 64) -> Results:
    """Four rows: one without cached tokens, and one each with one, a few and many new tokens after cached ones."""
    slots, counts, held = [2, 0, 3, 1], [19, 1, 4, 13], [0, 40, 7, 21]
    qkv, keys, values = (inputs(i, *s).detach() for i, s in enumerate([(sum(counts), 3 * H * D), *[(4, H, S, D)] * 2]))
    if backend == PLAIN:
        lengths = [0] * 4
        for slot, length in zip(slots, held, strict=True):
            lengths[slot] = length
        starts = [sum(counts[:i]) for i in range(4)]
        rows = {"starts": starts, "counts": counts, "slots": slots}
        of: Any = {name: inputs.integers(numbers) for name, numbers in rows.items()}
        out = reference.decode_attention(qkv, keys, values, inputs.integers(lengths), **of)
    else:
        out = ops.cached_attention(
            qkv, keys, values, ops.plan_rows(slots, counts, held, inputs.device), backend=backend
        )
    return [out, keys, values]


def _layer_norm(inputs: Inputs, backend: str, width: int, of_sum: bool = False) -> Results:
    x, weight, bias = inputs(0, 2, 5, width), inputs(1, width), inputs(2, width)
    residual = inputs(3, 2, 5, width) if of_sum else None
    leaves = [x, weight, bias, *([] if residual is None else [residual])]
    if backend != PLAIN:
        outs = ops.layer_norm(x, weight, bias, 1e-5, residual=residual, backend=backend)
        return _gradients(outs, inputs, *leaves)
    s = x if residual is None else x + residual
    # Not the reference in other dtypes than float64, because it rounds at every step.
    norm = reference.layer_norm(s, weight, bias, 1e-5) if s.dtype == torch.float64 else _torch_norm(s, weight, bias)
    return _gradients(norm if residual is None else (norm, s), inputs, *leaves)


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def _activation(inputs: Inputs, backend: str) -> Results:
    x = inputs(0, 7, 80, scale=3.0)
    names = sorted(reference.ACTIVATIONS)
    if backend == PLAIN:
        return [r for name in names for r in _gradients(reference.ACTIVATIONS[name](x), inputs, x)]
    return [r for name in names for r in _gradients(ops.activation(x, name, backend=backend), inputs, x)]


def _bias_activation(inputs: Inputs, backend: str, name: str, width: int = 80) -> Results:
    x, bias = inputs(0, 2, 7, width, scale=2.0), inputs(1, width)
    if backend == PLAIN:
        return _gradients(reference.bias_activation(x, bias, name), inputs, x, bias)
    return _gradients(ops.bias_activation(x, bias, name, backend=backend), inputs, x, bias)


def _linear(inputs: Inputs, backend: str) -> Results:
    x, weight, bias = inputs(0, 2, 3, 40), inputs(1, 24, 40), inputs(2, 24)
    residual = inputs(3, 2, 3, 24)
    if backend == PLAIN:
        outs = F.gelu(F.linear(x, weight, bias), approximate="tanh"), F.linear(x, weight, bias) + residual
    else:
        outs = (
            ops.linear(x, weight, bias, activation="gelu_new", backend=backend),
            ops.linear(x, weight, bias, residual=residual, backend=backend),
        )
    return _gradients(outs, inputs, x, weight, bias, residual)


def _linear_decode(inputs: Inputs, backend: str, rows: int, int8: bool = False, K: int = 130, N: int = 50) -> Results:
    x, weight, bias, norm_weight, norm_bias, residual = (
        inputs(i, *s).detach() for i, s in enumerate([(rows, K), (N, K), (N,), (K,), (K,), (rows, N)])
    )
    scale = None
    if int8:
        # Quantize the same numbers in every dtype: those rounded to the dtype under test.
        weight, scale = ops.quantize_rows(weight.to(inputs.rounded))
    if backend != PLAIN:
        norm = ops.LayerNormWeights(norm_weight, norm_bias, 1e-5)
        decode = functools.partial(ops.linear_decode, weight_scale=scale, backend=backend)
        return [
            decode(x, weight, bias, activation="gelu_new"),
            decode(x, weight, bias, layer_norm=norm, residual=residual),
        ]
    if scale is not None:
        weight = (weight.to(inputs.dtype) * scale[:, None]).to(inputs.dtype)
    return [
        F.gelu(F.linear(x, weight, bias), approximate="tanh"),
        F.linear(_torch_norm(x, norm_weight, norm_bias), weight, bias) + residual,
    ]


def _decode_step(inputs: Inputs, backend: str) -> Results:
    """The logits after one token at position 0.

    At position 0 attention returns the token's value, so the plain expression is short.
    """
    C, V, inner, token = 32, 61, 64, 5

    def draw(index: int, *shape: int) -> Tensor:
        return inputs(index, *shape, scale=0.3).detach()

    def norm(index: int) -> ops.LayerNormWeights:
        return ops.LayerNormWeights(draw(index, C), draw(index + 1, C), 1e-5)

    def linear(index: int, rows: int, columns: int) -> ops.LinearWeights:
        return ops.LinearWeights(draw(index, rows, columns), draw(index + 1, rows))

    layer = ops.LayerWeights(
        norm(10), linear(12, 3 * C, C), linear(14, C, C), norm(16), linear(18, inner, C), linear(20, C, inner), 0.25
    )
    weights = ops.StepWeights(
        draw(1, V, C), draw(2, 8, C), (layer,), norm(30), ops.LinearWeights(draw(3, V, C)), 2, "gelu_tanh"
    )
    if backend == PLAIN:
        return [_first_token_logits(weights, token)]
    slots = ops.SlotState.idle(1, inputs.device)
    slots.tokens.fill_(token)
    slots.status.fill_(ops.FRESH)
    slots.limits.fill_(4)
    step = ops.decode_step(
        weights, slots, ops.SlotSampling(), inputs.integers([V - 1]), 1, inputs.dtype, backend=backend
    )
    cache = torch.full((2, 1, 1, 2, 8, C // 2), torch.nan, dtype=inputs.dtype, device=inputs.device)
    step.use_cache(*cache)
    step.run(torch.zeros(1, dtype=torch.int32, device=inputs.device))
    return [step.step_logits(1).clone()]


def _first_token_logits(weights: ops.StepWeights, token: int) -> Tensor:
    def linear(x: Tensor, of: ops.LinearWeights) -> Tensor:
        return F.linear(x, of.weight, of.bias)

    def norm(x: Tensor, of: ops.LayerNormWeights) -> Tensor:
        return _torch_norm(x, of.weight, of.bias)

    x = (weights.wte[token] + weights.wpe[0])[None]
    for layer in weights.layers:
        x = x + linear(linear(norm(x, layer.ln_1), layer.qkv)[:, -x.shape[1] :], layer.projection)
        hidden = F.gelu(linear(norm(x, layer.ln_2), layer.up), approximate="tanh")
        x = x + linear(hidden, layer.down)
    return linear(norm(x, weights.ln_f), weights.head)


def _cross_entropy(inputs: Inputs, backend: str, fuse: bool, V: int = 301) -> Results:
    loss: Any
    logits = inputs(0, 5, V, scale=3.0)
    targets = inputs.integers([3, -100, V - 1, 0, 17], torch.int64)
    if backend == PLAIN:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, targets, reduction="mean" if fuse else "none", label_smoothing=0.1)
    else:
        loss = ops.cross_entropy(
            logits, targets, reduction="mean" if fuse else "none", label_smoothing=0.1, fuse_backward=fuse,
            backend=backend,
        )  # fmt: skip
    return _gradients(loss, inputs, logits)


def _linear_cross_entropy(inputs: Inputs, backend: str, C: int = 40, V: int = 301, scale: float = 0.5) -> Results:
    x, weight, bias = inputs(0, 9, C), inputs(1, V, C, scale=scale), inputs(2, V)
    targets = inputs.integers([3, -100, V - 1, 0, 17, 17, V - 2, 1, 2], torch.int64)
    if backend == PLAIN:
        logits = F.linear(x, weight, bias)
        loss = F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets)
    else:
        loss = ops.linear_cross_entropy(x, weight, targets, bias, chunk_rows=4, backend=backend)
    return _gradients(loss, inputs, x, weight, bias)


def _sample(inputs: Inputs, backend: str, V: int = 301, **settings: Any) -> Results:
    R = 3
    logits = inputs(0, R, V, scale=2.0).detach()
    keys = inputs.integers(ops.row_keys(7, range(R), [0] * R), torch.int64)
    positions = inputs.integers([0, 5, 9])
    seen = inputs.integers((torch.arange(R * V) % 3).view(R, V) == 0, torch.uint8)
    if backend != PLAIN:
        ids, logprobs = ops.sample(logits, keys=keys, positions=positions, seen=seen, backend=backend, **settings)
        return [ids.to(inputs.dtype), logprobs]
    full = {name: logits.new_full((R,), value) for name, value in settings.items()}
    if "repetition_penalty" in full:
        full["penalty"] = full.pop("repetition_penalty")
    if "top_k" in full:
        full["top_k"] = full["top_k"].int()
    full.setdefault("temperature", logits.new_ones(R))
    ids, logprobs = reference.sample(
        logits if logits.dtype == torch.float64 else logits.float(), keys=keys, positions=positions, seen=seen, **full
    )
    return [ids.to(inputs.dtype), logprobs]


_FLOAT32 = (torch.float32,)
CASES = (
    *(
        Case("causal_attention", f"T={T} S={S} D={D}", functools.partial(_causal_attention, T=T, S=S, D=D), None, True)
        for T, S, D in ((1, 9, 16), (37, 37, 16), (5, 41, 24), (130, 130, 64))
    ),
    *(
        Case(
            "causal_attention_packed", kind, functools.partial(_causal_attention_packed, kind=kind), None,
            kind != "dropout",
        )
        for kind in ("plain rows", "lengths", "documents", "dropout")
    ),
    Case("cached_attention", "rows with and without cached tokens", _cached_attention),
    *(
        Case("decode_attention", title, functools.partial(_decode_attention, several=several))
        for title, several in (("one token per row", False), ("several tokens per row", True))
    ),
    *(
        Case("layer_norm", title, functools.partial(_layer_norm, width=width, of_sum=of_sum))
        for title, width, of_sum in (("C=96", 96, False), ("residual, C=96", 96, True), ("C=17000", 17_000, False))
    ),
    Case("activation", "every name", _activation),
    *(
        Case("bias_activation", name, functools.partial(_bias_activation, name=name))
        for name in ("gelu_new", "gelu", "silu")
    ),
    Case("linear", "activation and residual", _linear),
    *(
        Case("linear_decode", f"{rows} rows", functools.partial(_linear_decode, rows=rows)) for rows in (1, 3, 20)
    ),
    Case("linear_decode", "8-bit weights", functools.partial(_linear_decode, rows=3, int8=True), _FLOAT32),
    Case("decode_step", "a first token", _decode_step),
    Case("cross_entropy", "a loss per row", functools.partial(_cross_entropy, fuse=False)),
    Case("cross_entropy", "mean, fused backward", functools.partial(_cross_entropy, fuse=True)),
    Case("linear_cross_entropy", "chunks of 4 rows", _linear_cross_entropy),
    Case("sample", "greedy", functools.partial(_sample, temperature=0.0), _FLOAT32),
    Case("sample", "top_k=5", functools.partial(_sample, top_k=5), _FLOAT32),
    Case("sample", "top_p, min_p, penalty",
         functools.partial(_sample, temperature=0.8, top_p=0.9, min_p=0.01, repetition_penalty=1.2), _FLOAT32),
)  # fmt: skip
_HALF = (torch.bfloat16, torch.float16)
# The sizes of GPT-2, from 124M (C=768) to 1.5B (C=1600), for which a GPU's kernels have variants of their own. On a CPU
# they would take minutes, and find little: what it runs does not depend on the size.
GPT2_CASES = (
    *(
        Case("causal_attention", f"T={T} S={S} D=64", functools.partial(_causal_attention, T=T, S=S, D=64), _HALF, True)
        for T, S in ((300, 300), (1, 1000))
    ),
    *(
        Case(
            "causal_attention_packed", f"{kind}, T=300 H=12 D=64",
            functools.partial(_causal_attention_packed, kind=kind, T=300, H=12, D=64),
            None if kind == "dropout" else _HALF, kind != "dropout",
        )
        for kind in ("plain rows", "lengths", "documents", "dropout")
    ),
    Case("cached_attention", "H=12 D=64", functools.partial(_cached_attention, H=12, D=64, S=256), _HALF),
    *(
        Case(
            "decode_attention", f"{title}, H=12 D=64 S=1024",
            functools.partial(_decode_attention, several=several, H=12, D=64, S=1024), _HALF,
        )
        for title, several in (("one token per row", False), ("several tokens per row", True))
    ),
    *(
        Case("layer_norm", f"{title}C={width}", functools.partial(_layer_norm, width=width, of_sum=bool(title)))
        for width in (768, 1600)
        for title in ("", "residual, ")
    ),
    Case("bias_activation", "gelu_new, C=3072", functools.partial(_bias_activation, name="gelu_new", width=3072)),
    *(
        Case("linear_decode", f"{rows} rows K={K} N={N}", functools.partial(_linear_decode, rows=rows, K=K, N=N))
        for K, N in ((768, 2304), (1600, 1600))
        for rows in (1, 9, 32)
    ),
    Case("linear_decode", "8-bit weights, 9 rows K=768 N=2304",
         functools.partial(_linear_decode, rows=9, int8=True, K=768, N=2304), (torch.float32, torch.bfloat16)),
    Case("cross_entropy", "a loss per row, V=50257", functools.partial(_cross_entropy, fuse=False, V=50257)),
    Case("cross_entropy", "mean, fused backward, V=50257", functools.partial(_cross_entropy, fuse=True, V=50257)),
    Case("linear_cross_entropy", "C=768 V=50257", functools.partial(_linear_cross_entropy, C=768, V=50257, scale=0.02)),
    Case("sample", "greedy, V=50257", functools.partial(_sample, temperature=0.0, V=50257), _FLOAT32),
    Case("sample", "top_k=50, V=50257", functools.partial(_sample, top_k=50, V=50257), _FLOAT32),
    Case("sample", "top_p, min_p, penalty, V=50257",
         functools.partial(_sample, V=50257, temperature=0.8, top_p=0.9, min_p=0.01, repetition_penalty=1.2), _FLOAT32),
)  # fmt: skip


def cases_of(device: torch.device) -> tuple[Case, ...]:
    """The cases to check on `device`."""
    return (*CASES, *GPT2_CASES) if device.type == "cuda" else CASES
