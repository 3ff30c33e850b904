"""Arithmetic and bytes of a GPT-2, and what a device can do: the numbers behind MFU and the benchmarks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt2.config import GPT2Config

# Dense matrix-multiply peaks in TFLOP/s of 16-bit floats with float32 accumulation, from the vendors' data sheets.
# The first name found in the device's name counts.
_PEAK_TFLOPS_16BIT = {
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A40": 149.7,
    "A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
    "MI325X": 1307.0,
    "MI300X": 1307.0,
    "MI250X": 383.0,
}


def matmul_parameters(config: GPT2Config) -> int:
    """Weights that every token is multiplied by: the blocks' matrices and the head, not the embedding look-ups."""
    C, inner = config.hidden_size, config.inner_dim
    return config.num_layers * (4 * C * C + 2 * C * inner) + config.vocab_size * C


def forward_flops_per_token(config: GPT2Config, num_tokens: int) -> float:
    """FLOPs of one token's forward pass in a sequence of `num_tokens`: 2 a weight, and attention.

    Attention counts every query against every key (4 T C a layer), as PaLM's appendix B and nanoGPT do, though a causal
    kernel does half of it: MFU figures then compare with published ones.
    """
    return 2.0 * matmul_parameters(config) + 4.0 * config.num_layers * config.hidden_size * num_tokens


def training_flops_per_token(config: GPT2Config, num_tokens: int, *, frozen: bool = False) -> float:
    """FLOPs of one token's forward and backward pass: 3 x the forward's, 6 N + 12 L C T.

    frozen: the weights have no gradients, as beside adapters: 2 N less. The adapters' own are not counted.
    """
    gradients = 2.0 * matmul_parameters(config) if frozen else 0.0
    return 3.0 * forward_flops_per_token(config, num_tokens) - gradients


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of one process of a training run, activations left out.

    Args:
        weights: float32 parameters, its own share.
        gradients: their gradients.
        optimizer: AdamW's two averages.
        passing: what it holds for a while: DDP's buckets of gradients; of FSDP the weights and gradients of the
            embeddings, which stay gathered, the weights of two blocks and the gradients of one.
        sent: what it sends in a step, and receives, by rings.
    """

    weights: float
    gradients: float
    optimizer: float
    passing: float
    sent: float

    @property
    def held(self) -> float:
        """What it holds from step to step, and in a step's gradients."""
        return self.weights + self.gradients + self.optimizer


def training_bytes(
    config: GPT2Config, processes: int = 1, *, parallel: str = "ddp", accumulate: int = 1
) -> TrainingBytes:
    """Memory and messages of each of several processes that train a model with AdamW.

    Args:
        parallel: as in `TrainConfig`. "fsdp" gathers a block's weights in the forward and again in the backward pass,
            and sums gradients up in every micro-batch.
        accumulate: micro-batches of a step.

    Returns:
        The bytes. A share of a weight whose rows are no multiple of `processes` may be a row more.
    """
    C, inner, L = config.hidden_size, config.inner_dim, config.num_layers
    learned = {"prelu": 1, "xielu": 2}.get(config.activation_function, 0)
    block = 4 * (4 * C * C + 2 * C * inner + 9 * C + inner + learned)
    heads = 1 if config.tie_word_embeddings else 2
    rest = 4 * (heads * config.vocab_size * C + config.context_length * C + 2 * C)
    model = float(L * block + rest)
    ring = (processes - 1) / processes
    if parallel == "ddp":
        return TrainingBytes(model, model, 2 * model, model if processes > 1 else 0.0, 2 * ring * model)
    share = model / processes
    passing = 2.0 * rest + 3.0 * block
    return TrainingBytes(share, share, 2 * share, passing, accumulate * ring * (2 * L * block + rest + model))


def weight_bytes(config: GPT2Config, dtype: torch.dtype) -> int:
    """Bytes of weights that one decoding step reads, whatever the batch."""
    return matmul_parameters(config) * dtype.itemsize


def cache_bytes_per_token(config: GPT2Config, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token holds in the cache."""
    return 2 * config.num_layers * config.hidden_size * dtype.itemsize


@functools.cache
def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """Matrix-multiply FLOP/s of a device: the data sheet's where it is known for `dtype`, else measured here."""
    device = torch.device(device)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for part, tflops in _PEAK_TFLOPS_16BIT.items():
            if part in name:
                return tflops * 1e12
    return measured_matmul_flops(device, dtype)


def measured_matmul_flops(device: torch.device | str, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of the best of `repeats` square matrix products in `dtype` (after one to warm up)."""
    device = torch.device(device)
    size = 4096 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best_s = float("inf")
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - start)
    return 2.0 * size**3 / best_s


def measured_bandwidth(device: torch.device | str, repeats: int = 5) -> float:
    """Bytes a second of the best of `repeats` copies (read and written) or sums (read) of more than any cache holds."""
    device = torch.device(device)
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    num_bytes = source.numel() * source.element_size()
    best = 0.0
    for _ in range(repeats + 1):
        for moved, run in ((2 * num_bytes, lambda: target.copy_(source)), (num_bytes, source.sum)):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            best = max(best, moved / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


FLUSH_BYTES = 256 * 2**20  # more than any GPU's second-level cache


def wall_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call by the wall clock, the host's work included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def gpu_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """A GPU's own time of one call with a cold cache; writing the cache full also gives the host its head start."""
    total = 0.0
    with torch.cuda.device(device):
        for _ in range(min(repeats, 10)):
            _flush_buffer(device).zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end) * 1e-3
    return total / min(repeats, 10)


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
