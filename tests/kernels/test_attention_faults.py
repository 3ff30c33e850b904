"""The checks of attention catch each of these deliberate mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.faults import load
from tests.kernels.test_attention import CASES, check_launchers, pytestmark  # noqa: F401

SOURCE = Path(__file__).parents[2] / "kernels/fastgpt2_kernels/triton/attention.py"
# Deliberate faults: the case that must notice it, the right code, and the wrong code.
MUTATIONS = {
    "diagonal off by one": (
        "square",
        "offs_s[None, :] <= walk.offs[:, None] + walk.offset",
        "offs_s[None, :] < walk.offs[:, None] + walk.offset",
    ),
    "diagonal one too far": (
        "square",
        "offs_s[None, :] <= walk.offs[:, None] + walk.offset",
        "offs_s[None, :] <= walk.offs[:, None] + walk.offset + 1",
    ),
    "diagonal off by one for dK and dV": (
        "square",
        "walk.offs[:, None] <= offs_t[None, :] + walk.offset",
        "walk.offs[:, None] < offs_t[None, :] + walk.offset",
    ),
    "documents see their neighbours in dK and dV": (
        "documents",
        "allowed = allowed & (walk.offs[:, None] >= doc_start[None, :])",
        "allowed = allowed & (walk.offs[:, None] >= 0 * doc_start[None, :])",
    ),
    "the cache's offset forgotten": (
        "chunk",
        "    offset = S - T\n",
        "    offset = 0 * S\n",
    ),
    "whole tiles reach too far": (
        "square",
        "(t_start + offset + 1) // BLOCK_S * BLOCK_S",
        "(t_start + offset + BLOCK_S) // BLOCK_S * BLOCK_S",
    ),
    "output not rescaled": (
        "square",
        "    acc = acc * alpha[:, None]\n",
        "",
    ),
    "sum not rescaled": (
        "square",
        "l = l * alpha + tl.sum(p, 1)",
        "l = l + tl.sum(p, 1)",
    ),
    "scale dropped in the forward": (
        "square",
        "p = tl.exp2(x * walk.scale_log2 - m_used[:, None])",
        "p = tl.exp2(x * LOG2_E - m_used[:, None])",
    ),
    "scale dropped from dq": (
        "square",
        "_store_tile(_head(dq, b, h), acc * scales.scale,",
        "_store_tile(_head(dq, b, h), acc,",
    ),
    "scale dropped from dk": (
        "square",
        "_store_tile(dk_head, dk_acc * scales.scale,",
        "_store_tile(dk_head, dk_acc,",
    ),
    "delta dropped": (
        "square",
        "ds = p * (dp - delta[:, None])",
        "ds = p * dp",
    ),
    "unmasked tail of keys": (
        "square",
        "mask=(start + offs_t < limit)[:, None] & (offs_d < D)[None, :], other=0.0)\n    elif",
        "mask=(start + offs_t < limit + 1)[:, None] & (offs_d < D)[None, :], other=0.0)\n    elif",
    ),
    "unmasked columns": (
        "square",
        "mask=(offs_d < D)[None, :], other=0.0",
        "mask=(offs_d < D + 1)[None, :], other=0.0",
    ),
    "rows stored past the end": (
        "square",
        "mask = (start + offs_t < limit)",
        "mask = (start + offs_t < limit + 1)",
    ),
    "wrong stride of v": (
        "chunk",
        "k, v = _head(k, b, h), _head(v, b, h)",
        "k, v = _head(k, b, h), Matrix(_head(v, b, h).ptr, v.stride_t + 1)",
    ),
    "heads mixed up": (
        "mixed",
        "b, h = bh // H, bh % H",
        "b, h = bh % H, bh // H",
    ),
    "every section the first": (
        "sections",
        "return section * SECTION + within % heads",
        "return within % heads",
    ),
    "documents see their neighbours": (
        "documents",
        "        allowed = allowed & (offs_s[None, :] >= walk.doc_start[:, None])\n",
        "        allowed = allowed\n",
    ),
    "documents' first tile skipped": (
        "documents",
        "num_lead = (whole_start - cut_start) // BLOCK_S",
        "num_lead = 0",
    ),
    "later documents not visited": (
        "documents",
        "last = tl.minimum(last, tl.load(doc_end_ptr + s_end - 1))",
        "last = tl.minimum(last, tl.load(doc_end_ptr + s_start))",
    ),
    "padding attended": (
        "padding",
        "        s_limit = t_limit\n",
        "",
    ),
    "dropout not scaled": (
        "dropout",
        "acc * (scales.keep_scale / l_used)[:, None]",
        "acc * (1.0 / l_used)[:, None]",
    ),
    "dropout's mask transposed": (
        "dropout",
        "zero + offs_g, zero + offs_t, zero + bh",
        "zero + offs_t, zero + offs_g, zero + bh",
    ),
    "dropout the same in all heads": (
        "dropout",
        "zero + bh",
        "zero",
    ),
    "dropout forgotten in dk": (
        "dropout",
        "        dp_t = tl.where(keep, dp_t * walk.keep_scale, 0.0)\n",
        "",
    ),
    "the last queries skipped": (
        "square",
        "tl.maximum(tl.cdiv(last - whole_end, BLOCK_T), 0)",
        "0",
    ),
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_interpreted_mistake_is_caught(interpreter, tiles, tmp_path, mistake):
    case, right, wrong = MUTATIONS[mistake]
    kernel = load(SOURCE, tmp_path, right, wrong)
    tiles((16, 16))
    with pytest.raises(AssertionError, match=r"over the budget|outside its rows"):
        check_launchers(kernel, CASES[case], interpreter)
