"""The checks of the cross-entropy kernel catch each of these deliberate mistakes."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_within_budget
from tests.kernels.faults import load
from tests.kernels.losses import plain_cross_entropy, shifted

SOURCE = Path(__file__).parents[2] / "kernels/fastgpt2_kernels/triton/cross_entropy.py"
MUTATIONS = {
    "sums of earlier blocks are not scaled down": ("sum_p = sum_p * alpha +", "sum_p = sum_p +"),
    "-inf - (-inf)": ('m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)', "m_safe = m_new"),
    "one element past the row": ("mask_tail = mid_end + offs_mid < V", "mask_tail = mid_end + offs_mid <= V"),
    "a block is left out": ("(main_blocks - 1 - i)", "(main_blocks - 1)"),
    "targets of this position, not the next": ("(t + 1) * targets.stride_t", "t * targets.stride_t"),
    "any negative target is ignored": ("counted = target != ignore_index", "counted = target >= 0"),
    "a target equal to V is valid": ("(target < V)", "(target <= V)"),
    "the target's p without - 1": ("tl.where(offs == target, factors.target_grad, p)", "p"),
    "the target is off by the row's head": ("at = target - head", "at = target"),
    "half of z-loss's gradient": ("dloss_n * 2.0 * z_loss", "dloss_n * z_loss"),
    "no class weight in the gradient": ("dloss_n * (1.0 - smoothing) * w_t", "dloss_n * (1.0 - smoothing)"),
    "smoothing counts no classes": ("factors.smooth * (factors.weight_sum * p - 1.0)", "factors.smooth * (p - 1.0)"),
    "smoothing forgets the weights": ("(factors.weight_sum * p - w)", "(factors.weight_sum * p - 1.0)"),
    "ignored rows keep what was there": ("mask=i * MID_V + offs_mid < V)", "mask=i * MID_V + offs_mid < 0)"),
    "confident rows lose their bits": ("if (x_t == m) & (above_one < CONFIDENT):", "if x_t == m - 1.0:"),
    "the maximum moves, the entropy does not": ("(sum_px + moved * sum_p)", "sum_px"),
    "base-2 logarithms": ("LN_2 * tl.log2(sum_p)", "tl.log2(sum_p)"),
    "the upstream gradient is left out": (
        "dloss_n = tl.load(dloss.ptr + n * dloss.stride).to(tl.float32)",
        "dloss_n = 1.0",
    ),
}


def check(kernel: ModuleType, device: str) -> None:
    """A few of the random cases, chosen to reach every branch."""
    generator = torch.Generator().manual_seed(3)

    def draw(shape: tuple[int, ...], scale: float = 3.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    for case, (V, offset) in enumerate(((2 * 8192 + 2048 + 77, 1), (300, 3), (2100, 0))):
        logits = torch.full((2, 3, V + 4), 88.0)
        rows = logits[..., offset : offset + V]
        rows.copy_(draw((2, 3, V)))
        rows[0, 0, : V // 2] = -math.inf
        rows[1, 0] = 0.0
        rows[1, 0, 7] = 20.0  # a confident row
        targets = torch.randint(0, V, (2, 3), generator=generator)
        targets[0, 0], targets[1, 0], targets[1, 1] = V - 1, 7, -100
        if case == 1:
            targets[1, 2] = -1
        elif case == 2:
            targets[1, 2] = V
        weight = torch.rand(V, generator=generator) + 0.1
        dloss = torch.rand(2, 3, generator=generator) + 0.5
        for options in (
            {},
            {"z_loss": 1e-2, "class_weight": weight},
            {"label_smoothing": 0.2, "shift": True, "class_weight": weight},
            {"label_smoothing": 0.2, "z_loss": 1e-2},
        ):
            finite = rows if options.get("label_smoothing", 0.0) == 0 else rows.clamp_min(-50.0)
            one(kernel, finite, targets, dloss, options, -1 if case == 1 else -100, device)


def one(
    kernel: ModuleType, rows: Tensor, targets: Tensor, dloss: Tensor, options: dict, ignore: int, device: str
) -> None:
    shift = options.get("shift", False)
    own = shifted(targets, ignore) if shift else targets
    valid = (own >= 0) & (own < rows.shape[-1]) | (own == ignore)
    plain_options = {name: value for name, value in options.items() if name != "shift"}
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = rows.to(dtype, copy=True).requires_grad_()
        safe = own.where(valid, ignore)
        loss = plain_cross_entropy(leaf, safe, wide=dtype, ignore_index=ignore, reduction="none", **plain_options)
        (loss * dloss).sum().backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    (plain_loss, plain_grad), (exact_loss, exact_grad) = results
    arguments = {
        "ignore_index": ignore,
        **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()},
    }
    logits, targets, dloss = rows.to(device), targets.to(device), dloss.to(device)
    for mode in ("fused", "two-pass"):
        grad = logits.new_full((2, 3, logits.shape[-1] + 8), math.nan)[..., : logits.shape[-1]]  # room for mistakes
        if mode == "fused":
            out = kernel.cross_entropy_rows(logits, targets, with_stats=True, dloss=dloss, grad=grad, **arguments)
        else:
            out = kernel.cross_entropy_rows(logits, targets, **arguments)
            kernel.cross_entropy_rows_backward(dloss, logits, targets, *out[1:4], grad, **arguments)
        assert torch.equal(out.loss.isnan().cpu(), ~valid)
        assert torch.equal(grad.isnan().any(-1).cpu(), ~valid)
        assert_within_budget(out.loss.cpu()[valid], plain_loss[valid], exact_loss[valid], "loss")
        assert_within_budget(grad.cpu()[valid], plain_grad[valid], exact_grad[valid], "gradient")
        counted = valid & (own != ignore)
        if counted[1, 0]:
            torch.testing.assert_close(out.loss[1, 0].cpu().double(), exact_loss[1, 0], rtol=1e-5, atol=0)
        if mode == "fused":
            log_probs = rows.double().log_softmax(-1)
            entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)
            torch.testing.assert_close(out.entropy.cpu()[counted].double(), entropy[counted], rtol=1e-4, atol=1e-5)


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_interpreted_as_it_is(tmp_path: Path, interpreter: str) -> None:
    check(load(SOURCE, tmp_path), interpreter)


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_interpreted_mistake_is_caught(mistake: str, tmp_path: Path, interpreter: str) -> None:
    old, new = MUTATIONS[mistake]
    kernel = load(SOURCE, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check(kernel, interpreter)
