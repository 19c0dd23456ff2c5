"""SmolLM3 (Hugging Face 2025): Llama in which every fourth layer has no positions."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, FamilyError, Fields
from zoo.pattern import spell


def read(fields: Fields) -> dict[str, Any]:
    mixer, ffn, turning = parts.attention(fields), parts.mlp(fields), fields("no_rope_layers")
    sizes = parts.windows(fields)
    if not fields("use_sliding_window") and any(sizes):
        # transformers' masks have the window then, its flash attention has not.
        raise FamilyError("smollm3: layer_types has sliding_attention, but use_sliding_window is false")
    names, blocks = [], {}
    for has_rope, size in zip(turning, sizes, strict=True):
        name = ("rope" if has_rope else "nope") + ("" if size is None else "-sliding")
        blocks[name] = {"mixer": mixer | ({} if has_rope else {"rope": None}) | {"window": size}, "ffn": ffn}
        names.append(name)
    return {"norm": {"eps": fields("rms_norm_eps")}, "blocks": blocks, "pattern": spell(names)}


def write(model: ZooConfig) -> dict[str, Any]:
    mixers = [layer.mixer.config for layer in model.layers]
    # The rotation is that of a layer which has one.
    fields = parts.attention_fields(next((mixer for mixer in mixers if mixer.rope is not None), mixers[0]))
    ffn = parts.first(model, "mlp")
    return (
        fields
        | parts.window_fields(model)
        | {
            "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers],
            "use_sliding_window": any(mixer.window is not None for mixer in mixers),
            "intermediate_size": ffn.intermediate_size,
            "mlp_bias": ffn.bias,
            "rms_norm_eps": model.norm_config.eps,
        }
    )


FAMILY = Family(
    model_type="smollm3",
    model_class="SmolLM3ForCausalLM",
    read=read,
    write=write,
    outside=parts.OUTSIDE,
    layer=parts.LAYER,
    blocks={"attention": parts.ATTENTION, "mlp": parts.within("mlp", parts.MLP)},
    immaterial=("no_rope_layer_interval", "max_window_layers"),  # no_rope_layers and layer_types say it
)
