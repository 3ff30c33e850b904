"""Checks of whole models: training, decoding against the forward pass, batching, CUDA graphs, transformers."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config, SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow
from fastgpt2.formats.transformers import to_transformers
from fastgpt2.gpt2 import GPT2
from fastgpt2.selfcheck.operators import compare, why_not
from fastgpt2.selfcheck.report import Finding, error_finding
from fastgpt2_kernels import ops

_CONFIG = GPT2Config(
    vocab_size=61, context_length=32, hidden_size=32, num_layers=2, num_heads=2, tie_word_embeddings=False,
    residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


class _Work(NamedTuple):
    """The prompts that are decoded together, and the number of decode steps."""

    prompts: Sequence[Sequence[int]]
    steps: int


_WORK = _Work(([5, 6, 7], [9] * 11, [2], [40, 41, 42, 43, 44]), 6)
_LITTLE = _Work(_WORK.prompts[:2], 2)  # for Triton's interpreter


def _work(model: GPT2) -> _Work:
    return _LITTLE if model.device.type == "cpu" and model.backend == "triton" else _WORK


def draw_parameters(model: torch.nn.Module, seed: int, std: float = 0.3) -> None:
    """Set every parameter to random values, so that no bias is 0 and no LayerNorm weight is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * std + (1.0 if parameter.dim() == 1 else 0.0))


class _Check(NamedTuple):
    """A check before it is run."""

    name: str
    backend: str
    run: Callable[[], Finding]


def check_models(device: torch.device) -> Iterator[Finding]:
    """Run every check of whole models, and yield a finding for each. A check that raises an error has failed."""
    yield from map(_run, _checks(device))


def _run(check: _Check) -> Finding:
    try:
        return check.run()
    except Exception as error:  # a kernel, a compiler or a driver can raise anything
        return error_finding(check.name, check.backend, "", error)


def _checks(device: torch.device) -> Iterator[_Check]:
    """The checks for `device`. It puts nothing on the device, so no error of the device can end it."""
    if why_not("decode_step", "triton", device) is None:
        yield _Check("training", "triton", lambda: _training(device))
    for decoder in ("triton", "native"):
        if (reason := why_not("decode_step", decoder, device)) is not None:
            skipped = Finding("decoding", decoder, "skipped", None, reason)
            yield _Check(skipped.name, decoder, lambda skipped=skipped: skipped)  # type: ignore[misc]
            continue
        for dtype in decoded_dtypes(decoder, device):
            for name, run in (("prefill = decode", _decoding), ("row alone = in batch", _alone)):
                yield _Check(name, decoder, functools.partial(run, device, dtype, decoder))
        if decoder == "triton":
            yield _Check("CUDA graph = launches", decoder, lambda: _graphs(device))
            yield _Check("PDL = no PDL", decoder, lambda: _pdl(device))
    yield _Check("greedy = transformers", _auto(device), lambda: _beside_transformers(device))


def decoded_dtypes(decoder: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that decoding is checked in. Triton's interpreter computes wrong bfloat16 products."""
    if device.type == "cuda" or decoder == "native":
        return torch.float32, torch.bfloat16
    return (torch.float32,)


def _model(device: torch.device, dtype: torch.dtype, backend: str, seed: int = 0) -> GPT2:
    """A tiny random model, whose greedy tokens change from step to step."""
    model = GPT2(_CONFIG, backend=backend).eval()
    draw_parameters(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.sub_(1.0)
            elif name.endswith(("wte.weight", "wpe.weight")):
                parameter.mul_(4.0)
    return model.to(device, dtype)


def _exact(device: torch.device, rounded: torch.dtype, seed: int = 0) -> GPT2:
    return _model(device, rounded, "torch", seed).double()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _training(device: torch.device) -> Finding:
    """Check the loss and every gradient of a training step."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(_CONFIG.vocab_size, (2, 17), generator=generator).to(device)

    def results(model: GPT2) -> list[Tensor]:
        hidden = model.hidden_states(tokens[:, :-1])
        loss = ops.linear_cross_entropy(hidden, model.lm_head.weight, tokens[:, 1:], backend=model.backend)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    got, plain = (results(_model(device, torch.float32, backend)) for backend in ("triton", "torch"))
    share, wrong = compare(got, [plain], results(_exact(device, torch.float32)), torch.float32, is_rms=True)
    title = "loss and gradients of a model, float32"
    return Finding("training", "triton", "failed" if wrong else "ok", share, f"{title}: {wrong}" if wrong else title)


# -- decoding -------------------------------------------------------------------------------------------------------


class _Decoded(NamedTuple):
    """The new tokens of every row, and their log-probabilities in float32."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


def _decode(
    model: GPT2, groups: Sequence[Sequence[int]], *, use_graphs: bool = True, use_pdl: bool | None = False
) -> _Decoded:
    """Decode the prompts greedily. Each of `groups` holds the rows that are decoded in one batch."""
    rows, work = [row for group in groups for row in group], _work(model)
    dtype = model.dtype if model.device.type == "cuda" else torch.float32
    cache = KVCache(model.config, len(work.prompts), dtype=dtype, device=model.device)
    greedy = SamplingConfig(temperature=0)
    session = DecodeSession(model, cache, greedy, use_graphs=use_graphs, use_pdl=use_pdl)
    out = _Decoded([[] for _ in work.prompts], [[] for _ in work.prompts])
    for row in rows:  # one prefill per row, so that it cannot depend on the groups
        logits = session.prefill([row], [work.prompts[row]])
        _note(out, [row], session.begin([NewRow(row, work.prompts[row], (row, 1), 1000)], logits).read())
    with graphs_required(session):
        for _ in range(work.steps):
            for group in groups:
                _note(out, group, session.step(group).read())
    return out


@contextmanager
def graphs_required(session: DecodeSession) -> Iterator[None]:
    """Raise an error where a session that uses CUDA graphs warns that it continues without them."""
    wanted = session.use_graphs
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DecodeSession: a CUDA graph cannot be used")
        yield
    if wanted and not session.use_graphs:
        raise RuntimeError("the session stopped using CUDA graphs")


def _note(out: _Decoded, rows: Sequence[int], results: tuple[list[int], list[float]]) -> None:
    for row in rows:
        out.tokens[row].append(results[0][row])
        out.logprobs[row].append(results[1][row])


@torch.no_grad()
def _decoding(device: torch.device, dtype: torch.dtype, backend: str) -> Finding:
    """Check that decoding gives the same log-probabilities as one forward pass over the same tokens."""
    model = _model(device, dtype, backend)
    prompts, steps = _work(model)
    title = f"{steps} steps against one forward pass, {_name(dtype)}"
    got = _decode(model, [range(len(prompts))])
    plain, exact = _model(device, dtype, "torch"), _exact(device, dtype)

    def forward(model: GPT2, row: int) -> Tensor:
        ids = torch.tensor([[*prompts[row], *got.tokens[row]]], device=device)
        logits = model(ids[:, :-1])[0, len(prompts[row]) - 1 :]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide.log_softmax(-1).gather(1, ids[0, len(prompts[row]) :, None])[:, 0]

    each = range(len(prompts))
    mine = torch.tensor(got.logprobs, device=device).flatten()
    share, wrong = compare(
        [mine], [[torch.cat([forward(plain, r) for r in each])]], [torch.cat([forward(exact, r) for r in each])], dtype
    )
    return Finding(
        "prefill = decode", backend, "failed" if wrong else "ok", share, f"{title}: {wrong}" if wrong else title
    )


def _equal(name: str, backend: str, title: str, a: _Decoded, b: _Decoded) -> Finding:
    """Compare two runs, which must agree bit for bit."""
    for row, pair in enumerate(zip(a.tokens, a.logprobs, b.tokens, b.logprobs, strict=True)):
        if pair[:2] != pair[2:]:
            return Finding(name, backend, "failed", None, f"{title}: row {row} has other tokens or log-probabilities")
    return Finding(name, backend, "ok", None, title)


@torch.no_grad()
def _alone(device: torch.device, dtype: torch.dtype, backend: str) -> Finding:
    model = _model(device, dtype, backend)
    rows = range(len(_work(model).prompts))
    together, alone = _decode(model, [rows]), _decode(model, [[row] for row in rows])
    return _equal("row alone = in batch", backend, f"bit for bit, {_name(dtype)}", together, alone)


def _why_no_graphs(device: torch.device) -> str | None:
    return None if device.type == "cuda" and (torch.version.cuda or torch.version.hip) else "needs a GPU"


def _why_no_pdl(device: torch.device) -> str | None:
    if (reason := _why_no_graphs(device)) is not None:
        return reason
    is_old = torch.version.hip or torch.cuda.get_device_capability(device)[0] < 9
    return "needs compute capability 9.0" if is_old else None


@torch.no_grad()
def _graphs(device: torch.device) -> Finding:
    """Check CUDA graphs against a step that is launched kernel by kernel."""
    return _beside_launches("CUDA graph = launches", device, _why_no_graphs(device), use_pdl=False)


@torch.no_grad()
def _pdl(device: torch.device) -> Finding:
    """Check programmatic dependent launch in a CUDA graph against a step that is launched kernel by kernel."""
    return _beside_launches("PDL = no PDL", device, _why_no_pdl(device), use_pdl=True)


def _beside_launches(name: str, device: torch.device, reason: str | None, *, use_pdl: bool) -> Finding:
    if reason is not None:
        return Finding(name, "triton", "skipped", None, reason)
    model = _model(device, torch.bfloat16, "triton")
    rows = range(len(_work(model).prompts))
    launched, graph = _decode(model, [rows], use_graphs=False), _decode(model, [rows], use_pdl=use_pdl)
    return _equal(name, "triton", "bit for bit, bfloat16", launched, graph)


# -- transformers ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _beside_transformers(device: torch.device) -> Finding:
    """Compare greedy tokens of `generate` with transformers'."""
    name, backend = "greedy = transformers", _auto(device)
    if importlib.util.find_spec("transformers") is None:
        return Finding(name, backend, "skipped", None, "the package transformers is not installed")
    prompt, steps = _WORK.prompts[0], _LITTLE.steps if device.type == "cpu" and backend == "triton" else 12
    seed = _clear_seed(prompt, steps)
    model = _model(device, torch.float32, backend, seed)
    ours = model.generate([prompt], max_new_tokens=steps, temperature=0, stop_token_ids=())[0].token_ids
    ids = torch.tensor([prompt], device=device)
    options: Any = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    peer: Any = to_transformers(model)
    theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), **options)
    want = theirs[0, len(prompt) :].tolist()
    detail = f"{steps} tokens, float32"
    if list(ours) != want:
        return Finding(name, backend, "failed", None, f"{detail}: {list(ours)}; transformers: {want}")
    return Finding(name, backend, "ok", None, detail)


def _auto(device: torch.device) -> str:
    """ "triton" where its kernels can run, else "auto".

    With "auto" a kernel that fails would be replaced by PyTorch's operators, and the check would still pass.
    """
    return "triton" if why_not("decode_step", "triton", device) is None else "auto"


def _clear_seed(prompt: Sequence[int], steps: int) -> int:
    """A seed whose model's greedy tokens do not depend on rounding: in float64 each leads by more than 0.01."""
    for seed in itertools.count(1):
        model, ids = _exact(torch.device("cpu"), torch.float32, seed), list(prompt)
        gaps = []
        for _ in range(steps):
            best = model(torch.tensor([ids]))[0, -1].topk(2)
            gaps.append((best.values[0] - best.values[1]).item())
            ids.append(int(best.indices[0]))
        if min(gaps) > 1e-2:
            return seed
    raise ValueError("check: no seed gives a model whose greedy tokens are clear")
