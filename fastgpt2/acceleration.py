"""`accelerate` and `unaccelerate`. transformers is imported when they are called, not when this module is."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar, overload

if TYPE_CHECKING:
    from torch import nn

Model = TypeVar("Model", bound="nn.Module")


@overload
def accelerate(model: None = None) -> None: ...
@overload
def accelerate(model: Model) -> Model: ...
def accelerate(model: Model | None = None) -> Model | None:
    """Run transformers' GPT-2 on fastgpt2's operators: one model in place, or every model built from now on.

    A model of any GPT-2 class is changed in place, even when it is wrapped in another one (peft, DDP). It stays the
    same object with the same parameters, so an existing optimizer keeps working. Its attention implementation becomes
    "fastgpt2", unless its configuration asks for attention weights (`output_attentions`).

    Without an argument, transformers' GPT-2 classes are patched. `AutoModelForCausalLM`, `pipeline` and the classes
    themselves then build accelerated models.

    Args:
        model: A transformers GPT-2, or a model that contains one. None patches the classes.

    Returns:
        The same model, or None without an argument.

    Raises:
        TypeError: The model contains no transformers GPT-2.
        ImportError: transformers is missing or too old.

    Example:
        >>> model = fastgpt2.accelerate(AutoModelForCausalLM.from_pretrained("gpt2"))
    """
    return _patch().accelerate(model)


@overload
def unaccelerate(model: None = None) -> None: ...
@overload
def unaccelerate(model: Model) -> Model: ...
def unaccelerate(model: Model | None = None) -> Model | None:
    """Undo `accelerate`, for one model or for transformers' classes.

    Args:
        model: The model to restore. None restores the classes; models that are already built stay accelerated.

    Returns:
        The same model, or None without an argument.
    """
    return _patch().unaccelerate(model)


def _patch() -> ModuleType:
    return importlib.import_module("fastgpt2.transformers.patch")
