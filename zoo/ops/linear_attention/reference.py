"""linear_attention one token at a time: the recurrence as it is written."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from zoo.ops.dispatch import implements


@implements("linear_attention", "reference")
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        out, state = _recur(q, k, v, log_decay, scale, initial_state)
        return out.to(v.dtype), state
    outs, states = [], []
    bounds = cu_seqlens.tolist()
    for document, (start, end) in enumerate(pairwise(bounds)):
        decay = log_decay if log_decay.dim() == 1 else log_decay[:, start:end]
        rows = initial_state[document : document + 1]
        out, state = _recur(q[:, start:end], k[:, start:end], v[:, start:end], decay, scale, rows)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1).to(v.dtype), torch.cat(states)


def _recur(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, value_dim = v.shape
    # Products are bmm, not einsum or mul, so that torch.utils.flop_counter sees all 4*K*V FLOPs of a head and token.
    shared = heads // q.shape[2]
    queries = q.to(state.dtype).repeat_interleave(shared, dim=2)
    keys = k.to(state.dtype).repeat_interleave(shared, dim=2)
    values = v.to(state.dtype)
    decays = log_decay.to(state.dtype).exp().expand(batch, length, heads)
    outs = [values[:, :0]]
    # unbind, not [:, t]: the gradient of each index would be a tensor as long as the sequence.
    for q_t, k_t, v_t, decay_t in zip(*(x.unbind(1) for x in (queries, keys, values, decays)), strict=True):
        update = torch.bmm(k_t.flatten(0, 1)[:, :, None], v_t.flatten(0, 1)[:, None, :])
        state = decay_t[..., None, None] * state + update.view_as(state)
        out = torch.bmm(q_t.flatten(0, 1)[:, None, :], state.flatten(0, 1))
        outs.append(scale * out.view(batch, 1, heads, value_dim))
    return torch.cat(outs, dim=1), state
