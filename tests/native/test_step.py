"""The whole step and the prefill against the model in float64: tokens, state, ends of rows, and ragged batches."""

from __future__ import annotations

import math
import random
import signal
import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastgpt2 import GPT2
from fastgpt2.step_inputs import step_weights
from fastgpt2_kernels import native, ops
from fastgpt2_kernels.native.decode import MAX_STEPS, DecodeStep, why_not_step
from tests.helpers import TINY, assert_rms_within_budget, assert_within_budget, random_ids, random_model

pytestmark = pytest.mark.usefixtures("needs_native")

CPU = torch.device("cpu")
# The dtypes of the model, of its linear layers (None means the model's) and of the cache.
KINDS = {
    "float32": (torch.float32, None, torch.float32),
    "bfloat16": (torch.bfloat16, None, torch.float32),
    "bfloat16 with a bfloat16 cache": (torch.bfloat16, None, torch.bfloat16),
    "int8": (torch.float32, torch.int8, torch.float32),
    "int8 with a bfloat16 cache": (torch.float32, torch.int8, torch.bfloat16),
}


def make_step(
    model: GPT2, num_slots: int, kind: str = "float32", *, sampling: ops.SlotSampling | None = None,
    stop_ids: Sequence[int] = (),
) -> DecodeStep:  # fmt: skip
    """A step over a cache that is NaN where nothing was written."""
    config = model.config
    _, weight_dtype, cache_dtype = KINDS[kind]
    slots = ops.SlotState.idle(num_slots, CPU)
    step = DecodeStep(
        step_weights(model, weight_dtype), slots, sampling or ops.SlotSampling(),
        torch.tensor(stop_ids, dtype=torch.int32), num_slots, cache_dtype,
    )  # fmt: skip
    shape = (config.num_layers, num_slots, config.num_heads, config.context_length, config.head_dim)
    step.use_cache(*(torch.full(shape, math.nan, dtype=cache_dtype) for _ in range(2)))
    return step


def poison(step: DecodeStep) -> None:
    """Fill the buffers between phases with NaN: bytes of 0xFF are NaN in float32 and bfloat16."""
    buffers = step._step[0] if step._step is not None else None
    for tensor in [] if buffers is None else vars(buffers).values():
        if isinstance(tensor, Tensor) and tensor.numel() and tensor.is_contiguous():
            tensor.view(torch.uint8).fill_(255)


def begin(step: DecodeStep, slots: Sequence[int], prompts: Sequence[Tensor], limit: int = 1000) -> Tensor:
    """Put prompts into slots and choose their first tokens. Return the logits that these were chosen from."""
    counts = [len(ids) for ids in prompts]
    logits = step.prefill(torch.cat(list(prompts)), slots, counts)
    at = torch.tensor(slots)
    step.slots.lengths[at] = torch.tensor(counts, dtype=torch.int32)
    step.slots.limits[at] = limit
    step.slots.status[at] = ops.FRESH
    step.slots.produced[at] = 0
    step.choose(logits, at.int())
    step.slots.produced[at] = 1
    return logits


def logits_of(model: GPT2, ids: Tensor) -> Tensor:
    """The logits after the last token of one sequence, from the model's forward, with products in its own dtype."""
    with torch.no_grad():
        return model(ids[None])[0, -1]


def check_rows(seed: int, kind: str, activation: str = "gelu_new") -> None:
    """Check logits, tokens and lengths over 6 steps, for rows of different lengths in shuffled slots."""
    rng = random.Random(seed)
    dtype, _, _ = KINDS[kind]
    model = random_model(seed, activation_function=activation).to(dtype)
    exact_model = random_model(seed, activation_function=activation).to(dtype).double()
    step = make_step(model, 6, kind)
    slots = rng.sample(range(6), 4)
    sequences = [random_ids(seed + i, length) for i, length in enumerate((1, 9, 2, 14))]
    got = begin(step, slots, sequences)
    rows = torch.tensor(slots, dtype=torch.int32)
    for turn in range(6):
        exact, plain = (torch.stack([logits_of(m, ids).double() for ids in sequences]) for m in (exact_model, model))
        if "int8" in kind:
            # The error is the rounding to 8 bits, which the plain expression does not have.
            error = (got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            assert error < 0.1, f"int8 logits are off by {error:.3f} of their size"
        else:
            assert_rms_within_budget(got, [plain], exact, f"{kind} logits, turn {turn}", dtype=dtype)
        tokens = step.slots.tokens[rows.long()].long()
        assert torch.equal(tokens, got.argmax(-1))
        chosen = got.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert_within_budget(step.slots.logprobs[rows.long()], chosen.float(), chosen, "log-probabilities")
        sequences = [torch.cat([ids, token[None]]) for ids, token in zip(sequences, tokens, strict=True)]
        step.run(rows)
        got = step.step_logits(len(slots)).clone()
        assert step.slots.lengths[rows.long()].tolist() == [len(ids) - 1 for ids in sequences]
    assert step.slots.status[rows.long()].tolist() == [ops.RUNNING] * 4


def check_several_steps_in_a_call(seed: int) -> None:
    """Several steps in a call equal as many calls of one step, and no step follows the one in which a row ends."""
    rng = random.Random(seed)
    model = random_model(seed)
    prompts = [random_ids(seed + i, rng.randint(1, 6)) for i in range(3)]
    slots, limits = rng.sample(range(4), 3), [40, 40, rng.randint(5, 12)]
    several, single = make_step(model, 4), make_step(model, 4)
    for step in (several, single):
        begin(step, slots, prompts)
        step.slots.limits[slots] = torch.tensor(limits, dtype=torch.int32)
    rows, done = torch.tensor(slots, dtype=torch.int32), 0
    while done < limits[2] - 1:
        most = rng.choice([1, 3, 100])
        count = several.run(rows, most)
        assert count == min(most, limits[2] - 1 - done)
        done += count
        for i in range(count):
            assert single.run(rows) == 1
            assert several.tokens[i, slots].tolist() == single.slots.tokens[slots].tolist()
            assert several.logprobs[i, slots].tolist() == single.slots.logprobs[slots].tolist()
    # The other rows continue. The one that has ended is requested once more, and does not change.
    assert several.run(rows, 5) == single.run(rows) == 1
    assert all(torch.equal(a, b) for a, b in zip(several.slots, single.slots, strict=True))
    assert several.slots.status[slots].tolist() == [ops.RUNNING, ops.RUNNING, ops.IDLE]
    room = TINY.context_length - max(map(len, prompts[:2]))
    assert several.run(rows[:2], 100) == min(MAX_STEPS, room - done - 1)


def test_several_steps_in_a_call(seed, threads):
    check_several_steps_in_a_call(seed)


def test_an_interrupt_ends_the_steps_of_a_call(seed):
    """A signal arrives while the steps run. If it arrives after all of them, the test tries again."""
    step = make_step(random_model(seed, hidden_size=128, context_length=40, vocab_size=4096), 1)
    row = torch.zeros(1, dtype=torch.int32)
    begin(step, [0], [random_ids(seed, 2)])
    step.run(row)
    args = step._step[2]

    def refuse(*_: object) -> None:
        raise InterruptedError

    def interrupt() -> None:
        while args.steps_done == 0:
            pass
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def run() -> None:
        args.steps_done = 0
        sender = threading.Thread(target=interrupt)
        sender.start()
        try:
            step.run(row, MAX_STEPS)
        finally:
            sender.join()

    before = signal.signal(signal.SIGUSR1, refuse)
    try:
        for _ in range(200):
            begin(step, [0], [random_ids(seed, 2)])
            with pytest.raises(InterruptedError):
                run()
            if args.steps_done < MAX_STEPS:
                break
    finally:
        signal.signal(signal.SIGUSR1, before)
    done = int(args.steps_done)
    assert 0 < done < MAX_STEPS
    # The interrupted steps can be continued.
    assert step.run(row, MAX_STEPS) == MAX_STEPS
    assert step.slots.lengths.tolist() == [2 + done + MAX_STEPS - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_model_s(seed, threads, kind):
    check_rows(seed, kind)


def test_another_activation(seed):
    check_rows(seed, "float32", "silu")


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_pieces_and_in_company(seed, threads, kind):
    """A prompt's logits are bitwise the same among any rows, and after any prefix that leaves at least two tokens."""
    dtype, _, _ = KINDS[kind]
    model = random_model(seed).to(dtype)
    step = make_step(model, 4, kind)
    prompts = [random_ids(seed + i, length) for i, length in enumerate((13, 1, 20, 7))]
    together = step.prefill(torch.cat(prompts), [2, 0, 3, 1], [len(p) for p in prompts])
    for row, (slot, prompt) in enumerate(zip([2, 0, 3, 1], prompts, strict=True)):
        assert torch.equal(step.prefill(prompt, [slot], [len(prompt)])[0], together[row])
    first = step.prefill(prompts[2][:11], [3], [11])
    assert first.isfinite().all()
    for past in (11, 18, 5):
        assert torch.equal(step.prefill(prompts[2][past:], [3], [20 - past], [past])[0], together[2])
    piece = step.prefill(
        prompts[2][19:], [3], [1], [19]
    )  # a single token is summed in another order, like a decoding step
    error = (piece[0] - together[2]).abs().max() / together[2].abs().max()
    assert error < (1e-5 if kind == "float32" else 0.05)


def test_prefill_of_a_long_prompt_in_pieces(seed):
    """The prompt spans several blocks of queries, parts of keys and blocks of sums."""
    rng = random.Random(seed)
    step = make_step(random_model(seed, context_length=300), 1)
    length = rng.randint(257, 300)
    prompt = random_ids(seed, length)
    whole = step.prefill(prompt, [0], [length])
    past = rng.choice([2, 64, 256, length - 2, rng.randint(2, length - 2)])
    step.prefill(prompt[:past], [0], [past])
    assert torch.equal(step.prefill(prompt[past:], [0], [length - past], [past]), whole)


def check_rows_that_end(seed: int) -> None:
    """A stop token, the limit and a full context end rows. A row that has ended does not change."""
    model = random_model(seed)
    prompts = [random_ids(seed + i, length) for i, length in enumerate((3, 4, 20, 5))]
    plain = make_step(model, 4)
    begin(plain, range(4), prompts)
    rows = torch.arange(4, dtype=torch.int32)
    chosen = [plain.slots.tokens.tolist()]
    for _ in range(6):
        plain.run(rows)
        chosen.append(plain.slots.tokens.tolist())
    for stops in ([], [TINY.vocab_size + 5, chosen[2][0]]):
        step = make_step(model, 4, stop_ids=stops)
        begin(step, range(4), prompts)
        step.slots.limits[1] = 4
        ends = [[tokens[row] for tokens in chosen] for row in range(4)]
        # The last token needs no room in the context.
        ends[1], ends[2] = ends[1][:4], ends[2][: TINY.context_length - 20 + 1]
        for stop in stops:
            ends = [made[: made.index(stop) + 1] if stop in made else made for made in ends]
        got = [[token] for token in step.slots.tokens.tolist()]
        for _ in range(6):
            step.run(rows)
            for row in range(4):
                if step.slots.status[row] == ops.RUNNING:
                    got[row].append(int(step.slots.tokens[row]))
        assert got == ends
        standing = [t.clone() for t in step.slots]
        idle = (step.slots.status == ops.IDLE).nonzero()[:, 0]
        assert {1, 2} <= set(idle.tolist())
        step.run(idle.int())
        assert all(torch.equal(a, b) for a, b in zip(standing, step.slots, strict=True))


def test_rows_that_end(seed, threads):
    check_rows_that_end(seed)


def check_neighbours(seed: int, kind: str) -> None:
    """Ten rows together, alone and in threes, with noise, give bitwise the same tokens and log-probabilities."""
    dtype, _, _ = KINDS[kind]
    model = random_model(seed).to(dtype)
    prompts = [random_ids(seed + i, 1 + i) for i in range(10)]
    temperature = torch.full((10,), 0.9)
    outs, before = [], torch.get_num_threads()
    try:
        for threads, size in ((1, 10), (2, 10), (3, 10), (1, 3), (2, 3), (2, 1)):
            torch.set_num_threads(threads)
            step = make_step(model, 10, kind, sampling=ops.SlotSampling(temperature=temperature))
            step.slots.keys.copy_(torch.arange(20).view(10, 2) * 77 + seed)
            rows = [list(range(10))[i : i + size] for i in range(0, 10, size)]
            for part in rows:
                begin(step, part, [prompts[i] for i in part])
            made = []
            for _ in range(8):
                for part in rows:
                    step.run(torch.tensor(part, dtype=torch.int32))
                made.append(torch.cat([step.slots.tokens.double(), step.slots.logprobs.double()]))
            outs.append(torch.stack(made))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(seed, kind):
    check_neighbours(seed, kind)


def check_threads_that_wait(seed: int, kind: str, runs: int) -> None:
    """Steps run many times on more threads than cores, so a read before another thread's write would show.

    Each phase of a step reads what other threads wrote in the phase before. The buffers are NaN before every step.
    """
    dtype, _, _ = KINDS[kind]
    model = random_model(seed, hidden_size=64, num_layers=2).to(dtype)
    prompts = [random_ids(seed + i, 1 + i % 5) for i in range(12)]
    outs, before = [], torch.get_num_threads()
    try:
        for threads in (1, *[5] * runs):
            torch.set_num_threads(threads)
            step = make_step(model, 12, kind)
            logits = [begin(step, range(12), prompts)]
            for _ in range(10):
                poison(step)
                step.run(torch.arange(12, dtype=torch.int32))
                logits.append(step.step_logits(12).clone())
            outs.append(torch.stack(logits))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runs", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_threads_wait_for_each_other(seed, kind, runs):
    check_threads_that_wait(seed, kind, runs)


def test_a_cache_that_is_full_gives_nan(seed):
    step = make_step(random_model(seed), 2)
    begin(step, [0, 1], [random_ids(seed, 4), random_ids(seed + 1, 2)])
    keys, values = (t[:, :, :, :4].contiguous() for t in (step.keys, step.values))
    step.use_cache(keys, values)
    step.run(torch.tensor([0, 1], dtype=torch.int32))
    assert step.slots.logprobs.isnan().tolist() == [True, False]


def test_what_does_not_fit_is_refused_in_one_sentence(seed):
    model = random_model(seed)
    step = make_step(model, 2)
    weights = step_weights(model)
    ids = random_ids(seed, 3)
    new = DecodeStep(weights, step.slots, step.sampling, step.stop_ids, 2, torch.float32, step.packed)
    half = step_weights(random_model(seed).half())
    for call, message in [
        (lambda: DecodeStep(half, step.slots, step.sampling, step.stop_ids, 2, torch.float32), "float16"),
        (lambda: DecodeStep(weights, step.slots, step.sampling, step.stop_ids, 2, torch.float16), "cache is float32"),
        (lambda: new.run(torch.zeros(1, dtype=torch.int32)), "use_cache"),
        (lambda: new.prefill(ids, [0], [3]), "use_cache"),
        (lambda: new.use_cache(step.keys[:2], step.values[:2]), "3 layers"),
        (lambda: new.use_cache(step.keys.bfloat16(), step.values.bfloat16()), "must be torch.float32"),
        (lambda: step.run(torch.zeros(3, dtype=torch.int32)), "up to 2"),
        (lambda: step.run(torch.tensor([5], dtype=torch.int32)), "out of range"),
        (lambda: step.run(torch.tensor([0])), "int32"),
        (lambda: step.prefill(ids, [2], [3]), "slots must be in"),
        (lambda: step.prefill(ids, [0], [2]), "token_ids"),
        (lambda: step.prefill(ids, [0], [3], [22]), "room for 24"),
        (lambda: step.prefill(ids + 61, [0], [3]), "token ids"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert "no native kernel" in str(why_not_step(weights._replace(activation="sqrtsoftplus")))


def test_every_activation_of_triton_has_a_native_one():
    assert set(ops.TRITON_ACTIVATIONS.values()) <= set(native.ACTIVATIONS)
