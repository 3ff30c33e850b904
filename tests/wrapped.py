"""One process of a group, which runs `train_step` through DDP and FSDP2. `test_wrapped_training.py` starts it."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastgpt2 import calculate_loss, train_step
from tests.helpers import assert_close, random_ids, random_model


def main(rank: int, count: int, store: str, seed: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    ids = random_ids(seed, 2 * count, 9)
    mine = ids[2 * rank : 2 * rank + 2]
    for tied in (True, False):
        alone = random_model(seed, tie_word_embeddings=tied).double().train()
        expected = train_step(alone, ids, torch.optim.SGD(alone.parameters(), lr=0.1))
        for wrap in (torch.nn.parallel.DistributedDataParallel, fully_shard):
            model = random_model(seed, tie_word_embeddings=tied).double().train()
            if wrap is fully_shard:
                for block in model.transformer.h:
                    fully_shard(block)
            wrapped = wrap(model)
            loss = train_step(wrapped, mine, torch.optim.SGD(wrapped.parameters(), lr=0.1))
            dist.all_reduce(loss)
            assert_close(loss / count, expected, f"{wrap.__name__}: loss")
            for (name, got), exact in zip(wrapped.named_parameters(), alone.parameters(), strict=True):
                whole = got.full_tensor() if isinstance(got, DTensor) else got
                assert_close(whole.detach(), exact.detach(), f"{wrap.__name__}: {name}")
            with torch.no_grad():
                again = calculate_loss(wrapped, ids[:, :-1], ids[:, 1:])
                assert_close(again, calculate_loss(alone, ids[:, :-1], ids[:, 1:]), f"{wrap.__name__}: after the step")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
