"""Draws docs/blocks/hierarchical.png from the mixer itself: python docs/blocks/hierarchical.py"""

from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor

import zoo
from zoo import ops
from zoo.blocks import SequenceContext, kind_of

LENGTH = 128
FIELDS = {
    "kind": "hierarchical", "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "window": 12, "compress": "mean",
    "compress_block": 8, "compress_stride": 4, "select_block": 16, "top_n": 4,
}  # fmt: skip
MOBA = {
    "kind": "hierarchical", "num_heads": 1, "head_dim": 16, "window": None, "compress": None, "select_block": 16,
    "top_n": 3, "first_blocks": 0, "local_blocks": 1,
}  # fmt: skip


def seen(fields: dict, tier: str) -> Tensor:
    """`[LENGTH, LENGTH]`: 1 where the first output of token i changes with the value of token j in this tier."""
    torch.manual_seed(1)
    config = zoo.load_config({"vocab_size": 8, "hidden_size": 32, "blocks": {"b": {"mixer": fields}}, "pattern": "b"})
    mixer = kind_of("mixer", fields["kind"]).module_class(config.layers[0].mixer.config, config, 0).double()
    for weight in mixer.parameters():
        torch.nn.init.normal_(weight, std=0.6)
    outs: list[Tensor] = []
    name = {"window": "softmax_attention", "compress": "interval_attention", "select": "block_sparse_attention"}[tier]
    op = getattr(ops, name)

    def watched(*arguments, **keywords):
        result = op(*arguments, **keywords)
        outs.append(result[0] if isinstance(result, tuple) else result)  # some are asked for (out, lse)
        return result

    # A slow drift makes neighbours alike, so that the choice has something to find.
    x = torch.randn(1, LENGTH, 32).double() + 1.5 * torch.randn(1, LENGTH // 16, 32).double().repeat_interleave(16, 1)
    values: list[Tensor] = []

    def keep(_module, _inputs, output):
        values.append(output)

    mixer.v_proj.register_forward_hook(keep)
    with patch.object(ops, name, watched):
        mixer(x, SequenceContext.of(x))
    rows = [torch.autograd.grad(outs[0][0, i, 0, 0], values[0], retain_graph=True)[0][0] for i in range(LENGTH)]
    return (torch.stack(rows).abs().sum(-1) > 0).double()


def main() -> None:
    figure, panels = plt.subplots(1, 4, figsize=(12.0, 3.5), layout="constrained")
    cases = [
        ("window (12)", FIELDS, "window", "#2f6fde"),
        ("compress (8 every 4)", FIELDS, "compress", "#2a9d78"),
        ("select (4 of 16; first, two last)", FIELDS, "select", "#c2185b"),
        ("MoBA (3 of 16)", MOBA, "select", "#7b4bd0"),
    ]
    for panel, (title, fields, tier, colour) in zip(panels, cases, strict=True):
        panel.imshow(seen(fields, tier), cmap=ListedColormap(["white", colour]), interpolation="nearest")
        for edge in range(16, LENGTH, 16):
            panel.axvline(edge - 0.5, color="0.85", lw=0.5)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("key")
        panel.set_xticks(range(0, LENGTH + 1, 32))
        panel.set_yticks(range(0, LENGTH + 1, 32))
    panels[0].set_ylabel("query")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()
