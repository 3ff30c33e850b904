"""GPT-2 (Radford et al. 2019) as a PyTorch module: one forward pass, with or without a cache.

It has pre-LayerNorm blocks, learned positions and a tied head. `fastgpt2.GPT2` in gpt2.py adds files and generation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgpt2.cache import KVCache
from fastgpt2.config import GPT2Config
from fastgpt2.layers import Block, Linear, Transformer, apply_linear
from fastgpt2.operators import CachedAttention, CausalAttention, Operators, operator_backend
from fastgpt2.tokenizer import Tokenizer
from fastgpt2_kernels import ops

if TYPE_CHECKING:
    from typing_extensions import Self


class GPT2Base(nn.Module):
    """The network: token ids in, hidden states or logits out. Users build its subclass `GPT2`."""

    def __init__(
        self,
        config: GPT2Config | None = None,
        *,
        dropout_rate: float | None = None,
        backend: str = "auto",
        **fields: Any,
    ) -> None:
        super().__init__()
        if config is not None and not isinstance(config, GPT2Config):
            raise TypeError(f"GPT2: config must be a GPT2Config; got {type(config).__name__}; name sizes by keyword")
        if config is not None and (fields or dropout_rate is not None):
            names = [*fields, *(["dropout_rate"] if dropout_rate is not None else [])]
            raise TypeError(f"GPT2: give a config or its fields, not both; got a config and {', '.join(names)}")
        if config is None:
            unknown = sorted(set(fields) - set(GPT2Config.__dataclass_fields__))
            if unknown:
                raise TypeError(f"GPT2: unknown argument {', '.join(unknown)}; see GPT2Config for its fields")
            if dropout_rate is not None:
                for name in ("residual_dropout", "embedding_dropout", "attention_dropout"):
                    fields.setdefault(name, dropout_rate)
            config = GPT2Config(**fields)
        ops.check_backend(backend)
        self.config = config
        self.backend = backend
        self.tokenizer: Tokenizer | None = None  # for generation and scoring; the network does not use it
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        # On the meta device a checkpoint follows. Initializing would be useless, and would import half of PyTorch.
        if self.device.type != "meta":
            self.init_weights()

    @classmethod
    def from_config(cls, config: GPT2Config | str, *, backend: str = "auto", **changes: Any) -> Self:
        """Build a model with fresh weights from a configuration or a preset.

        Args:
            config: A configuration, or a preset's name such as "gpt2-medium".
            backend: The kernels to use: "auto", "triton", "native" or "torch".
            changes: Fields of the configuration to override.

        Raises:
            ValueError: The preset is unknown, or a field is out of range.
        """
        named = GPT2Config.preset(config, **changes) if isinstance(config, str) else config.replace(**changes)
        return cls(named, backend=backend)

    # -- weights ------------------------------------------------------------------------------------------------

    def tie_weights(self) -> None:
        """Let the head share the token embeddings' weight, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.register_parameter("weight", self.transformer.wte.get_parameter("weight"))

    def init_weights(self) -> None:
        """Initialize as GPT-2 does: normal weights, residual projections scaled by 1/sqrt(2 L), zero biases."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if ".act." in name:
                continue  # learned activations keep the values they were built with
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif ".ln_" in name:
                nn.init.ones_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.num_layers))
            else:
                nn.init.normal_(parameter, std=std)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.transformer.wte.weight.dtype

    def num_parameters(self) -> int:
        """The number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def recompute(self, on: bool = True) -> None:
        """Say whether blocks keep only their input for the backward pass, and compute their activations there again.

        Args:
            on: False keeps the activations, as a new model does.
        """
        for block in self.transformer.h:
            if isinstance(block, Block):
                block.recompute = on

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: KVCache | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
        **loss_options: Any,
    ) -> Tensor:
        """Compute logits, or with `targets` the loss without storing logits.

        Args:
            input_ids: Token ids, (B, T) int64 or int32.
            cache: A cache of B slots, which may hold rows of different lengths. The token ids are appended to it. Only
                in eval mode.
            position_ids: Positions, (B, T), in place of 0 .. T-1.
            cu_seqlens: Boundaries of packed documents; see `hidden_states`.
            targets: (B, T), the token that should follow each position. `calculate_loss` passes them here so that
                wrappers (DistributedDataParallel, FSDP, torch.compile) see the loss as part of the forward pass.
            loss_options: With `targets`, options of `fastgpt2.kernels.linear_cross_entropy`.

        Returns:
            Logits (B, T, V), or with `targets` the loss.

        Raises:
            TypeError: An argument is unknown.
            ValueError: The arguments do not fit each other, the model or its context.
        """
        if targets is None and loss_options:
            raise TypeError(f"GPT2: unknown argument {', '.join(loss_options)}; options of the loss need targets")
        if cache is None:
            hidden = self.hidden_states(input_ids, position_ids=position_ids, cu_seqlens=cu_seqlens)
            return self.logits(hidden) if targets is None else self._loss(hidden, targets, loss_options)
        if position_ids is not None or cu_seqlens is not None or targets is not None:
            raise ValueError(
                "GPT2: a cache cannot be combined with position_ids, cu_seqlens or targets; leave either the cache out "
                "or those"
            )
        if self.training:
            raise ValueError("GPT2: a cache needs evaluation mode; call model.eval() first")
        self._check_ids(input_ids)
        B, T = input_ids.shape
        if cache.num_slots != B:
            raise ValueError(
                f"GPT2: input_ids must have a row for each of the cache's {cache.num_slots} slots; got {B} rows"
            )
        if T == 0:
            return self.logits(input_ids.new_zeros((B, 0, self.config.hidden_size), dtype=self.dtype))
        plan = ops.plan_rows(range(B), [T] * B, cache.lengths, self.device)
        return self.logits(self.extend(input_ids.reshape(-1), plan, cache)).view(B, T, -1)

    def hidden_states(
        self, input_ids: Tensor, *, position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Compute the hidden states after the final LayerNorm; `logits` turns them into logits.

        Args:
            input_ids: Token ids, (B, T) int64 or int32.
            position_ids: Positions, (B, T), in place of 0 .. T-1.
            cu_seqlens: Boundaries of documents packed end to end into one row (B = 1), (documents + 1,). Documents do
                not attend to each other, and positions start at 0 in each.

        Returns:
            Hidden states, (B, T, C).

        Raises:
            ValueError: The input does not fit the model or its context.
        """
        self._check_ids(input_ids)
        T = input_ids.shape[1]
        context = self.config.context_length
        documents = None if cu_seqlens is None else ops.plan_documents(cu_seqlens.to(self.device), T)
        if position_ids is None and documents is not None:
            position_ids = (torch.arange(T, device=self.device) - documents.starts)[None]
        elif position_ids is None:
            if context < T:
                raise ValueError(f"GPT2: {T} tokens do not fit in the context of {context}; shorten the input")
            position_ids = torch.arange(T, device=input_ids.device).expand_as(input_ids)
        elif position_ids.shape != input_ids.shape or position_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"GPT2: position_ids must be integers of shape {tuple(input_ids.shape)}; "
                f"got {position_ids.dtype} {tuple(position_ids.shape)}"
            )
        self._check_range(position_ids, context, "positions", "the context")
        dropout_p = self.config.attention_dropout if self.training else 0.0
        attend = CausalAttention(self.config, self.backend, dropout_p=dropout_p, documents=documents)
        return self.transformer(input_ids, position_ids, attend, Operators(self.backend))

    @torch.no_grad()
    def extend(self, token_ids: Tensor, plan: ops.RowPlan, cache: KVCache) -> Tensor:
        """Append new tokens to rows of a cache. Both prefill and decoding call this.

        The batch is ragged: rows of any lengths, with any numbers of new tokens, are computed together without padding.
        Dropout is off in every mode.

        Args:
            token_ids: The new tokens of all rows, packed end to end as `plan` says, (N,).
            plan: Which tokens belong to which row.
            cache: The cache to append to.

        Returns:
            Hidden states, (N, C); `logits` turns them into logits.

        Raises:
            ValueError: A row would not fit in the context. The cache is then unchanged.
        """
        self._check_range(token_ids, self.config.vocab_size, "token ids", "the vocabulary")
        needed = max((past + count for _, count, past in plan.rows), default=0)
        if needed > self.config.context_length:
            raise ValueError(
                f"GPT2: {needed} tokens do not fit in the context of {self.config.context_length}; shorten the input"
            )
        cache.reserve(needed)

        attend = CachedAttention(cache, plan, self.backend)
        operators = Operators(self.backend, may_drop=False)
        hidden = self.transformer(token_ids, plan.positions, attend, operators)
        for slot, count, past in plan.rows:
            cache.lengths[slot] = past + count
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head: map hidden states (..., C) to logits (..., V)."""
        return apply_linear(self.lm_head, hidden, Operators(self.backend))

    def _loss(self, hidden: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        if not isinstance(self.lm_head, Linear):
            raise ValueError(
                "GPT2: the loss needs the plain linear layer lm_head; it was replaced by a "
                f"{type(self.lm_head).__name__}: put no adapter on lm_head"
            )
        return ops.linear_cross_entropy(
            hidden, self.lm_head.weight, targets, backend=operator_backend(self.backend), **options
        )

    def _check_ids(self, input_ids: Tensor) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise ValueError(f"GPT2: input_ids must be a (B, T) tensor of token ids; got {got}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"GPT2: input_ids must be int64 or int32; got {input_ids.dtype}")
        if input_ids.device != self.device:
            raise ValueError(f"GPT2: input_ids must be on {self.device}, like the model; got {input_ids.device}")
        self._check_range(input_ids, self.config.vocab_size, "token ids", "the vocabulary")

    @staticmethod
    def _check_range(values: Tensor, limit: int, what: str, of: str) -> None:
        # On a GPU reading the values would wait for the device. There the embedding reports bad ids itself.
        if values.device.type != "cpu" or torch.compiler.is_compiling() or not values.numel():
            return
        low, high = (int(v) for v in values.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"GPT2: {what} must be in [0, {limit}) ({of}); got {low if low < 0 else high}")
