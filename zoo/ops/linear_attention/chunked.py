"""linear_attention over chunks, in matmuls.

Mamba-2, arXiv:2405.21060, section 6; Lightning Attention-2, arXiv:2401.04658, section 3.

Within a chunk, with c_i the sum of the log decays up to and including token i, C its last token, and E the state that
enters it:

    o_i = q_i e^{c_i} E  +  sum_{j<=i} e^{c_i - c_j} (q_i . k_j) v_j
    Y   = e^{c_C} E      +  sum_j e^{c_C - c_j} k_j v_j^T                 the state that leaves

Every exponent is a sum of log decays, so none is positive, and nothing is ever divided by a decay. The backward pass
keeps the inputs and the entering states and computes the rest again. A few chunks are worked on at a time, so that what
is between two multiplications stays in the cache.

Shapes: G groups of q and k heads, H heads, M chunks (varlen.py lays them out: the rows of a batch run side by side, in
lanes), n chunks worked on together, C tokens in a chunk, K and V the head dims. q, k [M,G,C,K], v [M,H,C,V], states
[M,H,K,V].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops.chunks import (
    HeadDecays,
    add_matmul,
    blocks,
    chain_buffer,
    chunks_at_most,
    dot,
    in_lanes,
    layout_of,
    matmul,
    scaled,
    summed,
)
from zoo.ops.dispatch import implements, outside_autocast


@implements("linear_attention", "torch")
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # float16 has too small a range for sums over a chunk.
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
    if scale != 1.0:
        q = q * scale
    if v.shape[1] == 1 and cu_seqlens is None:
        out, state = _step(q, k, values, log_decay, initial_state)
    else:
        tensors = (q, k, values, log_decay, initial_state)
        keep_states = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        out, state, _ = _forward(*tensors, cu_seqlens, keep_states)
    return out.to(v.dtype), state


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself."""
    batch, _, heads, value_dim = v.shape
    if heads != q.shape[2]:
        q, k = (x.repeat_interleave(heads // q.shape[2], dim=2) for x in (q, k))
    decay = log_decay.exp().view(-1, heads, 1, 1)
    k, v = k.transpose(1, 2).mT.to(state.dtype), v.transpose(1, 2).to(state.dtype)
    state = torch.addcmul(decay * state, k, v)
    out = q.transpose(1, 2).to(state.dtype) @ state
    return out.view(batch, 1, heads, value_dim), state


# Opaque operators: torch.compile would otherwise unroll the loop over chunks into its graph.


@torch.library.custom_op("zoo::linear_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out [B,T,H,V], state [n,H,K,V], kept [M,H,K,V])`: the states that enter the chunks, where asked for."""
    layout = layout_of(v, cu_seqlens)
    decays = HeadDecays(log_decay, layout, v.dtype)
    kept = v.new_empty(chunks_at_most(v, cu_seqlens) if keep_states else 0, *initial_state.shape[1:])
    q, k, v = (layout.spread(x) for x in (q, k, v))
    out, final = torch.empty_like(v), initial_state.clone()
    state = initial_state
    for now, positions in blocks(layout, v.shape[1]):
        q_now, k_now, v_now = q[now], k[now], v[now]
        # Each state that enters is the one before, decayed, plus what its chunk added.
        added = matmul(scaled(k_now, decays.out_of[now]).mT, v_now)
        entering = chain_buffer(added.shape[0], layout.lanes, state)
        for p, add, enter, leave, whole in in_lanes(
            layout, positions, added, entering[: -layout.lanes], entering[layout.lanes :], decays.whole[now]
        ):
            if p in layout.starts:
                enter.copy_(initial_state[layout.starts[p]])
            torch.addcmul(add, enter, whole, out=leave)
            if p in layout.ends:
                final[layout.ends[p]] = leave
        state = entering[-layout.lanes :]
        entering = entering[: -layout.lanes]
        if keep_states:
            entering = kept[now].copy_(entering)
        else:
            entering = entering.to(v.dtype)
        scores = scaled(matmul(q_now, k_now.mT), decays.within(now))
        matmul(scaled(q_now, decays.into[now]), entering, out=out[now])
        add_matmul(out[now], scores, v_now)
    return layout.gather(out), final, kept


@torch.library.custom_op("zoo::linear_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    decay_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, of log_decay (zeros unless `decay_too`) and of the initial state."""
    layout = layout_of(v, cu_seqlens)
    decays = HeadDecays(log_decay, layout, v.dtype)
    d_out = torch.zeros_like(v) if d_out is None else d_out
    d_state = torch.zeros_like(initial_state) if d_final is None else d_final
    d_final, d_initial = d_state, d_state.clone()  # a document without tokens passes its state on
    q, k, v, d_out = (layout.spread(x) for x in (q, k, v, d_out))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    d_log_decay = decays.new_gradient() if decay_too else None
    groups = q.shape[1]
    for now, positions in reversed(blocks(layout, v.shape[1])):
        q_now, k_now, v_now, g_now, entering = q[now], k[now], v[now], d_out[now], kept[now]
        into, out_of, within = decays.into[now], decays.out_of[now], decays.within(now)
        # The gradient of a state that leaves a chunk is that of the next one that enters.
        given = matmul(scaled(q_now, into).mT, g_now)
        leaving = chain_buffer(given.shape[0], layout.lanes, d_state, at_end=True)
        for p, give, enter, leave, whole in reversed(
            in_lanes(layout, positions, given, leaving[: -layout.lanes], leaving[layout.lanes :], decays.whole[now])
        ):
            if p in layout.ends:
                leave.copy_(d_final[layout.ends[p]])
            torch.addcmul(give, leave, whole, out=enter)
            if p in layout.starts:
                d_initial[layout.starts[p]] = enter
        d_state = leaving[: layout.lanes]
        leaving = leaving[layout.lanes :].to(v.dtype)

        scores = scaled(matmul(q_now, k_now.mT), within)
        d_scores = matmul(g_now, v_now.mT)
        pairs = scores * d_scores if d_log_decay is not None else None
        d_scores = summed(d_scores.mul_(within), groups)
        dq_now = matmul(g_now, entering.mT).mul_(into)
        dk_now = matmul(v_now, leaving.mT).mul_(out_of)
        if d_log_decay is not None and pairs is not None:
            whole = decays.whole[now].flatten(1) * (entering * leaving).sum((-2, -1))
            decays.add_gradient(d_log_decay, now, pairs, dot(q_now, dq_now), dot(k_now, dk_now), whole)
        add_matmul(summed(dq_now, groups, out=dq[now]), d_scores, k_now)
        add_matmul(summed(dk_now, groups, out=dk[now]), d_scores.mT, q_now)
        add_matmul(matmul(scaled(k_now, out_of), leaving, out=dv[now]), scores.mT, g_now)
    if d_log_decay is None:
        d_log_decay = torch.zeros_like(log_decay)
    elif log_decay.dim() == 3:
        d_log_decay = layout.gather(d_log_decay[..., None])[..., 0]
    dq, dk, dv = (layout.gather(x) for x in (dq, dk, dv))
    return dq, dk, dv, d_log_decay.to(log_decay.dtype), d_initial


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = v.new_empty(chunks_at_most(v, cu_seqlens) if keep_states else 0, *initial_state.shape[1:])
    return v.new_empty(v.shape), torch.empty_like(initial_state), kept


@_backward.register_fake
def _(
    d_out: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    decay_too: bool,
) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v, log_decay)), torch.empty_like(initial_state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Any, ...]:
    dq, dk, dv, d_log_decay, d_initial = _backward(d_out, d_final, *ctx.saved_tensors, ctx.needs_input_grad[3])
    return dq, dk, dv, d_log_decay if ctx.needs_input_grad[3] else None, d_initial, None, None


_forward.register_autograd(outside_autocast(_differentiate), setup_context=_save)
