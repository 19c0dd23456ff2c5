"""`explain`: which backend an op would run on, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from zoo.ops import dispatch
from zoo.ops.block_sparse_attention import block_sparse_attention
from zoo.ops.causal_conv1d import causal_conv1d
from zoo.ops.delta_rule import delta_rule
from zoo.ops.gated_rms_norm import gated_rms_norm
from zoo.ops.infini_attention import infini_attention
from zoo.ops.interval_attention import interval_attention
from zoo.ops.landmark_attention import landmark_attention
from zoo.ops.linear_attention import linear_attention
from zoo.ops.select_blocks import select_blocks
from zoo.ops.selective_scan import selective_scan
from zoo.ops.softmax_attention import softmax_attention

OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        causal_conv1d,
        delta_rule,
        gated_rms_norm,
        landmark_attention,
        interval_attention,
        linear_attention,
        selective_scan,
        softmax_attention,
    )
}
# Numbers that they need, and on which the choice does not depend.
OPS["infini_attention"] = partial(infini_attention, segment=2048)
OPS["block_sparse_attention"] = partial(block_sparse_attention, block_size=64)
OPS["select_blocks"] = partial(select_blocks, compress_block=32, compress_stride=16, select_block=64, top_n=16)
# Arguments whose dtype is not that of the rest.
DTYPES = {
    **dict.fromkeys(("A", "D", "beta", "log_decay", "initial_state"), torch.float32),
    "cu_seqlens": torch.int32,
    **dict.fromkeys(("is_landmark", "key_mask"), torch.bool),
    **dict.fromkeys(("block_indices", "first", "position", "stop"), torch.int64),
}


def explain(
    op: str,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = True,
) -> dispatch.Choice:
    """Which backend runs `op` on arguments of these shapes, and why; nothing is computed.

    Args:
        op: the op's name, such as "linear_attention".
        shapes: the shape of each tensor argument by its name, such as `{"q": (1, 4096, 4, 64), ...}`.
        dtype: that of the activations; rates, decays and states are float32.
        device: where the call would run; it need not be here.
        requires_grad: whether gradients are wanted; some backends have none for some calls.

    Returns:
        The backend's name, the reason, and for each other backend why not. Printed, it is a sentence for each.

    Raises:
        ValueError: no such op, shapes that do not fit, or a backend asked for that cannot serve the call.
        TypeError: an argument the op does not have, or one missing.
    """
    if op not in OPS:
        raise ValueError(f"op {op!r} does not exist; choose one of {', '.join(sorted(OPS))}")
    tensors = {
        name: torch.empty(*shape, dtype=DTYPES.get(name, dtype), device="meta") for name, shape in shapes.items()
    }
    for tensor in tensors.values():
        tensor.requires_grad_(requires_grad and tensor.is_floating_point())
    with dispatch.only_choosing(torch.device(device)) as choices:
        OPS[op](**tensors)
    return choices[0]
