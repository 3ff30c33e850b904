"""Score given sequences: compute the log-probability and perplexity of each."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastgpt2.cli import options
from fastgpt2.cli.progress import Progress, is_shown
from fastgpt2.devices import find_device
from fastgpt2.gpt2 import GPT2
from fastgpt2.input_files import (
    SEQUENCES,
    Columns,
    Content,
    Entry,
    EntryError,
    Source,
    digest,
    find_sources,
    read_entries,
)
from fastgpt2.messages import counted
from fastgpt2.record_files import Key, RecordFile, Shard, check_writable
from fastgpt2.sample_files import CONTINUATION, WHOLE
from fastgpt2.score_files import ScoreLines, ScoreRecord, score_format
from fastgpt2.scoring import BATCH_TOKENS, Score, score_all, unscored

# Sequences are batched in groups of this size, and a group is always scored as a whole. The other sequences of a batch
# may change the last bit of a score, but a resumed run, or a run of several processes, must write the same scores as an
# uninterrupted one.
GROUP = 256
_MOST_STDIN_BYTES = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to score")
    what.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=".txt (one sequence per line), .jsonl, .csv, .parquet or .fasta files; patterns; hf://NAME; "
        "- reads .txt from stdin",
    )
    what.add_argument(
        "--column", metavar="NAME", help='the column of texts or token ids (default: "text" or "token_ids")'
    )
    what.add_argument("--prompt-column", metavar="NAME", help='the column of prompts, if any (default: "prompt")')
    what.add_argument("--prompt", metavar="TEXT", help="text to put before every sequence")
    what.add_argument("--append", metavar="TEXT", help="text to put after every sequence")
    what.add_argument("--wrap", type=int, metavar="N", help="break every text into lines of N characters")
    what.add_argument("--after-prompt", action="store_true", help="score only the tokens after the prompt")
    what.add_argument("--skip-bad", action="store_true", help="report sequences that cannot be scored, and skip them")
    options.add_model_arguments(parser)

    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help=".jsonl, .fasta, .txt, .csv or .parquet (default: the screen)")
    output.add_argument(
        "--resume", action="store_true", help="keep the scores that --out holds and score what is missing"
    )
    output.add_argument("--overwrite", action="store_true", help="replace --out")
    output.add_argument(
        "--batch-tokens",
        type=int,
        default=BATCH_TOKENS,
        metavar="N",
        help="the most tokens per forward pass (default: %(default)s)",
    )
    output.add_argument(
        "--token-ids", action="store_true", help="write the ids of the scored tokens (not in .fasta or .txt)"
    )
    output.add_argument(
        "--logprobs", action="store_true", help="write each token's log-probability (not in .fasta or .txt)"
    )
    options.add_shard_argument(output)
    options.add_selection_arguments(parser)


def run(args: argparse.Namespace) -> int:
    for name in ("batch_tokens", "wrap"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"score: --{name.replace('_', '-')} must be at least 1; got {value}")
    find_device(args.device)
    shard = options.find_shard(args)
    out = Path(args.out) if args.out is not None else None
    records = None
    if out is not None:
        records = options.records_path(args, out)
        format = score_format(records, token_ids=args.token_ids, logprobs=args.logprobs)
        check_writable(records, resume=args.resume, overwrite=args.overwrite, shard=shard)
    else:
        options.check_needs_no_output(args, shard, ("resume", "overwrite"))
    sources = _sources(args, {path for path in (out, records) if path is not None})
    reader = _Reader(args, sources)
    if next(reader.entries(), None) is None:  # a bad first file is reported here, before a model is loaded
        raise ValueError(f"{sources[0].name}: must hold at least one sequence; it holds none")
    model = options.load(args)
    reader.model = model
    if records is None:
        return _show(model, reader, args)
    if model.tokenizer is None and records.suffix != ".jsonl":
        raise ValueError(f"{records}: needs text, but the model {args.model} has no tokenizer; use a .jsonl output")
    special = options.special_tokens(model)
    settings = {
        "weights": options.weights_digest(model),
        "tokenizer": model.tokenizer.digest() if model.tokenizer is not None else None,
        "special_tokens": special,
        "sequences": digest(sources),
        "columns": reader.columns.all,
        **{name: getattr(args, name) for name in _SETTINGS},
    }
    with RecordFile(
        records, format, settings, resume=args.resume, overwrite=args.overwrite, shard=shard,
        wanted=lambda key: key[1] == 0,
    ) as output:  # fmt: skip
        _write(model, reader, args, output, shard)
        if not output.finish(reader.is_complete if shard.count > 1 else lambda keys: True):
            options.say_unfinished(records, shard)
        elif records != out and out is not None:
            options.write_selection(args, records, out, special)
    return 0


# The options that the records depend on, besides the model and the sequences.
_SETTINGS = ("prompt", "append", "wrap", "after_prompt", "batch_tokens", "token_ids", "logprobs")


def _sources(args: argparse.Namespace, outputs: set[Path]) -> list[Source]:
    sources: list[Source] = []
    for name in args.files:
        if name == "-":
            sources.append(options.stdin_source(_MOST_STDIN_BYTES, "name files to score"))
        else:
            sources.extend(find_sources([name], "a file of sequences"))
    for source in sources:
        for output in outputs:
            if source.data is None and output.exists() and Path(source.name).exists() and output.samefile(source.name):
                raise ValueError(f"{source.name}: holds the sequences and cannot be the output; choose another --out")
    return sources


@dataclass
class _Item:
    """An entry and its tokens, ready to be scored."""

    entry: Entry
    score: Score
    text: str | None


class _Reader:
    """The sequences to score; they can be read several times."""

    model: GPT2

    def __init__(self, args: argparse.Namespace, sources: list[Source]) -> None:
        self.args, self.sources = args, sources
        self.columns: Columns = SEQUENCES.named(args.column, args.prompt_column)

    def entries(self) -> Iterator[Entry | EntryError]:
        return read_entries(self.sources, self.columns, with_fields=True)

    def groups(self) -> Iterator[tuple[int, list[Entry | EntryError]]]:
        """Yield (number, entries) of every group of `GROUP` consecutive entries."""
        for number, group in itertools.groupby(self.entries(), key=lambda entry: entry.index // GROUP):
            yield number, list(group)

    def indices(self) -> Iterator[int]:
        """Yield the number of every entry."""
        return (entry.index for entry in self.entries())

    def item(self, entry: Entry | EntryError) -> _Item:
        """Tokenize an entry; ValueError if it cannot be scored."""
        if isinstance(entry, EntryError):
            raise entry
        prefix: Content | None = entry.prefix
        if self.args.prompt is not None:
            if prefix is not None:
                raise ValueError(f"{entry.where}: has a prompt of its own; leave out --prompt")
            prefix = self.args.prompt
        if prefix is None and self.args.after_prompt:
            raise ValueError(f'{entry.where}: has no prompt to score after; give --prompt or a column "prompt"')
        content = entry.content
        if isinstance(content, str):
            if self.args.wrap is not None:
                step = self.args.wrap
                content = "\n".join(content[start : start + step] for start in range(0, len(content), step))
            content += self.args.append or ""
        elif self.args.append is not None or self.args.wrap is not None:
            raise ValueError(f"{entry.where}: holds token ids; --append and --wrap are for text")
        score = unscored(
            self.model, entry.index, content, prefix or "", entry.where, after_prefix=self.args.after_prompt
        )
        if isinstance(entry.content, str):
            return _Item(entry, score, entry.content)
        tokenizer = self.model.tokenizer
        return _Item(entry, score, None if tokenizer is None else tokenizer.decode(entry.content))

    def record(self, item: _Item, score: Score) -> ScoreRecord:
        left_out = {self.columns.text, self.columns.ids, "id"}
        fields = {name: value for name, value in item.entry.fields.items() if name not in left_out}
        scored = CONTINUATION if self.args.after_prompt else WHOLE
        return ScoreRecord(score, item.entry.id, item.text, scored, fields)

    def is_complete(self, keys: set[Key]) -> bool:
        """Whether the keys include every sequence that can be scored."""
        for entry in self.entries():
            if (entry.index, 0) in keys:
                continue
            try:
                self.item(entry)
            except ValueError:
                continue
            return False
        return True


class _Tally:
    """Counts of what has been scored so far."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.sequences = self.tokens = 0
        self.logprob = 0.0

    def add(self, score: Score) -> None:
        self.sequences += 1
        self.tokens += len(score.logprobs)
        self.logprob += score.logprob

    @property
    def rate(self) -> float:
        return self.tokens / max(1e-9, time.perf_counter() - self.started)

    def say(self) -> None:
        mean = self.logprob / self.tokens if self.tokens else math.nan
        perplexity = f", perplexity {math.exp(-mean):.4f}" if abs(mean) < 700 else ""
        print(
            f"fastgpt2: {counted(self.sequences, 'sequence')}, {counted(self.tokens, 'token')} in "
            f"{time.perf_counter() - self.started:.1f} s: {self.rate:.0f} tokens/s{perplexity}",
            file=sys.stderr,
        )


def _scored(
    model: GPT2,
    reader: _Reader,
    args: argparse.Namespace,
    shard: Shard,
    is_done: Callable[[int], bool],
    progress: Progress | None = None,
) -> Iterator[tuple[ScoreRecord, Score]]:
    """Yield the records of this process's share that have not been written yet."""
    for number, group in reader.groups():
        if not shard.has(number) or all(is_done(entry.index) for entry in group):
            continue
        items = {}
        for entry in group:
            try:
                items[entry.index] = reader.item(entry)
            except ValueError as error:
                if not args.skip_bad:
                    raise
                print(f"fastgpt2: skipped: {error}", file=sys.stderr)
                if progress is not None:
                    progress.leave_out()
        for score in score_all(model, _taken(items, is_done, progress), args.batch_tokens):
            if not is_done(score.index):
                if progress is not None:
                    progress.add((score.index, 0), len(score.logprobs), ends=True)
                yield reader.record(items[score.index], score), score


def _taken(items: dict[int, _Item], is_done: Callable[[int], bool], progress: Progress | None) -> Iterator[Score]:
    """Yield the sequences to score. The progress line counts one as in flight once it is taken into a batch."""
    for index, item in items.items():
        if progress is not None and not is_done(index):
            progress.add((index, 0), 0)
        yield item.score


def _write(
    model: GPT2, reader: _Reader, args: argparse.Namespace, output: RecordFile[ScoreRecord], shard: Shard
) -> None:
    if output.done:
        print(f"fastgpt2: {output.path} already holds {len(output.done):,} scores", file=sys.stderr)
    # Only the progress line needs the number of sequences, and counting them reads the whole input once more.
    indices = [index for index in reader.indices() if shard.has(index // GROUP)] if is_shown() else []
    there = sum((index, 0) in output.done for index in indices)
    tally = _Tally()
    try:
        with Progress(len(indices), there, "sequence") as progress:
            for record, score in _scored(model, reader, args, shard, lambda index: (index, 0) in output.done, progress):
                output.write(record)
                tally.add(score)
    finally:
        if tally.sequences or sys.exc_info()[0] is None:
            tally.say()


def _show(model: GPT2, reader: _Reader, args: argparse.Namespace) -> int:
    format, tally = ScoreLines(token_ids=args.token_ids, logprobs=args.logprobs), _Tally()
    for record, score in _scored(model, reader, args, Shard(), lambda index: False):
        tally.add(score)
        print(format.encode(record), end="", flush=True)
    tally.say()
    return 0
