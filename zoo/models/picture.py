"""A picture of the layer stack, as SVG that needs nothing else."""

from __future__ import annotations

import html

from zoo.config import ZooConfig

WIDTH, PER_ROW = 960, 40
MIXER_HEIGHT, FFN_HEIGHT, ROW_HEIGHT = 54, 32, 124
INK, SOFT = "#1c2430", "#64748b"
# The zoo's own kinds keep their colour from picture to picture; others take what is left, in order of appearance.
COLOURS = {
    "attention": "#e07a2c",
    "compressive": "#e5989b",
    "fla": "#5c677d",
    "gated_delta": "#d4526e",
    "infini": "#c98bdb",
    "hierarchical": "#c2185b",
    "kda": "#8f2d56",
    "landmark": "#c9a227",
    "lightning": "#2f6fde",
    "linear": "#5aa9e6",
    "linformer": "#118ab2",
    "mamba": "#2a9d78",
    "mamba2": "#7b4bd0",
    "mla": "#a65a1f",
    "mlp": "#b9c4d6",
    "moe": "#f0c04d",
    "none": "#f1f3f7",
    "parallel": "#a3427f",
    "performer": "#c98bb9",
    "retention": "#1b998b",
    "rglru": "#4f772d",
    "short_conv": "#3d8fa3",
}
OTHER_COLOURS = ("#c73b55", "#3aa6c9", "#8a6d3b", "#d977b3", "#5b8c2a", "#6b7fd7")


def layer_stack_svg(config: ZooConfig) -> str:
    """The layers from the embedding (left) to the head (right), mixers above, feed-forwards below, one colour for each
    kind; 40 layers in a row."""
    layers = config.layers
    kinds = dict.fromkeys([layer.mixer.kind for layer in layers] + [layer.ffn.kind for layer in layers])
    others = [kind for kind in kinds if kind not in COLOURS]
    colours = COLOURS | {kind: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, kind in enumerate(others)}
    step = min(56.0, WIDTH / min(len(layers), PER_ROW))
    gap = min(3.0, step / 8)
    shapes = []
    for index, layer in enumerate(layers):
        row, column = divmod(index, PER_ROW)
        x, y = column * step, row * ROW_HEIGHT
        title = f"layer {index}: {layer.name}, {layer.mixer} + {layer.ffn}"
        width = step - gap
        shapes.append(
            f"<g><title>{html.escape(title)}</title>"
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{MIXER_HEIGHT}" rx="3" '
            f'fill="{colours[layer.mixer.kind]}"/>'
            f'<rect x="{x:.1f}" y="{y + MIXER_HEIGHT + 4}" width="{width:.1f}" height="{FFN_HEIGHT}" rx="3" '
            f'fill="{colours[layer.ffn.kind]}"/></g>'
        )
        if step >= 20 or index % 5 == 0:
            shapes.append(_text(x + width / 2, y + MIXER_HEIGHT + FFN_HEIGHT + 20, str(index), "middle"))
    height = ((len(layers) - 1) // PER_ROW + 1) * ROW_HEIGHT
    x = 0.0
    for kind in kinds:
        shapes.append(f'<rect x="{x:.1f}" y="{height}" width="14" height="14" rx="3" fill="{colours[kind]}"/>')
        shapes.append(_text(x + 20, height + 12, kind, "start", INK))
        x += 44 + 8 * len(kind)
    label = f"{len(layers)} layers: mixers above, feed-forwards below"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height + 20}" role="img" aria-label="{label}" '
        f'font-family="system-ui, sans-serif" font-size="13">{"".join(shapes)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = SOFT) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'
