"""Draws docs/blocks/infini.png from the op itself: python docs/blocks/infini.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from zoo.ops import infini_attention

LENGTH, SEGMENT, HEAD_DIM = 64, 16, 32


def weights(update: str, gate: float) -> torch.Tensor:
    """`[LENGTH, LENGTH]`: how much of token j's value token i gets. The output is linear in the values: with one-hot
    ones it is the weights."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, LENGTH, 1, HEAD_DIM).double()
    v = torch.eye(LENGTH).double()[None, :, None]
    return infini_attention(q, k, v, torch.tensor([gate]).double(), segment=SEGMENT, update=update)[0, :, 0]


def main() -> None:
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.5), layout="constrained")
    cases = [
        ("linear, gate 0.5", "linear", 0.0),
        ("linear, gate 0.9", "linear", 2.2),
        ("delta, gate 0.5", "delta", 0.0),
    ]
    for panel, (title, update, gate) in zip(panels, cases, strict=True):
        image = panel.imshow(weights(update, gate), cmap="RdBu_r", vmin=-0.12, vmax=0.12, interpolation="nearest")
        for edge in range(SEGMENT, LENGTH, SEGMENT):
            panel.axhline(edge - 0.5, color="0.7", lw=0.5)
            panel.axvline(edge - 0.5, color="0.7", lw=0.5)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("value of token")
        panel.set_xticks(range(0, LENGTH + 1, SEGMENT))
        panel.set_yticks(range(0, LENGTH + 1, SEGMENT))
    panels[0].set_ylabel("what a token gets")
    figure.colorbar(image, ax=panels, shrink=0.8, label="weight (clipped)")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
