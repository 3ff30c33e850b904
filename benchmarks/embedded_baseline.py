"""Held-out bits per byte of the embedded model's corpus: the model beside gzip, LZMA and an order-3 byte n-gram model.

python -m benchmarks.embedded_baseline RUN, where RUN is the folder of a run of `fastgpt2 train --data stdlib` (see
fastgpt2/assets/README.md). All four get the same held-out files. The n-gram model and fastgpt2 are trained on the same
training files; gzip and LZMA have nothing but the held-out text.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fastgpt2 import GPT2
from fastgpt2.data import TokenData, TokenShard
from fastgpt2.loss import calculate_loss
from fastgpt2.tokenizer import Tokenizer

ORDER = 3  # bytes of context


def text_of(shard: TokenShard, tokenizer: Tokenizer) -> bytes:
    """The documents of a shard, one after the other, without their separators."""
    ids = shard.tokens.astype(np.int64)
    return tokenizer.decode(ids[ids != tokenizer.eos_token_id].tolist()).encode("utf-8")


def model_bits(model: GPT2, shard: TokenShard) -> float:
    """Bits that the model needs for every token of a shard but the first, in windows of its context."""
    with torch.no_grad():
        batches = shard.evaluation_batches(model.config.context_length, 16, None)
        nats = sum(calculate_loss(model, x, y, reduction="sum").double().item() for x, y in batches)
    return nats / math.log(2)


def ngram_bits(train: bytes, held_out: bytes, order: int = ORDER) -> float:
    """Bits that an interpolated byte n-gram model (Witten and Bell 1991) needs for `held_out`.

    p_n(b | c) = (count(c b) + types(c) p_{n-1}(b | shorter c)) / (count(c) + types(c)); p_{-1} is 1/256.
    """
    probability = np.full(len(held_out), 1 / 256)
    for n in range(order + 1):
        context, gram = _contexts(train, n), _contexts(train, n + 1)[: len(train) - n]
        grams, gram_counts = np.unique(gram, return_counts=True)
        contexts, context_counts = np.unique(context[: len(train) - n], return_counts=True)
        _, types = np.unique(grams >> 8, return_counts=True)  # in the order of `contexts`
        # A byte is predicted from the n bytes before it, if there are that many.
        asked = _contexts(held_out, n + 1)[: len(held_out) - n]
        count = _look_up(grams, gram_counts, asked)
        total = _look_up(contexts, context_counts, asked >> 8)
        kinds = _look_up(contexts, types, asked >> 8)
        seen = total > 0
        shorter = probability[n:]
        probability[n:] = np.where(seen, (count + kinds * shorter) / np.maximum(total + kinds, 1), shorter)
    return float(-np.log2(probability).sum())


def _contexts(text: bytes, length: int) -> np.ndarray:
    """For every position the next `length` bytes, as one big-endian integer. Past the end of the text they are 0."""
    padded = np.frombuffer(text + bytes(length), dtype=np.uint8).astype(np.int64)
    value = np.zeros(len(text), dtype=np.int64)
    for i in range(length):
        value = value << 8 | padded[i : i + len(text)]
    return value


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    index = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[index] == asked, values[index], 0)


def report(run: Path) -> Iterator[tuple[str, float]]:
    model = GPT2.from_pretrained("embedded", dtype=torch.float32)
    data, tokenizer = TokenData.open(run / "data"), Tokenizer.from_folder(run / "data")
    if tokenizer is None or data.val is None:
        raise SystemExit(f"{run}: must be the folder of a run of fastgpt2 train with a tokenizer and a validation set")
    train, held_out = text_of(data.train, tokenizer), text_of(data.val, tokenizer)
    yield "gzip -9", 8.0 * len(gzip.compress(held_out, 9)) / len(held_out)
    yield "LZMA (preset 9 extreme)", 8.0 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)
    yield f"order-{ORDER} byte n-gram", ngram_bits(train, held_out) / len(held_out)
    yield "fastgpt2 embedded", model_bits(model, data.val) / len(held_out)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m benchmarks.embedded_baseline RUN")
    figures = dict(report(Path(sys.argv[1])))
    for name, bits in figures.items():
        print(f"{name:24} {bits:.3f} bits per byte")
    print(json.dumps({name: round(bits, 4) for name, bits in figures.items()}))


if __name__ == "__main__":
    main()
