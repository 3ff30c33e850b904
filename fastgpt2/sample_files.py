"""The output formats of samples: `.jsonl`, `.fasta` and `.txt`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt2.generate import Sample
from fastgpt2.input_files import Entry
from fastgpt2.messages import shown
from fastgpt2.record_files import (
    LINE_BREAKS,
    FastaRecords,
    Key,
    Lines,
    RecordFormat,
    decimals,
    escape,
    fasta_entry,
    letters,
)

WHOLE, CONTINUATION = "whole", "continuation"  # what a perplexity covers


@dataclass(frozen=True)
class SampleRecord:
    """A sample, ready to be written.

    Attributes:
        prompt: The prompt.
        sample: The sample.
        text: The sample as text; None if the model has no tokenizer.
        prompt_logprobs: The log-probabilities of the prompt's tokens from the second on, if the perplexity should cover
            them too.
    """

    prompt: Entry
    sample: Sample
    text: str | None
    prompt_logprobs: Sequence[float] | None = None

    @property
    def scored(self) -> str:
        """What the perplexity covers, "whole" or "continuation"."""
        return CONTINUATION if self.prompt_logprobs is None else WHOLE

    @property
    def logprob(self) -> float:
        """The sum of the log-probabilities of the tokens that count."""
        return math.fsum(self.prompt_logprobs or ()) + math.fsum(self.sample.logprobs)

    @property
    def mean_logprob(self) -> float:
        return self.logprob / (len(self.prompt_logprobs or ()) + len(self.sample.logprobs))

    @property
    def perplexity(self) -> float | None:
        """exp(-mean log-probability), or None if that overflows."""
        return math.exp(-self.mean_logprob) if abs(self.mean_logprob) < 700 else None


class _Samples:
    """How errors name a sample."""

    what = "a sample"

    def describe(self, key: Key) -> str:
        return f"sample {shown(key[1])} of prompt {shown(key[0])}"


class JsonLines(_Samples, Lines[SampleRecord]):
    """One JSON object per line. Log-probabilities are natural, at temperature 1 and before any filter.

    "scored" says what "logprob" (the sum), "mean_logprob" and "perplexity" cover: only the "continuation", or the
    "whole", which is the prompt from its second token on and the continuation.

    Args:
        token_ids: Whether to write the token ids of the sample.
        logprobs: Whether to write the log-probability of each token.
    """

    def __init__(self, *, token_ids: bool = False, logprobs: bool = False) -> None:
        self.token_ids, self.logprobs = token_ids, logprobs

    def encode(self, record: SampleRecord) -> str:
        sample = record.sample
        fields: dict[str, Any] = {"prompt_index": record.prompt.index, "id": record.prompt.id}
        fields |= {"sample_index": sample.sample_index, "text": record.text, "num_tokens": len(sample.token_ids)}
        fields |= {"finish_reason": sample.finish_reason}
        fields |= {"logprob": record.logprob, "mean_logprob": record.mean_logprob}
        fields |= {"perplexity": record.perplexity, "scored": record.scored}
        if record.prompt.id is None:
            del fields["id"]
        if self.token_ids:
            fields["token_ids"] = sample.token_ids
        if self.logprobs:
            fields["logprobs"] = sample.logprobs
        return json.dumps(fields, ensure_ascii=False).translate(LINE_BREAKS) + "\n"

    def key(self, line: bytes) -> Key:
        row = json.loads(line)
        prompt_index, sample_index = row["prompt_index"], row["sample_index"]
        if type(prompt_index) is not int or type(sample_index) is not int:
            raise TypeError  # this program never writes "1", 1.0 or true
        return prompt_index, sample_index


class Text(_Samples, Lines[SampleRecord]):
    r"""One line per sample: `prompt index <TAB> sample index <TAB> escaped text`."""

    def encode(self, record: SampleRecord) -> str:
        return f"{record.prompt.index}\t{record.sample.sample_index}\t{escape(record.text or '')}\n"

    def key(self, line: bytes) -> Key:
        prompt_index, sample_index, _ = line.split(b"\t")
        if not (prompt_index.isdigit() and sample_index.isdigit()):
            raise ValueError  # `int` takes "+1", " 1" and "1_0" too
        return int(prompt_index), int(sample_index)


class Fasta(_Samples, FastaRecords[SampleRecord]):
    """`>id_sample prompt=0 sample=1 length=120 tokens=40 finish=stop perplexity=5.2 scored=whole`, the sequence."""

    header = re.compile(rb">\S+ prompt=(\d+) sample=(\d+) length=(\d+) ")

    def encode(self, record: SampleRecord) -> str:
        sample = record.sample
        sequence = letters(record.text or "")
        name = record.prompt.id if record.prompt.id is not None else f"prompt{record.prompt.index}"
        return fasta_entry(
            f"{name}_{sample.sample_index}",
            {
                "prompt": record.prompt.index,
                "sample": sample.sample_index,
                "length": len(sequence),
                "tokens": len(sample.token_ids),
                "finish": sample.finish_reason,
                "perplexity": decimals(record.perplexity),
                "scored": record.scored,
            },
            sequence,
        )


OUTPUT_SUFFIXES = (".jsonl", ".fasta", ".txt")


def sample_format(path: Path, *, token_ids: bool = False, logprobs: bool = False) -> RecordFormat[SampleRecord]:
    """The format for an output, chosen by its suffix; ValueError if there is none or the options do not fit it."""
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"{path}: an output must end in {', '.join(OUTPUT_SUFFIXES)}; got {path.suffix!r}")
    if path.suffix == ".jsonl":
        return JsonLines(token_ids=token_ids, logprobs=logprobs)
    if token_ids or logprobs:
        raise ValueError(f"{path}: token ids and log-probabilities need a .jsonl output; got {path.suffix!r}")
    return Fasta() if path.suffix == ".fasta" else Text()
