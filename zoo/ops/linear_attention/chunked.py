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

import math
from typing import Any

import torch
from torch import Tensor

from zoo.ops.dispatch import implements
from zoo.ops.varlen import DocumentChunks, RowChunks, max_chunks

MAX_CHUNK = 64  # measured on CPU: 128 doubles the work within chunks and saves less between them
LOG2_E = math.log2(math.e)
BLOCK = 32  # chunks times heads worked on together: with 64 x 64 float32 each, half a megabyte


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
    layout = _layout(v, cu_seqlens)
    decays = _Decays(log_decay, layout, v.dtype)
    kept = v.new_empty(_chunks_at_most(v, cu_seqlens) if keep_states else 0, *initial_state.shape[1:])
    q, k, v = (layout.spread(x) for x in (q, k, v))
    out, final = torch.empty_like(v), initial_state.clone()
    state = initial_state
    for now, positions in _blocks(layout, v.shape[1]):
        q_now, k_now, v_now = q[now], k[now], v[now]
        # Each state that enters is the one before, decayed, plus what its chunk added.
        added = _matmul(_scaled(k_now, decays.out_of[now]).mT, v_now)
        entering = _chain_buffer(added, layout.lanes, state)
        for p, add, enter, leave, whole in _in_lanes(
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
        scores = _scaled(_matmul(q_now, k_now.mT), decays.within(now))
        _matmul(_scaled(q_now, decays.into[now]), entering, out=out[now])
        _add_matmul(out[now], scores, v_now)
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
    layout = _layout(v, cu_seqlens)
    decays = _Decays(log_decay, layout, v.dtype)
    d_out = torch.zeros_like(v) if d_out is None else d_out
    d_state = torch.zeros_like(initial_state) if d_final is None else d_final
    d_final, d_initial = d_state, d_state.clone()  # a document without tokens passes its state on
    q, k, v, d_out = (layout.spread(x) for x in (q, k, v, d_out))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    d_log_decay = decays.new_gradient() if decay_too else None
    groups = q.shape[1]
    for now, positions in reversed(_blocks(layout, v.shape[1])):
        q_now, k_now, v_now, g_now, entering = q[now], k[now], v[now], d_out[now], kept[now]
        into, out_of, within = decays.into[now], decays.out_of[now], decays.within(now)
        # The gradient of a state that leaves a chunk is that of the next one that enters.
        given = _matmul(_scaled(q_now, into).mT, g_now)
        leaving = _chain_buffer(given, layout.lanes, d_state, at_end=True)
        for p, give, enter, leave, whole in reversed(
            _in_lanes(layout, positions, given, leaving[: -layout.lanes], leaving[layout.lanes :], decays.whole[now])
        ):
            if p in layout.ends:
                leave.copy_(d_final[layout.ends[p]])
            torch.addcmul(give, leave, whole, out=enter)
            if p in layout.starts:
                d_initial[layout.starts[p]] = enter
        d_state = leaving[: layout.lanes]
        leaving = leaving[layout.lanes :].to(v.dtype)

        scores = _scaled(_matmul(q_now, k_now.mT), within)
        d_scores = _matmul(g_now, v_now.mT)
        pairs = scores * d_scores if d_log_decay is not None else None
        d_scores = _summed(d_scores.mul_(within), groups)
        dq_now = _matmul(g_now, entering.mT).mul_(into)
        dk_now = _matmul(v_now, leaving.mT).mul_(out_of)
        if d_log_decay is not None and pairs is not None:
            whole = decays.whole[now].flatten(1) * (entering * leaving).sum((-2, -1))
            decays.add_gradient(d_log_decay, now, pairs, _dot(q_now, dq_now), _dot(k_now, dk_now), whole)
        _add_matmul(_summed(dq_now, groups, out=dq[now]), d_scores, k_now)
        _add_matmul(_summed(dk_now, groups, out=dk[now]), d_scores.mT, q_now)
        _add_matmul(_matmul(_scaled(k_now, out_of), leaving, out=dv[now]), scores.mT, g_now)
    if d_log_decay is None:
        d_log_decay = torch.zeros_like(log_decay)
    elif log_decay.dim() == 3:
        d_log_decay = layout.gather(d_log_decay[..., None])[..., 0]
    dq, dk, dv = (layout.gather(x) for x in (dq, dk, dv))
    return dq, dk, dv, d_log_decay.to(log_decay.dtype), d_initial


class _Decays:
    """What the log decays of the chunks come to: factors, all in [0, 1].

    into       `[M,H,C,1]`       from the chunk's start to each token, e^{c_i}
    out_of     `[M,H,C,1]`       from each token to the chunk's end, e^{c_C - c_j}
    whole      `[M,H,1,1]`       from its start to its end, in at least float32
    within()   `[n or 1,H,C,C]`  from token j to token i >= j, e^{c_i - c_j}, and 0 above the diagonal
    """

    def __init__(self, log_decay: Tensor, layout: RowChunks | DocumentChunks, dtype: torch.dtype) -> None:
        # Sums are of log2 decays: torch computes powers of two four times as fast as powers of e. They are float64,
        # because a difference of two float32 sums of strong decays has lost the weak ones between them.
        self.dtype, self.wide, self.tokens = dtype, torch.promote_types(dtype, torch.float32), layout.tokens
        self.steps = torch.arange(1, layout.chunk + 1, device=log_decay.device)
        self.distance = (self.steps[:, None] - self.steps).clamp(min=0)
        self.constant: Tensor | None = None
        if log_decay.dim() == 1:
            slope = log_decay.double()[:, None] * LOG2_E
            self.sums = slope * torch.minimum(self.steps, self.tokens[:, None])[:, None]
            self.constant = (slope[..., None] * self.distance).exp2().tril().to(dtype)[None]
        else:
            self.sums = layout.spread(log_decay[..., None])[..., 0].double().mul_(LOG2_E).cumsum(-1)
        total = self.sums[..., -1:]
        self.whole = total.exp2().to(log_decay.dtype)[..., None]
        self.into = self.sums.exp2().to(dtype)[..., None]
        self.out_of = (total - self.sums).clamp(max=0).exp2().to(dtype)[..., None]

    def within(self, now: slice) -> Tensor:
        if self.constant is not None:
            return self.constant
        sums = self.sums[now]
        high = sums.to(self.wide)
        low = (sums - high).to(self.wide)
        within = high[..., :, None] - high[..., None, :]
        within += low[..., :, None]
        within -= low[..., None, :]
        return within.clamp_(max=0).exp2_().tril_().to(self.dtype)

    def new_gradient(self) -> Tensor:
        """Zeros for `add_gradient` to add to: `[H]`, or `[M,H,C]` in chunks."""
        shape = self.sums.shape[1:2] if self.constant is not None else self.sums.shape
        return self.sums.new_zeros(shape, dtype=self.wide)

    def add_gradient(
        self, total: Tensor, now: slice, pairs: Tensor, into: Tensor, out_of: Tensor, whole: Tensor
    ) -> None:
        """Add the gradient of log_decay from the chunks `now`: a token's is the sum over all that decayed across it.

        pairs   `[n,H,C,C]`  what token j gave token i of the same chunk
        into    `[n,H,C]`    what the entering state gave each token
        out_of  `[n,H,C]`    what each token gave the leaving state
        whole   `[n,H]`      what the entering state gave the leaving state

        Taking sums only of the terms concerned, never the difference of two larger sums, keeps the gradient of a
        strong decay, which is tiny, from drowning in rounding.
        """
        if self.constant is not None:
            tokens = self.tokens[now, None]
            steps_in = torch.minimum(self.steps, tokens)[:, None]
            total += (pairs.sum(0).to(self.wide) * self.distance).sum((-2, -1))
            total += (into * steps_in + out_of * (tokens[..., None] - steps_in)).sum((0, 2)) + (whole * tokens).sum(0)
            return
        earlier = torch.ones_like(pairs[0, 0]).triu_(1)
        gradient = (pairs @ earlier).tril_().sum(-2).to(self.wide)
        gradient += into.flip(-1).cumsum(-1).flip(-1)
        gradient[..., 1:] += out_of.cumsum(-1)[..., :-1]
        gradient += whole[..., None]
        total[now] = gradient


def _layout(v: Tensor, cu_seqlens: Tensor | None) -> RowChunks | DocumentChunks:
    batch, length = v.shape[:2]
    if cu_seqlens is None:
        return RowChunks(batch, length, MAX_CHUNK, v.device)
    return DocumentChunks(cu_seqlens, length, MAX_CHUNK)


def _chunks_at_most(v: Tensor, cu_seqlens: Tensor | None) -> int:
    """A bound on the layout's chunks that does not depend on where documents end."""
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.shape[0] * max_chunks(v.shape[1], documents, MAX_CHUNK)


def _blocks(layout: RowChunks | DocumentChunks, heads: int) -> list[tuple[slice, range]]:
    """`(chunks, positions)` to work on together, in order."""
    step = max(1, BLOCK // max(1, heads * layout.lanes))
    ranges = (range(p, min(p + step, layout.positions)) for p in range(0, layout.positions, step))
    return [(slice(r.start * layout.lanes, r.stop * layout.lanes), r) for r in ranges]


def _in_lanes(layout: RowChunks | DocumentChunks, positions: range, *tensors: Tensor) -> list[tuple[Any, ...]]:
    """`(position, views...)` of each position: of each tensor `[n,...]` the lanes there, `[lanes,...]`."""
    return list(zip(positions, *(x.split(layout.lanes) for x in tensors), strict=True))


def _chain_buffer(x: Tensor, lanes: int, state: Tensor, at_end: bool = False) -> Tensor:
    """Room for the states before and after each position of x `[n,H,K,V]`, `[n + lanes,H,K,V]`, with `state` at one
    end."""
    buffer = state.new_empty(x.shape[0] + lanes, *x.shape[1:])
    end = buffer[-lanes:] if at_end else buffer[:lanes]
    if state.shape == end.shape:  # at the very first position the document's own comes in its place
        end.copy_(state)
    return buffer


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x `[n,G,...]`, each group's copy for every one of its heads times that head's factor `[n,H,...]`: `[n,H,...]`."""
    if x.shape[1] == factor.shape[1]:
        return x * factor
    out = x.new_empty(x.shape[0], factor.shape[1], *x.shape[2:])
    grouped = (x.shape[1], -1)
    torch.mul(x[:, :, None], factor.unflatten(1, grouped), out=out.unflatten(1, grouped))
    return out


def _summed(x: Tensor, groups: int, out: Tensor | None = None) -> Tensor:
    """`[n,H,...]` to `[n,G,...]`, the sum over the heads of each group."""
    if x.shape[1] != groups:
        return torch.sum(x.unflatten(1, (groups, -1)), 2, out=out)
    return x if out is None else out.copy_(x)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The dot products over the last dimension of x `[n,G,...,K]` and y `[n,H,...,K]`, in at least float32."""
    # sum adds up in float32 whatever it returns; asked to return float32 it would copy its input first.
    return _scaled(x, y).sum(-1).to(torch.promote_types(y.dtype, torch.float32))


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b of `[n,H,...]`; out is contiguous."""
    heads = a.shape[:2]
    out = None if out is None else out.flatten(0, 1)
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out).unflatten(0, heads)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; total is contiguous."""
    total.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


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
    kept = v.new_empty(_chunks_at_most(v, cu_seqlens) if keep_states else 0, *initial_state.shape[1:])
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


_forward.register_autograd(_differentiate, setup_context=_save)
