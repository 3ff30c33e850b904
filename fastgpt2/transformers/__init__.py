"""The GPT-2 classes of transformers on fastgpt2's operators. Import them from here instead of from transformers.

This import also makes `attn_implementation="fastgpt2"` known to every model of transformers.
"""

from __future__ import annotations

try:
    import transformers.masking_utils  # noqa: F401
except ImportError as error:
    raise ImportError(
        'fastgpt2.transformers needs transformers 5.20 or newer; install it with pip install "fastgpt2[transformers]"'
    ) from error

from fastgpt2.transformers import attention
from fastgpt2.transformers.modeling import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from fastgpt2.transformers.patch import accelerate, unaccelerate

attention.register()

__all__ = [
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "accelerate",
    "unaccelerate",
]
