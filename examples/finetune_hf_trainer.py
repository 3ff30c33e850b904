"""Fine-tune a GPT-2 with transformers' Trainer on fastgpt2's operators: one changed import, no logits in memory.

pip install "fastgpt2[transformers]" accelerate
python examples/finetune_hf_trainer.py --steps 50
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, Trainer, TrainingArguments

from fastgpt2.transformers import GPT2LMHeadModel  # was: from transformers import GPT2LMHeadModel

CONTEXT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path(__file__), help="text to train on (default: this file)")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()

    torch.manual_seed(0)
    data = torch.tensor(list(args.text.read_bytes()))  # a token is a byte
    rows = data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    examples = [{"input_ids": row, "labels": row} for row in rows]
    # GPT2LMHeadModel.from_pretrained("gpt2") starts from published weights.
    sizes = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=3e-3, save_strategy="no",
            report_to=[], disable_tqdm=True, logging_steps=10, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=examples).train()
    ids = torch.tensor([list(b"import ")], device=model.device)
    out = model.eval().generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    print(bytes(out[0].tolist()).decode("utf-8", "replace"))


if __name__ == "__main__":
    main()
