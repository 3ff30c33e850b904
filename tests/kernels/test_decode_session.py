"""The decoding step as a whole, and generation through it, against the model on PyTorch's operators."""

from __future__ import annotations

import math

import pytest
import torch

from fastgpt2 import GPT2, GPT2Config, decode
from fastgpt2.cache import KVCache
from fastgpt2.config import SamplingConfig
from fastgpt2.decode import DecodeSession, NewRow, why_not_decode
from fastgpt2.tokenizer import Tokenizer
from fastgpt2_kernels import ops
from tests.helpers import TINY, assert_within_budget, random_model

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SMALL = {"num_layers": 2, "num_heads": 2}
# Tiles with which the interpreter is quick, for whole generations.
TINIEST = {"num_layers": 1, "hidden_size": 32, "feedforward_dim": 32, "vocab_size": 31}
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture
def device(triton_device: str) -> str:
    return triton_device


def pair(device: str, seed: int = 0, **changes: object) -> tuple[GPT2, GPT2]:
    """The same model twice: on the Triton kernels and on PyTorch's operators.

    Its head is untied, its biases lie around 0 and its embeddings are large. Otherwise it would repeat one token for
    ever, and the tokens it has seen and their positions would make no difference.
    """
    plain = random_model(seed, **{**SMALL, "tie_word_embeddings": False, **changes})
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias"):
                parameter.sub_(1.0)
            elif name.endswith(("wte.weight", "wpe.weight")):
                parameter.mul_(4.0)
    plain = plain.to(device)
    plain.backend = "torch"
    ours = GPT2(plain.config, backend="triton").to(device)
    ours.load_state_dict(plain.state_dict())
    return ours.eval(), plain


def begun(model: GPT2, prompts: list[list[int]], slots: list[int] | None = None, limit: int = 1000, **options):
    """A session whose rows hold `prompts`, each prefilled alone on PyTorch's operators, and their first tokens."""
    sampling = options.pop("sampling", GREEDY)
    slots = list(range(len(prompts))) if slots is None else slots
    num_slots = options.pop("num_slots", max(slots) + 1)
    capacity = options.pop("capacity", model.config.context_length)
    cache = KVCache(model.config, num_slots, capacity, dtype=model.dtype, device=model.device)
    backend, model.backend = model.backend, "torch"
    logits = []
    for slot, ids in zip(slots, prompts, strict=True):
        plan = ops.plan_rows([slot], [len(ids)], [0], model.device)
        logits.append(model.lm_head(model.extend(torch.tensor(ids, device=model.device), plan, cache)[-1]).float())
    model.backend = backend
    session = DecodeSession(model, cache, sampling, **options)
    keys = ops.row_keys(5, list(range(len(prompts))), [0] * len(prompts)).tolist()
    new = [NewRow(slot, ids, tuple(key), limit) for slot, ids, key in zip(slots, prompts, keys, strict=True)]
    first = session.begin(new, torch.stack(logits).detach()).read()[0]
    return session, [first[slot] for slot in slots]


def logits_of(session: DecodeSession, rows: int) -> torch.Tensor:
    return session.step_logits(rows).cpu()


def test_greedy_tokens_are_the_reference_paths(device):
    """All 64 tokens after prompts of different lengths are the same, in float32."""
    ours, plain = pair(device, context_length=72, **TINIEST)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8]]
    options = {"max_new_tokens": 64, "temperature": 0, "stop_token_ids": ()}
    got, want = ours.generate(prompts, **options), plain.generate(prompts, **options)
    assert [s.token_ids for s in got] == [s.token_ids for s in want]
    assert all(len(s.token_ids) == 64 and len(set(s.token_ids)) > 10 for s in got)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(torch.tensor(g.logprobs), torch.tensor(w.logprobs), rtol=1e-4, atol=1e-4)


def test_tokens_chosen_outside_the_step_are_the_reference_paths(device):
    """With a ban, a penalty and a logits processor, the step returns its logits and takes the token that was chosen."""
    ours, plain = pair(device, context_length=40, **TINIEST)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8]]

    def shifted(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits + ids.sum() % 3 * (torch.arange(logits.shape[1], device=logits.device) % 3)

    options = {"max_new_tokens": 24, "temperature": 0, "stop_token_ids": ()}
    options |= {"no_repeat_ngram_size": 1, "repetition_penalty": 1.3, "logits_processor": shifted}
    got, want = ours.generate(prompts, **options), plain.generate(prompts, **options)
    assert [s.token_ids for s in got] == [s.token_ids for s in want]
    assert all(len({*s.prompt_ids, *s.token_ids}) == 24 + len(s.prompt_ids) for s in got)


def test_tokens_that_a_penalty_has_marked_cannot_be_replaced(device):
    ours, _ = pair(device, context_length=24, **TINIEST)
    session, _ = begun(ours, [[1, 2]], sampling=SamplingConfig(temperature=0, repetition_penalty=2.0))
    with pytest.raises(ValueError, match="tokens cannot be replaced with a repetition penalty"):
        session.replace_tokens([0], torch.tensor([3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "relu", "hidden_size": 48, "num_heads": 3, "feedforward_dim": 72},
        {"scale_attn_weights": False, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3},
    ],
)
def test_logits_of_a_step(device, dtype, changes):
    ours, plain = pair(device, 3, **changes)
    ours, plain = ours.to(dtype), plain.to(dtype)
    exact_model = GPT2(plain.config, backend="torch").double().to(device)
    exact_model.load_state_dict(plain.state_dict())
    exact_model.eval()
    prompts = [[5, 6, 7], [9] * 11, [2]]
    session, first = begun(ours, prompts, slots=[2, 0, 3])
    session.step([2, 0, 3])
    whole = [[*ids, token] for ids, token in zip(prompts, first, strict=True)]
    with torch.no_grad():
        plain_logits = torch.stack([plain(torch.tensor([ids], device=device))[0, -1] for ids in whole]).cpu()
        exact = torch.stack([exact_model(torch.tensor([ids], device=device))[0, -1] for ids in whole]).cpu()
    assert_within_budget(logits_of(session, 3), plain_logits, exact, "logits")


@pytest.mark.slow
def test_logits_of_a_step_at_the_size_of_gpt2(device):
    """The model has one block of GPT-2 small, and a head with an odd vocabulary."""
    torch.manual_seed(0)
    config = GPT2Config.preset("gpt2", num_layers=1, vocab_size=3001)
    plain = GPT2(config, backend="torch").to(device).eval()
    ours = GPT2(config, backend="triton").to(device).eval()
    ours.load_state_dict(plain.state_dict())
    exact_model = GPT2(config, backend="torch").double().to(device).eval()
    exact_model.load_state_dict(plain.state_dict())
    ids = torch.randint(0, config.vocab_size, (140,)).tolist()
    session, first = begun(ours, [ids])
    session.step([0])
    with torch.no_grad():
        whole = torch.tensor([[*ids, *first]], device=device)
        plain_logits, exact = plain(whole)[0, -1:].cpu(), exact_model(whole)[0, -1:].cpu()
    assert_within_budget(logits_of(session, 1), plain_logits, exact, "logits")


def test_launches_of_a_step(device, monkeypatch):
    """A step takes 5 kernel launches per layer, and 3 more."""
    ours, _ = pair(device)
    session, _ = begun(ours, [[1, 2], [3]])
    session.step([0, 1])
    launches = count_launches(monkeypatch)
    session.step([0, 1])
    assert len(launches) == 5 * ours.config.num_layers + 3


def count_launches(monkeypatch) -> list[str]:
    launches: list[str] = []
    if torch.cuda.is_available():
        from triton.runtime.jit import JITFunction

        run = JITFunction.run
        monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: (launches.append(self), run(self, *a, **k))[1])
    else:
        from triton.runtime.interpreter import GridExecutor

        call = GridExecutor.__call__
        monkeypatch.setattr(
            GridExecutor, "__call__", lambda self, *a, **k: (launches.append(self), call(self, *a, **k))[1]
        )
    return launches


def test_a_step_needs_no_synchronisation(device, monkeypatch):
    """Nothing in a step reads a tensor on the host, or has a size that depends on a tensor's values."""
    ours, _ = pair(device)
    session, _ = begun(ours, [[1, 2], [3]], sampling=SamplingConfig(top_k=5, top_p=0.9, repetition_penalty=1.2))
    session.step([0, 1])
    waits = count_waits(monkeypatch)
    for _ in range(2):
        session.step([0, 1])
    assert waits == []
    session.step([0, 1]).read()
    assert waits


def count_waits(monkeypatch) -> list[str]:
    waits: list[str] = []

    def counted(name: str, method):
        def call(self, *args, **options):
            waits.append(name)
            return method(self, *args, **options)

        return call

    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda.Event, "synchronize", counted("synchronize", torch.cuda.Event.synchronize))
    names = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return waits


@pytest.mark.parametrize("others", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 63))])
def test_neighbours_do_not_matter(device, others):
    """A row is bitwise the same alone and in batches of 3, 17 and 64, whatever its slot and the other rows' lengths."""
    ours, _ = pair(device, 1, **(SMALL if others < 20 else TINIEST))
    sampling = SamplingConfig(temperature=0.8, top_k=20)
    prompt = [4, 9, 2, 7]
    alone, first = begun(ours, [prompt], sampling=sampling)
    crowd = [[1 + i % 29] * (1 + i % 5) for i in range(others)]
    together, firsts = begun(ours, [prompt, *crowd], slots=[others, *range(others)], sampling=sampling)
    assert firsts[0] == first[0]
    for _ in range(2 if others < 20 else 1):
        one = alone.step([0]).read()
        many = together.step([*range(others - 1), others, others - 1]).read()
        assert one[0][0] == many[0][others]
        assert one[1][0] == many[1][others]
        assert torch.equal(logits_of(alone, 1)[0], logits_of(together, others + 1)[others - 1])


def check_rows_that_end(device: str) -> None:
    """Rows end at a stop token, a limit or a full context. Then they do not change, and the other rows continue."""
    ours, plain = pair(device, 7)
    prompts, limits = [[1, 2, 3], [4] * 23, [5, 6], [7, 8]], [9, 9, 9, 3]
    want = [s.token_ids for s in plain.generate(prompts, max_new_tokens=6, temperature=0, stop_token_ids=())]
    stop = want[0][2]
    assert all(len(set(tokens)) == len(tokens) for tokens in (want[0], want[3])), "the model repeats itself"
    assert stop not in want[3][:3]
    session, first = begun(ours, prompts, stop_ids=[60_000, stop])
    session.slots.limits[:4] = torch.tensor(limits)
    steps = [first, *(session.step([0, 1, 2, 3]).read()[0] for _ in range(5))]
    ended = 0
    for slot, (prompt, tokens, limit) in enumerate(zip(prompts, want, limits, strict=True)):
        n = 1
        while n < 6 and tokens[n - 1] != stop and n < limit and len(prompt) + n <= ours.config.context_length:
            n += 1
        assert [step[slot] for step in steps[:n]] == tokens[:n]
        if n < 6:
            ended += 1
            assert session.slots.status[slot] == ops.IDLE
            assert session.slots.lengths[slot] == len(prompt) + n - 1
    assert ended >= 3


def test_rows_end_on_the_device(device):
    check_rows_that_end(device)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_is_the_hosts(device, batch_size):
    """Refilled slots, several samples per prompt, stop tokens and full contexts give the same as the host's loop."""
    ours, plain = pair(device, 4, **TINIEST)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3] * 20]
    options = {"max_new_tokens": 5, "temperature": 0, "num_samples": 2}
    unstopped = [set(s.token_ids) for s in plain.generate(prompts, stop_token_ids=(), **options)]
    stop = next(t for t in set.union(*unstopped) if not all(t in tokens for tokens in unstopped))
    options["stop_token_ids"] = (stop,)
    got = ours.generate(prompts, batch_size=batch_size, **options)
    want = plain.generate(prompts, batch_size=batch_size, **options)
    assert [(s.token_ids, s.finish_reason) for s in got] == [(s.token_ids, s.finish_reason) for s in want]
    assert {s.finish_reason for s in got} == {"stop", "length"}


def test_a_shifted_context_is_the_hosts(device):
    """Rows continue from their last tokens, and keep the tokens that they have seen and their place in the noise."""
    ours, plain = pair(device, 4, context_length=6, **TINIEST)
    options = {"max_new_tokens": 9, "num_samples": 2, "stop_token_ids": (), "context_shift": True}
    options |= {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.7}
    got, want = (model.generate([[1, 2, 3], [4]], batch_size=3, **options) for model in (ours, plain))
    assert [s.token_ids for s in got] == [s.token_ids for s in want]
    assert {len(s.token_ids) for s in got} == {9}


def test_stop_strings_and_text(device):
    """A stop string is found on the host, one step late. The sample still ends at the string."""
    tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b\n"] * 4, 280)
    ours, plain = pair(device, **{**TINIEST, "vocab_size": tokenizer.vocab_size})
    ours.tokenizer = plain.tokenizer = tokenizer
    text = plain.generate(["def"], max_new_tokens=8, temperature=0, stop_token_ids=())[0].text
    assert text
    options = {"max_new_tokens": 8, "temperature": 0, "stop_token_ids": (), "stop_strings": (text[3:5],)}
    got, want = (model.generate(["def", "a +"], **options) for model in (ours, plain))
    assert [(s.text, s.token_ids, s.finish_reason) for s in got] == [
        (s.text, s.token_ids, s.finish_reason) for s in want
    ]
    events = list(ours.stream(["def"], **options))
    assert "".join(event.text for event in events) == got[0].text


def test_samples_depend_on_seed_prompt_and_sample_alone(device):
    ours, _ = pair(device, **TINIEST)
    options = {"max_new_tokens": 4, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3, "stop_token_ids": ()}
    prompts = [[1, 2], [3, 4], [1, 2]]
    together = ours.generate(prompts, num_samples=2, batch_size=6, seed=7, **options)
    one_by_one = ours.generate(prompts, num_samples=2, batch_size=1, seed=7, **options)
    assert [s.token_ids for s in together] == [s.token_ids for s in one_by_one]
    assert len({tuple(s.token_ids) for s in together}) > 3
    assert [s.token_ids for s in ours.generate(prompts[:1], seed=8, **options)] != [together[0].token_ids]


def test_repetition_penalty_sees_prompt_and_new_tokens(device):
    ours, plain = pair(device, 5)
    options = {"max_new_tokens": 6, "temperature": 0, "repetition_penalty": 1.7, "stop_token_ids": ()}
    got, want = (model.generate([[1, 2, 3], [9]], **options) for model in (ours, plain))
    assert [s.token_ids for s in got] == [s.token_ids for s in want]


# The sanitizer attributes an address that is loaded from memory to another tensor.
@pytest.mark.parametrize("use_table", [False, pytest.param(True, marks=pytest.mark.unsanitized)])
def test_the_cache_may_grow_between_steps(device, use_table):
    """Rows continue with their cached tokens. A graph reads the new address from the table on the device."""
    ours, plain = pair(device, context_length=150)
    prompts = [[1, 2, 3] * 20, [4]]
    want = [s.token_ids for s in plain.generate(prompts, max_new_tokens=8, temperature=0, stop_token_ids=())]
    session, first = begun(ours, prompts, capacity=64)
    session.use_table = use_table
    assert session.cache.capacity == 64
    got = [[token] for token in first]
    for step in range(7):
        if step == 2:
            session.cache.reserve(150)
        tokens = session.step([0, 1]).read()[0]
        for row, token in zip(got, tokens, strict=False):
            row.append(token)
    assert got == want


def test_a_session_is_kept_for_the_next_run(device):
    """The next run may have other settings of the same filters. Moved weights or other filters need a new session."""
    ours, plain = pair(device, **TINIEST)
    options = {"max_new_tokens": 3, "stop_token_ids": ()}
    ours.generate([[1]], top_k=3, **options)
    first = decode._KEPT[ours]
    ours.generate([[1, 2]], top_k=1, **options)
    ours.generate([[1, 2]], top_k=5, temperature=1e-6, **options)
    assert decode._KEPT[ours] is not first
    kept = decode._KEPT[ours]
    got = ours.generate([[1, 2]], top_k=2, temperature=1e-6, **options)
    assert decode._KEPT[ours] is kept
    assert got[0].token_ids == plain.generate([[1, 2]], temperature=0, **options)[0].token_ids
    with torch.no_grad():
        ours.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
        plain.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    got = ours.generate([[1, 2]], top_k=2, temperature=1e-6, **options)
    assert got[0].token_ids == plain.generate([[1, 2]], temperature=0, **options)[0].token_ids
    kept = decode._KEPT[ours]
    torch.set_float32_matmul_precision("high")
    try:
        ours.generate([[1, 2]], top_k=2, **options)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert decode._KEPT[ours] is not kept
    kept = decode._KEPT[ours]
    ours.transformer.h[0].mlp.c_fc.weight.data = ours.transformer.h[0].mlp.c_fc.weight.data.clone()
    ours.generate([[1, 2]], top_k=2, **options)
    assert decode._KEPT[ours] is not kept


def test_a_session_serves_in_and_outside_of_inference_mode(device):
    """The first run, in inference mode, makes the cache and lets it grow. The next run, outside of it, writes to it."""
    ours, plain = pair(device, **{**TINIEST, "context_length": 100})
    options = {"max_new_tokens": 3, "temperature": 0, "stop_token_ids": ()}
    prompts = [[1, 2, 3], list(range(30)) * 2 + list(range(8))]
    want = [sample.token_ids for sample in plain.generate(prompts, **options)]
    with torch.inference_mode():
        assert ours.generate(prompts[:1], **options)[0].token_ids == want[0]
        assert ours.generate(prompts[1:], **options)[0].token_ids == want[1]
    kept = decode._KEPT[ours]
    for prompt, tokens in zip(prompts, want, strict=True):
        assert ours.generate([prompt], **options)[0].token_ids == tokens
    assert decode._KEPT[ours] is kept


def test_other_slots_can_be_stepped_outside_of_inference_mode(device):
    """The tensor that names a step's rows is made in inference mode here, and is then written to outside of it."""
    ours, _ = pair(device, **TINIEST)
    session = DecodeSession(ours, KVCache(ours.config, 2, 8, device=device), SamplingConfig(temperature=0))
    for slot in (0, 1):
        with torch.inference_mode(slot == 0), torch.no_grad():
            session.begin([NewRow(slot, [1, 2], (0, slot), 4)], session.prefill([slot], [[1, 2]]))
            session.step([slot]).read()


def test_either_precision_switch(device):
    """If only PyTorch's newer switch is set, reading the older one raises."""
    ours, _ = pair(device, **TINIEST)
    options = {"max_new_tokens": 2, "temperature": 0, "stop_token_ids": ()}
    want = ours.generate([[1, 2]], **options)[0].token_ids
    kept, was = decode._KEPT[ours], torch.backends.cuda.matmul.fp32_precision
    assert ops.is_float32_exact()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert not ops.is_float32_exact()
        got = ours.generate([[1, 2]], **options)[0].token_ids
    finally:
        torch.backends.cuda.matmul.fp32_precision = was
    assert decode._KEPT[ours] is not kept
    assert len(got) == len(want)
    for precision in ("high", "medium", "highest"):
        torch.set_float32_matmul_precision(precision)
        assert ops.is_float32_exact() == (precision == "highest")


def test_int8_weights(device):
    """A step with 8-bit weights equals that of a model whose weights were rounded to 8 bits."""
    ours, plain = pair(device, 6)
    rounded = GPT2(plain.config, backend="torch").to(device).eval()
    state = plain.state_dict()
    for name, tensor in state.items():
        if tensor.dim() == 2 and not name.endswith(("wte.weight", "wpe.weight")):
            values, scale = ops.quantize_rows(tensor)
            state[name] = values * scale[:, None]
    rounded.load_state_dict(state)
    session, first = begun(ours, [[3, 1, 4]], weight_dtype=torch.int8)
    session.step([0])
    # The prompt's keys come from the unrounded model, so only a prompt of one token could be compared exactly. Instead,
    # check that the logits are closer to the rounded model than the unrounded model's are.
    exact = rounded(torch.tensor([[3, 1, 4, *first]], device=device))[0, -1]
    unrounded = plain(torch.tensor([[3, 1, 4, *first]], device=device))[0, -1]
    ours_logits = logits_of(session, 1)[0].to(device)
    assert (ours_logits - exact).norm() < (unrounded - exact).norm()


def test_a_failed_capture_costs_a_warning_only(device, monkeypatch):
    ours, plain = pair(device)
    want = plain.generate([[1, 2]], max_new_tokens=4, temperature=0, stop_token_ids=())[0].token_ids
    session, first = begun(ours, [[1, 2]])
    session.use_graphs = True

    def refuse(rows, use_pdl):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(session, "_captured", refuse)
    session.use_pdl = False
    with pytest.warns(UserWarning, match="a CUDA graph cannot be used .*not permitted"):
        got = [*first, session.step([0]).read()[0][0]]
    got += [session.step([0]).read()[0][0] for _ in range(2)]
    assert got == want


def test_nan_logits_are_reported(device):
    ours, _ = pair(device)
    with torch.no_grad():
        ours.transformer.h[0].mlp.c_fc.bias[0] = math.nan
    with pytest.raises(RuntimeError, match="prompt 0 after 0 tokens are NaN"):
        ours.generate([[1, 2]], max_new_tokens=4, temperature=0)


def test_bad_inputs(device):
    ours, plain = pair(device)
    cache = KVCache(ours.config, 2, 8, device=device)
    with pytest.raises(ValueError, match="cannot be used: the model's backend is 'torch'"):
        DecodeSession(plain, cache, GREEDY)
    with pytest.raises(ValueError, match=r"weight_dtype must be torch.float32 or torch.int8; got torch.float16"):
        DecodeSession(ours, cache, GREEDY, weight_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"cache must be on .* in torch.float32; got .* torch.float16"):
        DecodeSession(ours, KVCache(ours.config, 2, 8, dtype=torch.float16, device=device), GREEDY)
    session = DecodeSession(ours, cache, GREEDY)
    logits = torch.zeros(1, TINY.vocab_size, device=device)
    with pytest.raises(ValueError, match=r"slots must be in 0 .. 1; got 2"):
        session.begin([NewRow(2, [1], (0, 0), 5)], logits)
    with pytest.raises(ValueError, match=r"slot 1 cannot hold 25 tokens; the cache has room for 24"):
        session.begin([NewRow(1, [1] * 25, (0, 0), 5)], logits)
    with pytest.raises(ValueError, match=r"logits must be float32 of shape \(1, 61\); got torch.float16 \(1, 61\)"):
        session.begin([NewRow(1, [1], (0, 0), 5)], logits.half())
    with pytest.raises(ValueError, match=r"a step must have 1 to 2 different slots; got \[0, 1, 2\]"):
        session.step([0, 1, 2])
    with pytest.raises(ValueError, match="different slots"):
        session.step([0, 0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_function": "prelu"}, "the activation 'prelu' has no kernel"),
        ({"num_heads": 1, "hidden_size": 320}, "head sizes up to 256; the model's is 320"),
    ],
)
def test_models_that_decode_on_the_host(device, changes, reason):
    ours, _ = pair(device, **changes)
    assert reason in str(why_not_decode(ours))
    assert "float64" in str(why_not_decode(pair(device)[0].double()))
