"""The output formats of scores: `.jsonl`, `.fasta` and `.txt`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from fastgpt2.scoring import Score


@dataclass(frozen=True)
class ScoreRecord:
    """A scored sequence, ready to be written.

    Attributes:
        score: The log-probabilities.
        id: The sequence's id, if it has one.
        text: The sequence as text; None if the model has no tokenizer.
        scored: What the perplexity covers, "whole" or "continuation".
        fields: The other fields of the sequence's row in the input.
    """

    score: Score
    id: str | None
    text: str | None
    scored: str
    fields: Mapping[str, Any]


class _Scores:
    """How errors name a scored sequence."""

    what = "a scored sequence"

    def describe(self, key: Key) -> str:
        return f"the score of sequence {shown(key[0])}"


class ScoreLines(_Scores, Lines[ScoreRecord]):
    """One JSON object per line, with the input's own fields and the score.

    "logprob" is the sum of the natural log-probabilities of "num_tokens" tokens, and "mean_logprob" their mean.
    "scored" says which tokens: "whole" is the whole sequence from its second token on, "continuation" is what follows
    the prompt.

    Args:
        token_ids: Whether to write the ids of the scored tokens.
        logprobs: Whether to write the log-probability of each token.
    """

    def __init__(self, *, token_ids: bool = False, logprobs: bool = False) -> None:
        self.token_ids, self.logprobs = token_ids, logprobs

    def encode(self, record: ScoreRecord) -> str:
        score = record.score
        row: dict[str, Any] = {"index": score.index}
        if record.id is not None:
            row["id"] = record.id
        row["text"] = record.text
        # The numbers come last, so that they replace fields of the same names in the input.
        row |= {name: value for name, value in record.fields.items() if name not in row}
        row |= {"num_tokens": len(score.logprobs), "logprob": score.logprob, "mean_logprob": score.mean_logprob}
        row |= {"perplexity": score.perplexity, "scored": record.scored}
        for name in ("token_ids", "logprobs"):  # the input's own may be those of other tokens
            row.pop(name, None)
        if self.token_ids:
            row["token_ids"] = score.token_ids[score.start :]
        if self.logprobs:
            row["logprobs"] = score.logprobs
        return json.dumps(row, ensure_ascii=False, default=str).translate(LINE_BREAKS) + "\n"

    def key(self, line: bytes) -> Key:
        row = json.loads(line)
        if type(row["index"]) is not int or "logprob" not in row:
            raise TypeError
        return row["index"], 0


class ScoreText(_Scores, Lines[ScoreRecord]):
    r"""One line per sequence: `index <TAB> log-probability <TAB> tokens <TAB> perplexity <TAB> escaped text`."""

    def encode(self, record: ScoreRecord) -> str:
        score = record.score
        numbers = f"{score.logprob:.6f}\t{len(score.logprobs)}\t{decimals(score.perplexity)}"
        return f"{score.index}\t{numbers}\t{escape(record.text or '')}\n"

    def key(self, line: bytes) -> Key:
        index, _, _, _, _ = line.split(b"\t")
        if not index.isdigit():
            raise ValueError
        return int(index), 0


class ScoreFasta(_Scores, FastaRecords[ScoreRecord]):
    """`>id index=0 length=120 tokens=40 logprob=-65.9 perplexity=5.2 scored=whole`, then the sequence."""

    header = re.compile(rb">\S+ index=(\d+) length=(\d+) ")

    def encode(self, record: ScoreRecord) -> str:
        score, sequence = record.score, letters(record.text or "")
        return fasta_entry(
            record.id or f"sequence{score.index}",
            {
                "index": score.index,
                "length": len(sequence),
                "tokens": len(score.logprobs),
                "logprob": decimals(score.logprob),
                "perplexity": decimals(score.perplexity),
                "scored": record.scored,
            },
            sequence,
        )


def score_format(path: Path, *, token_ids: bool = False, logprobs: bool = False) -> RecordFormat[ScoreRecord]:
    """The format for an output, chosen by its suffix; ValueError if there is none or the options do not fit it."""
    if path.suffix == ".jsonl":
        return ScoreLines(token_ids=token_ids, logprobs=logprobs)
    if path.suffix not in (".fasta", ".txt"):
        raise ValueError(f"{path}: an output must end in .jsonl, .fasta, .txt; got {path.suffix!r}")
    if token_ids or logprobs:
        raise ValueError(f"{path}: token ids and log-probabilities need a .jsonl output; got {path.suffix!r}")
    return ScoreFasta() if path.suffix == ".fasta" else ScoreText()
