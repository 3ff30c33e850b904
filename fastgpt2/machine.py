"""Facts about this machine (versions, processor, GPU, driver) for `fastgpt2 info`, `fastgpt2 check` and bug reports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastgpt2_kernels import ops


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of the packages it runs on."""
    optional = ("triton", "transformers", "tokenizers", "safetensors", "huggingface_hub")
    return {
        "fastgpt2": _installed("fastgpt2"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _installed(name) for name in optional},
    }


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # PyTorch builds its own Triton under other names (triton-rocm, pytorch-triton).
        return "installed" if importlib.util.find_spec(name) else "not installed"


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """The machine's platform, GPU, driver and processor. The GPU is `device`, or by default the current one."""
    found: dict[str, Any] = {"platform": platform.platform()}
    if torch.cuda.is_available():
        index = torch.cuda.current_device() if device is None or device.index is None else device.index
        properties = torch.cuda.get_device_properties(index)
        found["gpu"] = torch.cuda.get_device_name(index)
        found["gpu_capability"] = ".".join(map(str, torch.cuda.get_device_capability(index)))
        found["gpu_memory"] = properties.total_memory
        found["gpu_runtime"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
        found["gpu_driver"] = _driver()
    else:
        found["gpu"] = None
    found["cpu"] = processor()
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    found["cpu_threads"] = torch.get_num_threads()
    found["cpu_native"] = ops.why_not_native("decode_step", "cpu") or f"{ops.native_isa()} instructions"
    return found


def free_memory(device: torch.device) -> int | None:
    """The bytes of memory that a process can still allocate on the device; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    found = []
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            found += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass
    try:  # a container's own limit
        limit, used = (
            Path("/sys/fs/cgroup", f"memory.{name}").read_text(encoding="utf-8") for name in ("max", "current")
        )
        found.append(max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # there is none, or it is "max"
        pass
    return min(found, default=None)


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()


def _driver() -> str:
    """The version of NVIDIA's driver, or "unknown" if nvidia-smi does not report it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]
