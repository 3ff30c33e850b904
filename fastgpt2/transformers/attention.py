"""`attn_implementation="fastgpt2"`: causal attention for every model of transformers that takes attention by name.

transformers asks two functions. The mask function is called once a forward pass and says what the attention functions
of all layers get as their mask:

- None: plain causal attention;
- `Ragged`: causal attention within documents. They are the tokens that a 2-D padding mask keeps, or the sequences that
  position ids, which restart, pack into a row. Where padding follows a token, only within `padding_ignored`, for
  transformers' generation reads what stands in a last position that is padding;
- a 4-D mask, as transformers makes it for PyTorch's own operator, for everything else (a cache with padding, windows,
  masks of the user's own, a trace of `torch.compile`).

The attention function takes the first two to `fastgpt2.kernels` and the last to PyTorch's operator.
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
# What changes the maths of attention and is not here: refused, not ignored.
_REFUSED = {
    "softcap": "a soft cap of the scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias of the scores by position",
    "cache": "a paged cache",
}


_IS_IGNORED = ContextVar("padding_is_ignored", default=False)


@contextlib.contextmanager
def padding_ignored(ignored: bool = True) -> Iterator[None]:
    """Forward passes in which nobody reads hidden states at padding."""
    token = _IS_IGNORED.set(ignored)
    try:
        yield
    finally:
        _IS_IGNORED.reset(token)


class Ragged:
    """Which of B x T tokens attend, and where documents begin: they are laid end to end, one row after the other.

    The outputs at the other positions are 0. Hidden states there mean nothing, as with flash attention.
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
        """One document a row: the tokens that a (B, T) bool mask keeps."""
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
    """The documents that a 4-D mask (B, 1, T, T) separates, if it is causal within each and nothing else."""
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
    """The mask of a forward pass; arguments as transformers' mask functions take them."""
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
    # Packed sequences come as a function of positions; what it means is in the mask that it makes.
    is_packed = is_whole and mask_function is not causal_mask_function and attention_mask is None
    documents = None
    if is_packed and mask is not None and mask.shape == (batch_size, 1, q_length, q_length):
        documents = _documents(mask)
    return mask if documents is None else documents


def causal_mask_4d(mask: Tensor) -> Tensor:
    """What a 2-D padding mask (B, T) means to PyTorch's operator: (B, 1, T, T), True where a query sees a key."""
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
    """Attention of query (B, H, T, D) to key and value (B, H or fewer, S, D) -> (B, T, H, D), and no weights.

    ValueError for what would change the result and is not here (soft caps, attention sinks ...).
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
