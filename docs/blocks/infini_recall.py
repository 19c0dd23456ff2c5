"""Recall through the memory of Infini-attention against the number of segments it holds, and where its gates go;
written to docs/blocks/infini_recall.png: python docs/blocks/infini_recall.py

The first segment holds pairs of a key and a value, then come segments of noise, and the last one asks for the values.
The control is the same model with its gates closed: attention within segments alone.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.train.optimizers import make_optimizer

SEGMENT, PAIRS, KEYS, VALUES, NOISE = 16, 4, 16, 16, 16
COUNTS = (1, 2, 4, 8, 16)  # of segments before the last one


def batch(rows: int, segments: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens `[rows, (segments + 1) * SEGMENT]`, and labels that are -100 but at the keys asked for."""

    def draw(count: int, of: int) -> Tensor:
        return torch.rand(rows, of, generator=generator).argsort(1)[:, :count]

    keys, values = draw(PAIRS, KEYS), KEYS + torch.randint(VALUES, (rows, PAIRS), generator=generator)
    shape = rows, (segments + 1) * SEGMENT
    tokens = KEYS + VALUES + torch.randint(NOISE, shape, generator=generator)
    labels = torch.full_like(tokens, -100)
    order = draw(PAIRS, PAIRS)
    for start, chosen in ((0, torch.arange(PAIRS).expand_as(order)), (segments * SEGMENT, order)):
        now = slice(start, start + 2 * PAIRS)
        tokens[:, now] = torch.stack([keys.gather(1, chosen), values.gather(1, chosen)], -1).flatten(1)
    labels[:, segments * SEGMENT : segments * SEGMENT + 2 * PAIRS : 2] = values.gather(1, order)
    return tokens, labels


def train(update: str, seed: int, steps: int, closed: bool = False) -> tuple[list[float], list[list[float]]]:
    """Accuracy by COUNTS, and the gates (after the sigmoid) of each layer."""
    torch.manual_seed(seed)
    infini = {"kind": "infini", "num_heads": 4, "head_dim": 32, "segment": SEGMENT, "update": update}
    model = zoo.build(
        {
            "vocab_size": KEYS + VALUES + NOISE,
            "hidden_size": 64,
            "blocks": {"conv": {"mixer": {"kind": "short_conv"}}, "infini": {"mixer": infini}},
            "defaults": {"ffn": {"kind": "mlp", "intermediate_size": 128}},
            "pattern": "conv infini conv infini",
        }
    )
    mixers = [layer.mixer for layer in model.model.layers if hasattr(layer.mixer, "gate")]
    if closed:
        for mixer in mixers:
            mixer.gate.data.fill_(-torch.inf)
            mixer.gate.requires_grad_(False)
    optimizer = make_optimizer("adamw", model, learning_rate=3e-3, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50, (steps - step) / 200))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        segments = int(torch.randint(1, 9, (1,), generator=generator))
        tokens, labels = batch(32, segments, generator)
        loss = F.cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    accuracies = []
    for count in COUNTS:
        tokens, labels = batch(128, count, generator)
        with torch.no_grad():
            right = model(tokens, use_cache=False).logits.argmax(-1) == labels
        accuracies.append((right.sum() / (labels >= 0).sum()).item())
    return accuracies, [mixer.gate.sigmoid().tolist() for mixer in mixers]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    cases = {"linear": ("linear", False), "delta": ("delta", False), "gates closed": ("linear", True)}
    for i, (name, (update, closed)) in enumerate(cases.items()):
        for seed in range(options.seeds):
            began = time.time()
            accuracies, gates = train(update, seed, options.steps, closed)
            left.plot(COUNTS, accuracies, f"C{i}o-", ms=3, lw=1, label=None if seed else name)
            if not closed:
                spread = [gate for layer in gates for gate in layer]
                right.plot([i + 0.15 * (seed - 1)] * len(spread), spread, f"C{i}o", ms=4, alpha=0.7)
            print(name, seed, [round(x, 3) for x in accuracies], gates, f"{time.time() - began:.0f} s", flush=True)
    left.axhline(1 / VALUES, color="0.6", ls=":", label="chance")
    left.axvspan(8, COUNTS[-1], color="0.94", label="more than in training")
    left.set(xscale="log", xlabel="segments in the memory", ylabel="values recalled", ylim=(0, 1.02))
    left.set_xticks(COUNTS, COUNTS)
    left.minorticks_off()
    left.legend(fontsize=8)
    right.axhline(0.5, color="0.6", ls=":")
    right.set(ylabel="gate of a head after training", xticks=[0, 1], xticklabels=["linear", "delta"], ylim=(0, 1))
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
