"""The GPT-2 classes of transformers, computed with `fastgpt2.kernels`.

Each class is a subclass of transformers' class of the same name, with the same modules and parameters: everything
around the computation (files, configurations, outputs, caches, checkpointing, hooks, generation) is transformers' own.
What differs is how a block computes:

- attention: packed and causal, without the padding (attention.py);
- LayerNorm with the residual in one pass, bias and activation in one pass;
- with `labels`, the head and its cross-entropy in one operator that never holds the logits.

A module that was replaced (an adapter, a quantized layer) or that has hooks is called the way transformers calls it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import activations
from transformers.cache_utils import EncoderDecoderCache
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from fastgpt2.transformers.attention import NAME, Ragged, attention_forward, causal_mask_4d, padding_ignored
from fastgpt2.transformers.generation import FastGenerationMixin
from fastgpt2_kernels import ops

IGNORE_INDEX = -100
# How transformers names the cache, as an argument and as an output; newer releases call it "cache".
_CACHE = "cache" if "cache" in inspect.signature(hf.GPT2Block.forward).parameters else "past_key_values"
# The classes of activation modules that are one function each, and its name.
_ACTIVATIONS: dict[type, str] = {
    activations.AccurateGELUActivation: "gelu_accurate",
    activations.FastGELUActivation: "gelu_fast",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_pytorch_tanh",
    activations.NewGELUActivation: "gelu_new",
    activations.QuickGELUActivation: "quick_gelu",
    activations.ReLUSquaredActivation: "relu2",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` runs `kind.forward` and nothing else."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """LayerNorm of the input; with `residual` the LayerNorm of their sum, and the sum."""
        if residual is None:
            return ops.layer_norm(input, self.weight, self.bias, self.eps)
        return ops.layer_norm(input, self.weight, self.bias, self.eps, residual=residual)


class GPT2Attention(hf.GPT2Attention):
    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        output_attentions: bool | None = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = past_key_values if cache is None else cache  # its name in newer releases
        if self.config._attn_implementation != NAME or encoder_hidden_states is not None or not self.is_causal:
            return super().forward(
                hidden_states,
                **{_CACHE: cache},
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                output_attentions=output_attentions,
                **kwargs,
            )
        qkv = self.c_attn(hidden_states)
        dropout_p = self.attn_dropout.p if self.training else 0.0
        keys_values = None if cache is None else self._append(qkv, cache)
        is_whole = keys_values is None or keys_values[0].shape[2] == qkv.shape[1]  # nothing was in the cache before
        if is_whole and (attention_mask is None or isinstance(attention_mask, Ragged)):
            options = {"scale": self.scaling, "dropout_p": dropout_p, "upcast": self.reorder_and_upcast_attn}
            if attention_mask is None:
                attended = ops.causal_attention_packed(qkv, self.num_heads, **options)
            else:
                attended = attention_mask.attend(qkv, self.num_heads, **options)
        else:
            query, key, value = self._heads(qkv)
            key, value = (key, value) if keys_values is None else keys_values
            attended, _ = attention_forward(
                self, query, key, value, attention_mask, dropout=dropout_p, scaling=self.scaling, **kwargs
            )
            attended = attended.flatten(2)
        return self.resid_dropout(self.c_proj(attended)), None

    def _append(self, qkv: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """Add the new keys and values to a cache; returns all of them (B, H, S, D)."""
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        _, key, value = self._heads(qkv)
        return cache.update(key, value, self.layer_idx)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Packed (B, T, 3C) -> queries, keys and values (B, H, T, D)."""
        return tuple(x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))


class GPT2MLP(hf.GPT2MLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        name = _ACTIVATIONS.get(type(self.act))
        if name is None or not _is_plain(self.act, type(self.act)):
            return super().forward(hidden_states)
        if _is_plain(self.c_fc, Conv1D):
            inner = ops.linear(hidden_states, self.c_fc.weight.t(), self.c_fc.bias, activation=name)
        else:
            inner = ops.activation(self.c_fc(hidden_states), name)
        return self.dropout(self.c_proj(inner))


class GPT2Block(hf.GPT2Block):
    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or not _is_plain(self.ln_2, LayerNorm):
            return super().forward(
                hidden_states,
                cache,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
        attended, _ = self.attn(
            self.ln_1(hidden_states),
            **{_CACHE: cache},
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        normed, hidden_states = self.ln_2(attended, residual=hidden_states)
        return hidden_states + self.mlp(normed)


class _Accelerated(hf.GPT2PreTrainedModel):
    """The common base of the models: their modules are ours, and so is attention unless another one is asked for."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        become_ours(self)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        chosen = NAME if requested_attention is None else requested_attention
        return super().get_correct_attn_implementation(chosen, is_init_check)


class GPT2Model(_Accelerated, hf.GPT2Model):
    """transformers' GPT2Model on fastgpt2's operators."""

    @functools.wraps(hf.GPT2Model.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        wants_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        if wants_attentions and self.config._attn_implementation == NAME:
            raise ValueError(
                f'GPT2Model: output_attentions needs attn_implementation="eager", as "{NAME}" has no attention '
                'weights; call model.set_attn_implementation("eager") first'
            )
        return super().forward(*args, **kwargs)


# The arguments of each model's forward, in their order.
_NAMES = {
    theirs: list(inspect.signature(theirs.forward).parameters)[1:]
    for theirs in (
        hf.GPT2LMHeadModel,
        hf.GPT2DoubleHeadsModel,
        hf.GPT2ForTokenClassification,
        hf.GPT2ForQuestionAnswering,
    )
}


def _takes_skip_logits(theirs: Any) -> Callable[[Any], Any]:
    """Give a `forward` the signature of transformers' one plus `skip_logits`.

    Editors and `help` show it, and Trainer passes on only the columns that it names.
    """
    signature = inspect.signature(theirs.forward)
    *parameters, rest = signature.parameters.values()
    more = inspect.Parameter("skip_logits", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="bool | None")

    def named(forward: Any) -> Any:
        forward.__signature__ = signature.replace(parameters=[*parameters, more, rest])
        return forward

    return named


class _SkipsLogits(_Accelerated):
    """The common base of the models with a language modelling loss.

    With `labels` the loss is computed without the logits. `skip_logits`, an argument of `forward` or an attribute of
    the model, says whether `logits` are left out. None, the default, leaves them out in training mode only. A tuple
    (`return_dict=False`) always holds them.
    """

    skip_logits: bool | None = None

    def _skips(self, asked: bool | None, has_labels: bool, returns_dict: bool) -> bool:
        if asked and not has_labels:
            raise ValueError(f"{type(self).__name__}: skip_logits=True needs labels; without them there is no loss")
        skip = self.skip_logits if asked is None else asked
        return has_labels and returns_dict and (self.training if skip is None else skip)


class GPT2LMHeadModel(_SkipsLogits, FastGenerationMixin, hf.GPT2LMHeadModel):
    """transformers' GPT2LMHeadModel on fastgpt2's operators.

    With `labels` the loss is computed without the logits. `skip_logits`, an argument of `forward` or an attribute of
    the model, says whether `logits` are left out of the output. None, the default, leaves them out in training mode
    only. A tuple (`return_dict=False`) always holds them.
    """

    @_takes_skip_logits(hf.GPT2LMHeadModel)
    def forward(self, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        """Like `GPT2LMHeadModel.forward` of transformers, with one more argument.

        Args:
            skip_logits: True leaves the logits out of the output, which then holds None. False computes them besides
                the loss. None takes the attribute `skip_logits`, and if that is None too, `self.training`. Without
                `labels` only None and False are allowed.
        """
        given = {**dict(zip(_NAMES[hf.GPT2LMHeadModel], args, strict=False)), **kwargs}
        returns_dict = given.pop("return_dict", None)
        returns_dict = self.config.return_dict if returns_dict is None else returns_dict
        labels = given.get("labels")
        skip = self._skips(skip_logits, labels is not None, returns_dict)
        keep = given.get("logits_to_keep", 0)
        keeps_all = isinstance(keep, int) and keep == 0
        if labels is None or not (keeps_all and _has_plain_loss(self) and _is_plain(self.lm_head, nn.Linear)):
            outputs = super().forward(**given, return_dict=returns_dict)
            if skip_logits and returns_dict:
                outputs.logits = None
            return outputs
        given = {name: value for name, value in given.items() if name not in ("labels", "logits_to_keep")}
        if skip and given.get("use_cache") is None and self.training:
            given["use_cache"] = False  # a training step needs no cache
        ignore_index = given.get("ignore_index", IGNORE_INDEX)
        targets = given.get("shift_labels")
        if targets is None:
            targets = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
        if torch.compiler.is_compiling():
            outputs = self.transformer(**given, return_dict=True)
        else:
            given["attention_mask"] = _mask_for_targets(given.get("attention_mask"), targets, ignore_index)
            with padding_ignored(skip):
                outputs = self.transformer(**given, return_dict=True)
        hidden_BTC = outputs.last_hidden_state
        result = CausalLMOutputWithCrossAttentions(
            loss=_linear_cross_entropy(
                hidden_BTC, self.lm_head, targets, ignore_index, given.get("num_items_in_batch")
            ),
            logits=None if skip else self.lm_head(hidden_BTC),
            **{_CACHE: getattr(outputs, _CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
        return result if returns_dict else result.to_tuple()


def _has_plain_loss(model: Any) -> bool:
    """Whether `model.loss_function` is transformers' own. Reading it warns, which breaks torch.compile's graph."""
    default = LOSS_MAPPING.get(getattr(model, "loss_type", None), ForCausalLMLoss)
    return model.__dict__.get("_loss_function", default) is ForCausalLMLoss


def _linear_cross_entropy(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    ignore_index: int,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    """transformers' `ForCausalLMLoss` of the head's logits, from hidden states (..., C) and targets (...)."""
    return ops.linear_cross_entropy(
        hidden.flatten(0, -2),
        head.weight,
        targets.flatten().to(hidden.device, torch.int64),
        head.bias,
        ignore_index=ignore_index,
        num_items_in_batch=num_items_in_batch,
    )


def _mask_for_targets(mask: Tensor | None, targets: Tensor, ignore_index: int) -> Tensor | None:
    """The padding mask; or a 4-D mask if a target that counts is predicted from padding, as only that defines it.

    This happens with left padding: the first token is predicted from the padding before it.
    """
    if mask is None or mask.shape != targets.shape:
        return mask
    counts_padding = ((targets.to(mask.device) != ignore_index) & (mask == 0)).any()
    return causal_mask_4d(mask) if counts_padding else mask


def _defined_padding(given: dict[str, Any]) -> dict[str, Any]:
    """Replace the mask by a 4-D one, for a forward pass that depends on hidden states at padding."""
    mask = given.get("attention_mask")
    has_past = any(given.get(name) is not None for name in ("cache", "past_key_values"))
    # Tracing uses a 4-D mask anyway.
    if mask is None or mask.dim() >= 4 or has_past or torch.compiler.is_compiling() or mask.all():
        return given
    return {**given, "attention_mask": causal_mask_4d(mask.flatten(0, -2))}


def _with_defined_padding(theirs: Any) -> Any:
    @functools.wraps(theirs.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(_NAMES[theirs], args, strict=False)), **kwargs}
        return theirs.forward(self, **_defined_padding(given))

    return forward


class GPT2DoubleHeadsModel(_SkipsLogits, FastGenerationMixin, hf.GPT2DoubleHeadsModel):
    """transformers' GPT2DoubleHeadsModel on fastgpt2's operators.

    `skip_logits` works as for `GPT2LMHeadModel`: in training mode `logits` is None unless it is False.
    """

    _theirs = _with_defined_padding(hf.GPT2DoubleHeadsModel)

    @_takes_skip_logits(hf.GPT2DoubleHeadsModel)
    def forward(self, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
        """Like `GPT2DoubleHeadsModel.forward` of transformers; for `skip_logits` see `GPT2LMHeadModel.forward`."""
        given = {**dict(zip(_NAMES[hf.GPT2DoubleHeadsModel], args, strict=False)), **kwargs}
        returns_dict = given.pop("return_dict", None)
        returns_dict = self.config.return_dict if returns_dict is None else returns_dict
        labels = given.get("labels")
        skip = self._skips(skip_logits, labels is not None, returns_dict)
        if labels is None or not _is_plain(self.lm_head, nn.Linear):
            outputs = self._theirs(**given, return_dict=returns_dict)
            if skip:
                outputs.logits = None
            return outputs
        del given["labels"]
        mc_token_ids, mc_labels = (given.pop(name, None) for name in ("mc_token_ids", "mc_labels"))
        outputs = self.transformer(**_defined_padding(given), return_dict=True)
        hidden = outputs.last_hidden_state
        mc_logits = self.multiple_choice_head(hidden, mc_token_ids).squeeze(-1)
        mc_loss = None
        if mc_labels is not None:
            mc_loss = nn.functional.cross_entropy(mc_logits.view(-1, mc_logits.shape[-1]), mc_labels.view(-1))
        targets = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
        result = hf.GPT2DoubleHeadsModelOutput(
            loss=_linear_cross_entropy(hidden, self.lm_head, targets, IGNORE_INDEX, None),
            mc_loss=mc_loss,
            logits=None if skip else self.lm_head(hidden),
            mc_logits=mc_logits,
            **{_CACHE: getattr(outputs, _CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if returns_dict else result.to_tuple()


class GPT2ForSequenceClassification(_Accelerated, hf.GPT2ForSequenceClassification):
    """transformers' GPT2ForSequenceClassification on fastgpt2's operators."""


class GPT2ForTokenClassification(_Accelerated, hf.GPT2ForTokenClassification):
    """transformers' GPT2ForTokenClassification on fastgpt2's operators."""

    forward = _with_defined_padding(hf.GPT2ForTokenClassification)


class GPT2ForQuestionAnswering(_Accelerated, hf.GPT2ForQuestionAnswering):
    """transformers' GPT2ForQuestionAnswering on fastgpt2's operators."""

    forward = _with_defined_padding(hf.GPT2ForQuestionAnswering)


# transformers' class of a module inside a GPT2Model -> ours, with the same state.
_INNER: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    hf.GPT2Attention: GPT2Attention,
    hf.GPT2Block: GPT2Block,
    hf.GPT2MLP: GPT2MLP,
}
# transformers' class of a model -> ours.
MODELS: dict[type[nn.Module], type[nn.Module]] = {
    hf.GPT2Model: GPT2Model,
    hf.GPT2LMHeadModel: GPT2LMHeadModel,
    hf.GPT2DoubleHeadsModel: GPT2DoubleHeadsModel,
    hf.GPT2ForSequenceClassification: GPT2ForSequenceClassification,
    hf.GPT2ForTokenClassification: GPT2ForTokenClassification,
    hf.GPT2ForQuestionAnswering: GPT2ForQuestionAnswering,
}
_THEIRS = {ours: theirs for theirs, ours in {**_INNER, **MODELS}.items()}


def become_ours(model: nn.Module) -> None:
    """Give every GPT-2 in `model` and the modules inside it our classes."""
    for outer in model.modules():
        _change_class(outer, MODELS)
        if isinstance(outer, hf.GPT2Model):
            for inner in outer.modules():
                _change_class(inner, _INNER)


def become_theirs(model: nn.Module) -> None:
    """Undo `become_ours`."""
    for module in model.modules():
        _change_class(module, _THEIRS)


def _change_class(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    to = classes.get(type(module))
    if to is not None:
        module.__class__ = to
        if isinstance(module, hf.GPT2PreTrainedModel):
            # Which outputs can be recorded is kept by the name of the class, as its __init__ would note it.
            _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
