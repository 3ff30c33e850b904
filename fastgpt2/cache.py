"""The key-value cache of generation: a fixed number of slots, each with its own length, without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt2.config import GPT2Config
from fastgpt2_kernels import ops

# Slots grow by whole blocks of tokens, so that the cache is rarely reallocated and copied.
BLOCK_TOKENS = 64


class KVCache:
    """The keys and values of every layer, for several sequences of different lengths.

    A slot holds one sequence. Setting its length back to 0 frees it for another one. Whatever lies past a slot's length
    is never read.

    Args:
        config: The model's configuration.
        num_slots: The number R of slots.
        capacity: The number of tokens that each slot has room for at first; by default the model's context.
        dtype: The model's dtype, or float32.
        device: The device that holds the cache.

    Attributes:
        keys: The keys, (L, R, H, S, D), with S the capacity and D the head size.
        values: The values, (L, R, H, S, D).
        lengths: The number of tokens in each slot.

    Raises:
        ValueError: `num_slots` is below 1, or the capacity exceeds the model's context.

    Example:
        >>> cache = KVCache(GPT2Config(hidden_size=64, num_heads=4, num_layers=2), num_slots=3)
        >>> cache.lengths
        [0, 0, 0]
    """

    def __init__(
        self,
        config: GPT2Config,
        num_slots: int,
        capacity: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"KVCache: num_slots must be >= 1; got {num_slots}")
        capacity = config.context_length if capacity is None else capacity
        if not 1 <= capacity <= config.context_length:
            raise ValueError(f"KVCache: capacity must be in [1, {config.context_length}] (the context); got {capacity}")
        self.config = config
        self.lengths = [0] * num_slots
        shape = (config.num_layers, num_slots, config.num_heads, self._round(capacity), config.head_dim)
        self.keys, self.values = (ops.use_large_pages(torch.empty(shape, dtype=dtype, device=device)) for _ in range(2))

    @staticmethod
    def best_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype to hold a model's keys and values in. CPUs compute attention faster in float32 than in half."""
        return torch.float32 if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else dtype

    @property
    def num_slots(self) -> int:
        """The number of slots."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """The number of tokens that every slot has room for now."""
        return self.keys.shape[3]

    def _round(self, tokens: int) -> int:
        return min(self.config.context_length, -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS)

    def reserve(self, tokens: int) -> None:
        """Make room for at least `tokens` tokens in every slot. The contents are kept.

        Args:
            tokens: The capacity that is needed.

        Raises:
            ValueError: `tokens` exceeds the model's context.
        """
        if tokens > self.config.context_length:
            raise ValueError(
                f"KVCache: {tokens} tokens do not fit in the context of {self.config.context_length}; shorten the input"
            )
        if tokens > self.capacity:
            self.keys = self._grown(self.keys, self._round(tokens))
            self.values = self._grown(self.values, self._round(tokens))

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        # Copies the whole capacity, not just up to `lengths`: while a GPU decodes, the lengths on the device are ahead
        # of the host's.
        new = ops.use_large_pages(old.new_empty((*old.shape[:3], capacity, old.shape[4])))
        new[:, :, :, : old.shape[3]] = old
        return new

    def fork(self, source: int, targets: list[int], length: int | None = None) -> None:
        """Copy the first `length` tokens of a slot into other slots, to draw several samples from one prompt.

        Args:
            source: The slot to copy from.
            targets: The slots to copy into; their former contents are dropped.
            length: The number of tokens; None copies all.
        """
        length = self.lengths[source] if length is None else length
        for target in targets:
            self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
            self.values[:, target, :, :length] = self.values[:, source, :, :length]
            self.lengths[target] = length

    def free(self, slot: int) -> None:
        """Free a slot for another sequence."""
        self.lengths[slot] = 0
