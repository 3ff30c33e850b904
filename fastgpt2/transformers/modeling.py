"""The GPT-2 classes of transformers, whose work runs on `fastgpt2.kernels`.

Each class is a subclass of transformers' class of the same name, with the same modules and parameters: everything
around the computation (files, configurations, outputs, caches, checkpointing, hooks, generation) is transformers' own.
What differs is what a block computes with:

- attention: packed and causal, without the padding (attention.py);
- LayerNorm with the residual in one pass, bias and activation in one pass;
- with `labels`, the head and its cross-entropy in one operator that never holds the logits.

A module that was replaced (an adapter, a quantized layer) or that carries hooks is called as transformers calls it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import activations
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from fastgpt2.transformers.attention import NAME, Padding
from fastgpt2_kernels import ops

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
    """Whether a call of `module` is `kind.forward` and nothing else."""
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
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        is_packed = (
            self.config._attn_implementation == NAME
            and past_key_values is None
            and encoder_hidden_states is None
            and (attention_mask is None or isinstance(attention_mask, Padding))
            and self.is_causal
            and kwargs.get("is_causal") is not False
        )
        if not is_packed:
            return super().forward(
                hidden_states,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                output_attentions=output_attentions,
                **kwargs,
            )
        qkv = self.c_attn(hidden_states)
        options: dict[str, Any] = {
            "scale": self.scaling,
            "dropout_p": self.attn_dropout.p if self.training else 0.0,
            "upcast": self.reorder_and_upcast_attn,
        }
        if attention_mask is None:
            attended = ops.causal_attention_packed(qkv, self.num_heads, **options)
        else:
            attended = attention_mask.attend(qkv, self.num_heads, **options)
        return self.resid_dropout(self.c_proj(attended)), None


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
        past_key_values: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or not _is_plain(self.ln_2, LayerNorm):
            return super().forward(
                hidden_states,
                past_key_values,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
        attended, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        normed, hidden_states = self.ln_2(attended, residual=hidden_states)
        return hidden_states + self.mlp(normed)


class _Accelerated:
    """What the models share: their modules are ours, and their attention too unless another is asked for."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        become_ours(self)  # type: ignore[arg-type]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        chosen = NAME if requested_attention is None else requested_attention
        return super().get_correct_attn_implementation(chosen, is_init_check)  # type: ignore[misc]


class GPT2Model(_Accelerated, hf.GPT2Model):
    """transformers' GPT2Model on fastgpt2's operators."""


class FastGenerationMixin:
    """The hook of a faster `generate`: fastgpt2/transformers/generation.py takes this class's place."""


class GPT2LMHeadModel(_Accelerated, FastGenerationMixin, hf.GPT2LMHeadModel):
    """transformers' GPT2LMHeadModel on fastgpt2's operators."""


class GPT2DoubleHeadsModel(_Accelerated, FastGenerationMixin, hf.GPT2DoubleHeadsModel):
    """transformers' GPT2DoubleHeadsModel on fastgpt2's operators."""


class GPT2ForSequenceClassification(_Accelerated, hf.GPT2ForSequenceClassification):
    """transformers' GPT2ForSequenceClassification on fastgpt2's operators."""


class GPT2ForTokenClassification(_Accelerated, hf.GPT2ForTokenClassification):
    """transformers' GPT2ForTokenClassification on fastgpt2's operators."""


class GPT2ForQuestionAnswering(_Accelerated, hf.GPT2ForQuestionAnswering):
    """transformers' GPT2ForQuestionAnswering on fastgpt2's operators."""


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
