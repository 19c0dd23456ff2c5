"""The rows of the matrix: small models, one for every setting of a mixer that takes another path through the code, and
mixed stacks. A new kind is one more row here; test_document.py fails while it has none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import zoo
from zoo.blocks import kinds
from zoo.config import Layer

VOCAB_SIZE, HIDDEN_SIZE = 61, 32

MLP = {"kind": "mlp", "intermediate_size": 24}
GELU = {"kind": "mlp", "intermediate_size": 24, "activation": "gelu", "gated": False, "bias": True}
GEGLU = {"kind": "mlp", "intermediate_size": 24, "activation": "gelu_tanh"}
RELU2 = {"kind": "mlp", "intermediate_size": 24, "activation": "relu2", "gated": False}
MOE = {"kind": "moe", "intermediate_size": 16, "num_experts": 4, "top_k": 2, "renormalize": True}
JAMBA_MOE = {**MOE, "renormalize": False}
SHARED_MOE = {**MOE, "top_k": 3, "num_shared_experts": 1, "router": {"z_loss_coef": 0.01}}
GROUPS_MOE = {
    **MOE, "num_experts": 6, "num_shared_experts": 2,
    "router": {"kind": "sigmoid", "correction_bias": True, "num_groups": 3, "top_k_groups": 2, "scale": 1.5},
}  # fmt: skip
CLAMPED_MOE = {**MOE, "bias": True, "swiglu_limit": 0.5, "router": {"bias": True}}
UNGATED_MOE = {
    **MOE, "gated": False, "activation": "relu2", "num_shared_experts": 1, "shared_intermediate_size": 12,
    "shared_gate": True,
}  # fmt: skip
LATENT_MOE = {**MOE, "latent_size": 10, "num_shared_experts": 1}

MHA = {"kind": "attention", "num_heads": 4}
PARTIAL_ROPE = {"theta": 1.0e4, "rotary_dim": 4}
GQA = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": PARTIAL_ROPE}
FULL_GQA = {**GQA, "qk_norm": True, "bias": True, "output_gate": True}
WINDOW = {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "window": 5}
SINKS = {**WINDOW, "num_kv_heads": 2, "num_sinks": 2}
CACHE_SINKS = {**SINKS, "sink_positions": "cache"}
GROWING = {**WINDOW, "window": {"start": 4, "growth": 2.0, "cap": 7}}
DILATED = {**WINDOW, "window": 4, "dilation": 3, "num_sinks": 2}
DILATED_ALL = {**WINDOW, "window": None, "dilation": 4}
STRIDED = {**WINDOW, "stride": 4, "softcap": 1.5}
RANDOM = {**WINDOW, "window": 3, "num_sinks": 1, "stride": 9, "random": {"blocks": 2, "block_size": 4, "seed": 1}}
WINDOW_LIST = {**WINDOW, "window": [4, 9, None], "num_sinks": 1}
GLOBAL = {**WINDOW, "global_token_ids": [0]}
GLOBAL_SINKS = {**SINKS, "global_token_ids": [1, 0], "sink_logits": True, "rope": {"theta": 50.0}}
GEMMA = {**WINDOW, "scale": 0.4, "softcap": 1.5}
OLMO2 = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "qk_norm": "projection"}
LONGROPE = {
    "kind": "attention", "num_heads": 4,
    "rope": {"type": "longrope", "factor": 4.0, "original_max_position_embeddings": 512,
             "short_factor": [1.0, 1.1, 1.4, 1.9], "long_factor": [1.5, 3.0, 8.0, 21.0]},
}  # fmt: skip
QWEN2 = {"kind": "attention", "num_heads": 2, "bias": True, "output_bias": False}
NO_ROPE = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "rope": None}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "truncate": False}
MLA = {
    "kind": "mla", "num_heads": 3, "q_lora_rank": 10, "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5, "rope": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "interleaved": True},
}  # fmt: skip
MLA_NO_ROPE = {**MLA, "q_lora_rank": None, "rope": None, "bias": True}
MLA_GATED = {**MLA, "q_lora_rank": None, "output_gate": True}
INFINI = {"kind": "infini", "num_heads": 4, "num_kv_heads": 2, "segment": 9, "rope": PARTIAL_ROPE}
INFINI_DELTA = {**INFINI, "update": "delta", "segment": 4}
INFINI_NO_ROPE = {"kind": "infini", "num_heads": 2, "head_dim": 12, "rope": None, "segment": 6}
LANDMARK = {"kind": "landmark", "num_heads": 4, "block_size": 4}
LANDMARK_GQA = {"kind": "landmark", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": None, "block_size": 5}
# As many blocks as any of these texts has: reading all of them is the same as a full forward.
LANDMARK_RETRIEVAL = {**LANDMARK, "num_kv_heads": 2, "top_k": 90, "rope": PARTIAL_ROPE}
# Training that reads few blocks; with a cache it is the same as without.
LANDMARK_CHOSEN = {**LANDMARK, "num_kv_heads": 2, "train_top_k": 2, "rope": PARTIAL_ROPE}
# Without positions, and in the first layer: all landmarks are alike, and equal logits decide.
LANDMARK_ALIKE = {**LANDMARK, "train_top_k": 2, "rope": None}
LIGHTNING = {"kind": "lightning", "num_heads": 4}
MAMBA = {"kind": "mamba", "state_size": 4}
JAMBA = {"kind": "mamba", "state_size": 4, "conv_kernel": 3, "inner_norms": True, "bias": True, "conv_bias": False}
MAMBA2 = {"kind": "mamba2", "num_heads": 3, "head_dim": 8, "state_size": 6, "conv_kernel": 2}
MAMBA2_GROUPS = {
    "kind": "mamba2", "head_dim": 16, "state_size": 8, "num_groups": 2, "bias": True, "conv_bias": False,
    "dt_min": 0.01, "dt_max": 0.08,
}  # fmt: skip
MAMBA2_NORM_FIRST = {**MAMBA2, "norm": "norm_first", "num_heads": 4, "num_groups": 2}
MAMBA2_NO_NORM = {**MAMBA2, "norm": "none", "multipliers": [0.5, 1.5, 0.7, 1.3, 0.8]}
GATE_SCALE = {**MLP, "gate_scale": 0.6}
BESIDE = {
    "kind": "parallel",
    "branches": [MAMBA2_NO_NORM, GQA],
    "input_scales": [0.8, 1.1],
    "output_scales": [1.2, 0.7],
}
RECURRENT_BESIDE = {"kind": "parallel", "branches": [LIGHTNING, MAMBA, MAMBA2], "combine": "mean"}
ELU = {"kind": "linear", "num_heads": 4}
RELU = {"kind": "linear", "num_heads": 2, "head_dim": 6, "feature_map": "relu"}
COSFORMER = {"kind": "linear", "num_heads": 4, "feature_map": "cosformer", "max_length": 2**15}
PERFORMER = {"kind": "performer", "num_heads": 4}
PERFORMER_FEATURES = {"kind": "performer", "num_heads": 2, "head_dim": 6, "num_features": 21, "seed": 3}
RETENTION = {"kind": "retention", "num_heads": 4}
RETENTION_NO_ROPE = {"kind": "retention", "num_heads": 2, "head_dim": 6, "v_head_dim": 10, "rope": None}
SHORT_CONV = {"kind": "short_conv"}
SHORT_CONV_BIAS = {"kind": "short_conv", "conv_kernel": 4, "bias": True}
RGLRU = {"kind": "rglru", "num_heads": 4}
RGLRU_WIDTH = {"kind": "rglru", "num_heads": 2, "width": 20, "conv_kernel": 2}
GATED_DELTA = {"kind": "gated_delta", "num_heads": 2, "head_dim": 8}
GATED_DELTA_GROUPS = {
    "kind": "gated_delta", "num_heads": 2, "num_v_heads": 4, "head_dim": 6, "v_head_dim": 10, "conv_kernel": 3,
    "negative_eigenvalues": True, "norm_eps": 1.0e-3,
}  # fmt: skip
KDA = {"kind": "kda", "num_heads": 2, "head_dim": 8, "conv_kernel": 3}
KDA_BOUNDED = {**KDA, "low_rank": False, "lower_bound": -5.0}

HIERARCHICAL = {
    "kind": "hierarchical", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": PARTIAL_ROPE, "window": 5,
    "compress_block": 4, "compress_stride": 2, "select_block": 8, "top_n": 4,
}  # fmt: skip
HIERARCHICAL_MEAN = {
    **HIERARCHICAL, "num_kv_heads": 4, "rope": None, "compress": "mean", "compress_block": 3, "compress_stride": 3,
    "select_block": 6, "top_n": 3, "local_blocks": 1,
}  # fmt: skip
HIERARCHICAL_STRIDE = {**HIERARCHICAL, "window": None, "compress": "stride", "select_block": 4, "first_blocks": 0}
HIERARCHICAL_RECENT = {
    **HIERARCHICAL, "num_kv_heads": 1, "compress": "mean", "first_blocks": 0, "local_blocks": 1, "top_n": 2,
    "select_window": 24,
}  # fmt: skip
COMPRESSIVE = {
    "kind": "compressive", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": PARTIAL_ROPE, "window": 4,
    "slots": 2,
}  # fmt: skip
COMPRESSIVE_NO_ROPE = {"kind": "compressive", "num_heads": 2, "rope": None, "window": 2, "slots": 3}
LINFORMER = {
    "kind": "linformer", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": PARTIAL_ROPE, "block": 5, "slots": 2
}  # fmt: skip
LINFORMER_NO_ROPE = {"kind": "linformer", "num_heads": 2, "rope": None, "block": 8, "slots": 3}
MOBA = {
    "kind": "hierarchical", "num_heads": 4, "window": None, "compress": None, "select_block": 4, "top_n": 3,
    "first_blocks": 0, "local_blocks": 1,
}  # fmt: skip


def _stack(pattern: str, blocks: dict[str, dict], **fields: Any) -> dict[str, Any]:
    return {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "blocks": blocks, "pattern": pattern, **fields}


def _alone(mixer: dict, ffn: dict) -> dict[str, Any]:
    # Twice: a lightning layer's decay depends on its depth, and an error in the first layer shows in the second.
    return _stack("block*2", {"block": {"mixer": mixer, "ffn": ffn}})


ALL_KINDS = {
    "attention": {"mixer": FULL_GQA, "ffn": MLP},
    "lightning": {"mixer": LIGHTNING, "ffn": MOE},
    "mla": {"mixer": MLA, "ffn": UNGATED_MOE},
    "mamba": {"mixer": MAMBA},
    "mamba2": {"mixer": MAMBA2_GROUPS, "ffn": JAMBA_MOE},
    "dense": {"ffn": MLP},
}
ALL_PATTERN = "attention mla mamba lightning dense mamba2"

SUBJECTS: dict[str, dict[str, Any]] = {
    "attention": _alone(MHA, MLP),
    "attention-gqa": _alone(FULL_GQA, MOE),
    "attention-window": _alone(WINDOW, GELU),
    "attention-sinks": _alone(SINKS, MLP),
    "attention-cache-sinks": _alone(CACHE_SINKS, MLP),
    "attention-growing": _alone(GROWING, MLP),
    "attention-dilated": _alone(DILATED, MLP),
    "attention-dilated-all": _alone(DILATED_ALL, MLP),
    "attention-strided": _alone(STRIDED, MLP),
    "attention-random": _alone(RANDOM, MLP),
    "attention-window-list": _stack(
        "list mamba list", {"list": {"mixer": WINDOW_LIST, "ffn": MLP}, "mamba": {"mixer": MAMBA}}
    ),
    "attention-global": _alone(GLOBAL, MLP),
    "attention-global-sinks": _alone(GLOBAL_SINKS, MLP),
    "attention-softcap": _alone(GEMMA, GEGLU),
    "attention-sink-logits": _alone({**WINDOW, "sink_logits": True}, CLAMPED_MOE),
    "attention-qk-norm-projection": _alone(OLMO2, MLP),
    "attention-longrope": _alone(LONGROPE, MLP),
    "attention-output-bias": _alone(QWEN2, MLP),
    "attention-no-rope": _alone(NO_ROPE, JAMBA_MOE),
    "mla": _alone(MLA, MLP),
    "mla-no-rope": _alone(MLA_NO_ROPE, GROUPS_MOE),
    "mla-gated": _alone(MLA_GATED, MLP),
    "infini": _alone(INFINI, MLP),
    "infini-delta": _alone(INFINI_DELTA, MLP),
    "infini-no-rope": _alone(INFINI_NO_ROPE, MLP),
    "landmark": _alone(LANDMARK, MLP),
    "landmark-gqa": _alone(LANDMARK_GQA, MLP),
    "landmark-retrieval": _alone(LANDMARK_RETRIEVAL, MLP),
    "landmark-chosen": _alone(LANDMARK_CHOSEN, MLP),
    "landmark-alike": _alone(LANDMARK_ALIKE, MLP),
    "lightning": _alone(LIGHTNING, SHARED_MOE),
    "mamba": _alone(MAMBA, RELU2),
    "mamba-inner-norms": _alone(JAMBA, MLP),
    "mamba2": _alone(MAMBA2, MLP),
    "mamba2-groups": _alone(MAMBA2_GROUPS, MOE),
    "moe-ungated": _alone(LIGHTNING, UNGATED_MOE),
    "moe-latent": _alone(MAMBA, LATENT_MOE),
    "mamba2-norm-first": _alone(MAMBA2_NORM_FIRST, MLP),
    "mamba2-no-norm": _alone(MAMBA2_NO_NORM, MLP),
    "parallel": _alone(BESIDE, GATE_SCALE),
    "parallel-recurrent": _alone(RECURRENT_BESIDE, MLP),
    "linear-elu": _alone(ELU, MLP),
    "linear-relu": _alone(RELU, MLP),
    "linear-cosformer": _alone(COSFORMER, MLP),
    "performer": _alone(PERFORMER, MLP),
    "performer-features": _alone(PERFORMER_FEATURES, MLP),
    "retention": _alone(RETENTION, MLP),
    "retention-no-rope": _alone(RETENTION_NO_ROPE, MLP),
    "short-conv": _alone(SHORT_CONV, MLP),
    "short-conv-bias": _alone(SHORT_CONV_BIAS, MLP),
    "rglru": _alone(RGLRU, MLP),
    "rglru-width": _alone(RGLRU_WIDTH, MLP),
    "gated-delta": _alone(GATED_DELTA, MLP),
    "gated-delta-groups": _alone(GATED_DELTA_GROUPS, SHARED_MOE),
    "kda": _alone(KDA, MLP),
    "kda-bounded": _alone(KDA_BOUNDED, MLP),
    "hierarchical": _alone(HIERARCHICAL, MLP),
    "hierarchical-mean": _alone(HIERARCHICAL_MEAN, MLP),
    "hierarchical-stride": _alone(HIERARCHICAL_STRIDE, MLP),
    "hierarchical-recent": _alone(HIERARCHICAL_RECENT, MLP),
    "hierarchical-moba": _alone(MOBA, MLP),
    "compressive": _alone(COMPRESSIVE, MLP),
    "compressive-no-rope": _alone(COMPRESSIVE_NO_ROPE, MLP),
    "linformer": _alone(LINFORMER, MLP),
    "linformer-no-rope": _alone(LINFORMER_NO_ROPE, MLP),
    "minimax": _stack(
        "lightning*2 softmax",
        {"lightning": {"mixer": LIGHTNING}, "softmax": {"mixer": GQA}},
        defaults={"ffn": MOE},
        residual={"kind": "normalized", "mixer_alpha": 2.0, "ffn_alpha": 1.5, "ffn_beta": 0.8},
        tie_word_embeddings=True,
    ),
    "jamba": _stack(
        "mamba mamba_moe softmax mamba_moe",
        {
            "mamba": {"mixer": JAMBA, "ffn": MLP},
            "mamba_moe": {"mixer": JAMBA, "ffn": JAMBA_MOE},
            "softmax": {"mixer": NO_ROPE, "ffn": MLP},
        },
    ),
    "zamba": _stack(
        "mamba2 shared after mamba2 shared after",
        {
            "mamba2": {"mixer": MAMBA2},
            "shared": {
                "mixer": {"kind": "attention", "num_heads": 4, "head_dim": 16, "concat_embeddings": True},
                "ffn": MLP,
                "residual": {"kind": "serial"},
                "shared": {"mixer_adapter": 3, "ffn_adapter": 5, "out_proj": True},
            },
            "after": {"mixer": MAMBA2, "residual": {"kind": "skip"}},
        },
    ),
    "shared": _stack(
        "plain*2 adapted*2 plain",
        {
            "plain": {"mixer": LIGHTNING, "ffn": MOE, "shared": True},
            "adapted": {"mixer": MAMBA2, "ffn": GELU, "residual": {"kind": "skip"}, "shared": {"mixer_adapter": 2}},
        },
    ),
    "landmarks-everywhere": _stack(
        "attention window mamba landmark lightning mamba2 beside",
        {
            "attention": {"mixer": GQA, "ffn": MLP},
            "window": {"mixer": WINDOW, "ffn": MOE},
            "mamba": {"mixer": MAMBA},
            "landmark": {"mixer": LANDMARK, "ffn": MLP},
            "lightning": {"mixer": LIGHTNING},
            "mamba2": {"mixer": MAMBA2},
            "beside": {
                "mixer": {"kind": "parallel", "branches": [LIGHTNING, {**LANDMARK_GQA, "block_size": 4}]},
                "ffn": MLP,
            },
        },
        embedding_scale=1.7,
    ),
    "all-pre": _stack(
        ALL_PATTERN, ALL_KINDS, norm={"kind": "layer"}, residual={"kind": "pre", "mixer_scale": 0.6, "ffn_scale": 1.4}
    ),
    "all-normalized": _stack(ALL_PATTERN, ALL_KINDS, residual={"kind": "normalized"}),
    "all-post": _stack(ALL_PATTERN, ALL_KINDS, residual={"kind": "post"}),
    "all-reordered": _stack(ALL_PATTERN, ALL_KINDS, residual={"kind": "reordered"}),
    "all-sandwich": _stack(ALL_PATTERN, ALL_KINDS, residual={"kind": "sandwich"}, norm={"zero_centered": True}),
    "all-parallel": _stack(ALL_PATTERN, ALL_KINDS, residual={"kind": "parallel"}),
}


# Kinds that no row can have, each with its reason.
ELSEWHERE = {("mixer", "fla"): "another library's layers, which need a GPU (tests/blocks/test_fla.py has the adapter)"}


def _settings() -> dict[str, list[dict[str, Any]]]:
    """Of each kind of mixer, the settings that it has in rows of its own."""
    found: dict[str, list[dict[str, Any]]] = {
        kind.name: [] for kind in kinds() if kind.role == "mixer" and (kind.role, kind.name) not in ELSEWHERE
    }
    del found["none"]
    for mapping in SUBJECTS.values():
        mixers = [block.get("mixer") for block in mapping["blocks"].values()]
        if len(mixers) == 1 and mixers[0] not in found[mixers[0]["kind"]]:
            found[mixers[0]["kind"]].append(mixers[0])
    return {kind: settings for kind, settings in found.items() if settings}  # test_document.py names a kind without


def _pairs() -> dict[str, dict[str, Any]]:
    """Every kind of mixer beside every other, `a b a`. A kind goes through its settings from partner to partner."""
    settings, pairs = _settings(), {}
    for i, j in combinations(range(len(settings)), 2):
        (a, a_settings), (b, b_settings) = list(settings.items())[i], list(settings.items())[j]
        blocks = {"a": {"mixer": a_settings[j % len(a_settings)]}, "b": {"mixer": b_settings[i % len(b_settings)]}}
        pairs[f"{a} + {b}"] = _stack("a b a", blocks, defaults={"ffn": MLP})
    return pairs


PAIRS = _pairs()


def new_layers(subject: str, parts: Callable[[Layer], tuple]) -> list[int]:
    """The layers of `subject` of which some part is in no layer before it, in no subject before it: for checks that
    take long and that only this part can change."""
    seen: list[Any] = []
    for name, mapping in SUBJECTS.items():
        new = []
        for i, layer in enumerate(zoo.load_config(mapping).layers):
            unseen = [part for part in parts(layer) if part not in seen]
            if unseen:
                new.append(i)
            seen += unseen
        if name == subject:
            return new
    raise KeyError(subject)
