"""Zamba2 (Zyphra 2024, arXiv:2411.15242): Mamba-2 layers, and transformer blocks shared by several depths. A hybrid
layer there is two layers here: the shared block, which reads the stream beside the embeddings, and Mamba-2 above it."""

from __future__ import annotations

from typing import Any, NamedTuple

from zoo.config import ZooConfig
from zoo.models.families import parts
from zoo.models.families.base import Family, Fields, Names, Rows
from zoo.models.families.mamba2 import MIXER, bounded_below
from zoo.pattern import spell

NORM_EPS = 1e-5  # of Mamba-2's own norm, whatever the model's


class Use(NamedTuple):
    """A shared block at one depth: our layer, theirs, which block, how many uses of any block came before, and their
    layer that holds the block's weights."""

    ours: int
    theirs: int
    block: int
    count: int
    owner: int


def uses(model: ZooConfig) -> list[Use]:
    found: list[Use] = []
    owners: dict[str, tuple[int, int]] = {}  # by name: which block, its first layer there
    for i, layer in enumerate(model.layers):
        if layer.shared is not None:
            theirs = i - len(found)  # every use before this one took a layer more here
            block, owner = owners.setdefault(layer.name, (len(owners), theirs))
            found.append(Use(i, theirs, block, len(found), owner))
    return found


def read(fields: Fields) -> dict[str, Any]:
    fields.only("hidden_act", "gelu")
    fields.only("attention_dropout", 0)
    fields.only("rms_norm_eps", NORM_EPS)
    fields.only("use_long_context", False)
    fields.only("use_shared_mlp_adapter", True, None)
    if fields("layers_block_type").count("hybrid") > fields("num_mem_blocks"):
        fields.only("tie_word_embeddings", True)  # else transformers does not share the blocks either
    hidden, heads = fields("hidden_size"), fields("num_attention_heads")
    bias = fields("add_bias_linear")
    inner = int(fields("mamba_expand") * hidden)
    mamba2 = {
        "kind": "mamba2",
        "num_heads": fields("n_mamba_heads"),
        "head_dim": inner // fields("n_mamba_heads"),
        "state_size": fields("mamba_d_state"),
        "num_groups": fields("mamba_ngroups"),
        "conv_kernel": fields("mamba_d_conv"),
        "bias": bias,
        "dt_min": float(fields("time_step_min")),
    }
    head_dim = 2 * hidden // heads
    rope = parts.rope(fields)  # there, used or not
    attention = {
        "kind": "attention",
        "num_heads": heads,
        "num_kv_heads": fields("num_key_value_heads"),
        "head_dim": head_dim,
        "rope": rope if fields("use_mem_rope") else None,
        "scale": (head_dim / 2) ** -0.5,
        "concat_embeddings": True,
    }
    rank = fields("adapter_rank")
    transformer = {
        "mixer": attention,
        "ffn": {
            "kind": "mlp",
            "intermediate_size": fields("intermediate_size"),
            "activation": "gelu",
            "bias": bias,
        },
        "residual": {"kind": "serial"},
        "shared": {
            "mixer_adapter": rank if fields("use_shared_attention_adapter") else None,
            "ffn_adapter": rank,
            "out_proj": True,
        },
    }
    names, hybrids = [], 0
    for kind in fields("layers_block_type"):
        if kind == "hybrid":
            names += [f"transformer_{hybrids % fields('num_mem_blocks')}", "after"]
            hybrids += 1
        else:
            names.append("mamba2")
    blocks = {"mamba2": {"mixer": mamba2}, "after": {"mixer": mamba2, "residual": {"kind": "skip"}}}
    return {
        "norm": {"eps": NORM_EPS},
        "blocks": {name: blocks.get(name, transformer) for name in dict.fromkeys(names)},
        "pattern": spell(names),
    }


def write(model: ZooConfig) -> dict[str, Any]:
    found = uses(model)
    hybrids = {use.theirs for use in found}
    layers = model.num_hidden_layers - len(found)
    mamba2 = parts.first(model, "mamba2")
    fields = {
        "num_hidden_layers": layers,
        "layers_block_type": ["hybrid" if i in hybrids else "linear_attention" for i in range(layers)],
        "rms_norm_eps": model.norm_config.eps,
        "add_bias_linear": mamba2.bias,
        "mamba_expand": parts.expansion(mamba2.num_heads * mamba2.head_dim, model),
        "n_mamba_heads": mamba2.num_heads,
        "mamba_d_state": mamba2.state_size,
        "mamba_ngroups": mamba2.num_groups,
        "mamba_d_conv": mamba2.conv_kernel,
        "time_step_min": mamba2.dt_min,
    }
    if found:
        block = model.layers[found[0].ours]
        attention, shared = parts.first(model, "attention"), block.shared
        rope = parts.attention_fields(attention).get("rope_parameters")
        fields |= {
            "num_mem_blocks": len({use.block for use in found}),
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "use_mem_rope": rope is not None,
            **({} if rope is None else {"rope_parameters": rope}),
            "intermediate_size": parts.first(model, "mlp").intermediate_size,
            "use_shared_attention_adapter": shared is not None and shared.mixer_adapter is not None,
            "adapter_rank": shared and shared.ffn_adapter,
        }
    return fields


def place(model: ZooConfig, i: int) -> str:
    """The prefix of our layer i: of Mamba-2, which stands further in where a shared block is below it."""
    below = [use for use in uses(model) if use.ours < i]
    return f"model.layers.{i - len(below)}." + ("mamba_decoder." if below and below[-1].ours == i - 1 else "")


BLOCK: Names = {
    "mixer_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "pre_ff_layernorm.weight",
    **{f"mixer.{name}_proj.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{
        (f"ffn.gate_proj.{leaf}", f"ffn.up_proj.{leaf}"): Rows(f"feed_forward.gate_up_proj.{leaf}")
        for leaf in ("weight", "bias")
    },
    **{f"ffn.down_proj.{leaf}": f"feed_forward.down_proj.{leaf}" for leaf in ("weight", "bias")},
}


def outside(model: ZooConfig) -> Names:
    names: dict[Any, Any] = {
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.norm.weight": "model.final_layernorm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for use in uses(model):
        ours, there = f"model.shared.{use.block}.", f"model.layers.{use.owner}.shared_transformer."
        for mine, theirs in parts.within(there[:-1], BLOCK).items():
            names[ours + mine if isinstance(mine, str) else tuple(ours + each for each in mine)] = theirs
        own = f"model.layers.{use.ours}."
        names[f"{own}out_proj.weight"] = f"model.layers.{use.theirs}.linear.weight"
        for n, matrix in enumerate(("down", "up")):
            mlp = f"feed_forward.gate_up_proj_adapter_list.{use.count}.{n}.weight"
            names[f"{own}adapters.ffn.gate_proj.{matrix}"] = there + mlp
            for name in "qkv":
                attention = f"self_attn.linear_{name}_adapter_list.{use.count}.{n}.weight"
                names[f"{own}adapters.mixer.{name}_proj.{matrix}"] = there + attention
    return names


FAMILY = Family(
    model_type="zamba2",
    model_class="Zamba2ForCausalLM",
    read=read,
    write=write,
    outside=outside,
    layer={"mixer_norm.weight": "input_layernorm.weight"},
    blocks={"mamba2": parts.within("mamba", MIXER)},
    place=place,
    notes=bounded_below,
    copies=lambda model: tuple(
        f"model.layers.{use.theirs}.shared_transformer." for use in uses(model) if use.theirs != use.owner
    ),
    # Of the last four, transformers reads none: the convolution has a bias whatever use_conv_bias says.
    immaterial=("attention_hidden_size", "attention_head_dim", "mamba_headdim", "kv_channels", "num_query_groups",
                "hybrid_layer_ids", "num_logits_to_keep", "use_mem_eff_path", "use_conv_bias", "ffn_hidden_size",
                "rope_theta"),
)  # fmt: skip
