"""The shape and maths of a model: `GPT2Config`, and those of published models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastgpt2.config.checks import is_int, require
from fastgpt2.config.huggingface import OPENAI_IDS, fields_from_hf, fields_to_hf
from fastgpt2.messages import shown
from fastgpt2_kernels.ops import ACTIVATIONS

# Activations with weights of their own are modules of the model (layers.py), the others are plain functions.
LEARNED_ACTIVATIONS = ("prelu", "xielu")


# Tensors of any two sizes then have fewer than 2**62 elements, as PyTorch counts them.
MAX_SIZE = 2**31 - 1
# Building a layer takes time even without memory for its weights: a damaged file must not take hours to be refused.
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class GPT2Config:
    """The sizes and the maths of a GPT-2. The defaults are GPT-2 small (Radford et al. 2019).

    The fields from `activation_function` on mean what they mean in transformers' `GPT2Config`, where the dropouts are
    called `resid_pdrop`, `embd_pdrop` and `attn_pdrop`.

    Args:
        vocab_size: the number V of tokens.
        context_length: the most tokens of a sequence.
        hidden_size: the width C.
        num_layers: the number L of blocks.
        num_heads: the number H of attention heads; `hidden_size` must be a multiple of it.
        feedforward_dim: the width of the MLP, or None for 4 x `hidden_size`.
        activation_function: one of transformers' names.
        residual_dropout: the probability with which an output of attention or MLP is dropped in training.
        embedding_dropout: the same for the embeddings.
        attention_dropout: the same for attention weights.
        layer_norm_epsilon: what LayerNorm adds to the variance.
        initializer_range: the standard deviation of new weights.
        scale_attn_weights: whether scores are divided by the root of the head size.
        scale_attn_by_inverse_layer_idx: whether scores of layer i (from 0) are also divided by i + 1.
        reorder_and_upcast_attn: whether scores and softmax of half precision are computed in float32.
        tie_word_embeddings: whether the head shares the weight of the token embeddings.
        bos_token_id: the token that stands for an empty prompt, or None.
        eos_token_id: the token, or tokens, that end a sample; None if there is none.
        pad_token_id: the padding token, or None.

    Raises:
        ValueError: A value is out of its range, or `hidden_size` is no multiple of `num_heads`.

    Example:
        >>> GPT2Config(hidden_size=64, num_heads=4).head_dim
        16
    """

    vocab_size: int = 50257
    context_length: int = 1024
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    feedforward_dim: int | None = None
    activation_function: str = "gelu_new"
    residual_dropout: float = 0.1
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "hidden_size", "num_layers", "num_heads"):
            value = getattr(self, name)
            most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
            require(is_int(value) and value > 0, f"GPT2Config: {name} must be a positive int; got {shown(value)}")
            require(value <= most, f"GPT2Config: {name} must be at most {most}; got {shown(value)}")
        if self.feedforward_dim is not None:
            given = self.feedforward_dim
            require(
                is_int(given) and given > 0,
                f"GPT2Config: feedforward_dim must be a positive int or None; got {shown(given)}",
            )
            require(given <= MAX_SIZE, f"GPT2Config: feedforward_dim must be at most {MAX_SIZE}; got {shown(given)}")
        require(
            self.hidden_size % self.num_heads == 0,
            f"GPT2Config: hidden_size must be a multiple of num_heads; got {self.hidden_size} and {self.num_heads}",
        )
        for name in ("residual_dropout", "embedding_dropout", "attention_dropout"):
            value = getattr(self, name)
            require(
                isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1,
                f"GPT2Config: {name} must be in [0, 1); got {shown(value)}",
            )
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            require(
                isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0,
                f"GPT2Config: {name} must be a positive number; got {shown(value)}",
            )
        require(
            self.activation_function in ACTIVATIONS or self.activation_function in LEARNED_ACTIVATIONS,
            f"GPT2Config: activation_function must be one of {sorted((*ACTIVATIONS, *LEARNED_ACTIVATIONS))}; "
            f"got {shown(self.activation_function)}",
        )
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def inner_dim(self) -> int:
        return self.feedforward_dim if self.feedforward_dim is not None else 4 * self.hidden_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text ids as a tuple, empty where the model has none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def attention_scale(self, layer: int) -> float:
        """What q k^T is multiplied by in layer `layer` (counted from 0)."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def replace(self, **changes: Any) -> GPT2Config:
        return dataclasses.replace(self, **changes)

    # -- presets ------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPT2Config:
        """A published model's configuration by its name, e.g. "gpt2-medium"; `changes` override its fields."""
        if name not in PRESETS:
            raise ValueError(f"GPT2Config: no preset {shown(name)}; there are {', '.join(PRESETS)}")
        return cls(**{**OPENAI_IDS, **PRESETS[name], **changes})

    # -- Hugging Face -------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> GPT2Config:
        """Read transformers' `config.json`. Raises ValueError for whatever would change the maths and is not here."""
        return cls(**fields_from_hf(hf))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers' GPT2LMHeadModel reads as this model."""
        return fields_to_hf(vars(self))


def _shape(layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"num_layers": layers, "hidden_size": hidden, "num_heads": heads, **more}


def _cerebras(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    # Cerebras-GPT (Dey et al. 2023): 2048 positions, exact GELU, no dropout.
    no_dropout = {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
    return _shape(layers, hidden, heads, context_length=2048, activation_function="gelu", **no_dropout)


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _shape(12, 768, 12),
    "gpt2-medium": _shape(24, 1024, 16),
    "gpt2-large": _shape(36, 1280, 20),
    "gpt2-xl": _shape(48, 1600, 25),
    "distilgpt2": _shape(6, 768, 12),
    "cerebras-gpt-111m": _cerebras(10, 768, 12),
    "cerebras-gpt-256m": _cerebras(14, 1088, 17),
    "cerebras-gpt-590m": _cerebras(18, 1536, 12),
    "cerebras-gpt-1.3b": _cerebras(24, 2048, 16),
    "cerebras-gpt-2.7b": _cerebras(32, 2560, 32),
    "cerebras-gpt-6.7b": _cerebras(32, 4096, 32),
    "cerebras-gpt-13b": _cerebras(40, 5120, 40),
}
