"""Generate samples with Ray Data: two actors hold a model each, and a lost actor's prompts are generated again.

pip install "fastgpt2[ray]"
python examples/ray_generate.py
python examples/ray_generate.py --model gpt2 --num-workers 4 --num-gpus 1 --out samples/
"""

from __future__ import annotations

import argparse

import ray

from fastgpt2.integrations.ray import Generate

PROMPTS = ["import os\n", "class Stack:\n", "def fibonacci(n):\n", "for line in open(path):\n"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a folder, a file, or a name on the hub")
    parser.add_argument("--num-workers", type=int, default=2, help="actors, each with a model of its own")
    parser.add_argument("--num-gpus", type=float, default=0, help="GPUs for each actor")
    parser.add_argument("--num-samples", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--out", help="a folder for Parquet files; without it the samples are printed")
    args = parser.parse_args()

    # On a cluster, ray.init() connects to it; ray.data.read_parquet reads the prompts.
    ray.init(num_cpus=args.num_workers, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    prompts = ray.data.from_items([{"id": number, "prompt": prompt} for number, prompt in enumerate(PROMPTS)])
    samples = prompts.map_batches(
        Generate,
        # `index` names a column of unique numbers. A sample depends on this number and the seed, not on its batch.
        fn_constructor_kwargs={
            "model": args.model,
            "index": "id",
            "num_samples": args.num_samples,
            "max_new_tokens": args.max_new_tokens,
        },
        batch_size=2,  # in real work hundreds of prompts, to keep an actor's GPU busy
        num_gpus=args.num_gpus,
        compute=ray.data.ActorPoolStrategy(size=args.num_workers),
    )
    if args.out:
        samples.write_parquet(args.out)
    else:
        for row in sorted(samples.take_all(), key=lambda row: (row["id"], row["sample_index"])):
            print(f"--- {row['id']}.{row['sample_index']}, log-probability {row['logprob']:.1f}")
            print(row["prompt"] + row["text"])
    ray.shutdown()


if __name__ == "__main__":
    main()
