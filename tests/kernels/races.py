"""Find races inside a program in a kernel's PTX: a warp reads memory while another one writes it.

The warps of a program run at their own pace. If all of them load a number from global memory and one of them then
stores to it, the others may load it too late, unless there is a barrier between. Tests of values cannot find this,
because the interpreter and the sanitizer run the warps of a program in step.

Only NVIDIA's code is searched. AMD's is compiled from the same sources, with the same barriers.

The search covers every path of the code from a load to a store of the same memory, or from a store to a load, without a
barrier. Two addresses may be the same memory if they were computed from the same argument.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Arguments that may be the same tensor, by kernel.
ALIASES: dict[str, tuple[frozenset[str], ...]] = {
    "_cross_entropy_kernel": (frozenset({"logits.ptr", "grad.ptr"}),),
    "_linear_decode_kernel": (frozenset({"residual.ptr", "out.ptr"}),),
}
# (load, store) pairs without a barrier that are correct nevertheless, by kernel, and why. A pair whose address is the
# same for all threads is never correct, because every warp loads from it.
_SAME_ELEMENT = "a thread loads what it stores itself, and the number goes nowhere else"
_NEW_POSITIONS = "cached positions are loaded, new ones are stored"
REVIEWED: dict[str, dict[tuple[str, str], str]] = {
    "_cross_entropy_kernel": {("logits.ptr", "grad.ptr"): _SAME_ELEMENT},
    "_scale_rows_kernel": {("grad.ptr", "grad.ptr"): _SAME_ELEMENT},
    "_linear_decode_kernel": {("residual.ptr", "out.ptr"): _SAME_ELEMENT},
    "_decode_attention_kernel": {
        ("cache.k_ptr", "cache.k_ptr"): _NEW_POSITIONS,
        ("cache.v_ptr", "cache.v_ptr"): _NEW_POSITIONS,
        ("*table_ptr", "*table_ptr"): _NEW_POSITIONS,
    },
}

_STATEMENT = re.compile(r"(@!?%?\w+\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_REGISTER = re.compile(r"%[a-z]+\d+")
_THREAD = ("%tid.", "%laneid", "%warpid")
# The results of these are the same in all threads of a warp, whatever their operands.
_ALIKE = ("shfl", "redux", "vote", "ld.shared")


class Pair(NamedTuple):
    """A load and a store without a barrier on some path between them, named by the arguments of their addresses.

    own: both addresses differ between threads, so each thread may use only its own numbers.
    """

    load: str
    store: str
    own: bool


class _Statement(NamedTuple):
    is_conditional: bool
    name: str
    operands: str

    @property
    def operand_list(self) -> list[str]:
        """The operands. Those in braces or brackets count as one."""
        return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", self.operands)]

    @property
    def is_store(self) -> bool:
        return self.name.startswith(("st.global", "atom", "red."))

    @property
    def is_load(self) -> bool:
        is_copy = self.name.startswith("cp.async") and ".shared" in self.name and "[" in self.operands
        return self.name.startswith(("ld.global", "atom")) or is_copy

    @property
    def is_barrier(self) -> bool:
        return self.name.startswith(("bar.sync", "barrier.sync")) and self.operands.strip() == "0"

    @property
    def address(self) -> list[str]:
        """The registers that hold the address of an access to global memory."""
        brackets = re.findall(r"\[([^\]]*)\]", self.operands)
        return _REGISTER.findall(brackets[1 if self.name.startswith("cp.async") else 0].split(",")[0])

    @property
    def results(self) -> list[str]:
        has_none = self.name.startswith(("st.", "bar", "bra", "ret", "cp.async", "red.", "mbarrier", "fence"))
        return [] if has_none or not self.operands else _REGISTER.findall(self.operand_list[0])

    @property
    def sources(self) -> list[str]:
        """The registers that decide the result's value, except the predicate."""
        return [r for r in _REGISTER.findall(",".join(self.operand_list[1:])) if not r.startswith("%p")]


def unordered(ptx: str, ttgir: str, kernel: str, pointers: Sequence[str]) -> list[Pair]:
    """Every pair of a load and a store of the same memory that has no barrier on some path between them.

    `pointers` names the kernel's addresses and descriptors, in order. Before 3.8 Triton's code does not name the
    members of a tuple.
    """
    arguments = _arguments(ttgir, pointers)
    statements, branches = _parse(ptx)
    bases, threads = _trace(statements, arguments)
    groups = ALIASES.get(kernel, ())

    def memory(statement: _Statement) -> set[str]:
        found = set().union(*(bases.get(register, set()) for register in statement.address))
        return found.union(*(group for group in groups if group & found))

    accesses = {i: memory(s) for i, s in enumerate(statements) if s.is_load or s.is_store}
    lost = [statements[i] for i, found in accesses.items() if not found]
    if lost:
        raise ValueError(f"{kernel}: no argument found that this address is of: {lost[0]}")
    pairs = set()
    for i, of_first in accesses.items():
        for j in _reached(i, statements, branches):
            if j in accesses and of_first & accesses[j]:
                for load, store in ((i, j), (j, i)):
                    if statements[load].is_load and statements[store].is_store:
                        own = all(any(r in threads for r in statements[k].address) for k in (load, store))
                        names = [" ".join(sorted(_own_bases(statements[k], bases))) for k in (load, store)]
                        pairs.add(Pair(*names, own))
    return sorted(pairs)


def _own_bases(statement: _Statement, bases: dict[str, set[str]]) -> set[str]:
    return set().union(*(bases[register] for register in statement.address if register in bases))


def _arguments(ttgir: str, pointers: Sequence[str]) -> list[str | None]:
    """The names of the compiled function's arguments, in order; None for those that are not addresses."""
    header = re.search(r"tt\.func public @\w+\((.*?)\) attributes", ttgir, re.DOTALL)
    if header is None:
        raise ValueError("the code has no public function")
    found = re.findall(r"%[\w.]+: (!tt\.ptr|!tt\.tensordesc)?", header[1])
    if len(pointers) != sum(map(bool, found)):
        raise ValueError(f"the code has other addresses than {', '.join(pointers)}: {header[1]}")
    names = iter(pointers)
    return [next(names) if kind else None for kind in found]


def _parse(ptx: str) -> tuple[list[_Statement], dict[int, int]]:
    """The statements of the function's body, and the targets of its branches."""
    body = re.sub(
        r"//.*|^\s*\.(?:loc|reg|pragma)\b.*", "", ptx[ptx.index("{", ptx.index(".entry")) :], flags=re.MULTILINE
    )
    body = re.sub(r"^\s*[{}]\s*$", "", body.split(".section")[0], flags=re.MULTILINE)
    statements: list[_Statement] = []
    places: dict[str, list[int]] = {}
    for part in body.split(";"):
        text = part.strip()
        while (label := re.match(r"([$\w]+):(?!:)", text)) is not None:
            places.setdefault(label[1], []).append(len(statements))
            text = text[label.end() :].strip()
        if (found := _STATEMENT.fullmatch(text)) is not None:
            statements.append(_Statement(found[1] is not None, found[2], found[3]))
    branches = {}
    for i, statement in enumerate(statements):
        if statement.name.startswith("bra"):
            # A label of inline assembly occurs once for each copy of it; the nearest one is meant.
            branches[i] = min(places[statement.operands.strip()], key=lambda place, at=i: abs(place - at))
    return statements, branches


def _trace(statements: Sequence[_Statement], arguments: Sequence[str | None]) -> tuple[dict[str, set[str]], set[str]]:
    """For every register, the arguments that its value may be an address of; and which registers differ by thread."""
    bases: dict[str, set[str]] = {}
    threads: set[str] = set()
    has_changed = True
    while has_changed:
        has_changed = False
        for s in statements:
            if not s.results:
                continue
            made: set[str] = set()
            if s.name.startswith(("ld.param", "cvta.param", "mov")) and (at := re.search(r"_param_(\d+)", s.operands)):
                argument = arguments[int(at[1])]
                made = set() if argument is None else {argument}
            elif s.name.startswith("ld.global"):
                if "64" in s.name:  # an address that is loaded from memory
                    made = {f"*{base}" for base in _own_bases(s, bases) if not base.startswith("*")}
            elif not s.name.startswith(_ALIKE):
                made = set().union(*(bases.get(register, set()) for register in s.sources))
            differs = not s.name.startswith(_ALIKE) and (
                any(word in s.operands for word in _THREAD) or any(register in threads for register in s.sources)
            )
            for register in s.results:
                if not made <= bases.get(register, set()) or (differs and register not in threads):
                    bases.setdefault(register, set()).update(made)
                    threads.update([register] if differs else [])
                    has_changed = True
    return bases, threads


def _reached(start: int, statements: Sequence[_Statement], branches: dict[int, int]) -> set[int]:
    """The statements that may run after `start` without a barrier between."""

    def following(i: int) -> Iterator[int]:
        if i in branches:
            yield branches[i]
        if statements[i].is_conditional or not statements[i].name.startswith(("bra", "ret", "exit", "trap")):
            yield i + 1

    waiting, seen = list(following(start)), set()
    while waiting:
        i = waiting.pop()
        if i in seen or i >= len(statements) or statements[i].is_barrier:
            continue
        seen.add(i)
        waiting += following(i)
    return seen
