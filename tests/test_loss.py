"""calculate_loss and train_step: shifting, ignored targets, accumulation, autocast, the optimizer's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastgpt2 import GPT2, calculate_loss, train_step
from fastgpt2.loss import shift_targets
from tests.helpers import TINY, assert_close, random_ids, random_model


@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
def test_loss_is_the_cross_entropy_of_the_logits(seed: int, ignore_index: int) -> None:
    model = random_model(seed).double()
    ids, targets = random_ids(seed, 3, 9), random_ids(seed + 1, 3, 9)
    targets[0, :4] = ignore_index
    got = calculate_loss(model, ids, targets, ignore_index=ignore_index)
    assert_close(got, F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=ignore_index))
    rows = calculate_loss(model, ids, targets, ignore_index=ignore_index, reduction="none")
    assert rows.shape == (3, 9)
    assert not rows[targets == ignore_index].any()


def test_shift_targets() -> None:
    ids = torch.tensor([[5, 0, 6, 9, 9]])
    assert shift_targets(ids).tolist() == [[0, 6, 9, 9, -100]]
    assert shift_targets(ids, pad_token_id=9).tolist() == [[0, 6, -100, -100, -100]]
    assert shift_targets(ids, ignore_index=0).tolist() == [[0, 6, 9, 9, 0]]
    assert shift_targets(ids[:, :1]).tolist() == [[-100]]


def test_train_step_is_the_step_written_out(seed: int) -> None:
    """A step shifts the targets itself, ignores the last position, and ignores padding if it is named."""
    ours, plain = random_model(seed).double(), random_model(seed).double()
    ids = random_ids(seed, 4, 12)
    ids[0, 8:] = 3
    options: dict[str, Any] = {"lr": 0.1}
    mine, other = (torch.optim.SGD(m.parameters(), **options) for m in (ours, plain))
    for _ in range(3):
        got = train_step(ours, ids, mine, pad_token_id=3, max_grad_norm=0.5)
        targets = ids[:, 1:].masked_fill(ids[:, 1:] == 3, -100)
        loss = F.cross_entropy(plain(ids)[:, :-1].flatten(0, 1), targets.flatten())
        other.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        other.step()
        assert not got.requires_grad
        assert_close(got, loss.detach())
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert_close(a.detach(), b.detach(), name)


def test_without_an_optimizer_gradients_add_up(seed: int) -> None:
    model = random_model(seed).double()
    ids = random_ids(seed, 2, 8)
    train_step(model, ids)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    train_step(model, ids)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, 2 * once[name], name)


def test_unequal_batches_add_up_to_the_mean_of_all(seed: int) -> None:
    model = random_model(seed).double()
    ids = random_ids(seed, 3, 8)
    ids[0, 3:] = 9
    whole = train_step(model, ids, pad_token_id=9)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    items = int((shift_targets(ids, pad_token_id=9) != -100).sum())
    parts = [train_step(model, ids[i : i + 1], pad_token_id=9, num_items_in_batch=items) for i in range(3)]
    assert_close(sum(parts), whole)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], name)


def test_200_steps_are_those_of_the_unfused_loss(seed: int) -> None:
    """The losses of a small model agree at every step, although rounding errors have 200 steps to grow."""
    torch.manual_seed(seed)
    fused, unfused = (GPT2(TINY.replace(num_layers=1)).double() for _ in range(2))
    unfused.load_state_dict(fused.state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, betas=(0.9, 0.95)) for m in (fused, unfused)]
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(200):
        ids = torch.randint(61, (4, 12), generator=generator).cumsum(1) % 61
        loss = F.cross_entropy(unfused(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        losses.append((train_step(fused, ids, optimizers[0]), loss.detach()))
    got, expected = torch.tensor(losses, dtype=torch.float64).T
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


def test_training_learns(seed: int) -> None:
    torch.manual_seed(seed)
    model = GPT2(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = random_ids(seed, 2, 16)
    losses = [train_step(model, ids, optimizer).item() for _ in range(60)]
    assert losses[0] == pytest.approx(torch.tensor(61.0).log().item(), abs=0.3)
    assert losses[-1] < 0.3


def test_float32_loss_whatever_the_dtype(seed: int) -> None:
    ids = random_ids(seed, 2, 8)
    model = random_model(seed)
    assert calculate_loss(model.bfloat16(), ids, ids).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss = calculate_loss(model.float(), ids, ids)
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.transformer.wte.weight.grad.dtype == torch.float32


def test_frozen_parts_get_no_gradient(seed: int) -> None:
    model = random_model(seed, tie_word_embeddings=False)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    ids = random_ids(seed, 2, 8)
    calculate_loss(model, ids, ids).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]


def test_refused(seed: int) -> None:
    model, ids = random_model(seed), random_ids(seed, 2, 8)
    with pytest.raises(ValueError, match=r"target_tensor must have the shape \(2, 8\) of input_tensor; got \(2, 7\)"):
        calculate_loss(model, ids, ids[:, :7])
    with pytest.raises(TypeError, match=r"model must be a fastgpt2\.GPT2, or a wrapper of one; got Linear"):
        calculate_loss(torch.nn.Linear(2, 2), ids, ids)
    with pytest.raises(ValueError, match="got 61 in row 0"):
        calculate_loss(model, ids, torch.full_like(ids, 61))
