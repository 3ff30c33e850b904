"""FLOPs and bytes of a GPT-2, and the peak speeds of a device: the numbers behind MFU and the benchmarks."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt2.config import GPT2Config

# Peak TFLOP/s of dense 16-bit matrix products with float32 accumulation, from the vendors' data sheets. The first entry
# whose name occurs in the device's name is used.
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
    """Number of weights that every token is multiplied by: the blocks' matrices and the head, not the embeddings."""
    C, inner = config.hidden_size, config.inner_dim
    return config.num_layers * (4 * C * C + 2 * C * inner) + config.vocab_size * C


def forward_flops_per_token(config: GPT2Config, num_tokens: int) -> float:
    """FLOPs of one token's forward pass in a sequence of `num_tokens`: 2 per weight, plus attention.

    Attention is counted as every query against every key, 4 T C per layer. A causal kernel does half of that, but
    PaLM's appendix B and nanoGPT count this way too, so our MFU figures compare with published ones.
    """
    return 2.0 * matmul_parameters(config) + 4.0 * config.num_layers * config.hidden_size * num_tokens


def training_flops_per_token(config: GPT2Config, num_tokens: int, *, frozen: bool = False) -> float:
    """FLOPs of one token's forward and backward pass: three times the forward pass, 6 N + 12 L C T.

    Args:
        config: The model's configuration.
        num_tokens: The tokens of a sequence.
        frozen: Whether the weights have no gradients, as when adapters are trained. This saves 2 N. The adapters' own
            FLOPs are not counted.
    """
    gradients = 2.0 * matmul_parameters(config) if frozen else 0.0
    return 3.0 * forward_flops_per_token(config, num_tokens) - gradients


@dataclass(frozen=True)
class TrainingBytes:
    """Memory and traffic of one process of a training run, in bytes and without activations.

    Args:
        weights: The process's share of the float32 parameters.
        gradients: Their gradients.
        optimizer: AdamW's two averages.
        passing: Temporary memory. With DDP these are the buckets of gradients. With FSDP they are the weights and
            gradients of the embeddings, which stay gathered, the weights of two blocks and the gradients of one.
        sent: What it sends in a step by ring algorithms; it receives as much.
    """

    weights: float
    gradients: float
    optimizer: float
    passing: float
    sent: float

    @property
    def held(self) -> float:
        """The memory for weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


def training_bytes(
    config: GPT2Config, processes: int = 1, *, parallel: str = "ddp", accumulate: int = 1
) -> TrainingBytes:
    """Memory and traffic of each process that trains a model with AdamW.

    Args:
        config: The model's configuration.
        processes: The number of processes.
        parallel: As in `TrainConfig`. "fsdp" gathers a block's weights in the forward pass and again in the backward
            pass, and reduces gradients in every micro-batch.
        accumulate: Micro-batches per step.

    Returns:
        The bytes. The share of a weight may be one row larger if its rows are not a multiple of `processes`.
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
    """Bytes of weights that one decode step reads, at any batch size."""
    return matmul_parameters(config) * dtype.itemsize


def cache_bytes_per_token(config: GPT2Config, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take in the cache."""
    return 2 * config.num_layers * config.hidden_size * dtype.itemsize


@functools.cache
def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """Peak FLOP/s of a device's matrix products: from the data sheet where known for `dtype`, else measured here."""
    device = torch.device(device)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for part, tflops in _PEAK_TFLOPS_16BIT.items():
            if part in name:
                return tflops * 1e12
    return measured_matmul_flops(device, dtype)


def measured_matmul_flops(device: torch.device | str, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of a square matrix product in `dtype`: the best of a warm-up run and `repeats` runs.

    It ends after a second with the runs so far. A processor without bfloat16 instructions takes seconds for one.
    """
    device = torch.device(device)
    size = 4096 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best_s, total_s = float("inf"), 0.0
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        run_s = time.perf_counter() - start
        best_s, total_s = min(best_s, run_s), total_s + run_s
        if total_s > 1:
            break
    return 2.0 * size**3 / best_s


def measured_bandwidth(device: torch.device | str, repeats: int = 5) -> float:
    """Memory bandwidth in bytes per second, measured on a buffer that is larger than any cache.

    The result is the best of `repeats` copies, which read and write the buffer, and sums, which only read it.
    """
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
    """Wait for a GPU's queued work; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


FLUSH_BYTES = 256 * 2**20  # larger than any GPU's L2 cache


def wall_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Wall-clock seconds per call, including the host's work."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


_MIN_HOLD, _MAX_HOLD = 100e-6, 50e-3  # seconds


def gpu_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """GPU seconds per call with a cold cache, excluding the host's work.

    Before each call a large buffer is zeroed, which flushes the cache. Then the GPU waits for longer than the host
    needs to queue the call, so that it never waits for the host while its time is taken. A call is measured again if
    the host needed longer than that. Only a call that itself waits for the GPU still contains the host's work.
    """
    total, count = 0.0, min(repeats, 10)
    with torch.cuda.device(device):
        synchronize(device)
        queued = _host_seconds(call)
        for _ in range(count):
            for _ in range(3):
                hold = min(max(2 * queued, _MIN_HOLD), _MAX_HOLD)
                _flush_buffer(device).zero_()
                torch.cuda._sleep(math.ceil(hold * _cycles_per_second(device)))
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                queued = _host_seconds(start.record, call, end.record)
                end.synchronize()
                if queued <= hold:
                    break
            total += start.elapsed_time(end) * 1e-3
    return total / count


def _host_seconds(*calls: Callable[[], Any]) -> float:
    """The time until the calls return. The GPU may be at work for longer."""
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


@functools.cache
def _cycles_per_second(device: torch.device) -> float:
    """The rate of the clock that `torch.cuda._sleep` counts."""
    cycles, seconds = 2_000_000, 0.0
    for _ in range(2):  # the first time also loads the kernel
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) * 1e-3
    return cycles / seconds


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
