"""What an optimizer step depends on: the optimizers, their learning rate and weight decay, and the precision."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastgpt2.config import TrainConfig
from fastgpt2.devices import why_not_bfloat16

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then half a cosine down to `min_lr`."""
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    warmup = min(config.warmup_steps, config.steps // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, config.steps - 1 - warmup))
    return low + 0.5 * (config.lr - low) * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW, as in GPT-2 and nanoGPT: only matrices decay, biases and LayerNorm weights do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizers(model: nn.Module, config: TrainConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW alone; or, if `config` names Muon, AdamW followed by Muon for the matrices of the blocks.

    Muon's steps are scaled to the size of AdamW's (Liu et al. 2025), so that one learning rate serves both.
    """
    groups, hidden = parameter_groups(model, config.weight_decay), []
    if config.optimizer == "muon":
        hidden = [p for n, p in model.named_parameters() if ".h." in n and p.dim() == 2 and p.requires_grad]
        ids = {id(p) for p in hidden}
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in ids]
    adamw = torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=device.type in ("cpu", "cuda")
    )
    if not hidden:
        return [adamw]
    muon = torch.optim.Muon(hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def check_optimizer(name: str) -> None:
    """Raise ImportError if this PyTorch does not have the optimizer."""
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ImportError(f"optimizer 'muon' needs PyTorch 2.9 or newer; this is {torch.__version__}: upgrade it")


def resolve_dtype(name: str, device: torch.device) -> str:
    """Resolve "auto" for a device: the half precision that it computes fast, or else fp32.

    Raises:
        ValueError: The dtype is "bf16" and the GPU does not support bfloat16.
    """
    reason = why_not_bfloat16(device)
    if name == "bf16" and reason is not None:
        raise ValueError(f"training: dtype 'bf16' cannot be used: {reason}; use 'fp16' or 'fp32'")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if reason is None else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
