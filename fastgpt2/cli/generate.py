"""Generate text: continue one prompt on the screen, or write samples for a file of prompts to a file."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgpt2.checkpoint import EMBEDDED
from fastgpt2.cli import options
from fastgpt2.cli.progress import Progress
from fastgpt2.config import SamplingConfig
from fastgpt2.devices import find_device
from fastgpt2.generate import kept_prompt_tokens, prompt_token_ids, stream, token_events
from fastgpt2.gpt2 import GPT2
from fastgpt2.input_files import PROMPTS, Entry, EntryError, Source, digest, find_sources, read_entries
from fastgpt2.messages import counted, shown
from fastgpt2.record_files import RecordFile, check_writable
from fastgpt2.sample_files import CONTINUATION, WHOLE, SampleRecord, sample_format
from fastgpt2.scoring import score
from fastgpt2.tokenizer import Tokenizer

# The embedded model was trained on Python code, so it continues some if no prompt is given.
DEFAULT_PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a file'


# Per prompt. The indices of all samples that are still to be generated are held in memory.
_MOST_SAMPLES = 10_000_000
# All prompts are held in memory. A larger input is not a file of prompts, or it never ends, like /dev/zero.
_MOST_PROMPT_BYTES = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to continue")
    what.add_argument("prompt", nargs="?", help="the text to continue; - reads it from standard input")
    what.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file of prompts: .txt (one per line), .jsonl, .csv, .parquet or .fasta, a pattern, or hf://NAME; "
        "- reads .txt from stdin",
    )
    what.add_argument(
        "--column", metavar="NAME", help='the column of prompts, texts or token ids (default: "prompt" or "prompt_ids")'
    )
    what.add_argument("--skip-bad", action="store_true", help="report prompts that cannot be used, and skip them")

    what.add_argument(
        "--truncate",
        choices=("left", "error"),
        default="error",
        help="what to do with a prompt that is too long. left: drop its first tokens to make room for "
        "--max-new-tokens, but keep at least half a context; error: refuse a prompt longer than the context "
        "(default: error)",
    )

    what.add_argument(
        "--context-shift",
        action="store_true",
        help="go on when the context is full, from the last tokens (half the context) as if they were the prompt "
        "(default: end there)",
    )

    options.add_model_arguments(parser).add_argument(
        "--weights",
        choices=("int8",),
        dest="weight_dtype",
        help="store the linear layers' weights in 8 bits: faster, but slightly less exact",
    )

    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add("--num-samples", type=int, default=1, metavar="N", help="samples per prompt (default: 1)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="most new tokens per sample (default: 128)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divide the logits by T; 0 is greedy, 1 changes nothing (default: 0.8)",
    )
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens only")
    add("--top-p", type=float, metavar="P", help="sample from the likeliest tokens whose probabilities add up to P")
    add("--min-p", type=float, metavar="P", help="drop tokens less likely than P times the likeliest one")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1, tokens that have occurred become less likely",
    )
    add("--min-new-tokens", type=int, default=0, metavar="N", help="sample no stop token before N tokens (default: 0)")
    add("--no-repeat-ngram-size", type=int, default=0, metavar="N", help="let no sequence of N tokens occur twice")
    add(
        "--suppress-token-id", action="append", type=int, default=[], dest="suppress_tokens", metavar="ID",
        help="never sample this token; repeatable",
    )  # fmt: skip
    add(
        "--stop",
        action="append",
        default=[],
        dest="stop_strings",
        metavar="TEXT",
        help="end a sample before this text; repeatable",
    )
    add(
        "--stop-token-id", action="append", type=int, dest="stop_token_ids", metavar="ID",
        help="end a sample at this token; repeatable (default: the model's end-of-text)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="the same seed gives the same samples (default: 0)")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="FILE",
        help=".jsonl, .fasta, .txt, .csv or .parquet; every sample is stored as soon as it is finished "
        "(default: the screen)",
    )
    output.add_argument(
        "--resume", action="store_true", help="keep the samples that --out holds and generate the missing ones"
    )
    output.add_argument("--overwrite", action="store_true", help="replace --out")
    output.add_argument(
        "--batch-size",
        type=_batch_size,
        default="auto",
        metavar="N",
        help="samples decoded together; they do not depend on it (default: auto, by free memory and measured speed)",
    )
    output.add_argument("--with-prompt", action="store_true", help="begin every text with its prompt")
    output.add_argument(
        "--token-ids", action="store_true", help="write the ids of the new tokens (not in .fasta or .txt)"
    )
    output.add_argument(
        "--logprobs", action="store_true", help="write each token's log-probability (not in .fasta or .txt)"
    )
    output.add_argument(
        "--score",
        choices=(CONTINUATION, WHOLE),
        default=CONTINUATION,
        help="what log-probability and perplexity cover: the new tokens, or the prompt too (default: %(default)s)",
    )
    options.add_shard_argument(output)
    options.add_selection_arguments(parser)


def _batch_size(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a number of samples; got {shown(text)}") from None


def run(args: argparse.Namespace) -> int:
    sampling = SamplingConfig(
        **{name: getattr(args, name) for name in SamplingConfig.__dataclass_fields__ if hasattr(args, name)}
    )
    if not 1 <= args.num_samples <= _MOST_SAMPLES:
        limit = "at least 1" if args.num_samples < 1 else f"at most {_MOST_SAMPLES:,}"
        raise ValueError(f"generate: --num-samples must be {limit}; got {shown(args.num_samples)}")
    if args.batch_size != "auto" and args.batch_size < 1:
        raise ValueError(f"generate: --batch-size must be at least 1; got {shown(args.batch_size)}")
    find_device(args.device)  # fails before any prompt is read and any model is loaded
    shard = options.find_shard(args)
    out = Path(args.out) if args.out is not None else None
    records = None
    if out is not None:
        records = options.records_path(args, out)
        format = sample_format(records, token_ids=args.token_ids, logprobs=args.logprobs)
        check_writable(records, resume=args.resume, overwrite=args.overwrite, shard=shard)
    else:
        options.check_needs_no_output(args, shard, ("resume", "overwrite", "token_ids", "logprobs"))
        if args.score != CONTINUATION:
            raise ValueError("generate: --score needs --out FILE; give both")
    prompts, prompts_digest = _prompts(args, records)
    model = options.load(args)
    usable = _checked(model, prompts, args)
    if records is None:
        return _show(model, usable, sampling, args)
    if model.tokenizer is None and records.suffix != ".jsonl":
        raise ValueError(f"{records}: needs text, but the model {args.model} has no tokenizer; use a .jsonl output")
    special = options.special_tokens(model)
    settings = {
        "weights": options.weights_digest(model),
        "tokenizer": model.tokenizer.digest() if model.tokenizer is not None else None,
        "special_tokens": special,
        "prompts": prompts_digest,
        "column": args.column,
        "num_samples": args.num_samples,
        **asdict(sampling),
        **{
            name: getattr(args, name)
            for name in ("truncate", "context_shift", "weight_dtype", "with_prompt", "token_ids", "logprobs", "score")
        },
    }
    indices = {item.prompt.index for item in usable}
    with RecordFile(
        records,
        format,
        settings,
        resume=args.resume,
        overwrite=args.overwrite,
        wanted=lambda key: key[0] in indices and 0 <= key[1] < args.num_samples,
        shard=shard,
    ) as output:
        _write(model, [item for item in usable if shard.has(item.prompt.index)], sampling, args, output)
        if not output.finish(lambda keys: len(keys) == len(usable) * args.num_samples):
            options.say_unfinished(records, shard)
        elif records != out and out is not None:
            options.write_selection(args, records, out, special)
    return 0


# -- prompts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Usable:
    """A prompt with its token ids."""

    prompt: Entry
    ids: tuple[int, ...]

    def text(self, tokenizer: Tokenizer) -> str:
        content = self.prompt.content
        return content if isinstance(content, str) else tokenizer.decode(content)


def _prompts(args: argparse.Namespace, out: Path | None) -> tuple[list[Entry | EntryError], str]:
    """Read the prompts; returns them and a hash of their contents."""
    if args.prompt is not None and args.prompts is not None:
        raise ValueError("generate: give a prompt or --prompts FILE, not both")
    if args.prompts is None and args.column is not None:
        raise ValueError("generate: --column needs --prompts FILE; give both")
    if args.prompts is not None:
        sources = [_stdin()] if args.prompts == "-" else find_sources([args.prompts], "a file of prompts")
        for source in sources:
            if out is not None and out.exists() and Path(source.name).exists() and out.samefile(source.name):
                raise ValueError(f"{source.name}: holds the prompts and cannot be the output; choose another --out")
        columns = PROMPTS.named(args.column)
        prompts = list(read_entries(sources, columns, most_bytes=_MOST_PROMPT_BYTES))
        if not prompts:
            raise ValueError(f"{sources[0].name}: must hold at least one prompt; it holds none")
        return prompts, digest(sources)
    if args.prompt == "-":
        source = _stdin()
    else:
        text = args.prompt if args.prompt is not None else DEFAULT_PROMPT if args.model == EMBEDDED else ""
        source = Source("the prompt", ".txt", data=os.fsencode(text))
    data = source.data or b""
    try:
        return [Entry(0, data.decode("utf-8"), source.name)], digest([source])
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.name} must be UTF-8 text; byte {error.start + 1} is not") from None


def _stdin() -> Source:
    return options.stdin_source(_MOST_PROMPT_BYTES, "give the prompt as an argument or --prompts FILE")


def _checked(model: GPT2, prompts: Sequence[Entry | EntryError], args: argparse.Namespace) -> list[_Usable]:
    """Find every prompt's token ids. A bad prompt ends the run, or with --skip-bad is reported and left out."""
    most = kept_prompt_tokens(model, args.truncate, args.max_new_tokens)
    usable = []
    for prompt in prompts:
        try:
            if isinstance(prompt, EntryError):
                raise prompt
            usable.append(_Usable(prompt, prompt_token_ids(model, prompt.content, prompt.where, most)))
        except ValueError as error:
            if not args.skip_bad:
                raise
            print(f"fastgpt2: skipped: {error}", file=sys.stderr)
    if not usable:
        raise ValueError("generate: at least one prompt must be usable; all were skipped")
    return usable


# -- on the screen ------------------------------------------------------------------------------------------------


def _show(model: GPT2, usable: list[_Usable], sampling: SamplingConfig, args: argparse.Namespace) -> int:
    """Print the samples: a single one token by token, several ones each when it is finished."""
    if model.tokenizer is None:
        raise ValueError(f"generate: the model {args.model} has no tokenizer to show text with; use --out FILE.jsonl")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # prints "?" for a character that the terminal cannot show
    several = len(usable) * args.num_samples > 1
    options = _options(usable, sampling, args)
    started = time.perf_counter()
    num_tokens = 0
    if several:
        for record in _records(model, usable, options, with_prompt=True):
            num_tokens += len(record.sample.token_ids)
            title = f"=== prompt {record.prompt.id or record.prompt.index}, sample {record.sample.sample_index}"
            print(f"{title}\n{record.text}", flush=True)
    else:
        print(usable[0].text(model.tokenizer), end="", flush=True)
        for event in stream(model, [usable[0].ids], **options):
            num_tokens += 1
            print(event.text, end="", flush=True)
        print(flush=True)
    _summarize(len(usable) * args.num_samples, num_tokens, time.perf_counter() - started)
    return 0


# -- to a file ----------------------------------------------------------------------------------------------------


def _write(
    model: GPT2,
    usable: list[_Usable],
    sampling: SamplingConfig,
    args: argparse.Namespace,
    output: RecordFile[SampleRecord],
) -> None:
    keys = {(item.prompt.index, sample) for item in usable for sample in range(args.num_samples)}
    total, there = len(keys), len(keys & output.done)
    if there:
        print(f"fastgpt2: {output.path} already holds {there} of {total} samples", file=sys.stderr)
    started = time.perf_counter()
    num_samples = num_tokens = 0
    try:
        with Progress(total, there, "sample") as progress:
            chosen = _options(usable, sampling, args) | {"skip": output.done}
            for record in _records(
                model, usable, chosen, progress, with_prompt=args.with_prompt, whole=args.score == WHOLE
            ):
                output.write(record)
                num_samples += 1
                num_tokens += len(record.sample.token_ids)
    finally:
        _summarize(num_samples, num_tokens, time.perf_counter() - started)


def _options(usable: list[_Usable], sampling: SamplingConfig, args: argparse.Namespace) -> dict[str, Any]:
    # A prompt's id is its index in the file, whatever is skipped. So a resumed run gives the same samples.
    return {
        "sampling": sampling,
        "weight_dtype": args.weight_dtype,
        "context_shift": args.context_shift,
        "num_samples": args.num_samples,
        "batch_size": args.batch_size,
        "sample_ids": [item.prompt.index for item in usable],
    }


def _records(
    model: GPT2,
    usable: list[_Usable],
    options: dict[str, Any],
    progress: Progress | None = None,
    *,
    with_prompt: bool,
    whole: bool = False,
) -> Iterator[SampleRecord]:
    prompt_logprobs: dict[int, list[float]] = {}
    for event in token_events(model, [item.ids for item in usable], **options):
        sample = event.finished
        if progress is not None:
            progress.add((event.prompt_index, event.sample_index), 1, ends=sample is not None)
        if sample is None:
            continue
        item = usable[sample.prompt_index]
        text = sample.text
        if with_prompt and text is not None and model.tokenizer is not None:
            text = item.text(model.tokenizer) + text
        before = None
        if whole:
            # Each prompt is scored alone, so its scores do not depend on the other prompts of this process.
            if item.prompt.index not in prompt_logprobs:
                is_scored = len(item.ids) > 1
                prompt_logprobs[item.prompt.index] = score(model, [item.ids])[0].logprobs if is_scored else []
            before = prompt_logprobs[item.prompt.index]
        yield SampleRecord(item.prompt, sample, text, before)


def _summarize(num_samples: int, num_tokens: int, seconds: float) -> None:
    rate = num_tokens / seconds if seconds > 0 else 0.0
    print(
        f"fastgpt2: {counted(num_samples, 'sample')}, {counted(num_tokens, 'token')} in {seconds:.1f} s: "
        f"{rate:.0f} tokens/s",
        file=sys.stderr,
    )
