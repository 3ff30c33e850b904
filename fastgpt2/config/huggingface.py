"""Conversion between transformers' GPT2Config and ours: how fields map, and which of theirs are refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from fastgpt2.config.checks import require
from fastgpt2.messages import shown

# The ids of OpenAI's vocabulary. transformers assumes them if a config.json does not name any.
OPENAI_IDS: dict[str, Any] = {"bos_token_id": 50256, "eos_token_id": 50256}

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
# Unsupported fields that change what a model computes, with the value that changes nothing.
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


def fields_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the contents of a `config.json` to the fields of our GPT2Config.

    Unknown fields are ignored with a warning.

    Args:
        hf: The contents of the file.

    Raises:
        ValueError: The file sets a field that is not supported and would change what the model computes.
    """
    model_type = hf.get("model_type", "gpt2")
    require(model_type == "gpt2", f"config.json: model_type must be 'gpt2'; got {shown(model_type)}")
    for name, harmless in _HF_REFUSED.items():
        value = hf.get(name, harmless)
        require(
            value == harmless or not value,
            f"config.json: {name}={shown(value)} is not supported (it would change what the model computes); "
            "load this checkpoint with transformers",
        )
    unknown = sorted(set(hf) - set(_HF_FIELDS) - set(_HF_ALIASES) - set(_HF_REFUSED) - _HF_HARMLESS)
    if unknown:
        warnings.warn(f"config.json: unknown fields have no effect here: {', '.join(unknown)}", stacklevel=3)
    fields = {_HF_ALIASES.get(name, name): value for name, value in hf.items()}
    known = {ours: fields[theirs] for theirs, ours in _HF_FIELDS.items() if theirs in fields}
    if isinstance(known.get("eos_token_id"), list):
        known["eos_token_id"] = tuple(known["eos_token_id"])
    return {**OPENAI_IDS, **known}


def fields_to_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the fields of our GPT2Config to the contents of a `config.json`."""
    hf: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    for theirs, ours in _HF_FIELDS.items():
        value = fields[ours]
        hf[theirs] = list(value) if isinstance(value, tuple) else value
    return hf
