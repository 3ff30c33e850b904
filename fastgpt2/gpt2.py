"""The public model: the network in model.py, plus checkpoints and generation."""

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

    There are four ways to build one:

    - from sizes: `GPT2(vocab_size=10000, hidden_size=256, num_layers=6, num_heads=8, feedforward_dim=1024,
      dropout_rate=0.1)`
    - from a configuration: `GPT2(GPT2Config(...))`
    - from a preset's name, with fresh weights: `GPT2.from_config("gpt2-medium")`
    - from a checkpoint: `GPT2.from_pretrained("gpt2")`

    Args:
        config: The configuration; None to give its fields as keywords.
        dropout_rate: Sets the three dropouts of the configuration.
        backend: The kernels to use: "auto", "triton", "native" or "torch".
        fields: Fields of `GPT2Config`.

    Raises:
        TypeError: An argument is unknown, or both a configuration and fields are given.
        ValueError: A field is out of range, or the backend is unknown.

    Example:
        >>> model = GPT2(vocab_size=100, context_length=32, hidden_size=16, num_layers=1, num_heads=2)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 100])
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
        """Load a checkpoint from a folder, a file, the Hugging Face hub, or "embedded", the model in this package.

        Supported are Hugging Face folders (safetensors or pytorch_model.bin, whole or sharded), a single such file
        beside its config.json, and nanoGPT's `ckpt.pt` or the folder that holds it. A nanoGPT model without biases gets
        zero biases, which compute the same.

        Args:
            name_or_path: A folder, a file, a name on the hub, or "embedded".
            dtype: The dtype of the weights; None keeps that of the file's token embeddings.
            device: The device to load the weights onto.
            backend: The kernels to use: "auto", "triton", "native" or "torch".
            revision: A branch, tag or commit on the hub.
            config_changes: Fields of `GPT2Config` to override. A smaller `vocab_size` or `context_length` than the
                file's drops the embedding rows past it (nanoGPT pads its vocabulary to 50304).

        Returns:
            The model in eval mode. Its `tokenizer` is set if the folder has one.

        Raises:
            OSError: A file is missing or cannot be read.
            ValueError: The contents are not a GPT-2 that fits; the error names keys and shapes.
            ImportError: A hub name was given without the extra, `pip install "fastgpt2[hub]"`.
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
        """Set training or eval mode. Training mode also frees what generation caches; see `decode.drop_sessions`.

        Args:
            mode: True for training, False for evaluation.

        Returns:
            The model itself.
        """
        if mode:
            drop_sessions(self)
        return super().train(mode)

    @classmethod
    def from_transformers(cls, hf_model: GPT2LMHeadModel, *, backend: str = "auto") -> Self:
        """Wrap the weights of transformers' `GPT2LMHeadModel` without copying them.

        The two models share storage: our linear weights are transposed views of the Conv1D ones. An in-place change,
        such as an optimizer's, shows in both. Gradients and hooks are not shared.

        Args:
            hf_model: The transformers model.
            backend: The kernels to use: "auto", "triton", "native" or "torch".

        Returns:
            A model with the same dtype, device, mode and frozen parameters.

        Raises:
            TypeError: The model is not a `GPT2LMHeadModel`.
            ValueError: Its configuration or weights are not plain GPT-2 (it has adapters or quantized layers).
        """
        return from_transformers(cls, hf_model, backend=backend)

    def to_transformers(self) -> GPT2LMHeadModel:
        """Wrap this model's weights as transformers' `GPT2LMHeadModel` without copying them.

        Returns:
            A transformers model in the same mode, which shares its storage with this one.
        """
        return to_transformers(self)

    def save_pretrained(self, path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Save a folder that transformers can load; see `fastgpt2.checkpoint.save_pretrained`.

        Args:
            path: The folder; it is created if it is missing.
            dtype: The dtype to save the weights in; None keeps the model's.
        """
        save_pretrained(self, path, dtype=dtype)

    @lists_options
    def generate(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> list[Sample]:
        """Continue prompts of any lengths; see `fastgpt2.generate.generate`."""
        return generate(self, prompts, **options)

    @lists_options
    def generate_iter(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> Iterator[Sample]:
        """Yield each sample as soon as it is finished; see `fastgpt2.generate.generate_iter`."""
        return generate_iter(self, prompts, **options)

    @lists_options
    def stream(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> Iterator[TokenEvent]:
        """Yield every token as soon as it is sampled; see `fastgpt2.generate.stream`."""
        return stream(self, prompts, **options)
