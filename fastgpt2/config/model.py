"""`GPT2Config`, the sizes and the maths of a model, and presets of published models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastgpt2.config.checks import is_int, is_number, require
from fastgpt2.config.huggingface import OPENAI_IDS, fields_from_hf, fields_to_hf
from fastgpt2.messages import shown
from fastgpt2_kernels.ops import ACTIVATIONS

# Activations with learned weights are modules of the model (layers.py). The others are plain functions.
LEARNED_ACTIVATIONS = ("prelu", "xielu")


# With this limit a tensor of any two sizes has fewer than 2**62 elements, which PyTorch can count.
MAX_SIZE = 2**31 - 1
# Building a layer takes time even on the meta device, and refusing a damaged file must not take hours.
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class GPT2Config:
    """The sizes and the maths of a GPT-2. The defaults are GPT-2 small (Radford et al. 2019).

    The fields from `activation_function` on have the same meaning as in transformers' `GPT2Config`, where the dropouts
    are called `resid_pdrop`, `embd_pdrop` and `attn_pdrop`.

    Args:
        vocab_size: The number V of tokens in the vocabulary.
        context_length: The most tokens of a sequence.
        hidden_size: The width C.
        num_layers: The number L of blocks.
        num_heads: The number H of attention heads; `hidden_size` must be a multiple of it.
        feedforward_dim: The width of the MLP, or None for 4 x `hidden_size`.
        activation_function: The MLP's activation, by transformers' name.
        residual_dropout: The probability with which outputs of attention and MLP are dropped in training.
        embedding_dropout: The same for the embeddings.
        attention_dropout: The same for attention weights.
        layer_norm_epsilon: The number that LayerNorm adds to the variance.
        initializer_range: The standard deviation of new weights.
        scale_attn_weights: Whether attention scores are divided by the square root of the head size.
        scale_attn_by_inverse_layer_idx: Whether attention scores of layer i (from 0) are also divided by i + 1.
        reorder_and_upcast_attn: Whether half-precision models compute attention scores and softmax in float32.
        tie_word_embeddings: Whether the head shares the token embeddings' weight.
        bos_token_id: The token that is used for an empty prompt, or None.
        eos_token_id: The token or tokens that end a sample, or None.
        pad_token_id: The padding token, or None.

    Raises:
        ValueError: A value is out of range, or `hidden_size` is not a multiple of `num_heads`.

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
                is_number(value) and 0 < value < float("inf"),
                f"GPT2Config: {name} must be a positive number; got {shown(value)}",
            )
        require(
            isinstance(self.activation_function, str)
            and self.activation_function in (*ACTIVATIONS, *LEARNED_ACTIVATIONS),
            f"GPT2Config: activation_function must be one of {sorted((*ACTIVATIONS, *LEARNED_ACTIVATIONS))}; "
            f"got {shown(self.activation_function)}",
        )
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, tuple) else (value,)
            require(
                value is None or all(is_int(token) for token in ids),
                f"GPT2Config: {name} must be a token id or None; got {shown(value)}",
            )

    @property
    def head_dim(self) -> int:
        """The size D of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def inner_dim(self) -> int:
        """The width of the MLP."""
        return self.feedforward_dim if self.feedforward_dim is not None else 4 * self.hidden_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text ids as a tuple, empty if the model has none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def attention_scale(self, layer: int) -> float:
        """The factor that q k^T is multiplied by in this layer, counted from 0."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def replace(self, **changes: Any) -> GPT2Config:
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)

    # -- presets ------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPT2Config:
        """The configuration of a published model.

        Args:
            name: The preset's name, such as "gpt2-medium".
            changes: Fields to override.

        Raises:
            ValueError: There is no such preset, or a field is out of range.

        Example:
            >>> GPT2Config.preset("gpt2-medium").hidden_size
            1024
        """
        if name not in PRESETS:
            raise ValueError(f"GPT2Config: no preset {shown(name)}; there are {', '.join(PRESETS)}")
        return cls(**{**OPENAI_IDS, **PRESETS[name], **changes})

    # -- Hugging Face -------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> GPT2Config:
        """Build a configuration from the contents of transformers' `config.json`.

        Args:
            hf: The contents of the file.

        Raises:
            ValueError: The file sets a field that is not supported and would change what the model computes.
        """
        return cls(**fields_from_hf(hf))

    def to_hf(self) -> dict[str, Any]:
        """The contents of the `config.json` from which transformers' GPT2LMHeadModel builds the same model."""
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
