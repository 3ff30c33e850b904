"""What 8-bit weights cost on a CPU: perplexity of held-out text, and the error of a large model's logits.

python -m benchmarks.int8_cost. The text is the held-out part of Python's standard library, for the embedded model. The
logits are those of GPT-2 124M with random weights. Both run token by token through the decoding step that `generate`
uses, so that 8-bit activations count too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt2 import GPT2, SamplingConfig
from fastgpt2.data import STDLIB, find_documents
from fastgpt2.decode import NewRow, acquire_session
from fastgpt2_kernels import ops

ROWS, TOKENS = 32, 200


def step_logits(model: GPT2, rows: Sequence[Sequence[int]], weight_dtype: torch.dtype | None) -> Tensor:
    """Logits (R, T - 1, V) after every token but the last of the rows (R, T)."""
    num_rows, length = len(rows), len(rows[0])
    session = acquire_session(model, num_rows, SamplingConfig(temperature=0.0), (), weight_dtype)
    step, slots = session._step, list(range(num_rows))
    assert isinstance(step, ops.NativeStep)
    session.cache.reserve(length)
    logits = [session.prefill(slots, [row[:1] for row in rows]).clone()]
    session.begin([NewRow(slot, rows[slot][:1], (0, 0), length) for slot in slots], logits[0])
    for position in range(1, length - 1):
        session.slots.tokens.copy_(torch.tensor([row[position] for row in rows], dtype=torch.int32))
        session.step(slots)
        logits.append(step.step_logits(num_rows).clone())
    return torch.stack(logits, 1)


def perplexity(model: GPT2, rows: Sequence[Sequence[int]], weight_dtype: torch.dtype | None) -> float:
    logprobs = step_logits(model, rows, weight_dtype).log_softmax(-1)
    targets = torch.tensor(rows)[:, 1:]
    return math.exp(-logprobs.gather(-1, targets[..., None]).double().mean().item())


def main() -> None:
    model = GPT2.from_pretrained("embedded", dtype=torch.float32)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    text = "".join(piece for segment in find_documents([STDLIB]).val for piece in segment.pieces())
    ids = tokenizer.encode(text)[: 4 * ROWS * TOKENS]
    rows = [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS + 1, TOKENS)]
    batches = [rows[start : start + ROWS] for start in range(0, len(rows) - ROWS + 1, ROWS)]
    print(f"Perplexity of the embedded model on {len(batches) * ROWS * (TOKENS - 1)} held-out tokens:")
    for name, weight_dtype in (("float32", None), ("int8", torch.int8)):
        values = [math.log(perplexity(model, batch, weight_dtype)) for batch in batches]
        print(f"  {name:8} {math.exp(sum(values) / len(values)):.4f}")
    torch.manual_seed(0)
    large = GPT2.from_config("gpt2").eval()
    rows = torch.randint(large.config.vocab_size, (8, 24)).tolist()
    exact = step_logits(large, rows, None)
    error = step_logits(large, rows, torch.int8) - exact
    spread = exact.std(-1).mean().item()
    rms, largest = error.square().mean().sqrt().item(), error.abs().max().item()
    print("Logits of GPT-2 124M with random weights:")
    print(f"  standard deviation {spread:.3f}, error {rms:.4f} (RMS), {largest:.4f} (largest)")


if __name__ == "__main__":
    main()
