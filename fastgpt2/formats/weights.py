"""The names, shapes and layouts of a checkpoint's weights. Nothing here reads a file.

There are two layouts. Hugging Face's GPT-2 stores the weights of its linear layers (Conv1D) as (in, out); nanoGPT and
this package store them as (out, in). A file's format tells its layout; its shapes never do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from fastgpt2.messages import listed
from fastgpt2.model import GPT2Base

WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
# Prefixes that torch.compile and DistributedDataParallel add to the names of wrapped modules.
_WRAPPERS = ("_orig_mod.", "module.")
# The causal mask, which old files store as a buffer.
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_LINEAR_WEIGHT = re.compile(r"transformer\.h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)\.weight")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def canonical_name(name: str) -> str:
    """Our name of a weight in a file: wrappers' prefixes are removed, and a missing `transformer.` is added."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def is_mask_buffer(name: str) -> bool:
    """Whether a canonical name is that of a causal mask, which is not a weight."""
    return _MASK_BUFFER.fullmatch(name) is not None


def is_linear_weight(name: str) -> bool:
    """Whether the weight with this name is transposed in Hugging Face's layout."""
    return _LINEAR_WEIGHT.fullmatch(name) is not None


def check_keys(
    model: GPT2Base,
    shapes: Mapping[str, torch.Size],
    source: str,
    *,
    transpose: bool,
    has_biases: bool = True,
    cut: Collection[str] = (),
) -> None:
    """Check that weights with these names and shapes fit a model.

    Args:
        model: The model.
        shapes: The shapes of the file's weights, by canonical name.
        source: What an error calls the file.
        transpose: Whether the weights are in Hugging Face's layout.
        has_biases: Whether missing biases are an error.
        cut: Names of weights that may have more rows than the model's.

    Raises:
        ValueError: Keys are missing or unexpected, or shapes differ; the error names them.
    """
    expected = {name: t.shape for name, t in named_weights(model, transpose=transpose)}
    if not has_biases:
        shapes = {**{name: shape for name, shape in expected.items() if name.endswith(".bias")}, **shapes}
    problems = []
    if missing := [name for name in expected if name not in shapes]:
        problems.append(f"missing keys: {listed(missing)}")
    if unexpected := [name for name in shapes if name not in expected]:
        problems.append(f"unexpected keys: {listed(unexpected)}")
    wrong = [
        f"{name} is {tuple(shapes[name])} in the file and {tuple(shape)} in the configuration"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape and not (name in cut and _is_cut(shape, shapes[name]))
    ]
    if wrong:
        problems.append(f"other shapes: {listed(wrong, limit=2)}")
    if problems:
        raise ValueError(f"{source}: the weights do not fit the configuration; {'; '.join(problems)}")


def _is_cut(shape: torch.Size, of: torch.Size) -> bool:
    return len(shape) == len(of) and shape[0] < of[0] and shape[1:] == of[1:]


def named_weights(model: GPT2Base, *, transpose: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, detached view) of each weight, in Hugging Face's layout if `transpose`. A tied head is left out."""
    for name, tensor in model.state_dict().items():
        if name == HEAD and model.config.tie_word_embeddings:
            continue
        yield name, tensor.t() if transpose and is_linear_weight(name) else tensor


def checked_dtype(tensor: Tensor, source: str) -> torch.dtype:
    """The tensor's dtype; ValueError if it is not a floating-point dtype that a model can have."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{source}: weights must be float64, float32, bfloat16 or float16; got {tensor.dtype}")
    return tensor.dtype


def written(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in the form in which it is saved: on the CPU, contiguous, in `dtype` if one is given."""
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()
