"""The public model: the network of model.py with checkpoints and generation."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from fastgpt2.decode import drop_sessions
from fastgpt2.formats.huggingface import save_pretrained
from fastgpt2.formats.load import load_model
from fastgpt2.formats.transformers import from_transformers, to_transformers
from fastgpt2.generate import (
    GenerateOptions,
    Prompts,
    Sample,
    TokenEvent,
    generate,
    generate_iter,
    lists_options,
    stream,
)
from fastgpt2.model import GPT2Base

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel
    from typing_extensions import Self, Unpack


class GPT2(GPT2Base):
    """GPT-2 language model: `model(input_ids)` maps (B, T) token ids to (B, T, V) logits.

    Build it from sizes, `GPT2(vocab_size=10000, hidden_size=256, num_layers=6, num_heads=8, feedforward_dim=1024,
    dropout_rate=0.1)`, from a configuration, `GPT2(GPT2Config(...))`, from a name, `GPT2.from_config("gpt2-medium")`,
    or from a checkpoint, `GPT2.from_pretrained("gpt2")`. `dropout_rate` sets the three dropouts of the configuration;
    any other keyword is a field of `GPT2Config`. `backend` chooses the kernels: "auto", "triton", "native" or
    "torch".
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        revision: str | None = None,
        **config_changes: Any,
    ) -> Self:
        """A model in eval mode from a folder, a file, a name on the Hugging Face hub, or "embedded".

        It reads Hugging Face folders (safetensors or pytorch_model.bin, whole or sharded), a single such file beside
        its config.json, and nanoGPT's `ckpt.pt` or the folder that holds it. nanoGPT models without biases get zero
        ones, which compute the same. `.tokenizer` is set where the folder has one.

        Args:
            dtype: of the weights; None keeps the dtype in which the file holds its token embeddings.
            revision: branch, tag or commit on the hub.
            config_changes: fields of `GPT2Config`. A `vocab_size` or `context_length` below the file's cuts the rows
                past it (nanoGPT pads its vocabulary to 50304).

        Raises:
            OSError: something cannot be found or read.
            ValueError: the contents do not fit; the error names keys and shapes.
            ImportError: a hub name without the extra, `pip install "fastgpt2[hub]"`.
        """
        return load_model(
            cls,
            name_or_path,
            dtype=dtype,
            device=device,
            backend=backend,
            revision=revision,
            config_changes=config_changes,
        )

    def train(self, mode: bool = True) -> Self:
        """Set the mode. Training mode frees what generation keeps for its next run: see `decode.drop_sessions`."""
        if mode:
            drop_sessions(self)
        return super().train(mode)

    @classmethod
    def from_transformers(cls, hf_model: GPT2LMHeadModel, *, backend: str = "auto") -> Self:
        """A model on the weights of transformers' `GPT2LMHeadModel`: no copy.

        It has that model's dtype, device and mode, and freezes what is frozen there. The two share their storage (our
        linear weights are transposed views of the Conv1D ones): whatever changes a weight in place, as an optimizer
        does, changes it in both. Gradients and hooks are not shared.

        Raises:
            TypeError: the model is another one.
            ValueError: its configuration or weights (adapters, quantized layers) are not plain GPT-2.
        """
        return from_transformers(cls, hf_model, backend=backend)

    def to_transformers(self) -> GPT2LMHeadModel:
        """transformers' GPT2LMHeadModel on the weights of this model, in the same mode; they share their storage."""
        return to_transformers(self)

    def save_pretrained(self, path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write a folder that transformers loads; see `fastgpt2.checkpoint.save_pretrained`."""
        save_pretrained(self, path, dtype=dtype)

    @lists_options
    def generate(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> list[Sample]:
        """Continue prompts of any lengths; see `fastgpt2.generate.generate`."""
        return generate(self, prompts, **options)

    @lists_options
    def generate_iter(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> Iterator[Sample]:
        """Yield finished samples as they end; see `fastgpt2.generate.generate_iter`."""
        return generate_iter(self, prompts, **options)

    @lists_options
    def stream(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> Iterator[TokenEvent]:
        """Yield every token as it is chosen; see `fastgpt2.generate.stream`."""
        return stream(self, prompts, **options)
