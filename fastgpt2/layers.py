"""The modules of a GPT-2: linear layers, layer norm, blocks.

Parameters have Hugging Face's names. The weights of linear layers are (out, in), as in `torch.nn.Linear`; Hugging
Face's Conv1D stores them as (in, out).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt2.config import GPT2Config
from fastgpt2.operators import Attend, Operators

_DEFAULT_OPERATORS = Operators()


class Linear(nn.Linear):
    """activation(x weight^T + bias): x (..., in), weight (out, in) -> (..., out)."""

    def reset_parameters(self) -> None:
        """Do nothing: the model's `init_weights` initializes every weight."""

    def forward(self, x: Tensor, operators: Operators = _DEFAULT_OPERATORS, *, activation: str = "linear") -> Tensor:
        """Return activation(x weight^T + bias), (..., out)."""
        return operators.linear(x, self.weight, self.bias, activation=activation)


def apply_linear(layer: nn.Module, x: Tensor, operators: Operators) -> Tensor:
    """Call a linear layer. A module that replaced a `Linear`, such as an adapter, is called without operators."""
    return layer(x, operators) if isinstance(layer, Linear) else layer(x)


class LayerNorm(nn.Module):
    """LayerNorm with a weight and a bias, optionally fused with the addition of a residual."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(
        self, x: Tensor, operators: Operators = _DEFAULT_OPERATORS, *, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return LayerNorm(x); with `residual`, return (LayerNorm(x + residual), x + residual)."""
        return operators.layer_norm(x, self.weight, self.bias, self.eps, residual)


class XIELU(nn.Module):
    """xIELU (Huang and Schlag 2024), an activation with two learned slopes. Parameters have transformers' names."""

    def __init__(self, alpha_p: float = 0.8, alpha_n: float = 0.8, beta: float = 0.5, eps: float = -1e-6) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.tensor([math.log(math.expm1(alpha_p))]))
        self.alpha_n = nn.Parameter(torch.tensor([math.log(math.expm1(alpha_n - beta))]))
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("eps", torch.tensor(eps))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to each element of x."""
        beta, eps = self.get_buffer("beta"), self.get_buffer("eps")
        slope_p, slope_n = F.softplus(self.alpha_p), beta + F.softplus(self.alpha_n)
        negative = (torch.expm1(torch.minimum(x, eps)) - x) * slope_n + beta * x
        return torch.where(x > 0, slope_p * x * x + beta * x, negative)


class Attention(nn.Module):
    """The packed QKV projection and the output projection. Attention itself is an operator that `Block` is given."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_attn = Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = Linear(config.hidden_size, config.hidden_size)


class MLP(nn.Module):
    """Linear, activation, linear. A plain activation is fused into the first linear layer."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.hidden_size, config.inner_dim)
        self.c_proj = Linear(config.inner_dim, config.hidden_size)
        learned = {"prelu": nn.PReLU, "xielu": XIELU}.get(config.activation_function)
        self.act = learned() if learned else None
        self.activation_name = "linear" if learned else config.activation_function

    def forward(self, x: Tensor, operators: Operators) -> Tensor:
        """Map hidden states (..., C) to (..., C)."""
        if isinstance(self.c_fc, Linear):
            x = self.c_fc(x, operators, activation=self.activation_name)
        else:
            x = operators.activation(self.c_fc(x), self.activation_name)
        return apply_linear(self.c_proj, x if self.act is None else self.act(x), operators)


class Block(nn.Module):
    """A pre-LayerNorm block: x = x + attention(LN(x)), then x + MLP(LN(x)).

    With `recompute` the block keeps only its input for the backward pass, and computes its activations again there.
    """

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.layer = layer
        self.scale = config.attention_scale(layer)
        self.residual_dropout = config.residual_dropout
        self.recompute = False

    def forward(self, x: Tensor, attend: Attend, operators: Operators) -> Tensor:
        """Map hidden states (..., C) to (..., C); `attend` computes attention on the packed QKV."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(lambda x: self._compute(x, attend, operators), x, use_reentrant=False)
        return self._compute(x, attend, operators)

    def _compute(self, x: Tensor, attend: Attend, operators: Operators) -> Tensor:
        qkv = apply_linear(self.attn.c_attn, self.ln_1(x, operators), operators)
        y = apply_linear(self.attn.c_proj, attend(qkv, self.layer, self.scale), operators)
        y = operators.dropout(y, self.residual_dropout, self.training)
        y, x = self.ln_2(y, operators, residual=x)  # x is now the sum
        return x + operators.dropout(self.mlp(y, operators), self.residual_dropout, self.training)


class Transformer(nn.Module):
    """Token and position embeddings, the blocks, and the final LayerNorm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        # Left uninitialized: `init_weights` follows, and nn.Embedding's own initialization would be wasted.
        wte, wpe = (torch.empty(rows, config.hidden_size) for rows in (config.vocab_size, config.context_length))
        self.wte = nn.Embedding.from_pretrained(wte, freeze=False)
        self.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.embedding_dropout = config.embedding_dropout

    def forward(self, input_ids: Tensor, position_ids: Tensor, attend: Attend, operators: Operators) -> Tensor:
        """Return hidden states (..., C) of token ids (...). Training, prefill and decoding all run this."""
        x = self.wte(input_ids) + self.wpe(position_ids)
        x = operators.dropout(x, self.embedding_dropout, self.training)
        for block in self.h:
            x = block(x, attend, operators)
        return self.ln_f(x, operators)
