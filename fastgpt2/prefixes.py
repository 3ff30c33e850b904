"""What prompts have in common: a prefix is computed once, and its keys and values are copied for the other prompts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

# Of each prompt so many tokens are always computed: the logits after the last one are needed, and the native backend
# rounds the attention of one token otherwise than that of several.
MIN_COMPUTED = 2
# A prefix that spares fewer tokens than this is computed anew: its copy, and a pass of its own, would cost as much.
MIN_SHARED = 16

Ids = Sequence[int]


@dataclass(eq=False)
class Holder:
    """Tokens whose keys and values are in the cache, or will be.

    slot: where, -1 while that is open. shared: how many of them are copied from `source`, None if none are. wave: after
    how many other passes the rest is computed; what is in the cache already has wave -1.
    """

    ids: tuple[int, ...]
    slot: int = -1
    source: Holder | None = None
    shared: int = 0
    wave: int = -1


class PrefixIndex:
    """Finds, for each prompt, the one before it that begins most like it.

    Neighbours in sorted order have the longest common prefix, so what is computed is what a prefix tree would hold, but
    for branches shorter than `MIN_SHARED`.
    """

    def __init__(self, held: dict[int, tuple[int, ...]]) -> None:
        """held: the tokens that the cache's slots begin with."""
        self._holders = sorted((Holder(ids, slot) for slot, ids in held.items()), key=lambda holder: holder.ids)
        self._keys = [holder.ids for holder in self._holders]

    def add(self, ids: tuple[int, ...]) -> Holder:
        """Say what a new prompt copies and from where. It is found by the prompts after it."""
        new = Holder(ids, wave=0)
        at = bisect_left(self._keys, ids)
        most = len(ids) - MIN_COMPUTED
        found = [(min(common_prefix(ids, other.ids), most), other) for other in self._holders[max(at - 1, 0) : at + 1]]
        if found:
            shared, source = max(found, key=lambda pair: pair[0])
            # What the source itself copies is there earlier, without waiting for the source.
            while source.source is not None and shared < source.shared + MIN_SHARED:
                source, shared = source.source, min(shared, source.shared)
            if shared >= MIN_SHARED:
                new.source, new.shared, new.wave = source, shared, source.wave + 1
        self._keys.insert(at, ids)
        self._holders.insert(at, new)
        return new


def common_prefix(one: Ids, other: Ids) -> int:
    """How many tokens at the beginning are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
