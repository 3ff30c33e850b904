"""Show versions, the device, the backend of every operator and the reason for it, and a model's configuration."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch

from fastgpt2 import machine
from fastgpt2.checkpoint import EMBEDDED, read_config
from fastgpt2.config import GPT2Config
from fastgpt2.gpt2 import GPT2
from fastgpt2_kernels import ops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="NAME",
        help="a checkpoint's folder, file or name on the hub (default: %(default)s)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    info = {
        "versions": machine.versions(),
        "device": machine.describe(),
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
        if title == "operators":
            for name, reason in _reasons(section):
                print(f"  {name} is not used: {reason}")
    return 0


def _operators(device: str) -> dict[str, dict[str, Any]]:
    """For every operator: the backend that "auto" selects here, all its backends, and why some of them cannot run."""
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


def _reasons(operators: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """(backend, why it is not used), each pair once: most operators have the same ones."""
    pairs = [(name, reason) for operator in operators.values() for name, reason in operator.items()]
    start = "why_not_"
    return list(dict.fromkeys((name.removeprefix(start), reason) for name, reason in pairs if name.startswith(start)))


def _model(config: GPT2Config) -> dict[str, Any]:
    with torch.device("meta"):
        parameters = GPT2(config).num_parameters()
    return {"parameters": parameters, **dataclasses.asdict(config)}


def _text(value: Any) -> str:
    if isinstance(value, dict):  # an operator
        return f"{value['backend'] or 'none'} (backends: {', '.join(value['backends'])})"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else "none"
        if value is None
        else str(value)
    )
