"""`attn_implementation="fastgpt2"`: causal attention for every model of transformers that takes attention by name.

transformers calls two functions. The mask function is called once per forward pass. It returns the mask that the
attention functions of all layers get:

- None for plain causal attention.
- `Ragged` for causal attention within documents. A document is the tokens of a row that a 2-D padding mask keeps, or
  one of the sequences that restarting position ids pack into a row. If padding follows a token, this is used only
  within `padding_ignored`, because transformers' generation reads the hidden state in the last position even if that is
  padding.
- a 4-D mask, which transformers makes for PyTorch's own operator, for everything else (a cache with padding, windows,
  the user's own masks, tracing by `torch.compile`).

The attention function passes the first two to `fastgpt2.kernels`, and the last to PyTorch's operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from fastgpt2_kernels import ops

NAME = "fastgpt2"
# Options that change the result and are not supported. They are refused, not ignored.
_REFUSED = {
    "softcap": "a soft cap of the scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias of the scores by position",
    "cache": "a paged cache",
}


_IS_IGNORED = ContextVar("padding_is_ignored", default=False)


@contextlib.contextmanager
def padding_ignored(ignored: bool = True) -> Iterator[None]:
    """Declare that nobody reads the hidden states at padding of the forward passes in this block."""
    token = _IS_IGNORED.set(ignored)
    try:
        yield
    finally:
        _IS_IGNORED.reset(token)


class Ragged:
    """Which of B x T tokens attend, and where documents begin. The tokens of all rows are laid end to end.

    The outputs at all other positions are 0. Hidden states there have no meaning, as with flash attention.
    """

    def __init__(self, kept: Tensor, starts: Tensor) -> None:
        """Args: kept: (B, T) bool, the tokens that attend. starts: (B, T) bool, the first tokens of documents."""
        self.shape = kept.shape
        self.index = kept.flatten().nonzero().squeeze(-1)  # (N,) of B * T
        first = starts.flatten().index_select(0, self.index).nonzero().squeeze(-1)
        cu_seqlens = torch.cat((first, first.new_tensor([len(self.index)]))).to(torch.int32)
        self.documents = ops.plan_documents(cu_seqlens, len(self.index))

    @classmethod
    def from_padding(cls, mask: Tensor) -> Ragged:
        """One document per row, of the tokens that a (B, T) bool mask keeps."""
        return cls(mask, mask & (mask.cumsum(1) == 1))

    def attend(self, qkv: Tensor, num_heads: int, **options: Any) -> Tensor:
        """Attention on the packed projection: qkv (B, T, 3C) -> (B, T, C)."""
        B, T = self.shape
        width = qkv.shape[-1] // 3
        documents = ops.Documents(*(t.to(qkv.device) for t in self.documents))
        flat = qkv.reshape(B * T, -1)
        if len(self.index) == B * T:
            return ops.causal_attention_packed(flat[None], num_heads, cu_seqlens=documents, **options).view(B, T, width)
        index = self.index.to(qkv.device)
        kept = flat.index_select(0, index)[None]
        out = ops.causal_attention_packed(kept, num_heads, cu_seqlens=documents, **options)[0]
        return out.new_zeros(B * T, width).index_copy(0, index, out).view(B, T, width)


def _documents(mask: Tensor) -> Ragged | None:
    """The documents that a 4-D mask (B, 1, T, T) separates; None if it is not just causal within each document."""
    seen = mask[:, 0]
    starts = ~torch.diagonal(seen, -1, 1, 2)  # a token that does not see the one before it
    starts = nn.functional.pad(starts, (1, 0), value=True)
    document = starts.cumsum(1)
    causal = (document[:, :, None] == document[:, None, :]).tril_()
    return Ragged(torch.ones_like(starts), starts) if torch.equal(seen, causal) else None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | Ragged | None:
    """The mask of a forward pass. The arguments are those of transformers' mask functions."""
    is_whole = (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and isinstance(q_offset, int)
        and (q_offset, kv_offset) == (0, 0)
        and q_length == kv_length
    )
    if (
        is_whole
        and mask_function is causal_mask_function
        and allow_is_causal_skip
        and attention_mask is not None
        and attention_mask.shape == (batch_size, q_length)
    ):
        if attention_mask.all():
            return None
        kept = attention_mask.bool()
        if _IS_IGNORED.get() or not (kept[:, :-1] & ~kept[:, 1:]).any():
            return Ragged.from_padding(kept)
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )
    # Packed sequences come as a function of positions. The mask it makes shows what they are.
    is_packed = is_whole and mask_function is not causal_mask_function and attention_mask is None
    documents = None
    if is_packed and mask is not None and mask.shape == (batch_size, 1, q_length, q_length):
        documents = _documents(mask)
    return mask if documents is None else documents


def causal_mask_4d(mask: Tensor) -> Tensor:
    """Turn a 2-D padding mask (B, T) into one for PyTorch's operator: (B, 1, T, T), True where a query sees a key."""
    B, T = mask.shape
    seen = sdpa_mask(B, T, T, attention_mask=mask.bool(), allow_is_causal_skip=False, device=mask.device)
    return seen.expand(B, 1, T, T)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Ragged | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of query (B, H, T, D) to key and value (B, H or fewer, S, D) -> (B, T, H, D). Returns no weights.

    Raises:
        ValueError: An option that changes the result is not supported (a soft cap, attention sinks ...).
    """
    for name, what in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(
                f'attn_implementation="{NAME}" does not support {name} ({what}), which {type(module).__name__} uses; '
                'choose "eager"'
            )
    T, S = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_ours = (
        causal
        and (attention_mask is None or isinstance(attention_mask, Ragged))
        and T == S
        and query.shape[-1] == value.shape[-1]
        and (scaling is None or scaling > 0)
    )
    if not is_ours:
        if isinstance(attention_mask, Ragged):
            raise ValueError(
                f'attn_implementation="{NAME}": {type(module).__name__} must attend causally among the '
                f'{attention_mask.shape[1]} tokens of its padding mask; it attends differently: choose "sdpa"'
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if isinstance(attention_mask, Ragged):
        qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in (query, key, value)], -1)
        heads = query.shape[1]
        out = attention_mask.attend(qkv, heads, scale=scaling, dropout_p=dropout)
        return out.view(*out.shape[:2], heads, -1), None
    out = ops.causal_attention(query, key, value, scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the name "fastgpt2" known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
