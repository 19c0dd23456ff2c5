"""Draws docs/blocks/landmark.png: how much each token reads of each other one, from the block's own code.

python docs/blocks/landmark.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

import zoo
from zoo import ops
from zoo.blocks.landmark import LandmarkState
from zoo.blocks.registry import kind_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import PowerNorm

LENGTH, BLOCK, TOP_K = 48, 7, 2
FIELDS = {"kind": "landmark", "num_heads": 1, "head_dim": 16, "block_size": BLOCK, "top_k": TOP_K}


def weights() -> dict[str, torch.Tensor]:
    """`[queries, keys]` of the ways to run; the values are the identity, so that what comes out are the weights."""
    torch.manual_seed(3)
    config = zoo.load_config({"vocab_size": 8, "hidden_size": 16, "blocks": {"b": {"mixer": FIELDS}}, "pattern": "b"})
    mixer = kind_of("mixer", "landmark").module_class(config.layers[0].mixer.config, config, 0)
    q, k = (1.4 * torch.randn(1, LENGTH, 1, 16) for _ in range(2))
    v = torch.eye(LENGTH)[None, :, None]
    positions = torch.arange(LENGTH)[None]
    inputs = *mixer.rotary(q, k, positions), v, positions % (BLOCK + 1) == BLOCK
    whole, few = (ops.landmark_attention(*inputs, top_k=top_k) for top_k in (None, TOP_K))
    state = LandmarkState(k[:, :0], v[:, :0], BLOCK + 1)
    return {
        "a forward pass: all blocks": whole[0, :, 0],
        f"a forward pass with train_top_k {TOP_K}": few[0, :, 0],
        f"with a cache and top_k {TOP_K}": mixer._retrieved(q, k, v, None, state)[0, :, 0],
    }


def main() -> None:
    with torch.no_grad():
        panels = weights()
    figure, axes = plt.subplots(1, 3, figsize=(15.4, 4.9), sharey=True)
    for axis, (title, matrix) in zip(axes, panels.items(), strict=True):
        shades = axis.imshow(matrix, cmap="Blues", norm=PowerNorm(0.4, 0, 1))
        axis.set_title(title, fontsize=10)
        for landmark in range(BLOCK, LENGTH, BLOCK + 1):
            axis.axvspan(landmark - 0.5, landmark + 0.5, color="#e07a2c", alpha=0.25, lw=0)
            axis.axhline(landmark + 0.5, color="#94a3b8", lw=0.5)
        axis.set_xlabel("read")
        axis.set_xticks(range(0, LENGTH, BLOCK + 1))
        axis.set_yticks(range(0, LENGTH, BLOCK + 1))
    axes[0].set_ylabel("reader")
    figure.colorbar(shades, ax=axes, label="weight", ticks=[0, 0.01, 0.1, 0.3, 1], shrink=0.85)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
