"""The ops of other projects, called on the same inputs as ours, each in the layout that it wants.

A peer's builder takes our op's tensors, the variant and whether it is one token from a state, and returns the call, or
None where it has nothing for this. Layouts are changed before the clock runs; results come in our layout.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import EPS, chosen_block
from benchmarks.rows import Options
from zoo.ops.linear_attention.ssd import WRONG_FROM

CHUNK = 256


class Call(NamedTuple):
    function: Callable[..., Any]
    tensors: dict[str, Tensor]


Builder = Callable[[dict[str, Tensor], str | None, bool], Call | None]
_builders: dict[tuple[str, str], Builder] = {}
# What each peer needs, and on which devices it is one: transformers' own functions are what a CPU user gets, on a GPU
# it calls mamba-ssm.
_needs = {"transformers": ("transformers", ("cpu",)), "fla": ("fla", ("cuda",)), "mamba_ssm": ("mamba_ssm", ("cuda",))}


def find(op: str, options: Options) -> dict[str, Builder]:
    """The peers of `op` that can run here."""
    found = {}
    for (name, peer), builder in _builders.items():
        package, devices = _needs.get(peer, ("torch", ("cpu", "cuda")))
        here = torch.device(options.device).type in devices and importlib.util.find_spec(package) is not None
        if name == op and peer in options.peers and here:
            found[peer] = builder
    return found


def _peer(op: str, name: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        _builders[op, name] = builder
        return builder

    return register


@_peer("block_sparse_attention", "sdpa")  # to everything
@_peer("softmax_attention", "sdpa")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call | None:
    if variant is not None:  # which FlexAttention serves, our library backend
        return None
    return dense(tensors, decode)


@_peer("landmark_attention", "sdpa")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call:
    """Plain attention: no public kernel has the grouped softmax."""
    return dense(tensors, decode)


def dense(tensors: dict[str, Tensor], decode: bool) -> Call:
    """Attention to everything, of which torch has a flash kernel."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=not decode, enable_gqa=True).transpose(1, 2)

    return Call(call, {name: tensors[name].transpose(1, 2).contiguous() for name in ("q", "k", "v")})


@_peer("block_sparse_attention", "fla")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call | None:
    from fla.ops.nsa import parallel_nsa

    q, k, v, blocks = (tensors[name] for name in ("q", "k", "v", "block_indices"))
    if decode or q.shape[2] // k.shape[2] < 16:  # as many queries as keys; and what it asks for
        return None
    size = chosen_block(k.shape[1])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel_nsa(q, k, v, block_indices=blocks, block_counts=blocks.shape[-1], block_size=size)

    return Call(call, {"q": q, "k": k, "v": v})


@_peer("infini_attention", "sdpa")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call:
    """Plain attention over everything, which is what a text is read with otherwise."""
    return dense(tensors, decode)


def _as_ssd(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """linear_attention's arguments as Mamba-2's: v = dt x and log_decay = dt A with A = -1."""
    v, log_decay = tensors["v"], tensors["log_decay"]
    dt = -log_decay.expand(v.shape[:3]).contiguous()
    x = (v / dt[..., None]).to(v.dtype)
    return {"x": x, "dt": dt, "A": -torch.ones_like(dt[0, 0]), "B": tensors["k"], "C": tensors["q"]}


def _ssd(scan: Callable[..., Any], update: Callable[..., Any], tensors: dict[str, Tensor], decode: bool) -> Call:
    found = _as_ssd(tensors)
    if not decode:
        return Call(lambda x, dt, A, B, C: scan(x, dt, A, B, C, CHUNK), found)
    batch, _, heads, width = found["x"].shape
    one = {name: t[:, 0] for name, t in found.items() if name != "A"}
    one["dt"] = one["dt"][..., None].expand(batch, heads, width)
    one["A"] = found["A"][:, None, None].expand(heads, width, tensors["q"].shape[-1])
    one["state"] = tensors["initial_state"].transpose(2, 3).contiguous()  # updated in place
    return Call(lambda x, dt, A, B, C, state: update(state, x, dt, A, B, C)[:, None], one)


@_peer("linear_attention", "transformers")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call:
    from transformers.models.mamba2 import modeling_mamba2 as theirs

    def update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return theirs.mamba2_selective_state_update(state, x, dt, A, B, C)

    return _ssd(theirs.mamba2_chunk_scan, update, tensors, decode)


@_peer("linear_attention", "mamba_ssm")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call | None:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if tensors["q"].shape[1] >= WRONG_FROM:
        return None
    return _ssd(mamba_chunk_scan_combined, selective_state_update, tensors, decode)


@_peer("linear_attention", "fla")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call:
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    decay = "g_gamma" if variant == "per head" else "g"

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None = None) -> Tensor:
        repeats = v.shape[2] // q.shape[2]
        if repeats > 1:  # it wants as many heads of q and k as of v
            q, k = (t.repeat_interleave(repeats, 2) for t in (q, k))
        function = fused_recurrent_simple_gla if decode else chunk_simple_gla
        state = {"initial_state": initial_state, "output_final_state": True} if decode else {}
        return function(q, k, v, **{decay: log_decay}, scale=1.0, **state)[0]

    return Call(call, tensors)


def _scan(scan: Callable[..., Any], update: Callable[..., Any], tensors: dict[str, Tensor], decode: bool) -> Call:
    """Mamba's, whose channels come before its tokens."""
    found = dict(tensors)
    if decode:
        found |= {name: found[name][:, 0] for name in ("u", "delta", "B", "C")}
        found["initial_state"] = found["initial_state"].clone()  # updated in place
        return Call(
            lambda u, delta, A, B, C, D, initial_state: update(initial_state, u, delta, A, B, C, D)[:, None], found
        )
    found |= {name: found[name].transpose(1, 2).contiguous() for name in ("u", "delta", "B", "C")}
    return Call(lambda u, delta, A, B, C, D: scan(u, delta, A, B, C, D).transpose(1, 2), found)


@_peer("selective_scan", "transformers")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call | None:
    from transformers.models.jamba import modeling_jamba as theirs

    if tensors["u"].shape[1] > 1024:  # its backward grows with the square of the length
        return None
    return _scan(theirs.mamba_selective_scan, theirs.mamba_selective_state_update, tensors, decode)


@_peer("selective_scan", "mamba_ssm")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    same = tensors | {"delta": tensors["delta"].to(tensors["u"].dtype)}  # it wants one dtype
    return _scan(selective_scan_fn, selective_state_update, same, decode)


def _conv(whole: Callable[..., Any], update: Callable[..., Any], tensors: dict[str, Tensor], decode: bool) -> Call:
    channels_first = tensors | {"x": tensors["x"].transpose(1, 2).contiguous()}
    if decode:
        channels_first["initial_state"] = tensors["initial_state"].to(tensors["x"].dtype, copy=True)  # updated in place
        return Call(
            lambda x, weight, bias, initial_state: update(x, initial_state, weight, bias, "silu").transpose(1, 2),
            channels_first,
        )
    return Call(
        lambda x, weight, bias: whole(x, weight=weight, bias=bias, activation="silu").transpose(1, 2), channels_first
    )


@_peer("causal_conv1d", "transformers")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call:
    from transformers.models.mamba2 import modeling_mamba2 as theirs

    return _conv(theirs.causal_conv1d_fn, theirs.causal_conv1d_update, tensors, decode)


@_peer("causal_conv1d", "mamba_ssm")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    return _conv(causal_conv1d_fn, causal_conv1d_update, tensors, decode)


@_peer("causal_conv1d", "fla")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call | None:
    from fla.modules.convolution import causal_conv1d

    if decode:
        return None
    return Call(lambda x, weight, bias: causal_conv1d(x, weight, bias, activation="silu")[0], tensors)


@_peer("gated_rms_norm", "transformers")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call:
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
    from transformers.models.minimax.modeling_minimax import MiniMaxRMSNorm

    def call(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        norm: Any = SimpleNamespace(weight=weight, variance_epsilon=EPS, group_size=x.shape[-1])
        if variant == "gate first":
            return MambaRMSNormGated.forward(norm, x, gate)
        return torch.sigmoid(gate) * MiniMaxRMSNorm.forward(norm, x)

    return Call(call, tensors)


@_peer("gated_rms_norm", "mamba_ssm")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call | None:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    if variant != "gate first":
        return None
    return Call(lambda x, gate, weight: rmsnorm_fn(x, weight, None, z=gate, eps=EPS, norm_before_gate=False), tensors)


@_peer("gated_rms_norm", "fla")
def _(tensors: dict[str, Tensor], variant: str | None, decode: bool) -> Call | None:
    from fla.modules.fused_norm_gate import rms_norm_gated

    if variant != "norm first":
        return None
    return Call(lambda x, gate, weight: rms_norm_gated(x, gate, weight, None, "sigmoid", eps=EPS), tensors)
