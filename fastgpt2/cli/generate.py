"""Generate text: continue one prompt on the screen, or thousands of prompts from a file to a file."""

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

HELP = "continue prompts with a model"

# The embedded model knows Python; without a prompt it shows that.
DEFAULT_PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a file'


# Of one prompt: all that are still to be made are held in memory.
_MOST_SAMPLES = 10_000_000
# Prompts are read whole: what is longer is no file of prompts, or an endless one like /dev/zero.
_MOST_PROMPT_BYTES = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to continue")
    what.add_argument("prompt", nargs="?", help="the text to continue; - reads it from standard input")
    what.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts: .txt (one a line), .jsonl, .csv, .parquet, .fasta, a pattern, hf://NAME; - is .txt on stdin",
    )
    what.add_argument(
        "--column", metavar="NAME", help='the column of prompts, text or token ids (default: "prompt", "prompt_ids")'
    )
    what.add_argument(
        "--skip-bad", action="store_true", help="report prompts that cannot be used and go on without them"
    )

    what.add_argument(
        "--truncate",
        choices=("left", "error"),
        default="error",
        help="left: drop the first tokens of prompts that leave no room for --max-new-tokens, but keep half a context "
        "(default: error, which refuses prompts longer than the context)",
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
        help="hold the linear layers' weights in 8 bits: faster, and a little less exact",
    )

    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add("--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt (default: 1)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest continuation (default: 128)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy, 1 the model as it is (default: 0.8)")
    add("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that hold the probability P")
    add("--min-p", type=float, metavar="P", help="leave out tokens less likely than P times the likeliest one")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: tokens seen become less likely")
    add("--min-new-tokens", type=int, default=0, metavar="N", help="no end-of-text before N tokens (default: 0)")
    add("--no-repeat-ngram-size", type=int, default=0, metavar="N", help="no sequence of N tokens appears twice")
    add(
        "--suppress-token-id", action="append", type=int, default=[], dest="suppress_tokens", metavar="ID",
        help="never choose this token; repeatable",
    )  # fmt: skip
    add(
        "--stop",
        action="append",
        default=[],
        dest="stop_strings",
        metavar="TEXT",
        help="end before this text; repeatable",
    )
    add(
        "--stop-token-id", action="append", type=int, dest="stop_token_ids", metavar="ID",
        help="end at this token; repeatable (default: the model's end-of-text)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="the same seed gives the same samples (default: 0)")

    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help=".jsonl, .fasta or .txt; records are written as samples finish")
    output.add_argument("--resume", action="store_true", help="keep what --out holds and generate what is missing")
    output.add_argument("--overwrite", action="store_true", help="replace --out")
    output.add_argument(
        "--batch-size",
        type=_batch_size,
        default="auto",
        metavar="N",
        help="samples decoded together (default: auto, which measures); samples do not depend on it",
    )
    output.add_argument("--with-prompt", action="store_true", help="the text begins with its prompt")
    output.add_argument("--token-ids", action="store_true", help="rows of a .jsonl hold the new tokens' ids")
    output.add_argument("--logprobs", action="store_true", help="rows of a .jsonl hold each token's log-probability")
    output.add_argument(
        "--score",
        choices=(CONTINUATION, WHOLE),
        default=CONTINUATION,
        help="what the perplexity covers: the new tokens, or those of the prompt too (default: %(default)s)",
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
    find_device(args.device)  # before prompts are read and a model is looked for
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
            raise ValueError("generate: --score goes with --out FILE; give one")
    prompts, prompts_digest = _prompts(args, records)
    model = options.load(args)
    usable = _checked(model, prompts, args)
    if records is None:
        return _show(model, usable, sampling, args)
    if model.tokenizer is None and records.suffix != ".jsonl":
        raise ValueError(f"{records}: holds text, and the model {args.model} has no tokenizer; use a .jsonl output")
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
    """The prompts that were asked for, and a hash of their contents."""
    if args.prompt is not None and args.prompts is not None:
        raise ValueError("generate: give a prompt or --prompts FILE, not both")
    if args.prompts is None and args.column is not None:
        raise ValueError("generate: --column goes with --prompts FILE; give one")
    if args.prompts is not None:
        sources = [_stdin()] if args.prompts == "-" else find_sources([args.prompts], "a file of prompts")
        for source in sources:
            if out is not None and out.exists() and Path(source.name).exists() and out.samefile(source.name):
                raise ValueError(f"{source.name}: holds the prompts and cannot be the output; choose another --out")
        columns = PROMPTS.named(args.column)
        prompts = list(read_entries(sources, columns, most_bytes=_MOST_PROMPT_BYTES))
        if not prompts:
            raise ValueError(f"{sources[0].name}: there are no prompts in it; give at least one")
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
    """Every prompt's token ids. The first bad prompt ends the run before it has begun, or is reported and left out."""
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
        raise ValueError("generate: none of the prompts can be used; there is nothing to do")
    return usable


# -- on the screen ------------------------------------------------------------------------------------------------


def _show(model: GPT2, usable: list[_Usable], sampling: SamplingConfig, args: argparse.Namespace) -> int:
    """Samples on stdout: a single one as it is written, several when each is finished."""
    if model.tokenizer is None:
        raise ValueError(f"generate: the model {args.model} has no tokenizer to show text with; use --out FILE.jsonl")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
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
        print(f"fastgpt2: {output.path} holds {there} of {total} samples", file=sys.stderr)
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
    # A prompt's identity is its place in the file, whatever was skipped before it: the same samples on every resume.
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
            # Each prompt for itself: its numbers are then the same whatever prompts a process has beside it.
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
