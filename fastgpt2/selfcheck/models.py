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


# A block of GPT-2 124M. A GPU's kernels have variants of their own for its sizes.
_GPT2_BLOCK = GPT2Config(
    num_layers=1, tie_word_embeddings=False, residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0
)
_SAMPLED = SamplingConfig(temperature=0.8, top_k=50, top_p=0.95)


class _Work(NamedTuple):
    """The prompts that are decoded together, the number of decode steps, and smaller groups of the rows.

    The kernels have variants for different numbers of rows. The groups are of such numbers.
    """

    prompts: Sequence[Sequence[int]]
    steps: int
    groups: Sequence[Sequence[int]]


_WORK = _Work(([5, 6, 7], [9] * 11, [2], [40, 41, 42, 43, 44]), 6, [[0], [1], [2], [3]])
_LITTLE = _Work(_WORK.prompts[:2], 2, [[0], [1]])  # for Triton's interpreter
_MANY = _Work(
    [[7 * row + 3, *range(row, 2 * row)] for row in range(32)],
    3,
    [[0], [1, 2], range(3, 8), range(8, 16), range(16, 32)],
)


def _work(model: GPT2) -> _Work:
    if model.config.hidden_size == _GPT2_BLOCK.hidden_size:
        return _MANY
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
        for trained, dtype in trained_models(device):
            yield _Check("training", "triton", functools.partial(_training, device, dtype, trained))
    for decoder in ("triton", "native"):
        if (reason := why_not("decode_step", decoder, device)) is not None:
            yield _Check("decoding", decoder, functools.partial(Finding, "decoding", decoder, "skipped", None, reason))
            continue
        for config, dtype in decoded_models(decoder, device):
            for name, run in (("prefill = decode", _decoding), ("row alone = in batch", _alone)):
                yield _Check(name, decoder, functools.partial(run, device, dtype, decoder, config))
        if decoder == "triton":
            for config in (_CONFIG, _GPT2_BLOCK) if device.type == "cuda" else (_CONFIG,):
                yield _Check("CUDA graph = launches", decoder, functools.partial(_graphs, device, config))
                yield _Check("PDL = no PDL", decoder, functools.partial(_pdl, device, config))
    yield _Check("greedy = transformers", _auto(device), lambda: _beside_transformers(device))


def launches(gpu: torch.device, device: torch.device, *, with_pdl: bool) -> Iterator[Callable[[], object]]:
    """What launches the kernels of the checks of `gpu` on `device`, where the kernels only note their launches."""
    for config, dtype in trained_models(gpu):
        yield functools.partial(_loss_and_gradients, device, dtype, "triton", config)
    for config, dtype in decoded_models("triton", gpu):
        yield functools.partial(_decode_noted, device, dtype, config, with_pdl)


@torch.no_grad()
def _decode_noted(device: torch.device, dtype: torch.dtype, config: GPT2Config, with_pdl: bool) -> None:
    """Take the steps of the checks, with and without programmatic dependent launch, as in a CUDA graph."""
    model = GPT2(config, backend="triton").to(device, dtype).eval()
    work = _work(model)
    for sampling in (_GREEDY, _SAMPLED) if config == _GPT2_BLOCK else (_GREEDY,):
        cache = KVCache(config, len(work.prompts), dtype=dtype, device=device)
        session = DecodeSession(model, cache, sampling, _stop_ids(sampling), use_pdl=False)
        for use_table in (False, True):
            session.use_table = use_table
            for use_pdl in (False, True) if with_pdl and use_table else (False,):
                session.use_pdl = use_pdl
                logits = session.prefill([0], [work.prompts[0]])
                session.begin([NewRow(0, work.prompts[0], (0, 1), 1000)], logits)
                for group in (range(len(work.prompts)), *work.groups):
                    session.step(group)


def trained_models(device: torch.device) -> list[tuple[GPT2Config, torch.dtype]]:
    """The models whose training is checked, with their dtypes."""
    if device.type == "cuda":
        return [(_CONFIG, torch.float32), (_GPT2_BLOCK, torch.float32), (_GPT2_BLOCK, torch.bfloat16)]
    return [(_CONFIG, torch.float32)]


def decoded_models(decoder: str, device: torch.device) -> list[tuple[GPT2Config, torch.dtype]]:
    """The models whose decoding is checked, with their dtypes."""
    if device.type == "cuda":
        return [(_CONFIG, torch.float32), (_CONFIG, torch.bfloat16), (_GPT2_BLOCK, torch.bfloat16)]
    if decoder == "native":
        return [(_CONFIG, torch.float32), (_CONFIG, torch.bfloat16)]
    return [(_CONFIG, torch.float32)]  # Triton's interpreter computes wrong bfloat16 products


def _model(device: torch.device, dtype: torch.dtype, backend: str, seed: int = 0, config: GPT2Config = _CONFIG) -> GPT2:
    """A random model, whose greedy tokens change from step to step."""
    model = GPT2(config, backend=backend).eval()
    # At every width the sums of a linear layer are about as large.
    draw_parameters(model, seed, 0.3 * (_CONFIG.hidden_size / config.hidden_size) ** 0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.sub_(1.0)
            elif name.endswith(("wte.weight", "wpe.weight")):
                parameter.mul_(4.0)
    return model.to(device, dtype)


def _exact(device: torch.device, rounded: torch.dtype, seed: int = 0, config: GPT2Config = _CONFIG) -> GPT2:
    return _model(device, rounded, "torch", seed, config).double()


def _describe(dtype: torch.dtype, config: GPT2Config) -> str:
    size = f", C={config.hidden_size} V={config.vocab_size}" if config == _GPT2_BLOCK else ""
    return str(dtype).removeprefix("torch.") + size


def _training(device: torch.device, dtype: torch.dtype = torch.float32, config: GPT2Config = _CONFIG) -> Finding:
    """Check the loss and every gradient of a training step."""
    got, plain = (_loss_and_gradients(device, dtype, backend, config) for backend in ("triton", "torch"))
    exact = _loss_and_gradients(device, dtype, "float64", config)
    share, wrong = compare(got, [plain], exact, dtype, is_rms=True)
    title = f"loss and gradients of a model, {_describe(dtype, config)}"
    return Finding("training", "triton", "failed" if wrong else "ok", share, f"{title}: {wrong}" if wrong else title)


def _loss_and_gradients(device: torch.device, dtype: torch.dtype, backend: str, config: GPT2Config) -> list[Tensor]:
    """The loss of a model, and the gradients of its parameters. `backend` may also be "float64"."""
    is_exact = backend == "float64"
    model = _exact(device, dtype, 0, config) if is_exact else _model(device, dtype, backend, 0, config)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (2, 17), generator=generator).to(device)
    hidden = model.hidden_states(tokens[:, :-1])
    loss = ops.linear_cross_entropy(hidden, model.lm_head.weight, tokens[:, 1:], backend=model.backend)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


# -- decoding -------------------------------------------------------------------------------------------------------


class _Decoded(NamedTuple):
    """The new tokens of every row, and their log-probabilities in float32."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


_GREEDY = SamplingConfig(temperature=0)


def _stop_ids(sampling: SamplingConfig) -> Sequence[int]:
    """Only greedy rows go on in any case: their tokens are compared with a forward pass."""
    return () if sampling == _GREEDY else (0,)


def _decode(
    model: GPT2,
    groups: Sequence[Sequence[int]],
    sampling: SamplingConfig = _GREEDY,
    *,
    use_graphs: bool = True,
    use_pdl: bool | None = False,
) -> _Decoded:
    """Decode the prompts. Each of `groups` holds the rows that are decoded in one batch."""
    rows, work = [row for group in groups for row in group], _work(model)
    dtype = model.dtype if model.device.type == "cuda" else torch.float32
    cache = KVCache(model.config, len(work.prompts), dtype=dtype, device=model.device)
    session = DecodeSession(model, cache, sampling, _stop_ids(sampling), use_graphs=use_graphs, use_pdl=use_pdl)
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
def _decoding(device: torch.device, dtype: torch.dtype, backend: str, config: GPT2Config = _CONFIG) -> Finding:
    """Check that decoding gives the same log-probabilities as one forward pass over the same tokens."""
    model = _model(device, dtype, backend, 0, config)
    prompts, steps, _ = _work(model)
    title = f"{steps} steps against one forward pass, {_describe(dtype, config)}"
    got = _decode(model, [range(len(prompts))])
    plain, exact = _model(device, dtype, "torch", 0, config), _exact(device, dtype, 0, config)

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
def _alone(device: torch.device, dtype: torch.dtype, backend: str, config: GPT2Config = _CONFIG) -> Finding:
    name, title = "row alone = in batch", f"bit for bit, {_describe(dtype, config)}"
    model = _model(device, dtype, backend, 0, config)
    rows, groups = range(len(_work(model).prompts)), _work(model).groups
    finding = _equal(name, backend, title, _decode(model, [rows]), _decode(model, groups))
    if finding.status == "ok" and config == _GPT2_BLOCK:
        title += ", greedy and sampled"
        together, alone = (_decode(model, of, _SAMPLED) for of in ([rows], groups))
        finding = _equal(name, backend, title, together, alone)
    return finding


def _why_no_graphs(device: torch.device) -> str | None:
    return None if device.type == "cuda" and (torch.version.cuda or torch.version.hip) else "needs a GPU"


def _why_no_pdl(device: torch.device) -> str | None:
    if (reason := _why_no_graphs(device)) is not None:
        return reason
    is_old = torch.version.hip or torch.cuda.get_device_capability(device)[0] < 9
    return "needs compute capability 9.0" if is_old else None


@torch.no_grad()
def _graphs(device: torch.device, config: GPT2Config = _CONFIG) -> Finding:
    """Check CUDA graphs against a step that is launched kernel by kernel."""
    return _beside_launches("CUDA graph = launches", device, config, _why_no_graphs(device), use_pdl=False)


@torch.no_grad()
def _pdl(device: torch.device, config: GPT2Config = _CONFIG) -> Finding:
    """Check programmatic dependent launch in a CUDA graph against a step that is launched kernel by kernel."""
    return _beside_launches("PDL = no PDL", device, config, _why_no_pdl(device), use_pdl=True)


def _beside_launches(
    name: str, device: torch.device, config: GPT2Config, reason: str | None, *, use_pdl: bool
) -> Finding:
    if reason is not None:
        return Finding(name, "triton", "skipped", None, reason)
    model = _model(device, torch.bfloat16, "triton", 0, config)
    groups = [range(len(_work(model).prompts)), *_work(model).groups]
    launched, graph = _decode(model, groups, use_graphs=False), _decode(model, groups, use_pdl=use_pdl)
    return _equal(name, "triton", f"bit for bit, {_describe(torch.bfloat16, config)}", launched, graph)


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
