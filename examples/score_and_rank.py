"""Generate candidates, score them under the model, and print the best ones first.

python examples/score_and_rank.py
python examples/score_and_rank.py --model gpt2 --keep 10
"""

from __future__ import annotations

import argparse

from fastgpt2 import GPT2, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a folder, a file, or a name on the hub")
    parser.add_argument("--prompt", default="def is_prime(n):\n")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--keep", type=int, default=3)
    args = parser.parse_args()

    model = GPT2.from_pretrained(args.model)
    samples = model.generate(
        args.prompt, num_samples=args.num_samples, max_new_tokens=args.max_new_tokens, temperature=1.0, seed=0
    )
    texts = sorted({sample.text for sample in samples if sample.text})
    # The perplexity of the generated text given the prompt. Without `after_prefix` it would cover the prompt as well.
    scores = score(model, texts, prefixes=args.prompt, after_prefix=True)
    ranked = sorted(zip(scores, texts, strict=True), key=lambda pair: pair[0].perplexity)
    for result, text in ranked[: args.keep]:
        print(f"--- perplexity {result.perplexity:.2f}\n{args.prompt}{text}")


if __name__ == "__main__":
    main()
