"""delta_rule over chunks, in matmuls.

Yang et al. 2024, arXiv:2406.06484, section 3; with decay, arXiv:2412.06464, section 3.3, and arXiv:2510.26692, section
3.

Within a chunk, with c_i the sum of the log decays up to and including token i, C its last token, E the state that
enters it, and <a, b>_ij the product of a_i and b_j with the decay between them, sum_d a_id e^{c_id - c_jd} b_jd:

    u_i = beta_i (v_i - k_i e^{c_i} E - sum_{j<i} <k, k>_ij u_j)       what token i writes: a triangular system
    o_i = q_i e^{c_i} E + sum_{j<=i} <q, k>_ij u_j
    Y   = e^{c_C} E + sum_j (k_j e^{c_C - c_j}) u_j^T                  the state that leaves

The system is linear in E, so it is solved for all chunks at once, u = u' - W E, and only two products per chunk wait
for the chunk before. Every exponent is a sum of log decays, so none is positive, and nothing is divided by a decay. The
backward pass keeps the inputs and the entering states and computes the rest again, a few chunks at a time.

Shapes: G groups of q and k heads, H heads, M chunks (varlen.py lays them out: the rows of a batch run side by side, in
lanes), n chunks worked on together, C tokens in a chunk, K and V the head dims. q, k [M,G,C,K], v [M,H,C,V], beta
[M,H,C,1], states [M,H,K,V]. Everything is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.ops.chunks import (
    add_matmul,
    blocks,
    chain_buffer,
    chunks_at_most,
    in_lanes,
    layout_of,
    matmul,
    scaled,
)
from zoo.ops.delta_rule.decays import Decays, PerChannel, PerHead
from zoo.ops.dispatch import implements, outside_autocast
from zoo.ops.varlen import DocumentChunks, RowChunks


@implements("delta_rule", "torch")
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = initial_state.dtype
    tensors = (q.to(dtype) * scale, k.to(dtype), v.to(dtype), beta, log_decay, initial_state)
    if v.shape[1] == 1 and cu_seqlens is None:
        out, state = _step(*tensors)
    else:
        keep_states = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        out, state, _ = _forward(*tensors, cu_seqlens, keep_states)
    return out.to(v.dtype), state


def _step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself."""
    batch, _, heads, value_dim = v.shape
    if heads != q.shape[2]:
        q, k = (x.repeat_interleave(heads // q.shape[2], dim=2) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B,H,1,*]
    state = state * log_decay.exp().view(-1, heads, log_decay.shape[-1] if log_decay.dim() == 4 else 1, 1)
    written = beta.view(batch, heads, 1, 1) * (v - k @ state)
    state = torch.addcmul(state, k.mT, written)
    return (q @ state).view(batch, 1, heads, value_dim), state


def _decays(log_decay: Tensor, layout: RowChunks | DocumentChunks, dtype: torch.dtype) -> Decays:
    return PerChannel(log_decay, layout) if log_decay.dim() == 4 else PerHead(log_decay, layout, dtype)


def _solve(system: Tensor, right: Tensor, transposed: bool = False) -> Tensor:
    """x with (1 + L) x = right, or (1 + L)^T x = right; L is what `system` `[n,H,C,C]` has below its diagonal."""
    system = system.mT if transposed else system
    return torch.linalg.solve_triangular(system, right, upper=transposed, unitriangular=True)


# Opaque operators: torch.compile would otherwise unroll the loop over chunks into its graph.


@torch.library.custom_op("zoo::delta_rule_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out [B,T,H,V], state [n,H,K,V], kept [M,H,K,V])`: the states that enter the chunks, where asked for."""
    layout = layout_of(v, cu_seqlens)
    decays = _decays(log_decay, layout, v.dtype)
    kept = v.new_empty(chunks_at_most(v, cu_seqlens) if keep_states else 0, *initial_state.shape[1:])
    q, k, v, beta = (layout.spread(x) for x in (q, k, v, beta[..., None]))
    out, final = torch.empty_like(v), initial_state.clone()
    state = initial_state
    for now, positions in blocks(layout, v.shape[1]):
        q_now, k_now = q[now], k[now]
        decay = decays.of(now, q_now, k_now)
        queries, keys = decay.products()
        k_in, k_out = scaled(k_now, decay.into), scaled(k_now, decay.out_of)
        right = torch.cat([v[now], k_in], -1) * beta[now]
        written, w = _solve(beta[now] * keys, right).split(v.shape[-1:] + k.shape[-1:], -1)
        written = written.contiguous()
        entering = chain_buffer(written.shape[0], layout.lanes, state)
        for p, u, w_p, k_p, whole, enter, leave in in_lanes(
            layout, positions, written, w, k_out, decay.whole, entering[: -layout.lanes], entering[layout.lanes :]
        ):
            if p in layout.starts:
                enter.copy_(initial_state[layout.starts[p]])
            add_matmul(u, w_p, enter, -1.0)
            torch.mul(enter, whole, out=leave)
            add_matmul(leave, k_p.mT, u)
            if p in layout.ends:
                final[layout.ends[p]] = leave
        state = entering[-layout.lanes :]
        entering = entering[: -layout.lanes]
        if keep_states:
            kept[now] = entering
        matmul(scaled(q_now, decay.into), entering, out=out[now])
        add_matmul(out[now], queries, written)
    return layout.gather(out), final, kept


@torch.library.custom_op("zoo::delta_rule_backward", mutates_args=())
def _backward(
    d_out: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay (zeros for a constant) and the initial state."""
    layout = layout_of(v, cu_seqlens)
    decays = _decays(log_decay, layout, v.dtype)
    d_out = torch.zeros_like(v) if d_out is None else d_out
    d_state = torch.zeros_like(initial_state) if d_final is None else d_final
    d_final, d_initial = d_state, d_state.clone()  # a document without tokens passes its state on
    q, k, v, beta, d_out = (layout.spread(x) for x in (q, k, v, beta[..., None], d_out))
    dq, dk, dv, d_beta = (torch.empty_like(x) for x in (q, k, v, beta))
    for now, positions in reversed(blocks(layout, v.shape[1])):
        q_now, k_now, beta_now, g_now, entering = q[now], k[now], beta[now], d_out[now], kept[now]
        decay = decays.of(now, q_now, k_now)
        queries, keys = decay.products()
        keys = keys.tril(-1)
        k_in, k_out = scaled(k_now, decay.into), scaled(k_now, decay.out_of)
        system = beta_now * keys
        unknown = v[now] - matmul(k_in, entering)  # of a value, what the entering state does not hold
        right = torch.cat([unknown, k_in], -1) * beta_now
        written, w = _solve(system, right).split(v.shape[-1:] + k.shape[-1:], -1)

        # The gradient of a state that leaves a chunk is that of the next one that enters.
        given = matmul(scaled(q_now, decay.into).mT, g_now)
        d_written = matmul(queries.mT, g_now)
        leaving = chain_buffer(given.shape[0], layout.lanes, d_state, at_end=True)
        lanes = in_lanes(
            layout, positions, d_written, w, k_out, decay.whole, given,
            leaving[: -layout.lanes], leaving[layout.lanes :],
        )  # fmt: skip
        for p, d_u, w_p, k_p, whole, give, enter, leave in reversed(lanes):
            if p in layout.ends:
                leave.copy_(d_final[layout.ends[p]])
            add_matmul(d_u, k_p, leave)
            torch.addcmul(give, leave, whole, out=enter)
            add_matmul(enter, w_p.mT, d_u, -1.0)
            if p in layout.starts:
                d_initial[layout.starts[p]] = enter
        d_state = leaving[: layout.lanes]
        leaving = leaving[layout.lanes :]

        d_right = _solve(system, d_written, transposed=True)
        add_matmul(unknown, keys, written, -1.0)  # nor do the tokens before it in the chunk
        d_beta[now] = (d_right * unknown).sum(-1, keepdim=True)
        d_inner = torch.mul(d_right, beta_now, out=dv[now])
        dq[now], dk[now] = decay.gradients(
            queries=matmul(g_now, written.mT).tril_(),
            keys=matmul(d_inner, written.mT).tril_(-1).neg_(),
            q_in=matmul(g_now, entering.mT),
            k_in=matmul(d_inner, entering.mT).neg_(),
            k_out=matmul(written, leaving.mT),
            whole=entering * leaving,
        )
    dq, dk, dv, d_beta = (layout.gather(x) for x in (dq, dk, dv, d_beta))
    return dq, dk, dv, d_beta[..., 0].contiguous(), decays.gradient(), d_initial


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
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
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v, beta, log_decay)), torch.empty_like(initial_state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Any, ...]:
    return *_backward(d_out, d_final, *ctx.saved_tensors), None, None


_forward.register_autograd(outside_autocast(_differentiate), setup_context=_save)
