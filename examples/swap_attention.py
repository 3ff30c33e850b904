"""Use the attention kernel in a network of your own, in place of PyTorch's.

python examples/swap_attention.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgpt2.kernels import causal_attention_packed


class TheirAttention(nn.Module):
    """Causal self-attention as it is usually written: split, transpose, attend, transpose back."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(C, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C))


class OurAttention(TheirAttention):
    """The same layer with our kernel. It reads the packed QKV directly, so nothing is split or copied."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.out(causal_attention_packed(self.qkv(x), num_heads=self.heads, lengths=lengths))


def main() -> None:
    torch.manual_seed(0)
    theirs, ours = TheirAttention(64, 4), OurAttention(64, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 10, 64)
    print(f"largest difference: {(theirs(x) - ours(x)).abs().max():.1e}")

    # A ragged batch with rows of 10 and 4 tokens: whatever lies past a row's end is never read.
    x[1, 4:] = float("nan")
    ragged = ours(x, lengths=torch.tensor([10, 4]))
    print(f"the short row is the same as by itself: {torch.allclose(ragged[1, :4], ours(x[1:, :4])[0], atol=1e-6)}")


if __name__ == "__main__":
    main()
