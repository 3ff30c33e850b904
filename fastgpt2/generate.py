"""Bulk generation from prompts of any length. scheduler.py decides which rows are decoded together."""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from torch import Tensor

from fastgpt2.batching import find_batch_size
from fastgpt2.config import SamplingConfig
from fastgpt2.constraints import LogitsProcessor
from fastgpt2.devices import why_not_bfloat16
from fastgpt2.messages import shown
from fastgpt2.model import GPT2Base
from fastgpt2.scheduler import Request, Sample, Scheduler, TokenEvent, half_context
from fastgpt2.tokenizer import as_token_id

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "GenerateOptions",
    "Prompts",
    "Sample",
    "TokenEvent",
    "generate",
    "generate_iter",
    "kept_prompt_tokens",
    "lists_options",
    "prompt_token_ids",
    "stream",
    "token_events",
]

Prompts = Iterable[str] | Iterable[Sequence[int]] | Tensor
_Function = TypeVar("_Function", bound=Callable[..., Any])


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate`, `generate_iter` and `stream`; see `generate_iter`."""

    attention_mask: Tensor | None
    num_samples: int
    batch_size: int | str
    truncate: str
    context_shift: bool
    sample_ids: Iterable[int] | None
    skip: Container[tuple[int, int]]
    pack_weights: bool
    weight_dtype: torch.dtype | str | None
    logits_processor: LogitsProcessor | None
    sampling: SamplingConfig | None
    # the fields of SamplingConfig, instead of `sampling`
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop_token_ids: Sequence[int] | None
    stop_strings: Sequence[str]
    seed: int
    min_new_tokens: int
    no_repeat_ngram_size: int
    suppress_tokens: Sequence[int]
    bad_words_ids: Sequence[Sequence[int]]
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]]


def generate(model: GPT2Base, prompts: Prompts, **options: Unpack[GenerateOptions]) -> list[Sample]:
    """Continue every prompt; returns the samples in the order of the prompts. For arguments see `generate_iter`."""
    return sorted(generate_iter(model, prompts, **options), key=lambda s: (s.prompt_index, s.sample_index))


def generate_iter(model: GPT2Base, prompts: Prompts, **options: Unpack[GenerateOptions]) -> Iterator[Sample]:
    """Continue every prompt; yields each sample when it ends.

    A sample's random numbers depend only on (seed, prompt id, sample index). The prompt id is the prompt's index, or
    what `sample_ids` says. If the native backend decodes, on a CPU, tokens and log-probabilities are bit-identical
    whatever other rows are in the batch and whatever shares a prefix, on one machine with one number of threads.
    PyTorch's matrix products round a row differently for different numbers of rows. On a GPU prompts go through them,
    and without a decoding step (`fastgpt2.decode.why_not_decode`) all tokens do. Log-probabilities may then differ in
    their last bits, and a token where two tokens nearly tie.

    Dropout is always off, and the model's mode does not change. The weights must not change during a run.

    Args:
        prompts: Texts (the model needs a tokenizer), sequences of token ids, or a (B, T) tensor. They may have any
            lengths. An iterable is read as rows become free.
        attention_mask: (B, T), 0 where a tensor of prompts holds padding, 1 where it holds tokens. Padding is left out,
            wherever it lies. A tensor that seems to be padded with the model's `pad_token_id` needs a mask.
        num_samples: Samples per prompt; 1 by default.
        batch_size: Rows decoded together. "auto", the default, is 32, or fewer if memory has no room for them. With the
            native backend and a long list of prompts it is more, if that measures as more tokens per second. Samples do
            not depend on it.
        truncate: What happens to a prompt that is too long. "error", the default, refuses one that does not fit the
            context. "left" drops the first tokens of a prompt that leaves no room for `max_new_tokens`, but keeps at
            least half a context. `Sample.prompt_ids` holds the tokens that were kept.
        context_shift: What happens to a row that has filled the context. False, the default, ends it. True continues
            from its last tokens, half a context, as if they were the prompt: they are computed again, at positions from
            0, and so on whenever the context is full. Repetition penalty, bans and `logits_processor` still see all of
            the row's tokens.
        sample_ids: An int >= 0 for each prompt, instead of its index.
        skip: (prompt id, sample index) pairs that are not generated.
        pack_weights: On a CPU, pack the weights for speed. This takes their memory once more. On by default.
        weight_dtype: "int8" stores the linear layers' weights in 8 bits, with a scale for every output. This is faster,
            but slightly less exact. None keeps the model's dtype.
        logits_processor: Changes the logits of a row before its next token is chosen: (ids so far (1, T), logits
            (1, V)) -> logits (1, V). It runs after biases and bans, before repetition penalty and temperature.
        sampling: A `SamplingConfig`. Its fields, such as the seed, can be given by keyword instead.

    Raises:
        ValueError: A prompt is empty or does not fit the context. Samples that were yielded before stay valid.
        RuntimeError: Logits are not finite, or the weights were changed in place during the run. PyTorch counts such
            changes, except those through `.data`, whose results are undefined.
    """
    return (event.finished for event in token_events(model, prompts, **options) if event.finished is not None)


def token_events(model: GPT2Base, prompts: Prompts, **options: Unpack[GenerateOptions]) -> Iterator[TokenEvent]:
    """Continue every prompt; yields each token, without its text, when it arrives. Arguments as for `generate_iter`."""
    return _run(model, prompts, **options)


def stream(model: GPT2Base, prompts: Prompts, **options: Unpack[GenerateOptions]) -> Iterator[TokenEvent]:
    """Continue every prompt; yields each token as it is chosen. For arguments see `generate_iter`."""
    return _run(model, prompts, want_text=True, **options)


# -- arguments ----------------------------------------------------------------------------------------------------


def _run(
    model: GPT2Base,
    prompts: Prompts,
    *,
    attention_mask: Tensor | None = None,
    num_samples: int = 1,
    batch_size: int | str = "auto",
    truncate: str = "error",
    context_shift: bool = False,
    sample_ids: Iterable[int] | None = None,
    skip: Container[tuple[int, int]] = (),
    logits_processor: LogitsProcessor | None = None,
    sampling: SamplingConfig | None = None,
    pack_weights: bool = True,
    weight_dtype: torch.dtype | str | None = None,
    want_text: bool = False,
    **fields: Any,
) -> Iterator[TokenEvent]:
    if sampling is not None and fields:
        raise TypeError(
            f"generate: give sampling or its fields, not both; got sampling and {', '.join(sorted(fields))}"
        )
    fields_of_sampling = set(SamplingConfig.__dataclass_fields__)
    unknown = sorted(set(fields) - fields_of_sampling)
    if unknown:
        known = ", ".join(name for name in GenerateOptions.__annotations__ if name not in fields_of_sampling)
        raise TypeError(
            f"generate: unknown argument {', '.join(unknown)}; there are {known} and the fields of SamplingConfig"
        )
    if sampling is None:
        sampling = SamplingConfig(**fields)
    for name, value, others in (("num_samples", num_samples, ()), ("batch_size", batch_size, ("auto",))):
        if value not in others and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            allowed = " or ".join(["an int >= 1", *map(repr, others)])
            raise ValueError(f"generate: {name} must be {allowed}; got {value!r}")
    if sampling.stop_strings and model.tokenizer is None:
        raise ValueError("generate: stop_strings need a tokenizer; set model.tokenizer or use stop_token_ids")
    if logits_processor is not None and not callable(logits_processor):
        raise TypeError(f"generate: logits_processor must be callable; got {type(logits_processor).__name__}")
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Tensor) or attention_mask is not None:
        prompts = _without_padding(model, prompts, attention_mask)
    if weight_dtype not in (None, "int8", torch.int8):
        raise ValueError(f"generate: weight_dtype must be None or 'int8'; got {weight_dtype!r}")
    int8 = None if weight_dtype is None else torch.int8
    if model.dtype == torch.bfloat16 and (reason := why_not_bfloat16(model.device)) is not None:
        warnings.warn(f"generate: {reason}: PyTorch emulates it, slowly; load the model in float16", stacklevel=4)
    if not isinstance(context_shift, bool):
        raise ValueError(f"generate: context_shift must be True or False; got {shown(context_shift)}")
    most = kept_prompt_tokens(model, truncate, sampling.max_new_tokens)
    rows = len(prompts) * num_samples if isinstance(prompts, Sized) else None
    if not isinstance(batch_size, int):
        batch_size = find_batch_size(model, prompts, rows, sampling, pack_weights, int8)
    elif rows is not None:
        batch_size = max(1, min(batch_size, rows))
    source = _read_prompts(model, prompts, num_samples, sample_ids, skip, most)
    scheduler = Scheduler(
        model, source, sampling, batch_size, pack_weights, int8, logits_processor, want_text, context_shift
    )
    return scheduler.run()


def _without_padding(model: GPT2Base, prompts: Prompts, mask: Tensor | None) -> list[list[int]]:
    """The rows of a tensor of prompts, without padding. ValueError if it seems padded but there is no mask."""
    if not isinstance(prompts, Tensor):
        raise ValueError(
            f"generate: attention_mask needs a tensor of prompts; got {type(prompts).__name__}: leave the mask out"
        )
    if prompts.dim() != 2 or prompts.is_floating_point():
        raise ValueError(
            f"generate: a tensor of prompts must be (B, T) integers; got {prompts.dtype} {tuple(prompts.shape)}"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != prompts.shape:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"generate: attention_mask must be a tensor {tuple(prompts.shape)}, as prompts; got {got}")
        if (bad := mask[(mask != 0) & (mask != 1)]).numel():
            raise ValueError(f"generate: attention_mask must hold 0 at padding and 1 at tokens; got {bad[0].item()}")
        return [ids[kept].tolist() for ids, kept in zip(prompts.cpu(), mask.cpu().bool(), strict=True)]
    pad = model.config.pad_token_id
    if pad is not None and prompts.numel() and _seems_padded(model, prompts.cpu() == pad):
        raise ValueError(
            f"generate: rows of the tensor of prompts begin or end with the pad token {pad}; give attention_mask (0 at "
            "padding, 1 at tokens), or lists without padding"
        )
    return prompts.tolist()


def _seems_padded(model: GPT2Base, is_pad: Tensor) -> bool:
    """Whether rows (B, T) seem to begin or end with padding.

    If the pad token also begins or ends texts, a single one in every row is no padding.
    """
    config = model.config
    marks_ends = config.pad_token_id in (config.bos_token_id, *config.eos_token_ids)
    for side in (is_pad, is_pad.flip(1)):
        runs = side.long().cumprod(1).sum(1)
        if int(runs.max()) > int(marks_ends) or int(runs.max()) != int(runs.min()):
            return True
    return False


def _read_prompts(
    model: GPT2Base,
    prompts: Prompts,
    num_samples: int,
    sample_ids: Iterable[int] | None,
    skip: Container[tuple[int, int]],
    most: int | None,
) -> Iterator[Request]:
    """Yield every prompt that has samples to generate, after checking it."""
    identities = iter(sample_ids) if sample_ids is not None else None
    for index, prompt in enumerate(prompts):
        identity = index if identities is None else next(identities, None)
        if identity is None:
            raise ValueError(
                f"generate: sample_ids must have one id for every prompt; there is none for prompt {index}"
            )
        if not isinstance(identity, int) or not 0 <= identity < 2**64:
            raise ValueError(f"generate: sample_ids must be ints in [0, 2**64); got {identity!r} for prompt {index}")
        pending = deque(s for s in range(num_samples) if (identity, s) not in skip)
        if pending:
            yield Request(index, identity, prompt_token_ids(model, prompt, f"prompt {index}", most), pending)


def kept_prompt_tokens(model: GPT2Base, truncate: str, max_new_tokens: int) -> int | None:
    """The most tokens that a prompt keeps, from its end. None keeps all of them."""
    if truncate not in ("error", "left"):
        raise ValueError(f"generate: truncate must be 'error' or 'left'; got {shown(truncate)}")
    context = model.config.context_length
    # The last new token needs no place in the context.
    return None if truncate == "error" else max(context + 1 - max_new_tokens, half_context(context))


def prompt_token_ids(
    model: GPT2Base, prompt: str | Sequence[int], name: str, most: int | None = None
) -> tuple[int, ...]:
    """The token ids of a prompt, checked against the model.

    Args:
        model: The model.
        prompt: Text or token ids.
        name: What errors call the prompt.
        most: How many of its last ids to keep; None keeps all.

    Raises:
        ValueError: The prompt is empty, does not fit the context, or has ids that the model does not know.
        TypeError: The prompt is neither text nor token ids.
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(
                f"generate: {name} is text, but the model has no tokenizer; set model.tokenizer or give ids"
            )
        ids = tuple(model.tokenizer.encode(prompt))
    else:
        if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Iterable):
            raise TypeError(
                f"generate: a prompt must be text or a sequence of token ids; {name} is {type(prompt).__name__}"
            )
        ids = tuple(as_token_id(token, "generate", name) for token in prompt)
    config = model.config
    if not ids and config.bos_token_id is not None:
        ids = (config.bos_token_id,)
    if not ids:
        raise ValueError(
            f"generate: {name} is empty, and the model has no bos_token_id to begin with; give at least one token"
        )
    if most is not None:
        ids = ids[-most:]
    if len(ids) > config.context_length:
        raise ValueError(
            f"generate: {name} has {len(ids)} tokens; the context holds {config.context_length}; shorten the prompt, "
            "or truncate it on the left"
        )
    bad = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise ValueError(f"generate: {name} holds the token id {shown(bad)}; ids must be in [0, {config.vocab_size})")
    return ids


# -- signatures --------------------------------------------------------------------------------------------------------


def lists_options(function: _Function) -> _Function:
    """Spell out the `GenerateOptions`, with their defaults, in the signature of a function that takes them."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(_run).parameters.items()}
    defaults |= {name: field.default for name, field in SamplingConfig.__dataclass_fields__.items()}
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults[name],
            annotation=getattr(annotation, "__forward_arg__", annotation),
        )
        for name, annotation in GenerateOptions.__annotations__.items()
    ]
    attributes: Any = function
    attributes.__signature__ = signature.replace(parameters=[*own, *options])
    return function


for _function in (generate, generate_iter, stream):
    lists_options(_function)
