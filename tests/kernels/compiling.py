"""Compile a kernel for a GPU that is not present, and measure the result: registers, spills, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastgpt2_kernels.triton import launch
from tests.kernels.races import unordered

TARGETS = {
    name: GPUTarget("hip", name, 64) if launch.is_amd(name) else GPUTarget("cuda", int(name[3:]), 32)
    for name in launch.ARCHITECTURES
}
_LEVELS = ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)([^;]*);")


class Case(NamedTuple):
    """A kernel and its specialization. The arguments named in `aligned` are multiples of 16.

    signature: the type of every argument, or a tuple of the types of its members; None for an argument that is None.
    constants: the values of "constexpr" arguments. A member of a tuple is named as in the code: "x.stride".
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    options: dict[str, Any]
    aligned: tuple[str, ...]


def members(signature: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    """The name, place and type of every argument, and of every member of arguments that are tuples."""

    def visit(name: str, place: tuple[int, ...], kind: Any) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
        if not isinstance(kind, tuple):
            yield name, place, kind
            return
        for i, (member, inner) in enumerate(zip(kind._fields, kind, strict=True)):
            yield from visit(f"{name}.{member}", (*place, i), inner)

    for i, (name, kind) in enumerate(signature.items()):
        yield from visit(name, (i,), kind)


def pointers_and_strides(signature: dict[str, Any]) -> tuple[str, ...]:
    """The names of these arguments' pointers and strides, which are multiples of 16 for most kernels."""
    names = ((name, kind) for name, _, kind in members(signature) if kind is not None)
    return tuple(name for name, kind in names if kind.startswith("*") or "stride" in name.split(".")[-1])


def _given(kind: Any) -> Any:
    """Triton's name of the type. None is a constant."""
    if isinstance(kind, tuple):
        return type(kind)(*map(_given, kind))
    return "constexpr" if kind is None else kind


def compile_case(case: Case, target: GPUTarget) -> dict[str, Any]:
    """Registers, bytes of shared memory, spills (all, and those in loops), tensor-core and 128-bit instructions.

    Also "reductions", which decide the order of additions; see `_reductions`. For NVIDIA also "races", the loads and
    stores without a barrier between them; see `races.py`.
    """
    assert list(case.signature) == case.kernel.arg_names, "the kernel's arguments have changed"
    found = list(members(case.signature))
    assert set(case.aligned) <= {name for name, _, _ in found}, "no such argument"
    # Triton generates a launch function that mixes the kernel's argument names with its own, such as "options".
    create_function_from_signature(case.kernel.signature, case.kernel.params, make_backend(target))
    attributes = {place: [["tt.divisibility", 16]] for name, place, _ in found if name in case.aligned}
    constants = dict(case.constants) | {place: None for _, place, kind in found if kind is None}
    signature = {name: _given(kind) for name, kind in case.signature.items()}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": case.num_warps, **case.options})
    result = {"case": case.name, "warps": case.num_warps, "shared": compiled.metadata.shared}
    result["reductions"] = _reductions(compiled.asm["ttgir"])
    if target.backend == "hip":
        return result | _read_amd(compiled.asm)
    pointers = [name for name, _, kind in found if kind is not None and kind.startswith(("*", "tensordesc"))]
    pairs = []
    if case.num_warps > 1:
        pairs = unordered(compiled.asm["ptx"], compiled.asm["ttgir"], case.kernel.__name__, pointers)
    return result | _read_nvidia(compiled.asm) | {"races": pairs}


def _reductions(ttgir: str) -> list[list[int]]:
    """For each tt.reduce over a blocked layout, how its dimension is laid out.

    That is its length, and how many of its elements lie in neighbouring registers of a thread, in lanes, and in warps.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)$", ttgir, re.MULTILINE))
    found = []
    for reduce in re.finditer(
        r'"tt\.reduce"\(.*?axis = (\d+)[^:]*: i32.*?\}\) : \(tensor<((?:\d+x)+)(.*?)>\) ->', ttgir, re.DOTALL
    ):
        axis, shape, layout = int(reduce[1]), reduce[2].split("x"), reduce[3]
        length = int(shape[axis])
        for dim in re.findall(r"dim = (\d+)", layout)[::-1]:  # nested slices; the innermost parent comes last
            axis += axis >= int(dim)
        name = re.search(r"#(?!ttg)\w+", layout)
        if name is not None and name[0] in layouts:
            sizes = [re.search(rf"{of} = \[(.*?)\]", layouts[name[0]]) for of in _LEVELS]
            found.append([length, *(int(size[1].split(",")[axis]) for size in sizes if size)])
    return found


def _read_amd(asm: dict[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]
    # On AMD, scalar registers spill to lanes of vector registers, not to memory.
    spills = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))
    return {
        "registers": max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text)),
        "spills": spills,
        "loop_spills": spills,
        "tensor_core": len(re.findall(r"v_mfma_", text)),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
    }


def _read_nvidia(asm: dict[str, Any]) -> dict[str, int]:
    ptx = asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        spills = _number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage)
        loop_spills = _loop_spills(_cuobjdump("-sass", file.name)) if spills else 0
    wide_loads = r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.c\w\.[^;]*, 0x10,|cp\.async\.bulk\.tensor"
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spills": spills,
        "loop_spills": loop_spills,
        "tensor_core": len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
        "wide_loads": len(re.findall(wide_loads, ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
    }


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"cuobjdump printed no {pattern}: {text[:200]}")
    return int(found[1])


def _loop_spills(sass: str) -> int:
    """The loads and stores of local memory between a backward branch and its target."""
    instructions = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(sass)]
    loops = []
    for at, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.split(".")[0] == "BRA" and target is not None and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    local = [at for at, name, _ in instructions if name.split(".")[0] in ("LDL", "STL")]
    return sum(any(start <= at <= end for start, end in loops) for at in local)
