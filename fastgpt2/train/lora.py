"""LoRA adapters (Hu et al. 2021), made by peft: small matrices beside those of the blocks. Only they are trained."""

from __future__ import annotations

import torch

from fastgpt2.gpt2 import GPT2

_TARGETS = ["c_attn", "c_fc", "c_proj"]


def check_lora() -> None:
    """Raise ImportError if peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError('lora_rank needs peft; install it with: pip install "fastgpt2[lora]"') from error


def add_adapters(model: GPT2, rank: int, alpha: float | None, seed: int) -> None:
    """Put adapters on the blocks' matrices, and freeze everything else."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)  # the same adapters in every process
    alpha = 2.0 * rank if alpha is None else alpha
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=_TARGETS), model)


def merge_adapters(model: GPT2) -> None:
    """Add the adapters to the weights and remove them. The plain GPT-2 that is left computes the same."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
