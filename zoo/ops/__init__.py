"""The mathematics of the mixers: pure functions on tensors, each with interchangeable backends (see dispatch.py)."""

from zoo.ops.block_sparse_attention import block_sparse_attention
from zoo.ops.causal_conv1d import causal_conv1d
from zoo.ops.delta_rule import delta_rule
from zoo.ops.dispatch import backend, backends
from zoo.ops.explain import explain
from zoo.ops.gated_rms_norm import gated_rms_norm
from zoo.ops.infini_attention import infini_attention
from zoo.ops.interval_attention import interval_attention
from zoo.ops.landmark_attention import landmark_attention
from zoo.ops.linear_attention import linear_attention
from zoo.ops.select_blocks import select_blocks
from zoo.ops.selective_scan import selective_scan
from zoo.ops.softmax_attention import softmax_attention

__all__ = [
    "backend",
    "backends",
    "block_sparse_attention",
    "causal_conv1d",
    "delta_rule",
    "explain",
    "gated_rms_norm",
    "infini_attention",
    "interval_attention",
    "landmark_attention",
    "linear_attention",
    "select_blocks",
    "selective_scan",
    "softmax_attention",
]
