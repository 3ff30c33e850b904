"""A reimplementation of nanoGPT's model and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.selfcheck.models import draw_parameters
from tests.helpers import random_ids


class NanoBlock(torch.nn.Module):
    """A block with the names and the maths of nanoGPT's (github.com/karpathy/nanoGPT, model.py)."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = torch.nn.LayerNorm(width, bias=bias)
        self.attn = torch.nn.ModuleDict(
            {"c_attn": torch.nn.Linear(width, 3 * width, bias), "c_proj": torch.nn.Linear(width, width, bias)}
        )
        self.ln_2 = torch.nn.LayerNorm(width, bias=bias)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, 4 * width, bias), "c_proj": torch.nn.Linear(4 * width, width, bias)}
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in qkv)
        scores = (q @ k.transpose(-2, -1)) * (C // self.heads) ** -0.5
        scores = scores.masked_fill(torch.ones(T, T).tril() == 0, float("-inf"))
        x = x + self.attn["c_proj"]((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp["c_proj"](torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(torch.nn.Module):
    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        width, bias = args["n_embd"], args["bias"]
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(args["vocab_size"], width),
                "wpe": torch.nn.Embedding(args["block_size"], width),
                "h": torch.nn.ModuleList(NanoBlock(width, args["n_head"], bias) for _ in range(args["n_layer"])),
                "ln_f": torch.nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = torch.nn.Linear(width, args["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def nano_checkpoint(path: Path, seed: int, *, bias: bool = True, prefix: str = "", vocab_size: int = 61) -> NanoGPT:
    """Write a ckpt.pt as nanoGPT's train.py does, and return the model."""
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": vocab_size}
    args = {**sizes, "bias": bias, "dropout": 0.1}
    nano = NanoGPT(args)
    draw_parameters(nano, seed)
    optimizer = torch.optim.AdamW(nano.parameters())
    nano(random_ids(seed, 2, 5)).square().mean().backward()
    optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "model": {prefix + name: tensor for name, tensor in nano.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "model_args": args,
            "iter_num": 7,
            "best_val_loss": torch.tensor(3.2),
            "config": {"dataset": "text", "device": "cpu"},
        },
        path,
    )
    return nano.eval()
