"""linear_attention over chunks, in matmuls.

Mamba-2, arXiv:2405.21060, section 6; Lightning Attention-2, arXiv:2401.04658, section 3.

Within a chunk, with c_i the sum of the log decays up to and including token i, C its last token, and E the state that
enters it:

    o_i = q_i e^{c_i} E  +  sum_{j<=i} e^{c_i - c_j} (q_i . k_j) v_j
    Y   = e^{c_C} E      +  sum_j e^{c_C - c_j} k_j v_j^T                 the state that leaves

Every exponent is a sum of log decays, so none is positive, and nothing is ever divided by a decay. The backward pass
keeps the inputs and the entering states and computes the rest again.

Shapes: G groups of q and k heads, H heads, M chunks (all documents and batch rows on one axis, each starting a chunk),
C tokens in a chunk, n documents, K and V the head dims. Heads stand first: q, k [G,M,C,K], v [H,M,C,V], states
[H,M,K,V].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from zoo.ops.dispatch import implements
from zoo.ops.varlen import DocumentChunks, RowChunks

MAX_CHUNK = 64  # measured on CPU: 128 doubles the work within chunks and saves less between them
SCAN_BLOCK = 32  # chunks whose states one matmul chains
RESET = -1000.0  # a log decay that leaves nothing, even in float64, and is still finite: -inf - -inf would be NaN


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
    batch, length = v.shape[:2]
    # float16 has too small a range for sums over a chunk.
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
    if scale != 1.0:
        q = q * scale
    if length == 1 and cu_seqlens is None:
        out, state = _step(q, k, values, log_decay, initial_state)
        return out.to(v.dtype), state

    layout: RowChunks | DocumentChunks
    if cu_seqlens is None:
        layout = RowChunks(batch, length, MAX_CHUNK, v.device)
    else:
        layout = DocumentChunks(cu_seqlens, length, MAX_CHUNK)
    per_token = log_decay.dim() == 3
    out, state = _Chunked.apply(
        layout.spread(q),
        layout.spread(k),
        layout.spread(values),
        layout.spread(log_decay[..., None])[..., 0] if per_token else log_decay,
        layout.enter(initial_state).transpose(0, 1),
        layout.tokens,
        layout.first,
        layout.last,
    )
    return layout.gather(out).to(v.dtype), layout.leave(state.transpose(0, 1), initial_state)


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself."""
    batch, _, heads, value_dim = v.shape
    shared = heads // q.shape[2]
    q, k = (x[:, 0].to(state.dtype).repeat_interleave(shared, dim=1) for x in (q, k))
    decay = log_decay.to(state.dtype).exp().expand(batch, 1, heads)[:, 0]
    state = decay[..., None, None] * state + k[..., :, None] * v[:, 0].to(state.dtype)[..., None, :]
    return (q[..., None, :] @ state).view(batch, 1, heads, value_dim), state


class _Decays:
    """What the log decays of a chunk come to: factors, all in [0, 1].

    into     `[H,M,C,1]`     from the chunk's start to each token, e^{c_i}
    out_of   `[H,M,C,1]`     from each token to the chunk's end, e^{c_C - c_j}
    within   `[H,M or 1,C,C]` from token j to token i >= j, e^{c_i - c_j}, and 0 above the diagonal
    total    `[H,M]`         float64, the whole chunk's log decay
    """

    def __init__(self, log_decay: Tensor, tokens: Tensor, chunk: int, dtype: torch.dtype) -> None:
        # Float64, because a difference of two float32 sums of strong decays has lost the weak ones between them.
        steps = torch.arange(1, chunk + 1, device=log_decay.device)
        if log_decay.dim() == 1:
            slope = log_decay.double()[:, None, None]
            sums = slope * torch.minimum(steps, tokens[:, None])
            distance = (steps[:, None] - steps).clamp(min=0)
            self.within = (slope * distance).exp().tril().to(dtype)[:, None]
        else:
            sums = log_decay.double().cumsum(-1)
            high = sums.to(_accumulator(dtype))
            low = (sums - high).to(high.dtype)
            within = high[..., :, None] - high[..., None, :]
            within += low[..., :, None]
            within -= low[..., None, :]
            self.within = within.clamp_(max=0).exp_().tril_().to(dtype)
        self.total = sums[..., -1]
        self.into = sums.exp().to(dtype)[..., None]
        self.out_of = (sums[..., -1:] - sums).clamp(max=0).exp().to(dtype)[..., None]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scan_matrices(total: Tensor, first: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How the entering states chain, from the chunks' log decays `[H,M]`.

    Returns:
        between: `[H,M]`, the factor on the state before; 0 where a document starts.
        matrices: `[H,blocks,SCAN_BLOCK,SCAN_BLOCK]`, in each block of chunks the factor from any state to any later.
    """
    between = functional.pad(total[:, :-1], (1, 0))
    between[:, first] = RESET
    padding = -between.shape[1] % SCAN_BLOCK
    sums = functional.pad(between, (0, padding)).unflatten(1, (-1, SCAN_BLOCK)).cumsum(-1)
    matrices = (sums[..., :, None] - sums[..., None, :]).clamp(max=0).exp().tril()
    return between.exp().to(dtype), matrices.to(dtype)


def _scan(x: Tensor, between: Tensor, matrices: Tensor, reverse: bool) -> Tensor:
    """Chain x `[H,M,F]` in place: x_m += between_m x_{m-1}; in reverse, from the end, x_m += between_{m+1} x_{m+1}."""
    chunks = x.shape[1]
    starts = range(0, chunks, SCAN_BLOCK)
    for start in reversed(starts) if reverse else starts:
        end = min(start + SCAN_BLOCK, chunks)
        matrix = matrices[:, start // SCAN_BLOCK, : end - start, : end - start]
        if reverse:
            if end < chunks:
                x[:, end - 1] += between[:, end, None] * x[:, end]
            matrix = matrix.mT
        elif start:
            x[:, start] += between[:, start, None] * x[:, start - 1]
        x[:, start:end] = matrix @ x[:, start:end]
    return x


class _Chunked(torch.autograd.Function):
    """out `[H,M,C,V]` and the states that leave the documents `[H,n,K,V]`, from inputs laid out in chunks.

    log_decay is `[H]` or `[H,M,C]`, zero in the padding; `tokens` `[M]` counts the tokens of each chunk that are not
    padding; `first` and `last` `[n]` are the chunks where documents begin and end.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial_state: Tensor,
        tokens: Tensor,
        first: Tensor,
        last: Tensor,
    ) -> tuple[Tensor, Tensor]:
        decays = _Decays(log_decay, tokens, v.shape[2], v.dtype)
        # The states that enter: each is the one before, decayed, plus what its chunk added.
        added = _scaled(k, decays.out_of).mT @ v
        states = torch.empty_like(added, dtype=initial_state.dtype)
        states[:, 1:] = added[:, :-1]
        states[:, first] = initial_state
        between, matrices = _scan_matrices(decays.total, first, states.dtype)
        _scan(states.flatten(2), between, matrices, reverse=False)
        final = decays.total[:, last, None, None].exp().to(states.dtype) * states[:, last] + added[:, last]
        states = states.to(v.dtype)

        scores = _scaled(q @ k.mT, decays.within)
        out = _sum_of_products(_scaled(q, decays.into) @ states, scores, v)
        ctx.save_for_backward(q, k, v, log_decay, states, tokens, first, last)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, states, tokens, first, last = ctx.saved_tensors
        groups = q.shape[0]
        decays = _Decays(log_decay, tokens, v.shape[2], v.dtype)
        d_out = d_out.contiguous()

        # Gradients of the states that enter, from the last chunk to the first; then of those that leave.
        d_states = (_scaled(q, decays.into).mT @ d_out).to(d_final.dtype)
        d_states[:, last] += decays.total[:, last, None, None].exp().to(d_final.dtype) * d_final
        between, matrices = _scan_matrices(decays.total, first, d_final.dtype)
        _scan(d_states.flatten(2), between, matrices, reverse=True)
        d_initial = d_states[:, first]
        d_leaving = torch.empty_like(states)
        d_leaving[:, :-1] = d_states[:, 1:]
        d_leaving[:, last] = d_final.to(d_leaving.dtype)

        scores = _scaled(q @ k.mT, decays.within)
        d_scores = d_out @ v.mT
        pairs = scores * d_scores if ctx.needs_input_grad[3] else None
        d_scores = _summed(d_scores.mul_(decays.within), groups)
        dq = (d_out @ states.mT).mul_(decays.into)
        dk = (v @ d_leaving.mT).mul_(decays.out_of)
        dv = _sum_of_products(_scaled(k, decays.out_of) @ d_leaving, scores.mT, d_out)
        d_log_decay = None
        if pairs is not None:
            into = _dot(q, dq)
            out_of = _dot(k, dk)
            whole = (decays.total.exp() * (states * d_leaving).sum((-2, -1))).to(d_final.dtype)
            d_log_decay = _decay_gradient(log_decay, tokens, pairs, into, out_of, whole)
        dq = _sum_of_products(_summed(dq, groups), d_scores, k)
        dk = _sum_of_products(_summed(dk, groups), d_scores.mT, q)
        return dq, dk, dv, d_log_decay, d_initial, None, None, None


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x `[G,...]`, each group's copy for every one of its heads times that head's factor `[H,...]`: `[H,...]`."""
    return (x[:, None] * factor.unflatten(0, (x.shape[0], -1))).flatten(0, 1)


def _summed(x: Tensor, groups: int) -> Tensor:
    """`[H,...]` to `[G,...]`, the sum over the heads of each group."""
    return x if x.shape[0] == groups else x.unflatten(0, (groups, -1)).sum(1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The dot products over the last dimension of x `[G,...,K]` and y `[H,...,K]`."""
    # sum adds up in float32 whatever it returns; asked to return float32 it would copy its input first.
    return _scaled(x, y).sum(-1).to(_accumulator(y.dtype))


def _sum_of_products(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a @ b in one pass."""
    return torch.baddbmm(x.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1)).view_as(x)


def _decay_gradient(
    log_decay: Tensor, tokens: Tensor, pairs: Tensor, into: Tensor, out_of: Tensor, whole: Tensor
) -> Tensor:
    """The gradient of log_decay: a token's is the sum over everything that decayed across it.

    pairs   `[H,M,C,C]`  what token j gave token i of the same chunk
    into    `[H,M,C]`    what the entering state gave each token
    out_of  `[H,M,C]`    what each token gave the leaving state
    whole   `[H,M]`      what the entering state gave the leaving state

    Taking sums only of the terms concerned, never the difference of two larger sums, keeps the gradient of a strong
    decay, which is tiny, from drowning in rounding.
    """
    chunk = pairs.shape[-1]
    steps = torch.arange(1, chunk + 1, device=pairs.device)
    if log_decay.dim() == 1:
        steps_in = torch.minimum(steps, tokens[:, None])
        distance = (steps[:, None] - steps).clamp(min=0)
        gradient = (pairs.sum(1).to(into.dtype) * distance).sum((-2, -1))
        gradient += (into * steps_in).sum((-2, -1)) + (out_of * (tokens[:, None] - steps_in)).sum((-2, -1))
        gradient += (whole * tokens).sum(-1)
    else:
        earlier = torch.ones(chunk, chunk, dtype=pairs.dtype, device=pairs.device).triu(1)
        gradient = (pairs @ earlier).tril_().sum(-2).to(into.dtype)
        gradient += into.flip(-1).cumsum(-1).flip(-1)
        gradient[..., 1:] += out_of.cumsum(-1)[..., :-1]
        gradient += whole[..., None]
    return gradient.to(log_decay.dtype)
