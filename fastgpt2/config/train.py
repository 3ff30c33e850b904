"""`TrainConfig`: how a model is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastgpt2.config.checks import is_int, is_number, require
from fastgpt2.messages import shown

TRAIN_DTYPES = ("auto", "bf16", "fp16", "fp32")
# The fields that take one of a few words.
_CHOICES = {
    "dtype": TRAIN_DTYPES,
    "export": ("best", "last"),
    "parallel": ("ddp", "fsdp"),
    "optimizer": ("adamw", "muon"),
    "log": ("tensorboard", "wandb"),
}


def _help(default: Any, text: str) -> Any:
    """A field of TrainConfig, with the help text that the command line and the documentation show."""
    return dataclasses.field(default=default, metadata={"help": text})


def _choice(name: str, default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": _CHOICES[name]})


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Every field is an option of `fastgpt2 train`; its help describes them.

    A step trains on `batch_size * accumulate * processes` rows of the context's length. The learning rate rises
    linearly over `warmup_steps` (at most half of the steps). It then falls along half a cosine (Loshchilov and Hutter
    2017), and reaches `min_lr` at the last step.

    Raises:
        ValueError: A value is out of range.
    """

    steps: int = _help(1000, "optimizer steps in all")
    minutes: float | None = _help(
        None, "train for about this long, instead of --steps: the speed of the first steps sets their number"
    )
    batch_size: int = _help(16, "rows per micro-batch, in each process")
    accumulate: int = _help(1, "micro-batches per step, in each process")
    lr: float = _help(1e-3, "peak learning rate")
    min_lr: float | None = _help(None, "learning rate at the last step (default: a tenth of --lr)")
    warmup_steps: int = _help(100, "steps until the peak learning rate")
    weight_decay: float = _help(0.1, "weight decay, of matrices and embeddings only")
    beta1: float = _help(0.9, "AdamW's first beta")
    beta2: float = _help(0.95, "AdamW's second beta")
    max_grad_norm: float = _help(1.0, "clip the gradient to this norm; 0 does not clip")
    seed: int = _help(0, "seed of the initial weights, the order of the data, and dropout")
    optimizer: str = _choice(
        "optimizer",
        "adamw",
        "adamw for all weights; or muon for the blocks' matrices and AdamW for the rest, with one learning rate",
    )
    lora_rank: int = _help(
        0, "train LoRA adapters of this rank on the blocks' matrices and freeze the weights; 0 trains the weights"
    )
    lora_alpha: float | None = _help(
        None, "multiply the adapters' output by this number divided by the rank (default: twice the rank)"
    )
    dtype: str = _choice(
        "dtype",
        "auto",
        "precision of matrix products; weights stay float32. auto is the half precision that the device computes fast, "
        "or else fp32",
    )
    parallel: str = _choice(
        "parallel",
        "ddp",
        "what each of torchrun's processes holds: the whole model (ddp), or a share of the weights, gradients and "
        "optimizer state (fsdp)",
    )
    recompute: bool = _help(
        False, "recompute the blocks' activations in the backward pass: less memory, about a third more work"
    )
    compile: bool = _help(False, "compile the model with torch.compile")
    deterministic: bool = _help(False, "use only deterministic operators, so that resuming is bit-exact on a GPU too")
    log_interval: int = _help(10, "steps between lines of metrics.jsonl")
    eval_interval: int = _help(250, "steps between evaluations on the validation set; 0 turns them off")
    eval_tokens: int = _help(1 << 18, "evaluate on the first tokens of the validation set, this many; 0 is all of them")
    sample_interval: int = _help(0, "steps between text samples; 0 turns them off")
    sample_prompt: str = _help("\n", "the prompt of text samples")
    early_stopping: int = _help(0, "stop after this many evaluations in a row without a new lowest loss; 0 is off")
    checkpoint_interval: int = _help(250, "steps between checkpoints")
    keep_checkpoints: int = _help(2, "latest checkpoints to keep, besides the best one")
    export: str = _choice(
        "export",
        "best",
        "which weights the finished model has: those with the lowest validation loss, or the last ones",
    )
    log: str | None = _choice("log", None, "also log the metrics and samples there; under torchrun write --log-to")

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1, "batch_size": 1, "accumulate": 1, "warmup_steps": 0, "seed": 0, "log_interval": 1,
            "eval_interval": 0, "eval_tokens": 0, "sample_interval": 0, "checkpoint_interval": 1, "keep_checkpoints": 1,
            "lora_rank": 0, "early_stopping": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            require(
                is_int(value) and value >= least, f"TrainConfig: {name} must be an int >= {least}; got {shown(value)}"
            )
        for name in ("lr", "minutes", "min_lr", "weight_decay", "max_grad_norm", "lora_alpha"):
            value = getattr(self, name)
            optional, positive = name in ("minutes", "min_lr", "lora_alpha"), name in ("lr", "minutes", "lora_alpha")
            require(
                (value is None and optional)
                or (is_number(value) and 0 <= value < float("inf") and (value > 0 or not positive)),
                f"TrainConfig: {name} must be a finite number {'> 0' if positive else '>= 0'}; got {shown(value)}",
            )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value < 1, f"TrainConfig: {name} must be in [0, 1); got {shown(value)}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(
                value in choices or (value is None and name == "log"),
                f"TrainConfig: {name} must be one of {', '.join(choices)}; got {shown(value)}",
            )
        require(
            self.lora_alpha is None or self.lora_rank > 0,
            "TrainConfig: lora_alpha needs lora_rank; give both or neither",
        )
        require(
            not self.early_stopping or self.eval_interval > 0,
            "TrainConfig: early_stopping needs evaluations; give an eval_interval > 0",
        )
        require(
            self.parallel != "fsdp" or not self.compile,
            "TrainConfig: compile does not work with parallel 'fsdp'; leave one of the two out",
        )
        require(self.seed < 2**63, f"TrainConfig: seed must be below 2**63; got {self.seed}")

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)
