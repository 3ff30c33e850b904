"""Prefix sharing: a common prefix of several prompts is computed once, and its keys and values are copied."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

# At least this many tokens at the end of a prompt are always computed. The logits after the last token are needed, and
# the native backend rounds attention of a single token differently from attention of several.
MIN_COMPUTED = 2
# A shorter common prefix is computed again: copying it, with the extra pass that this takes, would cost as much.
MIN_SHARED = 16

Ids = Sequence[int]


@dataclass(eq=False)
class Holder:
    """A sequence of tokens whose keys and values are in the cache, or will be.

    Attributes:
        ids: The tokens.
        slot: The cache slot, or -1 while it is not assigned.
        source: The holder that the first tokens are copied from, or None if none are copied.
        shared: The number of tokens that are copied from `source`.
        wave: The number of passes that must run before the other tokens are computed; -1 if they are in the cache.
    """

    ids: tuple[int, ...]
    slot: int = -1
    source: Holder | None = None
    shared: int = 0
    wave: int = -1


class PrefixIndex:
    """Finds, for each prompt, the earlier prompt with the longest common prefix.

    In sorted order that prompt is a neighbour of the new one. The tokens that are computed are therefore those of a
    prefix tree, except that prefixes shorter than `MIN_SHARED` are computed again.
    """

    def __init__(self, held: dict[int, tuple[int, ...]]) -> None:
        """Start from a cache; `held` maps its slots to the tokens that they begin with."""
        self._holders = sorted((Holder(ids, slot) for slot, ids in held.items()), key=lambda holder: holder.ids)
        self._keys = [holder.ids for holder in self._holders]

    def add(self, ids: tuple[int, ...]) -> Holder:
        """Add a prompt, and find what it copies and from where. Later prompts may copy from it in turn."""
        new = Holder(ids, wave=0)
        at = bisect_left(self._keys, ids)
        most = len(ids) - MIN_COMPUTED
        found = [(min(common_prefix(ids, other.ids), most), other) for other in self._holders[max(at - 1, 0) : at + 1]]
        if found:
            shared, source = max(found, key=lambda pair: pair[0])
            # Tokens that the source itself copies are available earlier, without waiting for the source.
            while source.source is not None and shared < source.shared + MIN_SHARED:
                source, shared = source.source, min(shared, source.shared)
            if shared >= MIN_SHARED:
                new.source, new.shared, new.wave = source, shared, source.wave + 1
        self._keys.insert(at, ids)
        self._holders.insert(at, new)
        return new


def common_prefix(one: Ids, other: Ids) -> int:
    """The length of the longest common prefix of two sequences."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
