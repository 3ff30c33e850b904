"""`accelerate`: use our classes for existing models of transformers, and for those that will be built.

Our classes are subclasses of transformers' classes that add no state. So changing an object's `__class__` makes it
ours, or theirs again. It keeps its parameters, buffers, hooks and attributes. New objects become ours through the
classes' `__new__`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from transformers.models.gpt2 import modeling_gpt2 as hf

from fastgpt2.transformers.attention import NAME
from fastgpt2.transformers.modeling import MODELS, become_ours, become_theirs

Model = TypeVar("Model", bound=nn.Module)
_PREVIOUS = "_attention_before_fastgpt2"


def accelerate(model: Model | None = None) -> Model | None:
    """See `fastgpt2.accelerate`."""
    if model is None:
        for theirs in MODELS:
            theirs.__new__ = _new_ours  # type: ignore[method-assign]
        return None
    found = [module for module in model.modules() if isinstance(module, hf.GPT2PreTrainedModel)]
    if not found:
        raise TypeError(f"accelerate: the model must be or hold a GPT-2 of transformers; got {type(model).__name__}")
    become_ours(model)
    for module in found:
        previous = module.config._attn_implementation
        if previous != NAME and not module.config.output_attentions:
            module.set_attn_implementation(NAME)
            setattr(module, _PREVIOUS, previous)
    return model


def unaccelerate(model: Model | None = None) -> Model | None:
    """See `fastgpt2.unaccelerate`."""
    if model is None:
        for theirs in MODELS:
            theirs.__new__ = _new_theirs  # type: ignore[method-assign]
        return None
    become_theirs(model)
    for module in model.modules():
        if isinstance(module, hf.GPT2PreTrainedModel) and module.config._attn_implementation == NAME:
            module.set_attn_implementation(module.__dict__.pop(_PREVIOUS, "sdpa"))
    return model


def _new_ours(cls: type, *args: Any, **kwargs: Any) -> Any:
    return object.__new__(MODELS.get(cls, cls))


# Once a class has had a __new__, Python would pass __init__'s arguments to object.__new__. So it stays replaced.
def _new_theirs(cls: type, *args: Any, **kwargs: Any) -> Any:
    return object.__new__(cls)
