"""Show the versions, the device, the backend of every operator and why, and the configuration of a model."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
from typing import Any

import torch

import fastgpt2
from fastgpt2.checkpoint import EMBEDDED, read_config
from fastgpt2.config import GPT2Config
from fastgpt2.gpt2 import GPT2
from fastgpt2_kernels import ops

HELP = "show versions, backends and a model's configuration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=EMBEDDED, metavar="NAME", help="a checkpoint's folder, file or name on the hub; %(default)s"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    info = {
        "versions": _versions(),
        "device": _device(),
        "operators": _operators("cuda" if torch.cuda.is_available() else "cpu"),
        "model": {"name": args.model, **_model(read_config(args.model, revision=args.revision))},
    }
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    for title, section in info.items():
        print(title)
        width = max(map(len, section))
        for name, value in section.items():
            print(f"  {name:<{width}}  {_text(value)}")
    return 0


def _versions() -> dict[str, str]:
    optional = ("triton", "transformers", "tokenizers", "safetensors", "huggingface_hub")
    return {
        "fastgpt2": fastgpt2.__version__,
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


def _device() -> dict[str, Any]:
    device: dict[str, Any] = {"platform": platform.platform()}
    if torch.cuda.is_available():
        device["gpu"] = torch.cuda.get_device_name()
        device["gpu_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    else:
        device["gpu"] = None
    device["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    device["cpu_threads"] = torch.get_num_threads()
    device["cpu_native"] = ops.why_not_native("decode_step", "cpu") or f"{ops.native_isa()} instructions"
    return device


def _operators(device: str) -> dict[str, dict[str, Any]]:
    """For every operator the backend that "auto" is on this machine, those that it has, and why it is not another."""
    operators: dict[str, dict[str, Any]] = {}
    for operator in ops.OPERATORS:
        backends = ops.backends_of(operator)
        reasons = {"triton": ops.why_not_triton(operator, device), "native": ops.why_not_native(operator, device)}
        usable = [name for name in backends if reasons.get(name) is None]
        operators[operator] = {"backend": usable[0] if usable else None, "backends": backends}
        for name, reason in reasons.items():
            if name in backends and reason is not None:
                operators[operator][f"why_not_{name}"] = reason
    return operators


def _model(config: GPT2Config) -> dict[str, Any]:
    with torch.device("meta"):
        parameters = GPT2(config).num_parameters()
    return {"parameters": parameters, **dataclasses.asdict(config)}


def _text(value: Any) -> str:
    if isinstance(value, dict):  # an operator
        reasons = [reason for name, reason in value.items() if name.startswith("why_not_")]
        chosen = value["backend"] or "none"
        return f"{chosen}, of {' and '.join(value['backends'])}" + (f" ({'; '.join(reasons)})" if reasons else "")
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else "none"
        if value is None
        else str(value)
    )
