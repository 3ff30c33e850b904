"""Configurations as frozen dataclasses: the model, sampling, training.

`GPT2Config.from_hf` / `to_hf` translate Hugging Face's `config.json` (transformers' GPT2Config) to and from ours.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastgpt2_kernels.ops import ACTIVATIONS

# Activations with weights of their own are modules of the model (model.py), the others are plain functions.
LEARNED_ACTIVATIONS = ("prelu", "xielu")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class GPT2Config:
    """Shape and maths of a GPT-2. Defaults are GPT-2 small (Radford et al. 2019).

    `feedforward_dim=None` means 4 x `hidden_size`. The flags from `scale_attn_weights` on have the names and the
    meaning they have in transformers' GPT2Config.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    feedforward_dim: int | None = None
    activation_function: str = "gelu_new"
    residual_dropout: float = 0.1
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "hidden_size", "num_layers", "num_heads"):
            value = getattr(self, name)
            _require(_is_int(value) and value > 0, f"GPT2Config: {name} must be a positive int; got {value!r}")
        if self.feedforward_dim is not None:
            _require(
                _is_int(self.feedforward_dim) and self.feedforward_dim > 0,
                f"GPT2Config: feedforward_dim must be a positive int or None; got {self.feedforward_dim!r}",
            )
        _require(
            self.hidden_size % self.num_heads == 0,
            f"GPT2Config: hidden_size must be a multiple of num_heads; got {self.hidden_size} and {self.num_heads}",
        )
        for name in ("residual_dropout", "embedding_dropout", "attention_dropout"):
            value = getattr(self, name)
            _require(
                isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1,
                f"GPT2Config: {name} must be in [0, 1); got {value!r}",
            )
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            _require(
                isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0,
                f"GPT2Config: {name} must be a positive number; got {value!r}",
            )
        _require(
            self.activation_function in ACTIVATIONS or self.activation_function in LEARNED_ACTIVATIONS,
            f"GPT2Config: activation_function must be one of {sorted((*ACTIVATIONS, *LEARNED_ACTIVATIONS))}; "
            f"got {self.activation_function!r}",
        )
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def inner_dim(self) -> int:
        return self.feedforward_dim if self.feedforward_dim is not None else 4 * self.hidden_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text ids as a tuple, empty where the model has none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def attention_scale(self, layer: int) -> float:
        """What q k^T is multiplied by in layer `layer` (counted from 0)."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def replace(self, **changes: Any) -> GPT2Config:
        return dataclasses.replace(self, **changes)

    # -- presets ------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPT2Config:
        """A published model's configuration by its name, e.g. "gpt2-medium"; `changes` override its fields."""
        if name not in PRESETS:
            raise ValueError(f"GPT2Config: no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**_OPENAI_IDS, **PRESETS[name], **changes})

    # -- Hugging Face -------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> GPT2Config:
        """Read transformers' `config.json`. Raises ValueError for whatever would change the maths and is not here."""
        model_type = hf.get("model_type", "gpt2")
        _require(model_type == "gpt2", f"config.json: model_type must be 'gpt2'; got {model_type!r}")
        for name, harmless in _HF_REFUSED.items():
            value = hf.get(name, harmless)
            _require(
                value == harmless or not value,
                f"config.json: {name}={value!r} is not supported (it would change what the model computes); "
                "load this checkpoint with transformers",
            )
        unknown = sorted(set(hf) - set(_HF_FIELDS) - set(_HF_ALIASES) - set(_HF_REFUSED) - _HF_HARMLESS)
        if unknown:
            warnings.warn(f"config.json: unknown fields have no effect here: {', '.join(unknown)}", stacklevel=2)
        fields = {_HF_ALIASES.get(name, name): value for name, value in hf.items()}
        known = {ours: fields[theirs] for theirs, ours in _HF_FIELDS.items() if theirs in fields}
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        return cls(**{**_OPENAI_IDS, **known})

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers' GPT2LMHeadModel reads as this model."""
        hf: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        for theirs, ours in _HF_FIELDS.items():
            value = getattr(self, ours)
            hf[theirs] = list(value) if isinstance(value, tuple) else value
        return hf


_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_inner": "feedforward_dim",
    "activation_function": "activation_function",
    "resid_pdrop": "residual_dropout",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attention_dropout",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "scale_attn_weights": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn": "reorder_and_upcast_attn",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_HF_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Fields that change the maths and are not supported, with the value that leaves it unchanged.
_HF_REFUSED: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "head_mask": None,
    "quantization_config": None,
    "multi_query": False,
    "position_embedding_type": "absolute",
    "rope_scaling": None,
    "rope_parameters": None,
}
_HF_HARMLESS = {
    "_name_or_path",
    "_attn_implementation_autoset",
    "architectures",
    "attn_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "model_type",
    "n_ctx",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "predict_special_tokens",
    "prefix",
    "problem_type",
    "return_dict",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_bfloat16",
    "use_cache",
    # generation defaults that old configurations carry; they belong to the call, not to the model
    "bad_words_ids",
    "begin_suppress_tokens",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "top_k",
    "top_p",
    "typical_p",
}

# What transformers assumes where a config.json is silent, and what OpenAI's vocabulary uses.
_OPENAI_IDS: dict[str, Any] = {"bos_token_id": 50256, "eos_token_id": 50256}


def _shape(layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"num_layers": layers, "hidden_size": hidden, "num_heads": heads, **more}


def _cerebras(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    # Cerebras-GPT (Dey et al. 2023): 2048 positions, exact GELU, no dropout.
    no_dropout = {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
    return _shape(layers, hidden, heads, context_length=2048, activation_function="gelu", **no_dropout)


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _shape(12, 768, 12),
    "gpt2-medium": _shape(24, 1024, 16),
    "gpt2-large": _shape(36, 1280, 20),
    "gpt2-xl": _shape(48, 1600, 25),
    "distilgpt2": _shape(6, 768, 12),
    "cerebras-gpt-111m": _cerebras(10, 768, 12),
    "cerebras-gpt-256m": _cerebras(14, 1088, 17),
    "cerebras-gpt-590m": _cerebras(18, 1536, 12),
    "cerebras-gpt-1.3b": _cerebras(24, 2048, 16),
    "cerebras-gpt-2.7b": _cerebras(32, 2560, 32),
    "cerebras-gpt-6.7b": _cerebras(32, 4096, 32),
    "cerebras-gpt-13b": _cerebras(40, 5120, 40),
}


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen and when a sample ends.

    temperature=0 (or top_k=1) is greedy. Filters apply in this order, as in transformers: repetition penalty
    (Keskar et al. 2019), temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).
    `stop_token_ids=None` means the model's end-of-text ids; `()` means none. The stop token ends the sample and is
    not part of its text; a stop string ends it at the string's first character.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("stop_token_ids", "stop_strings"):
            value = getattr(self, name)
            _require(
                value is None or isinstance(value, (list, tuple)),
                f"SamplingConfig: {name} must be a list; got {value!r}",
            )
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _require(
            _is_int(self.max_new_tokens) and self.max_new_tokens >= 1,
            f"SamplingConfig: max_new_tokens must be an int >= 1; got {self.max_new_tokens!r}",
        )
        _require(
            _is_number(self.temperature) and 0 <= self.temperature < float("inf"),
            f"SamplingConfig: temperature must be finite and >= 0 (0 is greedy); got {self.temperature!r}",
        )
        _require(
            self.top_k is None or (_is_int(self.top_k) and self.top_k >= 1),
            f"SamplingConfig: top_k must be an int >= 1 or None; got {self.top_k!r}",
        )
        _require(
            self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1),
            f"SamplingConfig: top_p must be in (0, 1] or None; got {self.top_p!r}",
        )
        _require(
            self.min_p is None or (_is_number(self.min_p) and 0 <= self.min_p <= 1),
            f"SamplingConfig: min_p must be in [0, 1] or None; got {self.min_p!r}",
        )
        _require(
            _is_number(self.repetition_penalty) and 0 < self.repetition_penalty < float("inf"),
            f"SamplingConfig: repetition_penalty must be finite and > 0 (1 is none); got {self.repetition_penalty!r}",
        )
        _require(
            all(_is_int(i) and i >= 0 for i in self.stop_token_ids or ()),
            f"SamplingConfig: stop_token_ids must be ints >= 0; got {self.stop_token_ids!r}",
        )
        _require(
            all(isinstance(s, str) and s for s in self.stop_strings),
            f"SamplingConfig: stop_strings must be non-empty strings; got {self.stop_strings!r}",
        )
        _require(
            _is_int(self.seed) and 0 <= self.seed < 2**64,
            f"SamplingConfig: seed must be an int in [0, 2**64); got {self.seed!r}",
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


def _help(default: Any, text: str, **more: Any) -> Any:
    """A field of TrainConfig with the sentence that the command line and the documentation show for it."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


TRAIN_DTYPES = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Every field is an option of `fastgpt2 train`.

    One step sees `batch_size * accumulate * processes` rows of the context's length. The learning rate rises
    linearly over `warmup_steps` (at most half of the steps) and falls along half a cosine to `min_lr`
    (Loshchilov and Hutter 2017) at the last step.
    """

    steps: int = _help(1000, "optimizer steps in all")
    minutes: float | None = _help(
        None, "train for about this long: sets steps from the speed of the first steps, in place of --steps"
    )
    batch_size: int = _help(16, "rows of a micro-batch, in each process")
    accumulate: int = _help(1, "micro-batches of a step, in each process")
    lr: float = _help(1e-3, "peak learning rate")
    min_lr: float | None = _help(None, "learning rate at the last step (default: a tenth of --lr)")
    warmup_steps: int = _help(100, "steps until the peak learning rate")
    weight_decay: float = _help(0.1, "AdamW's weight decay, of matrices and embeddings only")
    beta1: float = _help(0.9, "AdamW's first beta")
    beta2: float = _help(0.95, "AdamW's second beta")
    max_grad_norm: float = _help(1.0, "clip the gradient to this norm; 0 does not clip")
    seed: int = _help(0, "seed of the weights, the data's order and dropout")
    dtype: str = _help(
        "auto",
        "precision of the products (weights stay float32): auto is the half precision that the device is fast at",
        choices=TRAIN_DTYPES,
    )
    compile: bool = _help(False, "compile the model with torch.compile")
    deterministic: bool = _help(False, "use only deterministic GPU operators: resuming is exact to the bit there too")
    log_interval: int = _help(10, "steps between lines of metrics.jsonl")
    eval_interval: int = _help(250, "steps between evaluations on the validation set; 0 is none")
    eval_tokens: int = _help(1 << 18, "evaluate on the first tokens of the validation set; 0 is all")
    sample_interval: int = _help(0, "steps between samples of text; 0 is none")
    sample_prompt: str = _help("\n", "what samples continue")
    checkpoint_interval: int = _help(250, "steps between checkpoints")
    keep_checkpoints: int = _help(2, "latest checkpoints to keep, beside the best one")
    export: str = _help(
        "best",
        "which weights become the finished model: of the lowest validation loss, or the last",
        choices=("best", "last"),
    )

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1, "batch_size": 1, "accumulate": 1, "warmup_steps": 0, "seed": 0, "log_interval": 1,
            "eval_interval": 0, "eval_tokens": 0, "sample_interval": 0, "checkpoint_interval": 1, "keep_checkpoints": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            _require(_is_int(value) and value >= least, f"TrainConfig: {name} must be an int >= {least}; got {value!r}")
        for name in ("lr", "minutes", "min_lr", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            optional, positive = name in ("minutes", "min_lr"), name in ("lr", "minutes")
            _require(
                (value is None and optional)
                or (_is_number(value) and 0 <= value < float("inf") and (value > 0 or not positive)),
                f"TrainConfig: {name} must be a finite number {'> 0' if positive else '>= 0'}; got {value!r}",
            )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value < 1, f"TrainConfig: {name} must be in [0, 1); got {value!r}")
        for name, choices in (("dtype", TRAIN_DTYPES), ("export", ("best", "last"))):
            value = getattr(self, name)
            _require(value in choices, f"TrainConfig: {name} must be one of {', '.join(choices)}; got {value!r}")
        _require(self.seed < 2**63, f"TrainConfig: seed must be below 2**63; got {self.seed}")

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
