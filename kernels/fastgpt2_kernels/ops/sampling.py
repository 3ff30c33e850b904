"""Sampling: choose the next token of every row of logits, and make the keys that give each row its own noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgpt2_kernels import reference
from fastgpt2_kernels.backends import choose_backend, run_operator
from fastgpt2_kernels.ops.checks import check_same, describe, only_float32

_NAME = "sample"
_WORD = 0xFFFFFFFF
_LIMIT = 2**21  # the kernel counts tokens in 21 bits
# For each setting: its dtype, its valid range in words, and that range as a predicate of numbers and tensors.
_SETTINGS: dict[str, tuple[torch.dtype, str, Callable]] = {
    "temperature": (torch.float32, "finite and >= 0", lambda x: (x >= 0) & (x < math.inf)),
    "top_k": (torch.int32, ">= 1", lambda x: x >= 1),
    "top_p": (torch.float32, "in (0, 1]", lambda x: (x > 0) & (x <= 1)),
    "min_p": (torch.float32, "in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
    "repetition_penalty": (torch.float32, "finite and > 0", lambda x: (x > 0) & (x < math.inf)),
}
# The range of each setting in a tensor. The kernels compute with temperatures of at most 1e30.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
_RANGES = {
    "temperature": (0.0, 1e30),
    "top_k": (1, 2**31 - 1),
    "top_p": (_SMALLEST, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (_SMALLEST, _LARGEST),
}


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    repetition_penalty: float | Tensor = 1.0,
    seen: Tensor | None = None,
    mark_seen: bool = False,
    keys: Tensor | None = None,
    positions: Tensor | None = None,
    slots: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sample one token for every row of logits.

    The filters apply in this order: repetition penalty (Keskar et al. 2019) of the tokens in `seen`, temperature,
    top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). Tokens with equal logits are kept or dropped
    together. Temperature 0, or top-k 1, is greedy: it takes the lowest index of the largest logit.

    A setting given as a number applies to every row. Everything that belongs to one row lies in tensors with one entry
    per slot, S slots in all; row r uses the entry `slots[r]`. Without `slots`, S = R and row r uses entry r. The noise
    is a function of key, position and token alone, so a row's result does not depend on the other rows.

    Args:
        logits: (R, V), floating-point, V < 2^21.
        temperature: a number, or (S,) float32; finite and >= 0.
        top_k: keeps the logits >= the k-th largest. An int >= 1, (S,) int32 where <= 0 is off, or None (off).
        top_p: in (0, 1]: keeps the fewest values whose tokens hold `top_p` of what top-k keeps. A number, (S,) float32,
            or None (off).
        min_p: in [0, 1]; a number, (S,) float32, or None (off).
        repetition_penalty: finite and > 0; a number, or (S,) float32. 1 is off.
        seen: (S, V) bool or uint8, the tokens that the penalty applies to.
        mark_seen: mark the chosen token in `seen`.
        keys: (S, 2) int64 or int32, from `row_keys`. Greedy sampling needs none.
        positions: (S,) int32, the number of tokens before the one to choose. Greedy sampling needs none.
        slots: (R,) int32, the slot of each row.
        out: (ids (S,) int64 or int32, log-probabilities (S,) float32), to be written at `slots` and returned. With
            `out`, and every setting a tensor, the Triton backend allocates nothing.
        backend: the backend, or "auto".

    Returns:
        The ids (R,) int64 and their log-probabilities (R,) float32, or `out` if it was given. The log-probabilities are
        those of softmax(logits) before penalty, temperature and filters. A row that contains NaN or +inf, or only -inf,
        gives id 0 and NaN.

    Raises:
        ValueError: Arguments do not go together, or the backend cannot be used. Values of tensors are checked on a CPU
            only.

    Notes:
        Every accepted setting has a defined result, which is the same on every backend. A temperature above 1e30 counts
        as 1e30, and one that float32 rounds to 0 is greedy. However small top_p is, the largest logit stays. Where the
        penalty makes the largest logit infinite, the first of the largest is chosen.
    """
    if logits.dim() != 2 or not logits.is_floating_point() or not 0 < logits.shape[1] < _LIMIT:
        raise ValueError(f"{_NAME}: logits must be floating-point (R, V), 0 < V < 2^21; got {describe(logits)}")
    if backend == "auto" and logits.device.type == "cpu" and torch.compiler.is_compiling():
        backend = "torch"  # the compiler does not see into the native backend
    size = (logits.shape[1], logits.dtype)
    chosen = choose_backend(_NAME, logits.device, backend, lambda: only_float32(logits.dtype), size)
    R = len(logits)
    numbers: dict[str, float | Tensor | None] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    given = {name: t for name, t in numbers.items() if isinstance(t, Tensor)}
    state = {"keys": keys, "positions": positions, "seen": seen}
    if out is not None:
        state |= {"out[0]": out[0], "out[1]": out[1]}
    given |= {name: t for name, t in state.items() if t is not None}
    num_slots = R if slots is None or not given else next(iter(given.values())).shape[0]
    _check_state(given, slots, logits, num_slots)
    settings = {name: _setting(name, value, logits, num_slots) for name, value in numbers.items()}
    penalty = settings.pop("repetition_penalty")
    if seen is None and (penalty is not None or mark_seen):
        raise ValueError(f"{_NAME}: a repetition penalty and mark_seen need `seen` (S, V); got None")
    if settings["temperature"] is None or (isinstance(top_k, int) and top_k == 1):
        settings = dict.fromkeys(settings)
    elif keys is None or positions is None:
        raise ValueError(f"{_NAME}: a temperature above 0 needs `keys` (S, 2) and `positions` (S,); got None")
    ids, logprobs = out or (
        torch.empty(num_slots, dtype=torch.int64, device=logits.device),
        torch.empty(num_slots, dtype=torch.float32, device=logits.device),
    )
    settings |= {"keys": keys, "positions": positions, "penalty": penalty}
    run_operator(_NAME, chosen, backend, logits.device, size, logits, ids, logprobs, slots, settings, seen, mark_seen)
    if out is not None or slots is None:
        return ids, logprobs
    return ids[slots], logprobs[slots]


def _setting(name: str, value: float | Tensor | None, logits: Tensor, num_slots: int) -> Tensor | None:
    """The setting as a tensor (S,), or None if it has no effect."""
    dtype, needed, is_valid = _SETTINGS[name]
    if value is None:
        if name in ("temperature", "repetition_penalty"):
            raise ValueError(f"{_NAME}: {name} must be a number or a tensor; got None")
        return None
    if isinstance(value, Tensor):
        looks = value.device.type == "cpu" and not torch.compiler.is_compiling() and name != "top_k"
        if looks and not is_valid(value).all():
            raise ValueError(f"{_NAME}: {name} must be {needed}; got {value[~is_valid(value)][0].item()}")
        return value
    kinds = int if name == "top_k" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not is_valid(value):
        kind = "an int " if name == "top_k" else ""
        raise ValueError(f"{_NAME}: {name} must be {kind}{needed}; got {value!r}")
    off = {"temperature": value == 0, "top_k": value >= logits.shape[1], "top_p": value == 1, "min_p": value == 0}
    if off.get(name, value == 1):
        return None
    return torch.full((num_slots,), in_range(name, value), dtype=dtype, device=logits.device)


def in_range(name: str, value: float) -> float:
    """Clamp a sampling setting to the range that a tensor passed to `sample` can hold."""
    low, high = _RANGES[name]
    return min(max(value, low), high)


def _check_state(given: dict[str, Tensor], slots: Tensor | None, logits: Tensor, num_slots: int) -> None:
    """Check the shape, dtype and device of `slots` and of every tensor that has an entry per slot."""
    R, V = logits.shape
    int_types = (torch.int64, torch.int32)
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "keys": ((num_slots, 2), int_types),
        "positions": ((num_slots,), (torch.int32,)),
        "seen": ((num_slots, V), (torch.bool, torch.uint8)),
        "out[0]": ((num_slots,), int_types),
        "out[1]": ((num_slots,), (torch.float32,)),
        "slots": ((R,), (torch.int32,)),
        **{name: ((num_slots,), (dtype,)) for name, (dtype, _, _) in _SETTINGS.items()},
    }
    tensors = given if slots is None else {**given, "slots": slots}
    for name, tensor in tensors.items():
        shape, dtypes = expected[name]
        is_dense = tensor.stride(-1) == 1 if name == "seen" else tensor.is_contiguous()
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not is_dense:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{_NAME}: {name} must be {kinds} of shape {shape}, dense; got {describe(tensor)}")
    check_same(_NAME, check_dtype=False, logits=logits, **{name.replace("[", "_"): t for name, t in tensors.items()})
    if slots is not None and slots.device.type == "cpu" and not torch.compiler.is_compiling():
        is_bad = (slots < 0) | (slots >= num_slots)
        if is_bad.any():
            raise ValueError(f"{_NAME}: slots must be in [0, {num_slots}); got {slots[is_bad][0].item()}")


def row_keys(seed: int, prompts: Sequence[int], samples: Sequence[int]) -> Tensor:
    """The keys that `sample` draws its noise with, for sample `samples[i]` of prompt `prompts[i]`.

    Each key is words 0 and 1 of one call of Philox 4x32-7 with the key `seed` and the counter (sample, prompt, 1).

    Args:
        seed: in [0, 2^64).
        prompts: N numbers in [0, 2^64).
        samples: N numbers in [0, 2^32).

    Returns:
        The keys (N, 2) int64, on the CPU.

    Raises:
        ValueError: A number is out of range, or `prompts` and `samples` differ in length.
    """
    if len(prompts) != len(samples):
        raise ValueError(
            f"row_keys: prompts and samples must have the same length; got {len(prompts)} and {len(samples)}"
        )
    for what, numbers, bits in (("seed", [seed], 64), ("prompts", prompts, 64), ("samples", samples, 32)):
        if not all(0 <= number < 2**bits for number in numbers):
            raise ValueError(f"row_keys: {what} must be in [0, 2^{bits}); got {[*numbers][:4]}")
    counters = [[sample, prompt & _WORD, prompt >> 32, 1] for prompt, sample in zip(prompts, samples, strict=True)]
    c0, c1, c2, c3 = torch.tensor(counters, dtype=torch.int64).view(-1, 4).unbind(1)
    return torch.stack(reference.philox(c0, c1, c2, c3, seed & _WORD, seed >> 32)[:2], 1)
