"""The attention kernels against float64, with random shapes, layouts, masks and dropout; and as PyTorch operators."""

from __future__ import annotations

import itertools
import math
import os
import random

import pytest
import torch

from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.triton import launch
from tests.helpers import assert_rms_within_budget, parts, random_ids, random_model
from tests.kernels.traffic import Traffic

# Triton's interpreter multiplies bfloat16 tiles wrong (it takes their bits), so bfloat16 is tested on compiled kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
# Tiles, besides the shipped ones, that put every kind of border within a short sequence.
TILES = [(16, 16), (32, 16), (16, 32), (32, 32), (32, 32), (64, 32), (16, 32), None]
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings(
        "ignore:invalid value:RuntimeWarning",
        "ignore:overflow:RuntimeWarning",
        "ignore:divide by zero:RuntimeWarning",
        "ignore:All-NaN:RuntimeWarning",
    ),
]


# -- cases --------------------------------------------------------------------------------------------------------


def random_case(rng: random.Random) -> dict:
    layout = rng.choice(["heads", "heads", "broadcast", "packed", "packed", "documents"])
    T = rng.choice([1, 2, 3, 15, 16, 17, 31, 32, 33, 33, 50])
    B, H = rng.choice([(1, 1), (1, 1), (1, 2), (2, 1), (2, 2)])
    if T < 15:  # with fewer numbers the largest error would be a matter of luck
        B, H = (1, 8) if layout == "documents" else (4, 2)
    D = rng.choice([1, 8, 16, 20, 32, 40, 64, 80])
    # Large logits only where products are summed in blocks and in several orders, like those of the plain expression.
    may_be_large = INTERPRETED and D > 1
    return {
        "layout": layout,
        "B": 1 if layout == "documents" else B,
        "H": H,
        "T": T,
        "S": T + rng.choice([0, 0, 1, 7, 30, 40]) if layout in ("heads", "broadcast") else T,
        "D": D,
        "dtype": rng.choice(DTYPES),
        "scale": rng.choice([None, None, 0.05, 1.0]),
        "lengths": layout != "documents" and rng.random() < 0.3,
        "dropout_p": rng.choice([0.0, 0.0, 0.0, 0.0, 0.1, 0.6]),
        "size": rng.choice([1.0, 1.0, 4.0 if may_be_large else 1.0]),
        "tiles": rng.choice(TILES),
        "tma": INTERPRETED and rng.random() < 0.3,
    }


def random_lengths(T: int, count: int) -> torch.Tensor:
    return torch.randint(0, T + 1, (count,), dtype=torch.int32)


def random_documents(T: int) -> torch.Tensor:
    cuts = torch.randint(0, T + 1, (random.randrange(6),)).sort().values
    return torch.tensor([0, *cuts.tolist(), T], dtype=random.choice([torch.int32, torch.int64]))


def surrounded(x: torch.Tensor) -> torch.Tensor:
    """The same values as a view in the middle of a larger buffer of NaN."""
    buffer = torch.full([n + 3 for n in x.shape[:-1]] + [x.shape[-1] + 8], float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[(*tuple(slice(1, n + 1) for n in x.shape[:-1]), slice(8, None))]
    return view.copy_(x)


def expected(inputs, dout, case, keep, mask):
    """(exact, plain) for output, log-sum-exp, dq, dk, dv; plain has the results of three orders of summing over D."""
    D = dout.shape[-1]
    orders = [torch.arange(D), torch.arange(D).flip(0), torch.randperm(D)]
    results = []
    for dtype, order in ((torch.float64, orders[0]), *((dout.dtype, order) for order in orders)):
        order, back = order.to(dout.device), order.argsort().to(dout.device)
        leaves = [x.to(dtype)[..., order].requires_grad_() for x in inputs]
        options = {"scale": case["scale"] or D**-0.5, "mask": mask}
        out = reference.causal_attention(*leaves, keep=keep, dropout_p=case["dropout_p"], **options)
        lse = reference.attention_lse(*leaves[:2], **options)
        grads = torch.autograd.grad(out, leaves, dout.to(dtype)[..., order])
        results.append((out.detach()[..., back], lse.detach(), *(grad[..., back] for grad in grads)))
    exact, *plains = results
    return zip(exact, zip(*plains, strict=True), strict=True)


def sizes_of_terms(inputs, dout, case):
    """The size of the summands. For example dS = P (dP - delta) cancels where one key has all the weight."""
    q, k, v = (x.double().abs() for x in inputs)
    dout = dout.double().abs()
    largest_dp = torch.matmul(dout, v.mT).max().item() / (1 - case["dropout_p"])
    scale = case["scale"] or q.shape[-1] ** -0.5
    return {
        "output": v.max().item() / (1 - case["dropout_p"]),
        "lse": scale * torch.matmul(q, k.mT).max().item(),
        "dq": scale * largest_dp * k.max().item(),
        "dk": scale * largest_dp * q.max().item(),
        "dv": dout.max().item() / (1 - case["dropout_p"]),
    }


def hold_all(got, inputs, dout, case, keep, mask):
    """Assert the 2x rule for output, log-sum-exp, dq, dk and dv, with root-mean-square errors.

    Where two keys share the weight of a row, the largest error would depend on how their two logits are rounded.
    """
    terms = sizes_of_terms(inputs, dout, case)
    names = ("output", "lse", "dq", "dk", "dv")
    for name, value, (exact, plains) in zip(names, got, expected(inputs, dout, case, keep, mask), strict=True):
        if name == "lse":
            assert torch.equal(value == float("-inf"), exact == float("-inf"))
            value, exact, *plains = (x.masked_fill(x == float("-inf"), 0.0) for x in (value, exact, *plains))
        what = f"{name} of {case}"
        assert_rms_within_budget(value, plains, exact, what, dtype=dout.dtype, terms=terms[name])


def check(case: dict, device: str) -> None:
    """Output, log-sum-exp and gradients of the public operator are within the budget."""
    B, H, T, S, D = (case[name] for name in "BHTSD")
    dtype, packed = case["dtype"], case["layout"] in ("packed", "documents")
    if case["lengths"] and S != T:
        case = {**case, "lengths": False}
    lengths = random_lengths(T, B).to(device) if case["lengths"] else None
    cu_seqlens = random_documents(T).to(device) if case["layout"] == "documents" else None
    seed = torch.randint(-(2**62), 2**62, (2,), device=device)
    mask = None
    if lengths is not None:
        row_mask = torch.arange(T, device=device) < lengths[:, None]
        mask = row_mask[:, None, None, :] & row_mask[:, None, :, None]
    if cu_seqlens is not None:
        mask = reference.document_mask(cu_seqlens, T)
    keep = None
    if case["dropout_p"]:
        keep = reference.dropout_keep(seed, B, H, T, S, case["dropout_p"])

    leaves = [(torch.randn(B, H, n, D) * case["size"]).to(dtype).to(device) for n in (T, S, S)]
    if case["layout"] == "broadcast":
        leaves[1] = leaves[1][:, :1].expand(B, H, S, D)
    dout = torch.randn(B, H, T, D).to(dtype).to(device)
    if packed:
        joined = torch.stack([x.transpose(1, 2) for x in leaves], 2).reshape(B, T, 3 * H * D)
        qkv = surrounded(joined).detach()
        if lengths is not None:
            qkv.masked_fill_(~row_mask[..., None], float("nan"))
        qkv.requires_grad_()
        out, lse = ops.causal_attention_packed(
            qkv, H, scale=case["scale"], lengths=lengths, cu_seqlens=cu_seqlens, dropout_p=case["dropout_p"],
            dropout_seed=seed, return_lse=True, backend="triton",
        )  # fmt: skip
        assert out.shape == (B, T, H * D)
        out.backward(surrounded(dout.transpose(1, 2).flatten(2)))
        out = out.view(B, T, H, D).transpose(1, 2)
        grads = [x.transpose(1, 2) for x in qkv.grad.view(B, T, 3, H, D).unbind(2)]
    else:
        inputs = [x if case["layout"] == "broadcast" else surrounded(x).detach() for x in leaves]
        if lengths is not None:
            inputs = [x.masked_fill(~row_mask[:, None, :, None], float("nan")) for x in inputs]
        inputs = [x.requires_grad_() for x in inputs]
        out, lse = ops.causal_attention(
            *inputs, scale=case["scale"], lengths=lengths, dropout_p=case["dropout_p"], dropout_seed=seed,
            return_lse=True, backend="triton",
        )  # fmt: skip
        grads = torch.autograd.grad(out, inputs, dout.transpose(-1, -2).contiguous().transpose(-1, -2))
    assert {x.dtype for x in (out, *grads)} == {dtype}
    assert lse.dtype == torch.float32
    hold_all((out.detach(), lse, *grads), leaves, dout, case, keep, mask)


@pytest.mark.parametrize("part", parts(6))
def test_random_cases(triton_device, tiles, seed, part):
    """The 2x rule holds in 6 x 52 random cases (6 x 8 where every shape is compiled)."""
    torch.manual_seed(seed)
    random.seed(seed)
    rng = random.Random(seed)
    for _ in range(52 if INTERPRETED else 8):
        case = random_case(rng)
        tiles(case["tiles"], case["tma"])
        check(case, triton_device)


LARGE = {
    "a long row": {"T": 300, "S": 300, "D": 64},
    "a head of 96": {"T": 140, "S": 140, "D": 96},
    "a head of 128": {"T": 130, "S": 200, "D": 128},
    "a head of 256": {"T": 70, "S": 70, "D": 256, "dtype": torch.float16},
    "a chunk on a long cache": {"T": 5, "S": 400, "D": 64},
    "one token on a cache": {"T": 1, "S": 259, "D": 64},
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shipped_tiles(triton_device, seed, name, dtype):
    torch.manual_seed(seed)
    case = {"layout": "heads", "B": 1, "H": 2, "dtype": dtype, "scale": None, "lengths": False, "dropout_p": 0.0}
    check({**case, "size": 1.0, **LARGE[name]}, triton_device)


# -- what the kernels write and read ------------------------------------------------------------------------------


def run_launchers(kernel, case, device):
    """Run the forward and backward launchers, writing into views of canaries. Return the views and their buffers."""
    B, H, T, S, D = (case[name] for name in "BHTSD")
    tensors = {}
    for name, n in {"q": T, "k": S, "v": S, "dout": T}.items():
        tensors[name] = surrounded(torch.randn(B, n, H, D).to(device)).transpose(1, 2)
    lengths = torch.tensor([T - T // 3] * B, dtype=torch.int32, device=device) if case.get("lengths") else None
    if lengths is not None:
        for x in tensors.values():
            x[:, :, int(lengths[0]) :] = float("nan")
    documents = None
    if case.get("documents"):
        cu_seqlens = torch.tensor([0, T // 4, T // 4, T // 2 + 3, T], device=device)
        documents = ops.plan_documents(cu_seqlens, T)
        lengths = documents.cu_seqlens[-1:]
    seed = torch.tensor([5, 9], device=device) if case.get("dropout_p") else None
    starts, ends = (None, None) if documents is None else (documents.starts, documents.ends)
    masking = kernel.Masking(lengths, starts, ends, seed, case.get("dropout_p", 0.0))
    out, dq, dk, dv = (surrounded(torch.zeros(B, n, H, D, device=device)).transpose(1, 2) for n in (T, T, S, S))
    for x in (out, dq, dk, dv):
        x.fill_(float("nan"))
    row_max, row_sum = (torch.full((B, H, T), float("nan"), device=device) for _ in range(2))
    heads = kernel.Heads.of
    inputs = [heads(tensors[name]) for name in ("q", "k", "v")]
    kernel.attention_forward(*inputs, heads(out), row_max, row_sum, masking, 0.3)
    kernel.attention_backward(
        heads(tensors["dout"]), *inputs, heads(out), row_max, row_sum, heads(dq), (heads(dk), heads(dv)), masking, 0.3
    )
    lse = row_max * math.log(2) + row_sum.log()
    return tensors, (out, lse, dq, dk, dv), lengths, documents, seed


CASES = {
    "square": {"T": 40, "S": 40},
    "chunk": {"T": 19, "S": 53},
    "mixed": {"T": 17, "S": 17, "B": 3, "H": 2},
    "sections": {"T": 17, "S": 17, "B": 5, "H": 6, "D": 8},  # more heads than a section holds, and a remainder
    "padding": {"T": 42, "S": 42, "lengths": True},
    "documents": {"T": 75, "S": 75, "documents": True},
    "dropout": {"T": 20, "S": 20, "dropout_p": 0.4},
}


def check_launchers(kernel, case, device):
    case = {"B": 1 if case.get("documents") else 2, "H": 2, "D": 20, "scale": 0.3, "dropout_p": 0.0, **case}
    tensors, got, lengths, documents, seed = run_launchers(kernel, case, device)
    B, H, T, S, _ = (case[name] for name in "BHTSD")
    mask = None
    if documents is not None:
        mask = reference.document_mask(documents.cu_seqlens, T)
    elif lengths is not None:
        rows = torch.arange(T, device=device) < lengths[:, None]
        mask = rows[:, None, None, :] & rows[:, None, :, None]
    keep = None if seed is None else reference.dropout_keep(seed, B, H, T, S, case["dropout_p"])
    inputs = [tensors[name].nan_to_num() for name in ("q", "k", "v")]
    hold_all(got, inputs, tensors["dout"].nan_to_num(), case, keep, mask)
    for value in (got[0], *got[2:]):
        assert int(value._base.isfinite().sum()) == value.numel(), "written outside its rows"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("blocks", [(16, 16), *(pytest.param(b, marks=pytest.mark.slow) for b in [(32, 16), (16, 32)])])
def test_launchers_write_their_rows_and_nothing_else(triton_device, tiles, seed, name, blocks):
    from fastgpt2_kernels.triton import attention

    torch.manual_seed(seed)
    tiles(blocks)
    check_launchers(attention, CASES[name], triton_device)


def test_runs_are_bitwise_equal(triton_device, seed):
    torch.manual_seed(seed)
    qkv = torch.randn(2, 90, 3 * 48, device=triton_device, requires_grad=True)
    runs = []
    for _ in range(2):
        out = ops.causal_attention_packed(qkv, 3, backend="triton")
        runs.append((out.detach(), torch.autograd.grad(out.square().sum(), qkv)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_row_does_not_depend_on_its_neighbours(triton_device, seed):
    torch.manual_seed(seed)
    qkv = torch.randn(3, 70, 3 * 32, device=triton_device)
    whole = ops.causal_attention_packed(qkv, 2, backend="triton")
    alone = ops.causal_attention_packed(qkv[1:2], 2, backend="triton")
    ragged = ops.causal_attention_packed(
        qkv, 2, lengths=torch.tensor([3, 70, 0], device=triton_device), backend="triton"
    )
    documents = ops.causal_attention_packed(
        qkv.flatten(0, 1)[None], 2, cu_seqlens=torch.tensor([0, 70, 140, 210], device=triton_device), backend="triton"
    )
    assert torch.equal(whole[1:2], alone)
    assert torch.equal(ragged[1:2], alone)
    torch.testing.assert_close(documents[:, 70:140], alone, rtol=1e-5, atol=1e-6)


def test_strides_of_descriptors_fall(seed):
    """Each stride is a multiple of the next, as CUDA's manual requires. Where that is impossible, pointers are used."""
    from fastgpt2_kernels.triton.attention import Heads

    B, H, T, D = 2, 3, 20, 16
    qkv = torch.randn(B, T, 3 * H * D, dtype=torch.float16)
    own = torch.randn(B, H, T, D, dtype=torch.float16)
    one_head = torch.randn(B, T, 3 * D, dtype=torch.float16)
    fitting = {
        "packed": (Heads.packed(qkv, H)[1], [1, 8, 1, 16]),
        "a packed head": (Heads.packed(one_head, 1)[1], [1, 8, 1, 16]),
        "packed, of one token": (Heads.packed(qkv[:, :1], H)[2], [1, 8, 1, 16]),
        "heads of their own": (Heads.of(own), [1, 1, 8, 16]),
        "transposed": (Heads.of(own.transpose(1, 2).contiguous().transpose(1, 2)), [1, 8, 1, 16]),
        "every other token": (Heads.of(own[:, :, ::2]), [1, 1, 8, 16]),
    }
    for name, (heads, block_shape) in fitting.items():
        assert heads.fits_descriptor(), name
        descriptor = heads.descriptor(8, 16)
        assert descriptor.block_shape == block_shape, name
        *outer, last = descriptor.strides
        assert last == 1, name
        for stride, inner, size in zip(outer, descriptor.strides[1:], descriptor.shape[1:], strict=True):
            assert (stride % inner, stride * 2 % 16) == (0, 0), name
            assert stride >= inner * size, name
    others = {
        "tokens before rows": qkv.transpose(0, 1).contiguous().transpose(0, 1).view(B, T, 3 * H, D)[:, :, :H],
        "the same tokens for each head": own[:, :1].expand(B, H, T, D).transpose(1, 2),
        "overlapping": own.as_strided((B, T, H, D), (H * T * D, 8, T * D, 1)),
        "not aligned": torch.randn(B, T, H * D + 1, dtype=torch.float16)[..., 1:].view(B, T, H, D),
    }
    for name, tokens in others.items():
        assert not Heads.of(tokens.transpose(1, 2)).fits_descriptor(), name


@pytest.mark.parametrize("layout", ["packed", "heads", "mixed"])
def test_descriptors_read_what_pointers_read(interpreter, tiles, seed, layout):
    """The results are bitwise the same, whichever stride is larger; keys and values may have different layouts."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 37, 3 * 2 * 24).view(2, 37, 3, 2, 24).permute(2, 0, 3, 1, 4)
    if layout != "packed":
        q, k = q.contiguous(), k.contiguous()
        v = v.contiguous() if layout == "heads" else v
    found = []
    for use_tma in (False, True):
        tiles((16, 16), use_tma)
        found.append(ops.causal_attention(q, k, v, backend="triton"))
    assert torch.equal(*found)


@pytest.mark.parametrize("use_tma", [False, True])
def test_interpreted_traffic(interpreter, tiles, monkeypatch, use_tma):
    """Everything is written once. The rows of a program's own tile are read once, other rows once per program.

    So each element of k and v is read by the query tiles that see it, and each of q and dO by the key tiles that it
    sees.
    """
    from fastgpt2_kernels.triton import attention

    T, H, D, block_t, block_s = 70, 2, 32, 32, 16
    tiles((block_t, block_s), use_tma)
    heads, masking = attention.Heads, attention.Masking()
    qkv, dqkv = torch.randn(2, T, 3 * H * D), torch.empty(2, T, 3 * H * D)
    out, dout = torch.empty(2, T, H * D), torch.randn(2, T, H * D)
    row_max, row_sum = torch.empty(2, H, T), torch.empty(2, H, T)
    packed, merged = heads.packed(qkv, H), heads.merged(out, H)
    starts = torch.arange(T)
    # For each row, how many tiles of block_t queries see it, and how many tiles of block_s keys it sees.
    query_tiles = -(-T // block_t) - starts // block_t
    key_tiles = (starts // block_t * block_t + block_t - 1).clamp_max(T - 1) // block_s + 1

    def counts(numbers):
        return numbers[None, :, None].expand(2, T, H * D)

    with monkeypatch.context() as patch:
        traffic = Traffic(patch, qkv=qkv, out=out, row_max=row_max, row_sum=row_sum)
        attention.attention_forward(*packed, merged, row_max, row_sum, masking, 0.2)
    q_reads, k_reads, v_reads = traffic.reads["qkv"].chunk(3, -1)
    assert (q_reads == 1).all()
    assert torch.equal(k_reads, counts(query_tiles))
    assert torch.equal(v_reads, counts(query_tiles))
    assert not traffic.writes["qkv"].any()
    for name in ("out", "row_max", "row_sum"):
        assert (traffic.writes[name] == 1).all(), name
        assert not traffic.reads[name].any(), name

    with monkeypatch.context() as patch:
        traffic = Traffic(patch, qkv=qkv, out=out, dout=dout, dqkv=dqkv)
        dq, dk, dv = heads.packed(dqkv, H)
        attention.attention_backward(
            heads.merged(dout, H), *packed, merged, row_max, row_sum, dq, (dk, dv), masking, 0.2
        )
    q_reads, k_reads, v_reads = traffic.reads["qkv"].chunk(3, -1)
    assert torch.equal(q_reads, 1 + counts(key_tiles))
    assert torch.equal(traffic.reads["dout"], 1 + counts(key_tiles))
    assert torch.equal(k_reads, 1 + counts(query_tiles))
    assert torch.equal(v_reads, 1 + counts(query_tiles))
    assert (traffic.reads["out"] == 1).all()
    assert (traffic.writes["dqkv"] == 1).all()
    assert not traffic.reads["dqkv"].any()


def test_dropout_rate_and_seed(triton_device, seed):
    """Dropout keeps the right share of weights. Its mask depends only on (seed, offset), or on PyTorch's generator."""
    torch.manual_seed(seed)
    T, p = 128, 0.25
    q = torch.zeros(1, 2, T, 16, device=triton_device)
    v = torch.ones(1, 2, T, 16, device=triton_device)

    def run(**options):
        return ops.causal_attention(q, q, v, dropout_p=p, backend="triton", **options)

    # With equal weights every output is the share kept / (1 - p), with mean 1 and a binomial spread.
    share = run(dropout_seed=torch.tensor([3, 0], device=triton_device))[0, 0, :, 0] * (1 - p)
    kept = (share * torch.arange(1, T + 1, device=triton_device)).sum().item()
    weights = T * (T + 1) / 2
    assert abs(kept - (1 - p) * weights) < 5 * (weights * p * (1 - p)) ** 0.5
    seeds = [torch.tensor(pair, device=triton_device) for pair in ([3, 0], [3, 0], [3, 1], [4, 0])]
    outs = [run(dropout_seed=s) for s in seeds]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[3])
    assert not torch.equal(outs[0][:, 0], outs[0][:, 1]), "heads share a mask"
    drawn = []
    for start in (7, 7, 8):
        torch.manual_seed(start)
        drawn.append(run())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 0), (2, 2, 0, 5)])
def test_nothing_to_do(triton_device, shape):
    B, H, T, S = shape
    q, k, v = (torch.randn(B, H, n, 16, device=triton_device, requires_grad=True) for n in (T, S, S))
    out, lse = ops.causal_attention(q, k, v, return_lse=True, backend="triton")
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    out.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v))


def test_offsets_past_32_bits(triton_device):
    """Rows of the batch and heads are more than 2^31 elements apart, in a buffer that is reserved but not filled."""
    stride = 2**31 + 16
    torch.use_deterministic_algorithms(False)  # deterministic mode would fill the buffer
    store = torch.empty(2 * stride + 64, dtype=torch.float16, device=triton_device)
    for strides in ((stride, 16, 32), (16, stride, 32)):
        q = torch.as_strided(store, (2, 2, 2, 16), (*strides, 1))
        q.copy_(torch.randn(2, 2, 2, 16))
        exact = reference.causal_attention(q.double(), q.double(), q.double())
        out = ops.causal_attention(q, q, q, backend="triton")
        assert (out.double() - exact).abs().max() < 1e-2


# -- as a PyTorch operator ----------------------------------------------------------------------------------------


def test_opcheck(triton_device):
    import fastgpt2_kernels.triton.attention  # noqa: F401

    q, k, v = (torch.randn(2, 2, n, 16, device=triton_device, requires_grad=True) for n in (5, 7, 7))
    masks = (None, None, None, torch.tensor([1, 2], device=triton_device), 0.2)
    torch.library.opcheck(torch.ops.fastgpt2.attention.default, (q, k, v, *masks, 0.3))
    out, *stats = torch.ops.fastgpt2.attention(q, k, v, *masks, 0.3)
    saved = [x.detach() for x in (torch.randn_like(out), q, k, v, out, *stats)]
    backward = torch.ops.fastgpt2.attention_backward.default
    torch.library.opcheck(backward, (*saved, *masks, 0.3, True, True))
    for needs in ((True, False), (False, True)):
        metadata = ("test_schema", "test_faketensor")
        torch.library.opcheck(backward, (*saved, *masks, 0.3, *needs), test_utils=metadata)
    qkv = torch.randn(2, 6, 3 * 32, device=triton_device, requires_grad=True)
    lengths = torch.tensor([4, 6], dtype=torch.int32, device=triton_device)
    masks = (lengths, None, None, None, 0.0)
    torch.library.opcheck(torch.ops.fastgpt2.attention_packed.default, (qkv, 2, *masks, 0.3))
    out, *stats = torch.ops.fastgpt2.attention_packed(qkv.detach(), 2, *masks, 0.3)
    arguments = (torch.randn_like(out), qkv.detach(), out, *stats, 2, *masks, 0.3)
    torch.library.opcheck(torch.ops.fastgpt2.attention_packed_backward.default, arguments)


def test_compiles_whole(triton_device, seed):
    """torch.compile(fullgraph=True) captures it without a graph break. The result, even of dropout, is eager mode's."""
    torch.manual_seed(seed)
    qkv = torch.randn(1, 20, 3 * 32, device=triton_device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 8, 20], device=triton_device)
    dropout_seed = torch.tensor([1, 2], device=triton_device)

    def attend(x, **options):
        q, k, v = (2 * x).view(1, 20, 3, 2, 16).permute(2, 0, 3, 1, 4)
        packed = ops.causal_attention_packed(x * 2, 2, cu_seqlens=cu_seqlens, backend="triton", **options)
        return packed + ops.causal_attention(q, k, v, backend="triton", **options).transpose(1, 2).flatten(2)

    for options in ({}, {"dropout_p": 0.3, "dropout_seed": dropout_seed}):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        results = []
        for function in (attend, compiled):
            out = function(qkv, **options)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast(triton_device, seed):
    torch.manual_seed(seed)
    qkv = torch.randn(1, 20, 3 * 32, device=triton_device, requires_grad=True)
    with torch.autocast(torch.device(triton_device).type, dtype=torch.float16):
        out = ops.causal_attention_packed(qkv, 2, backend="triton")
        q = qkv.half()
        expected = ops.causal_attention_packed(q, 2, backend="triton")
    assert out.dtype == torch.float16
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert qkv.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "needed", [needs for needs in itertools.product((False, True), repeat=3) if any(needs)], ids=str
)
def test_frozen_inputs(triton_device, seed, needed):
    torch.manual_seed(seed)
    inputs = [torch.randn(1, 2, 20, 16, device=triton_device) for _ in range(3)]
    everything = [x.clone().requires_grad_() for x in inputs]
    ops.causal_attention(*everything, backend="triton").square().sum().backward()
    inputs = [x.requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    ops.causal_attention(*inputs, backend="triton").square().sum().backward()
    for x, whole, need in zip(inputs, everything, needed, strict=True):
        assert torch.equal(x.grad, whole.grad) if need else x.grad is None


def test_checkpointing_no_grad_and_inference(triton_device, seed):
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(seed)
    qkv = torch.randn(1, 30, 3 * 32, device=triton_device, requires_grad=True)

    def attend(x):
        return ops.causal_attention_packed(x, 2, dropout_p=0.3, backend="triton")

    grads = []
    for run in (attend, lambda x: checkpoint(attend, x, use_reentrant=False)):
        torch.manual_seed(5)  # checkpointing must draw the same dropout again
        out = run(qkv)
        grads.append(torch.autograd.grad(out.square().sum(), qkv)[0])
    assert torch.equal(*grads)
    with torch.no_grad():
        assert not attend(qkv).requires_grad
    with torch.inference_mode():
        attend(qkv)


def test_second_derivatives_are_refused(triton_device):
    qkv = torch.randn(1, 5, 3 * 16, device=triton_device, requires_grad=True)
    out = ops.causal_attention_packed(qkv, 1, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; use backend='torch'"):
        grad.sum().backward()


def test_tf32_on_request(triton_device, monkeypatch):
    """The precision of the kernels follows PyTorch's own switches."""
    flags = []
    shipped = launch.attention_row
    monkeypatch.setattr(launch, "attention_row", lambda *key, **more: flags.append(key[2]) or shipped(*key, **more))
    q = torch.randn(1, 1, 4, 16, device=triton_device)
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            ops.causal_attention(q, q, q, backend="triton")
        for precision in ("ieee", "tf32"):  # the newer switch
            torch.backends.cuda.matmul.fp32_precision = precision
            ops.causal_attention(q, q, q, backend="triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert flags == ["ieee", "tf32"] * 2


def test_gpt2_on_the_kernels(triton_device, seed):
    """The model's logits, gradients and greedy tokens are the same as on the PyTorch backend."""
    models = [random_model(seed).to(triton_device) for _ in range(2)]
    models[1].backend = "triton"
    assert sum(x.numel() for x in models[1].parameters()) == sum(x.numel() for x in models[0].parameters())
    ids = random_ids(seed, 2, 20).to(triton_device)
    results = []
    for model in models:
        logits = model(ids)
        results.append((logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))))
    for plain, got in zip(*results, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-4)
    cu_seqlens = torch.tensor([0, 6, 20], device=triton_device)
    plain, got = (model(ids[:1], cu_seqlens=cu_seqlens) for model in models)
    torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-4)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    plain, got = (
        [sample.token_ids for sample in model.generate(prompts, max_new_tokens=6, temperature=0)] for model in models
    )
    assert got == plain


BAD = {
    "double": (lambda q: ops.causal_attention(*[q.double()] * 3, backend="triton"), "float32, bfloat16 and float16"),
    "a wide head": (
        lambda q: ops.causal_attention(*[q.new_zeros(1, 1, 4, 257)] * 3, backend="triton"),
        "head sizes up to 256; got 257",
    ),
    "a wide head in float32": (
        lambda q: ops.causal_attention(*[q.new_zeros(1, 1, 4, 200)] * 3, backend="triton"),
        "float32 head sizes up to 128, and larger ones only in tf32; got 200",
    ),
    "a strided last dimension": (
        lambda q: ops.causal_attention(q, q.new_zeros(1, 1, 16, 4).mT, q, backend="triton"),
        "stride 1; got 1, 4, 1",
    ),
    "rows far apart": (
        lambda q: ops.causal_attention(*[q.as_strided((1, 1, 1, 16), (0, 0, 2**24, 1))] * 3, backend="triton"),
        "at most 8388608 elements apart",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_the_kernels_cannot_do_is_said(triton_device, name):
    call, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(1, 1, 4, 16, device=triton_device))
