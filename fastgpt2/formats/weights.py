"""The names, shapes and layouts of a checkpoint's weights; nothing here reads a file.

Two layouts exist. Hugging Face's GPT-2 holds the weights of its linear layers as (in, out) (its Conv1D), nanoGPT and
this package as (out, in). Which one a file has follows from its format, never from its shapes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from fastgpt2.messages import listed
from fastgpt2.model import GPT2Base

WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
# What torch.compile and DistributedDataParallel put before the names of the modules that they wrap.
_WRAPPERS = ("_orig_mod.", "module.")
# The causal mask that old files carry.
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_LINEAR_WEIGHT = re.compile(r"transformer\.h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)\.weight")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def canonical_name(name: str) -> str:
    """Our name of a file's weight: no wrapper's prefix, always with `transformer.`."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def is_mask_buffer(name: str) -> bool:
    """Whether a name, as `canonical_name` gives it, is that of a causal mask, which is no weight."""
    return _MASK_BUFFER.fullmatch(name) is not None


def is_linear_weight(name: str) -> bool:
    """Whether the weight of that name lies transposed in Hugging Face's layout."""
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
    """Check that weights of these names and shapes are those of `model`; ValueError names what is not.

    Args:
        source: what the error calls the weights' file.
        transpose: the weights are in Hugging Face's layout.
        has_biases: whether missing biases are an error.
        cut: weights that may have more rows than the model's.
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
    """The weights by name as detached views, with `transpose` in Hugging Face's layout; without a tied head."""
    for name, tensor in model.state_dict().items():
        if name == HEAD and model.config.tie_word_embeddings:
            continue
        yield name, tensor.t() if transpose and is_linear_weight(name) else tensor


def checked_dtype(tensor: Tensor, source: str) -> torch.dtype:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{source}: weights must be float64, float32, bfloat16 or float16; got {tensor.dtype}")
    return tensor.dtype


def written(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight as it is written to a file."""
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()
