"""Draw the figures of kernels.md. Every number in them is computed from shapes; nothing is measured.

python docs/figures.py [FOLDER]   (needs matplotlib; the folder is docs/img by default)
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREY, PALE = "#4063d8", "#e07b39", "#9aa0a6", "#e8eaed"
MEGABYTE = 1e6
# GPT-2 124M: layers, width, vocabulary, context
LAYERS, WIDTH, VOCABULARY, CONTEXT = 12, 768, 50257, 1024
BLOCK_WEIGHTS = 12 * WIDTH * WIDTH  # QKV 3, projection 1, up 4, down 4


def bars(ax: Axes, names: list[str], parts: dict[str, list[float]], unit: str) -> None:
    """Draw a stacked horizontal bar for each name, with its total at the end."""
    left = [0.0] * len(names)
    colours = (BLUE, ORANGE, GREY)
    for (label, values), colour in zip(parts.items(), colours, strict=False):
        ax.barh(names, values, left=left, color=colour, label=label, height=0.6)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for index, total in enumerate(left):
        ax.text(total, index, f" {total:,.0f}" if total >= 10 else f" {total:g}", va="center")
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15 * max(left))
    ax.set_xlabel(unit)
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, 1.25), ncols=len(parts))
    ax.spines[["top", "right"]].set_visible(False)


def attention_tiles(ax: Axes, num_tiles: int = 8, tile: int = 4) -> None:
    """Draw which tiles of scores the program of each tile of queries visits."""
    for row in range(num_tiles):
        for column in range(num_tiles):
            colour = PALE if column > row else (ORANGE if column == row else BLUE)
            ax.add_patch(Rectangle((column * tile, row * tile), tile, tile, facecolor=colour, edgecolor="white"))
    for label, colour in (("whole tile", BLUE), ("tile cut by the mask", ORANGE), ("never visited", PALE)):
        ax.add_patch(Rectangle((0, 0), 0, 0, facecolor=colour, label=label))
    ax.set(xlim=(0, num_tiles * tile), ylim=(num_tiles * tile, 0), aspect="equal", xticks=[], yticks=[])
    ax.set(xlabel="keys", ylabel="queries (a program owns a row of tiles)")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    ax.spines[:].set_visible(False)


def ragged_rows(ax: Axes, lengths: tuple[int, ...] = (9, 3, 14, 6, 4)) -> None:
    """Draw a padded batch, and the same rows packed end to end."""
    longest = max(lengths)
    for row, length in enumerate(lengths):
        ax.add_patch(Rectangle((0, row), longest, 0.8, facecolor=PALE))
        ax.add_patch(Rectangle((0, row), length, 0.8, facecolor=BLUE))
    start = 0
    for length in lengths:
        ax.add_patch(Rectangle((start, len(lengths) + 1), length - 0.2, 0.8, facecolor=BLUE))
        start += length
    padded, real = longest * len(lengths), sum(lengths)
    ax.text(longest + 1, len(lengths) / 2, f"padded: {padded} tokens, {padded - real} of them padding", va="center")
    ax.text(0, len(lengths) + 2.6, f"packed: {real} tokens", va="center")
    ax.set(xlim=(0, start + 4), ylim=(len(lengths) + 3, -0.2))
    ax.axis("off")


def layer_traffic(ax: Axes) -> None:
    """Draw how many numbers the forward pass reads and writes for each element."""
    names = [
        "sum, then LayerNorm",
        "layer_norm(x, residual)",
        "bias, then activation",
        "bias_activation",
    ]
    bars(ax, names, {"read": [3, 2, 2, 1], "written": [2, 2, 2, 1]}, "numbers for each element, forward pass")


def cross_entropy_traffic(ax: Axes) -> None:
    """Draw how often forward and backward pass over the logits, if each separate step is a kernel of its own."""
    names = [
        "log-softmax, pick,\nand their backward passes",
        "cross_entropy",
        "cross_entropy, gradient\nwanted at once",
    ]
    # Log-softmax reads x and writes log p. Its backward pass writes a gradient that is zero except at the targets,
    # reads it and log p, and writes dx.
    # Ours reads x; its backward pass reads x and writes dx. In a single launch the second read comes from the L2 cache.
    bars(ax, names, {"read": [3, 2, 1], "written": [3, 1, 1]}, "times that the (N, V) logits cross the memory bus")


def linear_cross_entropy_chunks(ax: Axes) -> None:
    """Draw the memory for the logits of 4096 rows: all of them and their gradient, or one buffer for a chunk."""
    rows, chunk = 4096, 166  # on a CPU: 2^23 / V rows, within 128 .. 512
    whole = rows * VOCABULARY * 4 / MEGABYTE
    names = ["logits and their gradient", "one buffer of 166 rows"]
    parts = {"logits": [whole, chunk * VOCABULARY * 4 / MEGABYTE], "gradient": [whole, 0.0]}
    bars(ax, names, parts, "MB for 4096 rows of float32, V = 50257")


def decode_bytes(ax: Axes) -> None:
    """Draw the bytes that a decoding step of GPT-2 124M reads when the context is half full."""
    weights = LAYERS * BLOCK_WEIGHTS + VOCABULARY * WIDTH
    names, read, cached = [], [], []
    for name, size, cache_size in (("float32", 4, 4), ("bfloat16", 2, 2), ("int8", 1, 2)):
        for rows in (1, 32):
            names.append(f"{name}, {rows} row{'s' * (rows > 1)}")
            read.append(weights * size / MEGABYTE)
            cached.append(rows * LAYERS * 2 * WIDTH * (CONTEXT // 2) * cache_size / MEGABYTE)
    bars(ax, names, {"weights": read, "keys and values": cached}, "MB read in a step, 512 tokens in the cache")


def gumbel_max(ax: Axes) -> None:
    """Draw one sample: the token with the largest sum of logit and noise."""
    logits = [2.0, 1.4, 0.9, 0.2, -0.5, -1.0]
    noise = [0.1, 1.6, -0.4, 0.9, 2.0, 0.3]
    tokens = [f"token {index}" for index in range(len(logits))]
    low = -1.5
    ax.bar(tokens, [y - low for y in logits], bottom=low, color=BLUE, width=0.6, label="logit y")
    sums = [y + g for y, g in zip(logits, noise, strict=True)]
    ax.scatter(tokens, sums, color=ORANGE, zorder=3, label="y + T g")
    winner = max(range(len(sums)), key=sums.__getitem__)
    ax.annotate("drawn", (winner, sums[winner]), (winner + 0.3, sums[winner] + 0.1), color=ORANGE)
    ax.legend(frameon=False)
    ax.set_yticks([])
    ax.spines[["top", "right", "left"]].set_visible(False)


FIGURES = {
    "attention_tiles": (attention_tiles, (6, 3.2)),
    "ragged_rows": (ragged_rows, (7, 2)),
    "layer_traffic": (layer_traffic, (7, 2.4)),
    "cross_entropy_traffic": (cross_entropy_traffic, (7, 2.2)),
    "linear_cross_entropy_chunks": (linear_cross_entropy_chunks, (7, 1.6)),
    "decode_bytes": (decode_bytes, (7, 2.8)),
    "gumbel_max": (gumbel_max, (6, 2.4)),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The same bytes in every run. Text stays text, so the files are small and can be searched.
    with mpl.rc_context({"svg.hashsalt": "fastgpt2", "svg.fonttype": "none", "font.size": 9}):
        for name, (draw, size) in FIGURES.items():
            figure, ax = plt.subplots(figsize=size)
            draw(ax)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight", facecolor="white")
            plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "img")
