"""CPU generation beside transformers' eager `generate`, in one run: `python benchmarks/generation.py`.

GPT-2 124M shape with random weights, greedy. For every dtype and number of rows the two take turns in the same
process; the figure is the median of the ratios of neighbouring turns. Before timing, the greedy ids must agree in
float32, and in bfloat16 each side's own logits must be within the 2x rule of float64's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt2 import GPT2
from fastgpt2.integrations.transformers import accelerate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(dtype: torch.dtype, layers: int) -> tuple[GPT2LMHeadModel, GPT2]:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, eos_token_id=None, bos_token_id=None)
    theirs = GPT2LMHeadModel(config).to(dtype).eval()
    ours = accelerate(theirs)
    return theirs, ours


def their_generate(model: GPT2LMHeadModel, prompts: torch.Tensor, new_tokens: int) -> list[list[int]]:
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, prompts.shape[1] :].tolist()


def our_generate(model: GPT2, prompts: torch.Tensor, new_tokens: int) -> list[list[int]]:
    samples = model.generate(prompts, max_new_tokens=new_tokens, temperature=0, batch_size=len(prompts))
    return [sample.token_ids for sample in samples]


def check_agreement(theirs: GPT2LMHeadModel, ours: GPT2, prompts: torch.Tensor) -> None:
    """Raise unless the logits of both are as near to float64's as the 2x rule asks."""
    with torch.no_grad():
        their_logits, our_logits = theirs(prompts).logits.double(), ours(prompts).double()
        exact = GPT2LMHeadModel(theirs.config).double().eval()
        exact.load_state_dict(theirs.state_dict())
        exact_logits = exact(prompts).logits
    eps = torch.finfo(ours.dtype).eps
    budget = 2 * (float((their_logits - exact_logits).abs().max()) + eps * float(exact_logits.abs().max()))
    error = float((our_logits - exact_logits).abs().max())
    if error > budget:
        raise SystemExit(f"the contenders disagree: error {error:.3g} against a budget of {budget:.3g}")


def seconds(run: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", help="also append the results to this file, a line each")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in args.dtypes:
        theirs, ours = build(DTYPES[name], args.layers)
        for rows in args.rows:
            prompts = torch.randint(0, theirs.config.vocab_size, (rows, args.prompt_tokens))
            check_agreement(theirs, ours, prompts[:1])
            same_ids = their_generate(theirs, prompts, 16) == our_generate(ours, prompts, 16)
            if name == "fp32" and not same_ids:
                raise SystemExit("the contenders disagree: greedy ids differ in float32")
            turns = [
                (
                    seconds(their_generate, theirs, prompts, args.new_tokens),
                    seconds(our_generate, ours, prompts, args.new_tokens),
                )
                for _ in range(args.turns)
            ]
            tokens = rows * args.new_tokens
            ratios = sorted(t / o for t, o in turns)
            result = {
                "dtype": name,
                "rows": rows,
                "transformers_tokens_per_s": round(tokens / statistics.median(t for t, _ in turns), 1),
                "fastgpt2_tokens_per_s": round(tokens / statistics.median(o for _, o in turns), 1),
                "ratio_median": round(statistics.median(ratios), 2),
                "ratio_min": round(ratios[0], 2),
                "ratio_max": round(ratios[-1], 2),
                "greedy_ids_agree": same_ids,
            }
            print(
                f"{name} {rows:3d} rows  transformers {result['transformers_tokens_per_s']:7} tok/s  "
                f"fastgpt2 {result['fastgpt2_tokens_per_s']:7} tok/s  ratio {result['ratio_median']} "
                f"({result['ratio_min']} .. {result['ratio_max']})",
                flush=True,
            )
            if args.json:
                with open(args.json, "a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
