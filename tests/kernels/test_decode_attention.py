"""Attention of new tokens to a KV cache against float64, with random lengths, slots and layouts; and as an operator."""

from __future__ import annotations

import os
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastgpt2_kernels import ops, reference
from fastgpt2_kernels.triton import launch
from tests.helpers import assert_rms_within_budget, parts
from tests.kernels.traffic import Traffic

# Triton's interpreter multiplies bfloat16 tiles wrong (it takes their bits). So rows of several new tokens in bfloat16,
# which use `tl.dot`, are tested on compiled kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAN = float("nan")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning"),
]


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from fastgpt2_kernels.triton.decode import attention

    return attention


# -- cases --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """past, counts: how many cached and new tokens each row has."""

    past: list[int]
    counts: list[int]
    H: int = 2
    D: int = 32
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    is_indirect: bool = False
    scale: float = 0.2
    max_new: int = 8


class Problem(NamedTuple):
    """The inputs of a case. The caches are NaN past the lengths and lie between other layers. Slots have any order."""

    qkv: Tensor
    caches: Tensor  # (2, layers, slots, H, S, D)
    lengths: Tensor
    slots: Tensor
    starts: Tensor
    counts: Tensor

    @property
    def k(self) -> Tensor:
        return self.caches[0, 1]

    @property
    def v(self) -> Tensor:
        return self.caches[1, 1]

    @property
    def arguments(self) -> dict[str, Tensor]:
        return {"starts": self.starts, "counts": self.counts, "slots": self.slots}


def surrounded(x: Tensor, around: int = 1) -> Tensor:
    """The same values as a view in the middle of a larger buffer of NaN whose rows are 8 elements longer."""
    shape = [x.shape[0] + 2 * around, *x.shape[1:-1], x.shape[-1] + 8]
    view = torch.full(shape, NAN, dtype=x.dtype, device=x.device)[around : around + x.shape[0], ..., : x.shape[-1]]
    return view.copy_(x)


def make(case: Case, device: str, room: int = 3) -> Problem:
    R, num_slots = len(case.past), len(case.past) + 2
    cache_dtype = case.cache_dtype or case.dtype
    S = max(p + c for p, c in zip(case.past, case.counts, strict=True)) + room
    caches = torch.full((2, 3, num_slots, case.H, S, case.D), NAN, dtype=cache_dtype)
    slots = random.sample(range(num_slots), R)
    lengths = torch.ones(num_slots + 1, dtype=torch.int32)[:num_slots]
    for slot, past in zip(slots, case.past, strict=True):
        lengths[slot] = past
        caches[:, :, slot, :, :past] = torch.randn(2, 3, case.H, past, case.D).to(cache_dtype)
    # The rows' tokens lie in any order, with tokens between them that belong to no row.
    order, starts, end = random.sample(range(R), R), [0] * R, 0
    for row in order:
        starts[row], end = end, end + case.counts[row] + (random.random() < 0.2 and case.max_new > 1)
    qkv = surrounded(torch.randn(max(end, 1), 3 * case.H * case.D).to(case.dtype))
    integers = (torch.tensor(x, dtype=torch.int32) for x in (slots, starts, case.counts))
    return Problem(*(x.to(device) for x in (qkv, caches, lengths, *integers)))


def run(kernels: Any, case: Case, problem: Problem, poison: float = NAN) -> Tensor:
    """The output of the launchers. Every buffer has room after its end, where mistakes would show."""
    N, S, device = problem.qkv.shape[0], problem.k.shape[2], problem.qkv.device
    integers = (problem.lengths, problem.slots, problem.starts, problem.counts)
    rows = kernels.Rows(len(case.past), *integers, case.max_new)
    cache = kernels.Cache(problem.k, problem.v, S)
    if case.is_indirect:
        keys, values = problem.caches
        table = torch.tensor([keys.data_ptr(), values.data_ptr(), *keys.stride()[:3]], device=device)
        # Only the dtype of these tensors is used. The capacity may be larger than the table's.
        unread = keys.new_full((1, case.H, 1, case.D), NAN)
        cache = kernels.Cache(unread, unread, S + 1, table, layer=1)
    shape = (N + 2, case.H, kernels.num_splits(cache.capacity, cache.k, case.D))
    parts = kernels.Parts(*(torch.full((*shape, *last), NAN, device=device)[1 : N + 1] for last in ((case.D,), (), ())))
    out = surrounded(torch.zeros(N, case.H * case.D, dtype=case.dtype, device=device))
    for x in (*parts, out):
        x.fill_(poison)
    kernels.decode_splits(problem.qkv, cache, rows, parts, case.scale)
    kernels.combine_splits(parts, cache, rows, out)
    assert all(is_nan_around(x) for x in (*parts, out)), "written outside its rows"
    return out


def is_nan_around(view: Tensor) -> bool:
    base = view._base.clone()
    base.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(NAN)
    return bool(base.isnan().all())


def expected(case: Case, problem: Problem) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """(exact, plain, keys, values): the output in float64, several in the case's dtype, and the caches afterwards."""
    D = case.D
    results = []
    orders = [torch.arange(D), torch.arange(D).flip(0), torch.randperm(D)]
    for wide, order in ((torch.float64, orders[0]), *((case.dtype, order) for order in orders)):
        order, back = order.to(problem.qkv.device), order.argsort().to(problem.qkv.device)
        qkv = problem.qkv.unflatten(-1, (3, case.H, D))[..., order].flatten(1).to(wide)
        caches = problem.caches[:, 1][..., order].to(torch.promote_types(wide, problem.k.dtype))
        out = reference.decode_attention(qkv, *caches, problem.lengths, scale=case.scale, **problem.arguments)
        results.append(out.unflatten(-1, (case.H, D))[..., back].flatten(1))
    k, v = problem.k.clone(), problem.v.clone()
    reference.decode_attention(problem.qkv, k, v, problem.lengths, scale=case.scale, **problem.arguments)
    exact, *plains = results
    return exact, plains, k, v


def tokens_of(problem: Problem) -> list[int]:
    pairs = zip(problem.starts.tolist(), problem.counts.tolist(), strict=True)
    return [start + i for start, count in pairs for i in range(count)]


def check(kernels: Any, case: Case, device: str) -> None:
    """The output is within the budget, the new tokens are in the caches, and nothing else is written."""
    problem = make(case, device)
    exact, plains, k, v = expected(case, problem)
    before = problem.caches.clone()
    out = run(kernels, case, problem)
    tokens = tokens_of(problem)
    assert out[tokens].isfinite().all(), f"over the budget: {case}"
    assert_rms_within_budget(
        out[tokens], [plain[tokens] for plain in plains], exact[tokens], str(case), dtype=case.dtype
    )
    others = sorted({*range(out.shape[0])} - {*tokens})
    assert out[others].isnan().all(), "written outside its rows"
    before[0, 1], before[1, 1] = k, v
    assert torch.equal(problem.caches.nan_to_num(7.0), before.nan_to_num(7.0)), "the caches differ"


def random_case(rng: random.Random) -> Case:
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    max_new = rng.choice([1, 8])
    if INTERPRETED and dtype == torch.bfloat16:
        max_new = 1
    D = rng.choice([16, 16, 32, 32, 40, 64, 64, 80, 128, 256])
    split = launch.decode_row(dtype.itemsize, max(16, 1 << (D - 1).bit_length())).split_s
    R = rng.choice([1, 1, 1, 1, 1, 2, 2, 2, 3, 9])
    # Lengths at, before and after the borders of splits. The interpreter takes 10 ms per program, so few are long.
    border = [split * rng.choice([1, 1, 2]) + rng.choice([-9, -8, -7, -2, -1, 0, 1]) for _ in range(R)]
    long = [rng.randrange(700) if R == 1 else border[i] for i in range(R)]
    past = [rng.choice([0, 1, rng.randrange(split), border[i], long[i]] if R < 9 else [0, 3, 40]) for i in range(R)]
    counts = [rng.choice([0, 1] if max_new == 1 else [0, 0, 1, 2, 3]) for _ in range(R)]
    counts[rng.randrange(R)] = rng.randint((max_new + 1) // 2, max_new)
    H = 1 if R > 1 or D > 64 else rng.choice([1, 1, 2, 3])
    cache_dtype = torch.float32 if rng.random() < 0.15 else None
    scale = rng.choice([D**-0.5, D**-0.5, 0.05])
    return Case(past, counts, H, D, dtype, cache_dtype, INTERPRETED and rng.random() < 0.3, scale, max_new)


@pytest.mark.parametrize("part", parts(4))
def test_random_cases(triton_device, kernels, seed, part):
    """All checks hold in 4 x 50 random cases (4 x 10 where every shape is compiled)."""
    torch.manual_seed(seed)
    random.seed(seed)
    rng = random.Random(seed)
    for _ in range(50 if INTERPRETED else 10):
        check(kernels, random_case(rng), triton_device)


# -- what the kernels write and read ------------------------------------------------------------------------------

CASES = {
    "one": Case([127, 128, 131], [1, 1, 0], H=2, D=16, max_new=1),
    "few": Case([126, 3], [4, 8], H=1, D=16),
    "few on tensor cores": Case([126, 3], [4, 8], H=1, D=16, dtype=torch.float16),
    "indirect": Case([5, 128], [1, 1], H=2, D=16, max_new=1, is_indirect=True),
    "full": Case([5, 4], [2, 2], H=1, D=16),
    "full, indirect": Case([5, 4], [2, 2], H=1, D=16, is_indirect=True),
}


def check_full(kernels: Any, case: Case, device: str) -> None:
    """A row that does not fit writes nothing to the cache and gives NaN. The other row is right."""

    def broken(*, good_start: int = 2, **changes: int) -> None:
        problem = make(case, device, room=0)
        # Each row has two of the five tokens. The last one belongs to no row, so that starts=4 reaches past the end.
        problem = problem._replace(qkv=surrounded(torch.randn(5, problem.qkv.shape[1]).to(problem.qkv)))
        problem.starts.copy_(torch.tensor([good_start, 2 - good_start]))
        good = {name: getattr(problem, name)[:1] for name in ("slots", "starts", "counts")}
        exact, plains, k, v = expected(case, problem._replace(**good))
        problem.lengths[problem.slots[1]] = changes.get("past", 4)
        for name in good:
            getattr(problem, name)[1] = changes.get(name, int(getattr(problem, name)[1]))
        before = problem.caches.clone()
        out = run(kernels, case, problem, poison=5.0)
        start, count = int(problem.starts[1]), int(problem.counts[1])
        row = out[max(start, 0) : start + count]
        assert row.numel()
        assert row.isnan().all(), f"over the budget: {changes}"
        own = slice(good_start, good_start + 2)
        assert_rms_within_budget(out[own], [x[own] for x in plains], exact[own], str(changes), dtype=case.dtype)
        before[0, 1], before[1, 1] = k, v
        assert torch.equal(problem.caches.nan_to_num(7.0), before.nan_to_num(7.0)), f"the caches differ: {changes}"

    broken(past=6)  # of 7
    broken(past=2**31 - 1)
    broken(past=-1)
    broken(slots=-1)
    broken(slots=4)
    broken(starts=-1)
    broken(counts=9, good_start=0)
    broken(starts=4)


@pytest.mark.parametrize(
    "name",
    # The sanitizer attributes an address that is loaded from memory to another tensor.
    [pytest.param(name, marks=[pytest.mark.unsanitized] if case.is_indirect else []) for name, case in CASES.items()],
)
def test_caches_and_outputs_are_written_and_nothing_else(triton_device, kernels, seed, name):
    torch.manual_seed(seed)
    random.seed(seed)
    (check_full if "full" in name else check)(kernels, CASES[name], triton_device)


@pytest.mark.parametrize("max_new", [1, 8])
def test_interpreted_traffic(interpreter, kernels, monkeypatch, seed, max_new):
    """Each cached key and value is read once, and each new one is written once. Nothing past a row is touched."""
    torch.manual_seed(seed)
    random.seed(seed)
    case = Case([200, 128, 0], [1, 1, 1] if max_new == 1 else [5, 0, 8], D=16, max_new=max_new)
    problem = make(case, interpreter)
    with monkeypatch.context() as patch:
        traffic = Traffic(patch, caches=problem.caches, qkv=problem.qkv.contiguous(), lengths=problem.lengths)
        run(kernels, case, problem._replace(qkv=traffic.tensors["qkv"]))
    reads, writes = (torch.zeros_like(traffic.reads["caches"]) for _ in range(2))
    for slot, past, count in zip(problem.slots.tolist(), case.past, case.counts, strict=True):
        if count:
            reads[:, 1, slot, :, :past] = 1
            writes[:, 1, slot, :, past : past + count] = 1
    assert torch.equal(traffic.reads["caches"], reads)
    assert torch.equal(traffic.writes["caches"], writes)
    new = traffic.reads["qkv"].unflatten(-1, (3, -1))[tokens_of(problem)]
    assert (new[:, 1:] == 1).all()  # keys and values
    assert not traffic.writes["qkv"].any()
    assert not traffic.writes["lengths"].any()


@pytest.mark.parametrize("max_new", [1, 8])
def test_a_row_does_not_depend_on_its_neighbours(triton_device, seed, max_new):
    """A row is bitwise the same alone, in other slots, and in batches of 3, 17 and 64 (17 with several tokens)."""
    torch.manual_seed(seed)
    random.seed(seed)
    past, count, D = 133, 1 if max_new == 1 else 5, 16
    own_qkv, own_cache = torch.randn(count, 3 * D), torch.randn(2, 1, past, D)
    results = []
    for R in (1, 3, 17, 64) if max_new == 1 else (1, 3, 17):
        row, slots = random.randrange(R), torch.randperm(R + 1)[:R]
        counts = torch.tensor([count if r == row else random.randrange(max_new + 1) for r in range(R)])
        starts = counts.cumsum(0) - counts
        lengths = torch.randint(0, 20, (R + 1,))
        lengths[slots[row]] = past
        k, v = torch.randn(2, R + 1, 1, 140 + R, D)
        k[slots[row], :, :past], v[slots[row], :, :past] = own_cache
        qkv = torch.randn(int(counts.sum()), 3 * D)
        own = slice(int(starts[row]), int(starts[row]) + count)
        qkv[own] = own_qkv
        given = [x.to(triton_device) for x in (qkv, k, v, lengths, starts, counts, slots)]
        qkv, k, v, lengths, starts, counts, slots = given
        if max_new == 1:  # with one token per row, every row has a token
            counts = torch.ones_like(counts)
            starts = torch.arange(R, device=triton_device)
            qkv, own = torch.randn(R, 3 * D).to(triton_device), slice(row, row + 1)
            qkv[own] = own_qkv.to(triton_device)
        rows = {} if max_new == 1 else {"starts": starts, "counts": counts}
        out = ops.decode_attention(qkv, k, v, lengths, slots=slots, **rows, backend="triton")
        results.append(out[own])
    assert all(torch.equal(result, results[0]) for result in results)


def test_decoding_equals_attention_of_the_whole(triton_device, seed):
    """Decoding one token or a few at a time gives the same as `causal_attention` of all tokens at once."""
    torch.manual_seed(seed)
    H, D, T = 2, 32, 12
    past = 125
    for dtype in (torch.float32, torch.float16):
        qkv = torch.randn(past + T, 3 * H * D).to(dtype).to(triton_device)
        q, k, v = qkv.view(past + T, 3, H, D).permute(1, 2, 0, 3).unsqueeze(1)
        exact = reference.causal_attention(q.double(), k.double(), v.double())[0].transpose(0, 1).flatten(1)[past:]
        whole = ops.causal_attention(q, k, v, backend="triton")[0].transpose(0, 1).flatten(1)[past:]
        for steps in ([1] * 4 + [8], [5, 7]):
            caches = [torch.full((1, H, past + T, D), NAN, dtype=dtype, device=triton_device) for _ in range(2)]
            caches[0][:, :, :past], caches[1][:, :, :past] = k[:, :, :past], v[:, :, :past]
            outs, held = [], past
            for count in steps:
                integers = torch.tensor([held, 0, count], device=triton_device).split(1)
                new = qkv[held : held + count]
                rows = {} if count == 1 else {"starts": integers[1], "counts": integers[2]}
                outs.append(ops.decode_attention(new, *caches, integers[0], **rows, backend="triton"))
                held += count
            assert_rms_within_budget(torch.cat(outs), [whole], exact, f"{dtype} {steps}", dtype=dtype)
            assert torch.equal(caches[0], k)
            assert torch.equal(caches[1], v)


@pytest.mark.unsanitized
def test_a_cache_that_moves(triton_device, kernels, seed):
    """A launch with the same arguments uses the cache that the table names now: a longer one at another address."""
    torch.manual_seed(seed)
    H, D = 2, 16
    lengths = torch.tensor([4], dtype=torch.int32, device=triton_device)
    table = torch.zeros(5, dtype=torch.int64, device=triton_device)
    unread = torch.empty(1, H, 1, D, device=triton_device)
    cache, rows = kernels.Cache(unread, unread, 300, table, layer=1), kernels.Rows(1, lengths)
    held = torch.randn(2, 4, H, 4, D, device=triton_device)
    for S in (4, 5, 200):
        caches = torch.full((2, 4, 1, H, S, D), NAN, device=triton_device)
        caches[:, :, 0, :, :4] = held
        table.copy_(torch.tensor([caches[0].data_ptr(), caches[1].data_ptr(), *caches.stride()[1:4]]))
        qkv, out = torch.randn(1, 3 * H * D, device=triton_device), torch.empty(1, H * D, device=triton_device)
        kernels.decode_attention(qkv, cache, rows, out, 0.3)
        if S == 4:
            assert out.isnan().all()
            assert torch.equal(caches[:, :, 0], held)
            continue
        k, v = caches[:, 1].clone()
        k[..., 4, :] = v[..., 4, :] = NAN
        exact = reference.decode_attention(qkv.double(), k.double(), v.double(), lengths, scale=0.3)
        assert_rms_within_budget(out, [exact.float()], exact)


# -- the operator ------------------------------------------------------------------------------------------------------


def mixed_plan(device: str) -> tuple[list[int], list[int], list[int], Any]:
    """A plan with rows of every kind: without cached tokens, and with one, a few and many new tokens."""
    slots, counts, past = [6, 0, 1, 2, 4, 5, 7], [1, 5, 3, 1, 12, 4, 1], [10, 0, 0, 33, 20, 126, 0]
    return slots, counts, past, ops.plan_rows(slots, counts, past, device)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("cache_dtype", [None, torch.float32], ids=str)
def test_cached_attention_of_mixed_rows(triton_device, seed, backend, cache_dtype):
    torch.manual_seed(seed)
    H, D = 2, 16
    slots, counts, past, plan = mixed_plan(triton_device)
    dtype = torch.float32 if cache_dtype is None else torch.float16
    k, v = torch.full((2, 8, H, 140, D), NAN, dtype=torch.float32).to(triton_device)
    for slot, held in zip(slots, past, strict=True):
        k[slot, :, :held], v[slot, :, :held] = torch.randn(2, H, held, D).to(dtype)
    qkv = torch.randn(sum(counts), 3 * H * D).to(dtype).to(triton_device)
    lengths = torch.zeros(8, dtype=torch.int64)
    lengths[slots] = torch.tensor(past)
    rows = {"slots": torch.tensor(slots), "counts": torch.tensor(counts)}
    rows["starts"] = rows["counts"].cumsum(0) - rows["counts"]
    exact = reference.decode_attention(qkv.double(), k.double(), v.double(), lengths, **rows)
    k_after, v_after = k.clone(), v.clone()
    plain = reference.decode_attention(qkv, k_after, v_after, lengths, **rows)
    got = ops.cached_attention(qkv, k, v, plan, backend=backend)
    assert got.dtype == dtype
    assert_rms_within_budget(got, [plain], exact, dtype=dtype)
    assert torch.equal(k.nan_to_num(7.0), k_after.nan_to_num(7.0))
    assert torch.equal(v.nan_to_num(7.0), v_after.nan_to_num(7.0))


def test_cached_rows_do_not_depend_on_their_neighbours(triton_device, seed):
    """Rows of one and of several new tokens are bitwise the same alone and among rows of every kind."""
    torch.manual_seed(seed)
    H, D = 1, 16
    slots, counts, past, plan = mixed_plan(triton_device)
    k, v = torch.randn(2, 8, H, 140, D).to(triton_device)
    qkv = torch.randn(sum(counts), 3 * H * D).to(triton_device)
    whole = ops.cached_attention(qkv, k.clone(), v.clone(), plan, backend="triton").split(counts)
    parts = qkv.split(counts)
    for i in (0, 3, 4, 5):
        alone = ops.plan_rows([slots[i]], [counts[i]], [past[i]], triton_device)
        got = ops.cached_attention(parts[i], k.clone(), v.clone(), alone, backend="triton")
        assert torch.equal(got, whole[i]), f"{counts[i]} new tokens after {past[i]}"


def test_which_kernel_takes_which_row(triton_device):
    plan = mixed_plan(triton_device)[-1].kernels
    one, few = plan.decode
    assert [x.tolist() for x in one[:3]] == [[0, 9], [1, 1], [6, 2]]
    assert one.max_new == 1
    assert [x.tolist() for x in few[:3]] == [[22], [4], [5]]
    assert few.max_new == ops.attention.MAX_DECODE_TOKENS
    assert [(start, end, documents.cu_seqlens.tolist()) for start, end, documents in plan.fresh] == [
        (1, 9, [0, 5, 8]),
        (26, 27, [0, 1]),
    ]
    assert plan.long == ((4, 10, 12, 20),)
    assert plan.appended.tolist() == [*range(1, 9), *range(10, 22), 26]
    assert plan.lengths.tolist() == [0, 0, 33, 0, 20, 126, 10, 0]
    assert ops.plan_rows([0], [4], [0], triton_device).kernels.appended is None


def test_kernels_and_door_agree_on_the_most_new_tokens(kernels):
    assert kernels.MAX_NEW == ops.attention.MAX_DECODE_TOKENS


def test_the_pytorch_backend(seed):
    """The PyTorch backend takes rows in any order with any counts, in float64."""
    torch.manual_seed(seed)
    random.seed(seed)
    case = Case([9, 0, 30], [3, 0, 1], dtype=torch.float64)
    problem = make(case, "cpu")
    k, v = problem.k.clone(), problem.v.clone()
    exact = reference.decode_attention(problem.qkv, k, v, problem.lengths, scale=0.2, **problem.arguments)
    got = ops.decode_attention(
        problem.qkv, problem.k, problem.v, problem.lengths, scale=0.2, **problem.arguments, backend="torch"
    )
    torch.testing.assert_close(got, exact)
    assert torch.equal(problem.caches[:, 1].nan_to_num(7.0), torch.stack((k, v)).nan_to_num(7.0))
    nothing = torch.zeros(0, dtype=torch.int32)
    none = {"starts": nothing, "counts": nothing, "slots": nothing}
    assert not ops.decode_attention(problem.qkv, problem.k, problem.v, problem.lengths, **none).any()


@pytest.mark.parametrize(("N", "H"), [(0, 2), (2, 0)])
def test_nothing_to_do(triton_device, N, H):
    k, v = torch.zeros(2, 3, H, 5, 16, device=triton_device)
    lengths = torch.zeros(3, dtype=torch.int32, device=triton_device)
    qkv = torch.zeros(N, 3 * H * 16, device=triton_device)
    assert ops.decode_attention(qkv, k, v, lengths, backend="triton").shape == (N, H * 16)


def test_tokens_of_no_row_give_0(triton_device, seed):
    torch.manual_seed(seed)
    k, v = torch.randn(2, 1, 1, 9, 16, device=triton_device)
    one, two = torch.tensor([1], device=triton_device), torch.tensor([2], device=triton_device)
    out = ops.decode_attention(
        torch.randn(4, 48, device=triton_device), k, v, two, starts=one, counts=two, backend="triton"
    )
    assert torch.equal(out.any(-1).cpu(), torch.tensor([False, True, True, False]))


def test_opcheck(triton_device, kernels):
    k, v = torch.randn(2, 3, 2, 9, 16, device=triton_device)
    lengths, slots, starts, counts = torch.tensor(
        [[4, 0, 7], [2, 0, 1], [0, 1, 3], [1, 2, 0]], dtype=torch.int32, device=triton_device
    )
    qkv, out = torch.randn(3, 96, device=triton_device), torch.zeros(3, 32, device=triton_device)
    operator = torch.ops.fastgpt2.decode_attention.default
    torch.library.opcheck(operator, (qkv, k, v, out, lengths, slots, starts, counts, 8, 0.3))
    torch.library.opcheck(operator, (qkv, k, v, out, lengths, slots, None, None, 1, 0.3))


def test_compiles_whole(triton_device, seed):
    """torch.compile(fullgraph=True) captures it without a graph break, and knows that the caches change."""
    torch.manual_seed(seed)
    caches = torch.randn(2, 3, 2, 9, 16, device=triton_device)
    lengths = torch.tensor([4, 0, 7], dtype=torch.int32, device=triton_device)
    qkv = torch.randn(3, 96, device=triton_device)

    def step(qkv, k, v, lengths):
        out = ops.decode_attention(qkv * 2, k, v, lengths, backend="triton")
        return out + ops.decode_attention(qkv, k, v, lengths + 1, backend="triton"), k.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        k, v = caches.clone()
        results.append((*function(qkv, k, v, lengths), k, v))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.unsanitized  # the sanitizer copies the buffer for every argument that lies in it
def test_offsets_past_32_bits(triton_device, kernels):
    """Slots and heads are more than 2^31 elements apart, in a buffer that is reserved but not filled."""
    stride = 2**31 + 16
    torch.use_deterministic_algorithms(False)  # deterministic mode would fill the buffer
    store = torch.empty(2 * stride + 2048, dtype=torch.float16, device=triton_device)
    qkv = torch.randn(2, 96, dtype=torch.float16, device=triton_device)
    lengths = torch.tensor([3, 3], dtype=torch.int32, device=triton_device)
    for strides in ((stride, 64), (64, stride)):
        k, v = (torch.as_strided(store, (2, 2, 4, 16), (*strides, 16, 1), at) for at in (0, 256))
        for x in (k, v):
            x.copy_(torch.randn(2, 2, 4, 16))
        exact = reference.decode_attention(qkv.double(), k.double(), v.double(), lengths)
        out = ops.decode_attention(qkv, k, v, lengths, backend="triton")
        assert (out.double() - exact).abs().max() < 1e-2


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "caches that differ": ({"v_cache": torch.zeros(2, 1, 3, 16)}, r"share shape \(R, H, S, D\); got \(2, 1, 4, 16\)"),
    "another width": ({"qkv": torch.zeros(2, 47)}, r"qkv must be \(N, 48\) for this cache; got \(2, 47\)"),
    "half caches": (
        {"k_cache": torch.zeros(2, 1, 4, 16).half(), "v_cache": torch.zeros(2, 1, 4, 16).half()},
        "must be torch.float32 as qkv or float32; got torch.float16",
    ),
    "starts alone": ({"starts": torch.tensor([0, 1])}, "give starts and counts together; got only starts"),
    "lengths of another cache": ({"lengths": torch.tensor([1])}, r"lengths must be int32 or int64 of shape \(2,\)"),
    "lengths as floats": ({"lengths": torch.zeros(2)}, "got torch.float32"),
    "more rows than slots": (
        {"qkv": torch.zeros(3, 48)},
        "there must be at most 2 rows, one for each cache slot; got 3",
    ),
    "a scale of 0": ({"scale": 0.0}, "scale must be finite and > 0"),
    "a full slot": ({"lengths": torch.tensor([1, 4])}, "slot 1 holds 4 tokens and gets 1; the cache has room for 4"),
    "a slot that is not": ({"slots": torch.tensor([0, 2])}, r"slots must be in \[0, 2\); got 2"),
    "a slot in two rows": ({"slots": torch.tensor([1, 1])}, r"in one row only; got slots \[1, 1\]"),
    "nine tokens": (
        {"qkv": torch.zeros(9, 48), "starts": torch.tensor([0]), "counts": torch.tensor([9])},
        "a row must have 0 to 8 of the 9 tokens; got 9 tokens from token 0 on",
    ),
    "tokens that are not": (
        {"starts": torch.tensor([0, 1]), "counts": torch.tensor([1, 2])},
        "a row must have 0 to 8 of the 2 tokens; got 2 tokens from token 1 on",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_refused(what):
    changes, sentence = BAD[what]
    given = {
        "qkv": torch.zeros(2, 48),
        "k_cache": torch.zeros(2, 1, 4, 16),
        "v_cache": torch.zeros(2, 1, 4, 16),
        "lengths": torch.tensor([1, 0]),
        **changes,
    }
    with pytest.raises(ValueError, match=sentence) as raised:
        ops.decode_attention(**given)
    assert str(raised.value).startswith("decode_attention: ")
    assert "\n" not in str(raised.value)


CANNOT: dict[str, tuple[Any, str]] = {
    "float64": (lambda k, q: (q.double(), k.double()), "float32, bfloat16 and float16; got torch.float64"),
    "a wide head": (lambda k, q: (q.new_zeros(1, 3 * 257), k.new_zeros(1, 1, 4, 257)), "up to 256; got 257"),
    "caches with gaps": (lambda k, q: (q, k.new_zeros(1, 1, 4, 32)[..., :16]), "must be contiguous"),
    "tokens with gaps": (lambda k, q: (q.new_zeros(1, 96)[:, ::2], k), "qkv must have stride 1"),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_the_kernels_cannot_do_is_said(triton_device, what):
    change, sentence = CANNOT[what]
    qkv, k = change(torch.zeros(1, 1, 4, 16, device=triton_device), torch.zeros(1, 48, device=triton_device))
    lengths = torch.zeros(1, dtype=torch.int32, device=triton_device)
    with pytest.raises(ValueError, match=f"decode_attention: backend='triton' cannot be used: .*{sentence}"):
        ops.decode_attention(qkv, k, k.clone(), lengths, backend="triton")
    plan = ops.plan_rows([0], [1], [0], triton_device)
    with pytest.raises(ValueError, match=f"cached_attention: backend='triton' cannot be used: .*{sentence}"):
        ops.cached_attention(qkv, k, k.clone(), plan, backend="triton")
