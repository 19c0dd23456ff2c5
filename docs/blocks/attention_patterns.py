"""Draws docs/blocks/attention_patterns.png from the masks themselves: python docs/blocks/attention_patterns.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from zoo.ops.softmax_attention import Pattern

LENGTH = 64
PATTERNS = {
    "window: 12, num_sinks: 3": Pattern(window=12, num_sinks=3),
    "window: 6, dilation: 4": Pattern(window=6, dilation=4),
    "dilation: 8": Pattern(dilation=8),
    "window: 8, stride: 8": Pattern(window=8, stride=8),
    "window: 8, random: {blocks: 2,\nblock_size: 4}": Pattern(window=8, random_blocks=2, block_size=4),
    "window: 6, num_sinks: 4, stride: 16,\nrandom: {blocks: 1, block_size: 8}": Pattern(
        window=6, num_sinks=4, stride=16, random_blocks=1, block_size=8
    ),
}


def main() -> None:
    figure, panels = plt.subplots(2, 3, figsize=(9.6, 6.8), layout="constrained")
    index = torch.arange(LENGTH)
    for panel, (title, pattern) in zip(panels.flat, PATTERNS.items(), strict=True):
        panel.imshow(pattern.visible(index[:, None], index), cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
        panel.set_title(title, fontsize=9)
        panel.set_xticks(range(0, LENGTH + 1, 16))
        panel.set_yticks(range(0, LENGTH + 1, 16))
        panel.text(62, 3, f"{pattern.visible_pairs(LENGTH)} pairs", ha="right", va="top", fontsize=9)
    for panel in panels[:, 0]:
        panel.set_ylabel("query")
    for panel in panels[1]:
        panel.set_xlabel("key")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()
