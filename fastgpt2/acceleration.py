"""`accelerate` and `unaccelerate`: they load `fastgpt2.transformers`, and with it transformers, when called."""

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
    """Run transformers' GPT-2 on fastgpt2's operators: one model in place, or every model that is built from now on.

    A model of any GPT-2 class is changed where it is, also inside another one (peft, DDP): the same object, the same
    parameters, so that an optimizer made before keeps working. Its attention becomes "fastgpt2", unless its
    configuration asks for attention weights (`output_attentions`). Without an argument transformers' GPT-2 classes
    are patched: `AutoModelForCausalLM`, `pipeline` and the classes themselves then build accelerated models.

    Args:
        model: a model that is or holds a GPT-2 of transformers; None for all that will be built.

    Returns:
        The model that was given.

    Raises:
        TypeError: the model holds no GPT-2 of transformers.
        ImportError: transformers is missing, or is too old.

    Example:
        >>> model = fastgpt2.accelerate(AutoModelForCausalLM.from_pretrained("gpt2"))
    """
    return _patch().accelerate(model)


@overload
def unaccelerate(model: None = None) -> None: ...
@overload
def unaccelerate(model: Model) -> Model: ...
def unaccelerate(model: Model | None = None) -> Model | None:
    """Undo `accelerate`: of one model, or without an argument of transformers' classes (models that are there stay).

    Returns:
        The model that was given.
    """
    return _patch().unaccelerate(model)


def _patch() -> ModuleType:
    return importlib.import_module("fastgpt2.transformers.patch")
