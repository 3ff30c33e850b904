"""Generate several samples for many prompts of different lengths, and keep the most likely one of each.

python examples/generate_batch.py
python examples/generate_batch.py --model gpt2 --num-samples 8
"""

from __future__ import annotations

import argparse
import math

from fastgpt2 import GPT2

PROMPTS = [
    "import os\n",
    "class Stack:\n    def push(self, item):\n",
    "def fibonacci(n):\n",
    "for line in open(path):\n",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a folder, a file, or a name on the hub")
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = GPT2.from_pretrained(args.model)
    best = {}
    # Samples come in the order in which they finish. A row that ends makes room for the next sample at once.
    for sample in model.generate(
        PROMPTS,
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        temperature=0.8,
        top_p=0.95,
        seed=args.seed,
    ):
        score = sum(sample.logprobs) / len(sample.logprobs)
        if sample.prompt_index not in best or score > best[sample.prompt_index][0]:
            best[sample.prompt_index] = score, sample

    for index, (score, sample) in sorted(best.items()):
        print(f"--- perplexity {math.exp(-score):.2f}")
        print(PROMPTS[index] + sample.text)


if __name__ == "__main__":
    main()
