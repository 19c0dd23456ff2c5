"""Draws linear.png, performer.png and retention.png here, each from its mixer: python docs/blocks/linear_family.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

import zoo
from zoo.blocks import SequenceContext

LENGTH = 48
MIXERS = {
    "linear": {
        "elu": {"kind": "linear", "feature_map": "elu"},
        "relu": {"kind": "linear", "feature_map": "relu"},
        "cosformer, max_length 48": {"kind": "linear", "feature_map": "cosformer", "max_length": LENGTH},
    },
    "performer": {
        "softmax attention": {"kind": "attention", "rope": None},
        "performer, 64 features": {"kind": "performer", "num_features": 64},
        "performer, 1024 features": {"kind": "performer", "num_features": 1024},
    },
    "retention": {"head 0": {"kind": "retention"}, "head 3": {"kind": "retention"}},
}


def weights(mixer: dict, head: int) -> torch.Tensor:
    """`[LENGTH, LENGTH]`: how much of token j's value token i gets in one of four heads, before the norm: the op is
    linear in the values, so with one-hot ones it gives the weights."""
    torch.manual_seed(0)
    fields = {"num_heads": 4, "head_dim": 16, **({"v_head_dim": LENGTH} if mixer["kind"] == "retention" else {})}
    config = {"vocab_size": 8, "hidden_size": 64, "initializer_range": 0.09, "pattern": "b"}
    model = zoo.build(config | {"blocks": {"b": {"mixer": mixer | fields}}}).model.eval()
    layer, x = model.layers[0].mixer, torch.randn(1, LENGTH, 64)
    if mixer["kind"] == "retention":
        return _retention(layer, x, head)
    columns = []
    for start in range(0, LENGTH, 16):  # one-hot values, as many tokens at once as a head has dimensions
        values = torch.zeros(1, LENGTH, 64)
        values[0, start : start + 16, 16 * head : 16 * head + 16] = torch.eye(16)
        layer.v_proj.forward = lambda _, values=values: values
        layer.o_proj.forward = lambda out: out
        columns.append(layer(x, SequenceContext.of(x))[0, :, 16 * head : 16 * head + 16])
    return torch.cat(columns, 1)


def _retention(layer: torch.nn.Module, x: torch.Tensor, head: int) -> torch.Tensor:
    layer.v_proj.forward = lambda _: torch.eye(LENGTH)[None].repeat(1, 1, 4)
    seen = []
    norm, zoo.ops.gated_rms_norm = zoo.ops.gated_rms_norm, lambda out, gate, *_, **__: seen.append(out) or gate
    layer(x, SequenceContext.of(x))
    zoo.ops.gated_rms_norm = norm
    return seen[0][0].unflatten(-1, (4, LENGTH))[:, head]


@torch.no_grad()
def main() -> None:
    for name, panels_of in MIXERS.items():
        figure, panels = plt.subplots(1, len(panels_of), figsize=(3.2 * len(panels_of), 3.4), layout="constrained")
        for panel, (title, mixer) in zip(panels, panels_of.items(), strict=True):
            shown = weights(mixer, 3 if title == "head 3" else 0)
            limit = 0.5 * shown.abs().max()
            panel.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            panel.set_title(title, fontsize=10)
            panel.set_xlabel("value of token")
        panels[0].set_ylabel("what a token gets")
        figure.savefig(Path(__file__).with_name(f"{name}.png"), dpi=80)


if __name__ == "__main__":
    main()
