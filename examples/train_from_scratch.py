"""Train a small GPT-2 on a text file, byte by byte, in a loop of your own.

python examples/train_from_scratch.py
python examples/train_from_scratch.py --text my_book.txt --steps 2000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastgpt2 import GPT2, train_step

CONTEXT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path(__file__), help="text to train on (default: this file)")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    torch.manual_seed(0)
    data = torch.tensor(list(args.text.read_bytes()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT2(vocab_size=256, context_length=CONTEXT, hidden_size=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for step in range(args.steps):
        starts = torch.randint(len(data) - CONTEXT, (8,))
        batch = torch.stack([data[start : start + CONTEXT] for start in starts]).to(device)
        loss = train_step(model, batch, optimizer)  # the targets are the next tokens
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss:.3f}")

    (sample,) = model.eval().generate([list(b"import ")], max_new_tokens=40, temperature=0.7)
    print(bytes(sample.token_ids).decode("utf-8", "replace"))


if __name__ == "__main__":
    main()
