"""Running tasks of EleutherAI's LM Evaluation Harness (`lm_eval`); needs the extra `fastgpt2[eval]`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from fastgpt2.acceleration import accelerate
from fastgpt2.gpt2 import GPT2


def evaluate(
    model: GPT2,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    include_path: str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """Run tasks of the LM Evaluation Harness on a model.

    The harness calls transformers' GPT2LMHeadModel on this model's weights, with fastgpt2's operators inside.

    Args:
        model: A GPT2 with a tokenizer.
        tasks: Names of tasks or groups, such as "lambada_openai" or "hellaswag"; `*` stands for any characters.
        num_fewshot: Examples before each question; None is what each task says.
        limit: Questions of each task: a number, or a share below 1. None is all of them.
        batch_size: Requests in one forward pass.
        include_path: A folder with more tasks (YAML files).

    Returns:
        What `lm_eval.simple_evaluate` returns: "results" has the metrics of each task.

    Raises:
        ImportError: The extra is missing, `pip install "fastgpt2[eval]"`.
        ValueError: The model has no tokenizer, or there is no task of such a name.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            'evaluate: needs the LM Evaluation Harness; install it with pip install "fastgpt2[eval]"'
        ) from error
    from transformers import PreTrainedTokenizerFast

    if model.tokenizer is None:
        raise ValueError("evaluate: the model has no tokenizer; put a tokenizer.json into its folder")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if not manager.match_tasks([name]):
            raise ValueError(f"evaluate: no task is called {name!r}; `lm_eval --tasks list` shows their names")
    eos_ids = model.config.eos_token_ids
    eos = model.tokenizer.backend.id_to_token(eos_ids[0]) if eos_ids else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer.backend, eos_token=eos)
    lm = HFLM(
        pretrained=accelerate(model.to_transformers()),
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=model.config.context_length,
    )
    return simple_evaluate(
        model=lm, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
    )
