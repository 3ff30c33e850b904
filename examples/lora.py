"""Adapt a GPT-2 with peft's LoRA: only a few per cent of the weights are trained, on fastgpt2's operators.

pip install "fastgpt2[transformers]" peft
python examples/lora.py --steps 50
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model

from fastgpt2 import GPT2, calculate_loss

LINES = ["def add(a, b):\n    return a + b\n", "def sub(a, b):\n    return a - b\n"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a folder, a file, or a name on the hub")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = GPT2.from_pretrained(args.model)
    tokenizer = model.tokenizer
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_fc", "c_proj"]))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in adapted.parameters())
    print(f"{share:.1%} of the weights are trained")

    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    rows = [torch.tensor(tokenizer.encode(line)) for line in LINES]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    targets = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    adapted.train()
    for step in range(args.steps):
        optimizer.zero_grad()
        loss = calculate_loss(adapted, tokens[:, :-1], targets[:, 1:])
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
