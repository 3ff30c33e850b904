"""`generate` of the Hugging Face classes gives what transformers' own gives, for its arguments and ragged batches."""

from __future__ import annotations

import copy
import inspect
import string

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TextStreamer,
)
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.pytorch_utils import Conv1D

import fastgpt2.transformers
from fastgpt2 import GPT2
from fastgpt2.transformers import generation
from fastgpt2.transformers.generation import _update_engine
from fastgpt2_kernels import ops, reference
from tests.helpers import assert_rms_within_budget

V, PAD, EOS, T, B = 61, 3, 2, 9, 4
CONFIG = {
    "vocab_size": V, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4,
    "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD, "of_ours": "unknown there",
}  # fmt: skip
# Rounding could decide between logits closer than this. Models and prompts with such a choice are not used.
MARGIN = 1e-3


class Longer(StoppingCriteria):
    """Ends a row when one of its last three tokens is above `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return (input_ids[:, -3:] > self.limit).any(1)


class Shift(LogitsProcessor):
    """Adds a number to each token's score that depends on the whole sequence."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + (torch.arange(V) + input_ids.sum(1, keepdim=True)).remainder(5).to(scores)


class Letters(PreTrainedTokenizerFast):
    """A tokenizer with one character per token."""

    def __init__(self) -> None:
        letters = ["<u>", *string.ascii_letters, *" .,;:!?-"]
        assert len(letters) == V
        model = models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<u>")
        tokenizer = Tokenizer(model)
        tokenizer.decoder = decoders.Fuse()
        super().__init__(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
        self.add_special_tokens({"pad_token": letters[PAD], "eos_token": letters[EOS]})


def pair(seed: int, name: str = "GPT2LMHeadModel") -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """transformers' model and ours, with the same random weights."""
    torch.manual_seed(seed)
    theirs = getattr(transformers, name)(GPT2Config(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    ours = getattr(fastgpt2.transformers, name)(GPT2Config(**CONFIG)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(seed: int, side: str = "left") -> dict[str, Tensor]:
    """Ragged prompts, padded to T. One of them has length T."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, V, (B, T), generator=generator)
    counts = [T, *torch.randint(1, T, (B - 1,), generator=generator).tolist()]
    columns = torch.arange(T)
    mask = torch.stack([columns < n if side == "right" else columns >= T - n for n in counts])
    return {"input_ids": ids.where(mask, PAD), "attention_mask": mask.long()}


def prompts_of(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def greedy(model: GPT2LMHeadModel, inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, bool]:
    """Decode greedily. Return the ids, and whether every choice was clear."""
    out = model.generate(**inputs, output_scores=True, return_dict_in_generate=True, do_sample=False, **options)
    best = torch.stack(out.scores).topk(2, -1).values
    return out.sequences, bool(((best[..., 0] - best[..., 1]) > MARGIN).all())


def clear_case(seed: int, name: str = "GPT2LMHeadModel", **options: object):
    """Find two models and a batch for which every greedy choice is clear. Return them with transformers' ids."""
    for attempt in range(50):
        theirs, ours = pair(seed + attempt, name)
        inputs = batch(seed + attempt)
        made = {option: value() if option in FRESH else value for option, value in options.items()}
        expected, is_clear = greedy(theirs, inputs, **made)
        if is_clear:
            return theirs, ours, inputs, expected
    raise AssertionError("no clear case in 50 attempts")


@pytest.fixture
def sessions(monkeypatch) -> list[object]:
    """A list that gets the sampling settings of every run on our decoding step."""
    if (reason := ops.why_not_native("decode_step", torch.device("cpu"))) is not None:
        pytest.skip(reason)
    made = []
    acquire = generation.acquire_session
    monkeypatch.setattr(generation, "acquire_session", lambda *args: made.append(args[2]) or acquire(*args))
    return made


# Older releases of transformers penalize the padding of a row as if it were tokens. Our step then does not choose.
PENALTY_BY_ROW = "Tensor" in str(inspect.signature(RepetitionPenaltyLogitsProcessor))

# -- greedy, over the arguments ---------------------------------------------------------------------------------------

# Arguments whose objects hold state are created again for every call.
FRESH = {"logits_processor", "stopping_criteria"}
FUSED = [
    {},
    {"max_new_tokens": 1},
    {"max_length": T + 5, "max_new_tokens": None},
    {"eos_token_id": [*range(30, 61, 3)]},
    {"eos_token_id": None, "pad_token_id": None},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"max_time": 1e6},
    {"stop_strings": ["def", "k", "M", "Zq", "."], "tokenizer": Letters()},
    {"stop_strings": ["def", "k", "M", "Zq", "."], "tokenizer": Letters(), "eos_token_id": None},
    {"stopping_criteria": lambda: [Longer(50)]},
    {"stopping_criteria": lambda: [Longer(50)], "eos_token_id": None},
    {"generation_config": transformers.GenerationConfig(max_new_tokens=5, eos_token_id=[4, 14, 24, 34, 44])},
]
IN_LOOP = [
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1, "max_new_tokens": 20},
    {"bad_words_ids": [[i] for i in range(4, 61, 2)] + [[5, 7], [9, 11, 13]]},
    {"sequence_bias": {(i,): float(i % 7) for i in range(4, 61)} | {(5, 9): 4.0}},
    {"suppress_tokens": list(range(10, 50))},
    {"begin_suppress_tokens": list(range(10, 60))},
    {"forced_bos_token_id": 8},
    {"forced_eos_token_id": EOS},
    {"min_new_tokens": 9, "eos_token_id": [*range(30, 61, 3)]},
    {"min_length": T + 4, "eos_token_id": [*range(30, 61, 3)]},
    {"exponential_decay_length_penalty": (2, 1.9)},
    {"encoder_repetition_penalty": 1.6},
    {"encoder_no_repeat_ngram_size": 2},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"prefix_allowed_tokens_fn": lambda row, ids: [4 + row, 10 + int(ids[-1]) % 7, 30 + len(ids)]},
    {"guidance_scale": 1.7},
    {"logits_processor": lambda: [Shift()]},
    {"logits_processor": lambda: [Shift()], "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"logits_processor": lambda: [RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=T)]},
    *([{"logits_processor": lambda: [RepetitionPenaltyLogitsProcessor(1.8, torch.full((B,), T))]}] * PENALTY_BY_ROW),
]


@pytest.mark.parametrize(("options", "fused"), [(o, True) for o in FUSED] + [(o, False) for o in IN_LOOP])
def test_greedy_ids_are_transformers_on_ragged_left_padded_batches(seed, sessions, options, fused):
    options = {"max_new_tokens": 12, **options}
    if "generation_config" in options:
        del options["max_new_tokens"]
    _, ours, inputs, expected = clear_case(seed, **options)
    made = {name: value() if name in FRESH else value for name, value in options.items()}
    got = ours.generate(**inputs, do_sample=False, **made)
    assert torch.equal(got, expected)
    assert got.dtype == inputs["input_ids"].dtype
    assert len(sessions) == 1, "the run did not use our decoding step"
    penalty = options.get("repetition_penalty", 1.0) if fused and PENALTY_BY_ROW else 1.0
    assert sessions[0].repetition_penalty == penalty
    with_scores, _ = greedy(ours, inputs, **{n: v() if n in FRESH else v for n, v in options.items()})
    assert torch.equal(with_scores, expected)


def test_the_models_own_generation_config_counts_where_no_argument_does(seed, sessions):
    for attempt in range(20):
        theirs, ours = pair(seed + attempt)
        for model in (theirs, ours):
            model.generation_config.max_new_tokens = 7
            model.generation_config.repetition_penalty = 1.5
        expected, is_clear = greedy(theirs, batch(seed))
        if is_clear:
            break
    assert torch.equal(ours.generate(**batch(seed)), expected)
    assert sessions[0].repetition_penalty == (1.5 if PENALTY_BY_ROW else 1.0)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_padded_rows_are_continued_as_they_are_alone(seed, options, dtype):
    """This holds with our step, in transformers' loop (which float64 needs), and with a hole in the mask."""
    options = {"max_new_tokens": 8, "eos_token_id": None, **options}
    for attempt in range(50):
        theirs, ours = (model.to(dtype) for model in pair(seed + attempt))
        inputs = batch(seed + attempt, "right")
        inputs["attention_mask"][0, 3:5] = 0
        alone = []
        for prompt in prompts_of(inputs):
            one = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt)[None]}
            alone.append(greedy(theirs, one, suppress_tokens=[PAD], **options))
        if all(is_clear for _, is_clear in alone):
            break
    got = ours.generate(**inputs, do_sample=False, suppress_tokens=[PAD], **options)
    assert torch.equal(got[:, :T], inputs["input_ids"])
    for new, (expected, _) in zip(got[:, T:], alone, strict=True):
        assert torch.equal(new, expected[0, -8:])
    if "no_repeat_ngram_size" not in options and (PENALTY_BY_ROW or not options.get("repetition_penalty")):
        # Without suppressed tokens, the fused step chooses.
        assert torch.equal(
            ours.generate(**inputs, do_sample=False, **options)[:, T:],
            torch.cat([greedy(theirs, {"input_ids": p[None]}, **options)[0][:, -8:] for p in prompts_of(inputs)]),
        )


def test_equal_prompts_without_a_mask_and_the_double_heads_model(seed, sessions):
    theirs, ours, inputs, _ = clear_case(seed, "GPT2DoubleHeadsModel", max_new_tokens=8)
    ids = inputs["input_ids"][:1].repeat(3, 1)
    assert torch.equal(
        ours.generate(ids, max_new_tokens=8, do_sample=False), theirs.generate(ids, max_new_tokens=8, do_sample=False)
    )
    assert torch.equal(  # without a prompt, it begins with the bos token
        ours.generate(max_new_tokens=4, do_sample=False), theirs.generate(max_new_tokens=4, do_sample=False)
    )
    assert len(sessions) == 2


# -- what is returned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_logits_and_cache_are_transformers(seed, sessions, side):
    options = {"max_new_tokens": 6, "eos_token_id": None, "no_repeat_ngram_size": 2, "output_scores": True,
               "output_logits": True, "return_dict_in_generate": True, "do_sample": False}  # fmt: skip
    theirs, ours, inputs, _ = clear_case(seed, max_new_tokens=6, eos_token_id=None, no_repeat_ngram_size=2)
    expected = theirs.generate(**inputs, **options)
    exact = copy.deepcopy(theirs).double().generate(**inputs, **options)
    eager = copy.deepcopy(theirs)
    eager.set_attn_implementation("eager")
    plain = [expected, eager.generate(**inputs, **options)]
    columns, given = torch.arange(T).expand(B, T), inputs
    if side == "right":
        columns = (1 - inputs["attention_mask"]).argsort(dim=1, stable=True)
        given = {name: tensor.gather(1, columns) for name, tensor in inputs.items()}
    got = ours.generate(**given, **options)
    assert type(got) is type(expected)
    assert [name for name, value in got.items() if value is not None] == [
        name for name, value in expected.items() if value is not None
    ]
    assert torch.equal(got.sequences, torch.cat([given["input_ids"], expected.sequences[:, T:]], 1))
    for name in ("scores", "logits"):
        assert [t.dtype for t in got[name]] == [torch.float32] * 6
        mine, *plains, right = (torch.stack(out[name]) for out in (got, *plain, exact))
        assert torch.equal(mine.isinf(), right.isinf())
        mine, *plains, right = (t.nan_to_num(neginf=0.0) for t in (mine, *plains, right.double()))
        assert_rms_within_budget(mine, plains, right, name)

    def cached(out: transformers.utils.ModelOutput, part: slice) -> Tensor:
        return torch.stack(
            [t for layer in out.past_key_values.layers for t in (layer.keys[:, :, part], layer.values[:, :, part])]
        )

    kept = given["attention_mask"][:, None, :, None].bool()
    prompt, new = slice(0, T), slice(T, None)
    mine, *plains, right = (cached(out, prompt) for out in (got, *plain, exact))
    assert not mine.masked_select(~kept).any()
    index = columns[:, None, :, None].expand_as(mine[0])
    plains = [t.gather(3, index.expand_as(t)).masked_fill(~kept, 0) for t in (*plains, right)]
    assert_rms_within_budget(mine, plains[:-1], plains[-1], "the cache of the prompts")
    mine, *plains, right = (cached(out, new) for out in (got, *plain, exact))
    assert_rms_within_budget(mine, plains, right, "the cache of the new tokens")


def test_a_run_is_continued_from_the_cache_it_returned(seed):
    _, ours, inputs, expected = clear_case(seed, max_new_tokens=10, eos_token_id=None)
    options = {"eos_token_id": None, "do_sample": False}
    first = ours.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, **options)
    mask = torch.cat([inputs["attention_mask"], torch.ones(B, 5, dtype=torch.long)], 1)
    second = ours.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=5, **options
    )
    assert torch.equal(second, expected)


def test_rows_that_have_ended_have_scores_of_zero(seed, sessions):
    _, ours, inputs, _ = clear_case(seed, max_new_tokens=12, eos_token_id=[*range(4, 61, 3)])
    out = ours.generate(**inputs, max_new_tokens=12, eos_token_id=[*range(4, 61, 3)], do_sample=False,
                        logits_processor=[Shift()], return_dict_in_generate=True, output_scores=True,
                        output_logits=True)  # fmt: skip
    new = out.sequences[:, T:]
    ended = (torch.isin(new, torch.arange(4, 61, 3)).int().cumsum(1) > 0).roll(1, 1)
    ended[:, 0] = False
    for name in ("scores", "logits"):
        values = torch.stack(out[name], 1)
        assert torch.equal(values.abs().sum(-1) == 0, ended)
    assert (new[ended] == PAD).all()
    for layer in out.past_key_values.layers:
        for cached in (layer.keys, layer.values):
            assert torch.equal(cached[:, :, T:].abs().sum((1, 3)) == 0, ended[:, 1:])


# -- sampling ---------------------------------------------------------------------------------------------------------

WARPERS = [
    {"top_k": 0},
    {"top_k": 5, "temperature": 1.5},
    {"top_k": 0, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("options", [*WARPERS, {"typical_p": 0.9}, {"top_k": 7, "no_repeat_ngram_size": 2}])
def test_samples_are_drawn_from_transformers_scores(seed, sessions, options):
    """Scores are what transformers' processors make of logits. Tokens have the largest score with Gumbel noise."""
    theirs, ours = pair(seed)
    inputs = batch(seed)
    config = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": None, **options}
    torch.manual_seed(seed)
    out = ours.generate(**inputs, **config, output_scores=True, return_dict_in_generate=True)
    torch.manual_seed(seed)
    assert torch.equal(ours.generate(**inputs, **config), out.sequences)
    fused = "typical_p" not in options and "no_repeat_ngram_size" not in options
    fused = fused and (PENALTY_BY_ROW or "repetition_penalty" not in options)
    assert sessions[1].is_greedy != fused, (
        "the fused step chose tokens that it should not choose, or did not choose those that it should"
    )
    torch.manual_seed(seed)
    keys = ops.row_keys(int(torch.randint(2**63 - 1, ())), range(B), [0] * B)
    for step, scores in enumerate(out.scores):
        so_far = out.sequences[:, : T + step]
        mask = torch.cat([inputs["attention_mask"], torch.ones(B, step, dtype=torch.long)], 1)
        again = theirs.generate(
            so_far, attention_mask=mask, **{**config, "max_new_tokens": 1}, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        noisy = scores.double() + reference.gumbel(keys, torch.full((B,), step), V)
        best = noisy.topk(2, -1)
        clear = best.values[:, 0] - best.values[:, 1] > MARGIN
        assert torch.equal(out.sequences[clear, T + step], best.indices[clear, 0])
        if not (
            {"repetition_penalty", "no_repeat_ngram_size"} & set(options)
        ):  # these two depend on the prompt's length
            assert torch.equal(again.scores[0].isinf(), scores.isinf())


def test_samples_follow_the_seed_of_torch(seed, sessions):
    _, ours = pair(seed)
    inputs = batch(seed)
    options = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": None, "top_k": 0, "temperature": 2.0}
    torch.manual_seed(seed)
    first, second = (ours.generate(**inputs, **options) for _ in range(2))
    torch.manual_seed(seed)
    assert torch.equal(ours.generate(**inputs, **options), first)
    assert not torch.equal(first, second)


def test_several_sequences_of_each_prompt(seed, sessions):
    _, ours = pair(seed)
    inputs = batch(seed)
    options = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": None, "top_k": 0, "temperature": 2.0}
    torch.manual_seed(seed)
    got = ours.generate(**inputs, num_return_sequences=3, **options)
    assert got.shape == (3 * B, T + 12)
    assert torch.equal(got[:, :T], inputs["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in got[:3]}) == 3
    torch.manual_seed(seed)
    repeated = {name: tensor.repeat_interleave(3, 0) for name, tensor in inputs.items()}
    assert torch.equal(ours.generate(**repeated, **options), got)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 1e-6, "top_k": 0}, {"top_p": 1e-6, "top_k": 0}])
def test_sampling_from_one_token_is_greedy(seed, sessions, options):
    _, ours, inputs, expected = clear_case(seed, max_new_tokens=12)
    assert torch.equal(ours.generate(**inputs, max_new_tokens=12, do_sample=True, **options), expected)


# -- streaming and pipelines -------------------------------------------------------------------------------------------


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.tolist())

    def end(self) -> None:
        self.pieces.append(["end"])


@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram_size": 2}])
def test_a_streamer_gets_what_transformers_gives_it(seed, sessions, options):
    options = {"max_new_tokens": 10, "eos_token_id": [*range(30, 61, 3)], **options}
    theirs, ours, inputs, _ = clear_case(seed, **options)
    streamers = Collect(), Collect()
    for model, streamer in zip((theirs, ours), streamers, strict=True):
        model.generate(**inputs, do_sample=False, streamer=streamer, **options)
    assert streamers[0].pieces == streamers[1].pieces
    assert len(sessions) == 1


def test_text_in_and_out_by_pipeline_and_text_streamer(seed, sessions, capsys):
    tokenizer = Letters()
    theirs, ours, _, _ = clear_case(seed, max_new_tokens=8)
    texts = ["xyz", "M", "Hello, you"]
    tokenizer.padding_side = "left"
    found = []
    for model in (theirs, ours):
        run = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
        found.append(run(texts, max_new_tokens=3, do_sample=False))
        model.generate(**tokenizer(texts[2], return_tensors="pt"), max_new_tokens=3, do_sample=False,
                       streamer=TextStreamer(tokenizer))  # fmt: skip
    assert [len(one) for one in found[1]] == [1, 1, 1]
    assert all(one[0]["generated_text"].startswith(text) for one, text in zip(found[1], texts, strict=True))
    assert len(sessions) >= 2
    assert capsys.readouterr().out.count(texts[2].strip()) == 2


# -- what runs in transformers' own loop ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"token_type_ids": torch.ones(B, T, dtype=torch.long)},
        {"position_ids": torch.arange(T).expand(B, T) + 3},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_everything_else_runs_as_it_does_in_transformers(seed, sessions, options):
    theirs, ours = pair(seed)
    inputs = batch(seed)
    if "prompt_lookup_num_tokens" in options:
        inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    results = []
    for model in (theirs, ours):
        torch.manual_seed(seed)
        result = model.generate(**inputs, **{"max_new_tokens": 5, "do_sample": False, **options})
        results.append(result if isinstance(result, Tensor) else result.sequences)
    assert torch.equal(*results)
    assert not sessions


def test_embeddings_as_a_prompt_run_in_transformers_loop(seed, sessions):
    theirs, ours = pair(seed)
    embeddings = torch.randn(2, 4, CONFIG["n_embd"])
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        ours.generate(inputs_embeds=embeddings, **options), theirs.generate(inputs_embeds=embeddings, **options)
    )
    assert not sessions


def test_a_changed_model_is_not_taken_for_a_plain_one(seed, sessions):
    """Hooks, an overridden forward pass, dropout in training mode and autocast all have their effect."""
    theirs, ours = pair(seed)
    inputs = batch(seed)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    calls = []
    handle = ours.transformer.h[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    ours.generate(**inputs, **options)
    assert len(calls) == 4
    handle.remove()
    ours.train()
    results = [ours.generate(**inputs, **{**options, "max_new_tokens": 12}) for _ in range(2)]
    assert not torch.equal(*results), "dropout was off"
    ours.eval()

    class Negative(fastgpt2.transformers.GPT2LMHeadModel):
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.logits = -out.logits
            return out

    negative = Negative(ours.config).eval()
    negative.load_state_dict(ours.state_dict())
    assert not torch.equal(negative.generate(**inputs, **options), theirs.generate(**inputs, **options))
    with torch.autocast("cpu", torch.bfloat16):
        ours.generate(**inputs, **options)
    mine = {"past_key_values": DynamicCache(config=ours.config)}
    ours.generate(**inputs, **options, **mine)
    assert mine["past_key_values"].get_seq_length() == T + 3

    class Doubled(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    ours.transformer.h[0].attn.c_attn.__class__ = Doubled
    theirs.transformer.h[0].attn.c_attn.__class__ = Doubled
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))
    assert not sessions


def test_weights_that_change_are_noticed(seed, sessions):
    theirs, ours, inputs, expected = clear_case(seed, max_new_tokens=12)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **options), expected)
    for model in (theirs, ours):
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight[0, 0] += 30.0
            model.transformer.wte.weight[5:30] *= -2.0
    changed, is_clear = greedy(theirs, inputs, max_new_tokens=12)
    assert not torch.equal(changed, expected)
    if is_clear:
        assert torch.equal(ours.generate(**inputs, **options), changed)
    ours.train()
    assert ours not in generation._ENGINES
    ours.eval()
    ours.resize_token_embeddings(V + 7)
    assert _update_engine(ours).config.vocab_size == V + 7
    ours.generate(**inputs, **options)
    runs = len(sessions)
    layer = ours.transformer.h[1].mlp.c_fc
    layer.weight = torch.nn.Parameter(layer.weight.flip(0))
    assert_same_weights(_update_engine(ours), ours)
    assert runs == 2 + is_clear


def assert_same_weights(mine: GPT2, hf_model: GPT2LMHeadModel) -> None:
    assert {p.data_ptr() for p in mine.parameters()} == {p.data_ptr() for p in hf_model.parameters()}


def test_special_tokens_past_the_vocabulary_are_no_obstacle(seed, sessions):
    """A small model with the default configuration has the end-of-text token 50256."""
    _, ours = pair(seed)
    ours.config.eos_token_id = ours.config.bos_token_id = 50256
    ours.generate(**batch(seed), max_new_tokens=2, eos_token_id=50256, pad_token_id=50256)
    ours.generate(**batch(seed), max_new_tokens=2, min_new_tokens=1, eos_token_id=EOS)
    assert len(sessions) == 2


def test_the_weights_are_not_copied_but_for_the_packed_ones(seed):
    _, ours = pair(seed)
    mine = _update_engine(ours)
    assert_same_weights(mine, ours)
    assert _update_engine(ours) is mine


def test_off_the_cpu_every_weight_is_contiguous(seed):
    """The kernels of a step read no transposed weights, as transformers' Conv1D would give them."""
    _, theirs = pair(seed)
    mine = _update_engine(theirs.to("meta"))
    assert mine.device.type == "meta"
    assert all(p.is_contiguous() for p in mine.parameters())


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors_are_one_sentence(seed, sessions):
    _, ours = pair(seed)
    inputs = batch(seed)
    empty = {name: tensor.clone() for name, tensor in inputs.items()}
    empty["attention_mask"][2] = 0
    with pytest.raises(ValueError, match="row 2 of the batch is padding only"):
        ours.generate(**empty, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"row 0 has 9 tokens and 40 new ones; the context holds 48"):
        ours.generate(**inputs, max_new_tokens=41, eos_token_id=None)
    assert ours.generate(**inputs, max_new_tokens=40, eos_token_id=None).shape == (B, T + 40)
    with pytest.raises(ValueError, match="max_new_token"):
        ours.generate(**inputs, max_new_token=3)
    with torch.no_grad():
        ours.transformer.ln_f.weight[3] = torch.nan
    with pytest.raises(RuntimeError, match="logits of row 0 after 0 new tokens are NaN"):
        ours.generate(**inputs, max_new_tokens=2)


def test_steps_ahead_of_the_host_change_nothing(seed, sessions, monkeypatch):
    """On a GPU, a step starts before the tokens of the last one are read. Rows that ended there are left out."""
    options = {"max_new_tokens": 39 + 12, "eos_token_id": [*range(30, 61, 3)]}
    inputs = batch(seed)
    inputs = {name: tensor[1:] for name, tensor in inputs.items()}
    _, ours = pair(seed)
    plain = ours.generate(**inputs, do_sample=False, **{**options, "max_new_tokens": 30})
    monkeypatch.setattr(generation.DecodeSession, "is_asynchronous", True)
    assert torch.equal(ours.generate(**inputs, do_sample=False, **{**options, "max_new_tokens": 30}), plain)
    full = batch(seed)  # with its first row, which has less room than the others
    with pytest.raises(ValueError, match="row 0 has 9 tokens and 40 new ones"):
        ours.generate(**full, max_new_tokens=45, eos_token_id=None)
