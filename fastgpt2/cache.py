"""The key-value cache of generation: fixed slots, a length for every slot, no padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt2.config import GPT2Config
from fastgpt2_kernels import ops

# Slots grow by whole blocks of tokens, so that a growing batch seldom copies its cache.
BLOCK_TOKENS = 64


class KVCache:
    """The keys and values of every layer, for several sequences of different lengths.

    A slot holds one sequence. It is free for another one when its length is set back to 0. What lies past a slot's
    length is never read.

    Args:
        config: the model's configuration.
        num_slots: the number R of slots.
        capacity: the tokens that each slot has room for at first, by default the model's context.
        dtype: the model's dtype or float32.
        device: where the cache is.

    Attributes:
        keys: (L, R, H, S, D).
        values: (L, R, H, S, D).
        lengths: the number of tokens that each slot holds.

    Raises:
        ValueError: There is no slot, or the capacity exceeds the model's context.

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
        """What to hold a model's keys and values in: CPUs attend to float32 faster than to a half precision."""
        return torch.float32 if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else dtype

    @property
    def num_slots(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens every slot has room for at present."""
        return self.keys.shape[3]

    def _round(self, tokens: int) -> int:
        return min(self.config.context_length, -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS)

    def reserve(self, tokens: int) -> None:
        """Make room for more tokens in every slot, and keep what is held.

        Raises:
            ValueError: `tokens` exceeds the model's context.
        """
        if tokens > self.config.context_length:
            raise ValueError(f"KVCache: {tokens} tokens do not fit in the context of {self.config.context_length}")
        if tokens > self.capacity:
            self.keys = self._grown(self.keys, self._round(tokens))
            self.values = self._grown(self.values, self._round(tokens))

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        # All there was room for, not up to `lengths`: decoding on a GPU counts on the device, ahead of the host.
        new = ops.use_large_pages(old.new_empty((*old.shape[:3], capacity, old.shape[4])))
        new[:, :, :, : old.shape[3]] = old
        return new

    def fork(self, source: int, targets: list[int], length: int | None = None) -> None:
        """Copy the first `length` tokens (by default all) of slot `source` into the slots `targets`."""
        length = self.lengths[source] if length is None else length
        for target in targets:
            self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
            self.values[:, target, :, :length] = self.values[:, source, :, :length]
            self.lengths[target] = length

    def free(self, slot: int) -> None:
        self.lengths[slot] = 0
