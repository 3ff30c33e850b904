"""Functions that load and save checkpoints: Hugging Face folders and hub names, single files, nanoGPT's `ckpt.pt`."""

from __future__ import annotations

from fastgpt2.formats.huggingface import hf_state_dict, load_hf_views, save_pretrained
from fastgpt2.formats.load import EMBEDDED, read_config, read_dtype
from fastgpt2.formats.nanogpt import save_nanogpt
from fastgpt2.gpt2 import GPT2

load_pretrained = GPT2.from_pretrained

__all__ = [
    "EMBEDDED",
    "hf_state_dict",
    "load_hf_views",
    "load_pretrained",
    "read_config",
    "read_dtype",
    "save_nanogpt",
    "save_pretrained",
]
