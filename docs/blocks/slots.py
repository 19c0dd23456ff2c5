"""Draws docs/blocks/compressive.png and linformer.png: what each token sees of each other one, asked of the mixers.

python docs/blocks/slots.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

import zoo
from zoo.blocks.registry import kind_of
from zoo.blocks.slots import SlotMixer

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

LENGTH = 128
MIXERS = {
    "compressive": {"kind": "compressive", "num_heads": 1, "window": 8, "slots": 4},
    "linformer": {"kind": "linformer", "num_heads": 1, "block": 16, "slots": 2},
}


def build(fields: dict) -> SlotMixer:
    config = zoo.load_config({"vocab_size": 8, "hidden_size": 16, "blocks": {"b": {"mixer": fields}}, "pattern": "b"})
    return kind_of("mixer", fields["kind"]).module_class(config.layers[0].mixer.config, config, 0)


def keys_per_token(mixer: SlotMixer) -> np.ndarray:
    """`[LENGTH, LENGTH]`: how many keys stand for token j where token i looks, NaN for none."""
    found = np.full((LENGTH, LENGTH), np.nan)
    for position in range(LENGTH):
        found[position, mixer.recent(position) : position + 1] = 1
        share = 1.0
        for first, stop in mixer.visible(position):
            share *= mixer.made / mixer.parts
            found[position, round(first / share) : round(stop / share)] = share
    return found


def main() -> None:
    for name, fields in MIXERS.items():
        figure, axis = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
        found = -np.log2(keys_per_token(build(fields)))
        levels = np.unique(found[~np.isnan(found)])
        for index, level in enumerate(levels):
            found[found == level] = index
        colours = ListedColormap(plt.get_cmap("viridis_r")(np.linspace(0.1, 0.95, len(levels))))
        image = axis.imshow(found, cmap=colours, vmin=-0.5, vmax=len(levels) - 0.5, interpolation="nearest")
        bar = figure.colorbar(image, ax=axis, ticks=range(len(levels)), shrink=0.85)
        bar.ax.set_yticklabels([f"{2**level:.0f}" for level in levels])
        bar.set_label("tokens to a key")
        axis.set_xlabel("seen")
        axis.set_ylabel("who sees")
        axis.set_xticks(range(0, LENGTH + 1, 16))
        axis.set_yticks(range(0, LENGTH + 1, 16))
        axis.set_title(", ".join(f"{key} {value}" for key, value in list(fields.items())[2:]), fontsize=10)
        figure.savefig(Path(__file__).with_name(f"{name}.png"), dpi=90, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
