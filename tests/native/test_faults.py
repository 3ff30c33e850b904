"""The checks of the native kernels catch each of these deliberate mistakes."""

from __future__ import annotations

import pytest

from fastgpt2_kernels import native
from tests.native.building import COMPILER, build, run_tests, setup_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.why_not_native() is not None, reason=f"native backend: {native.why_not_native()}"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]

# For every mistake: the tests that must fail, the file, the right code, and the wrong code.
MISTAKES = {
    "the last block of K only": (
        "linear",
        "linear.h",
        "is_first ? acc[r][v] : load_as<Sum>(at) + acc[r][v]",
        "acc[r][v]",
    ),
    "a sum that depends on the number of rows": (
        "linear",
        "linear.h",
        "block < steps; block += BLOCK_STEPS",
        "block < steps; block += rows == 1 ? 64 : BLOCK_STEPS",
    ),
    "a row written past its end": (
        "linear",
        "linear.h",
        "to->out_stride + column, y, left)",
        "to->out_stride + column, y, VL)",
    ),
    "variance in one pass": (
        "linear",
        "linear.h",
        "const vf d = load_n(x + i, width - i, mean) - splat(mean);",
        "const vf d = load_n(x + i, width - i);",
    ),
    "int8 rows that share a scale": (
        "linear",
        "linear.h",
        "* scale[row + r];",
        "* scale[0];",
    ),
    "a query that sees one key more": (
        "attention",
        "attention.h",
        "i < s - past - first && i < NR",
        "i < s - past - first - 1 && i < NR",
    ),
    "parts that are not weighted": (
        "attention",
        "attention.h",
        "= vexp(splat(other[0] - max))[0];",
        "= 1.0f;",
    ),
    "another layer's cache": (
        "attention",
        "attention.h",
        "base + layer * cache->layer_stride",
        "base + 0 * layer * cache->layer_stride",
    ),
    "a row that does not fit": (
        "attention",
        "attention.h",
        "past + rows->counts[r] <= cache->capacity",
        "past <= cache->capacity",
    ),
    "noise of another position": (
        "sampling",
        "sampling.h",
        "(uint32_t)a->state.produced[slot]}",
        "0}",
    ),
    "six rounds of Philox": (
        "sampling",
        "sampling.h",
        "round < 7",
        "round < 6",
    ),
    "top-k keeps one more": (
        "sampling",
        "sampling.h",
        "kth_largest(kept, n, k);",
        "kth_largest(kept, n, k + 1);",
    ),
    "no top-p": (
        "sampling",
        "sampling.h",
        "if (top_p >= 1.0f) break;",
        "break;",
    ),
    "a token past the limit": (
        "step",
        "kernels.cpp",
        "produced < state->limits[slot]",
        "produced <= state->limits[slot]",
    ),
    "attention that does not wait": (
        "step",
        "kernels.cpp",
        "    meet_after(phase);",
        "    phase == QKV ? mark(a, us, phase, &since) : meet_after(phase);",
    ),
    "a projection that does not wait": (
        "step",
        "kernels.cpp",
        "    meet_after(ATTENTION);",
        "    mark(a, us, ATTENTION, &since);",
    ),
    "a share whose last panel nobody takes": (
        "linear",
        "team.h",
        "share(n, of, us.threads);",
        "share(n - 1, of, us.threads);",
    ),
    "a cache that is cut off, not rounded": (
        "attention",
        "simd.h",
        "(bits + 0x7FFFu + ((bits >> 16) & 1u))",
        "bits",
    ),
    "no second residual": (
        "step",
        "kernels.cpp",
        "N, operand_2, to_x,",
        "N, operand_2, to_qkv,",
    ),
    "steps that do not end with a row": (
        "step",
        "kernels.cpp",
        "a->more && next_of(a, slot).goes_on;",
        "a->more;",
    ),
    "steps that note their tokens in one place": (
        "step",
        "kernels.cpp",
        "a->steps_done++ * a->state.num_slots;",
        "a->steps_done++ * 0;",
    ),
    "a token past the context": (
        "step",
        "kernels.cpp",
        "past < a->context;",
        "past <= a->context;",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_caught(tmp_path, mistake):
    tests, file, right, wrong = MISTAKES[mistake]
    isa = list(setup_file().ISAS)[-1]
    extension = build(tmp_path, [isa], ["-O1"], right, wrong, file)
    result = run_tests(extension, [f"tests/native/test_{tests}.py"], FASTGPT2_NATIVE_ISA=isa, OMP_NUM_THREADS="1")
    assert result.returncode == 1, f"no test noticed {mistake!r}:\n{result.stdout}{result.stderr}"
    assert "failed" in result.stdout
