"""delta_rule one token at a time: the recurrence as it is written."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from zoo.ops.dispatch import implements


@implements("delta_rule", "reference")
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
    if cu_seqlens is None:
        out, state = _recur(q, k, v, beta, log_decay, scale, initial_state)
        return out.to(v.dtype), state
    outs, states = [], []
    for document, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        now = slice(start, end)
        decay = log_decay if log_decay.dim() == 1 else log_decay[:, now]
        rows = initial_state[document : document + 1]
        out, state = _recur(q[:, now], k[:, now], v[:, now], beta[:, now], decay, scale, rows)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1).to(v.dtype), torch.cat(states)


def _recur(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    batch, length, heads, value_dim = v.shape
    shared = heads // q.shape[2]
    queries = q.to(state.dtype).repeat_interleave(shared, dim=2)
    keys = k.to(state.dtype).repeat_interleave(shared, dim=2)
    values, betas = v.to(state.dtype), beta.to(state.dtype)
    decays = log_decay.to(state.dtype).exp()
    # One factor per channel of the keys or one for all of them: [B,T,H,K] or [B,T,H,1].
    decays = (decays if decays.dim() == 4 else decays[..., None]).expand(batch, length, heads, -1)
    outs = [values[:, :0]]
    # unbind, not [:, t]: the gradient of each index would be a tensor as long as the sequence. Products are bmm, so
    # that torch.utils.flop_counter sees all 6*K*V FLOPs of a head and token.
    tokens = (x.unbind(1) for x in (queries, keys, values, betas, decays))
    for q_t, k_t, v_t, beta_t, decay_t in zip(*tokens, strict=True):
        state = decay_t[..., None] * state
        key = k_t.flatten(0, 1)[:, None, :]
        known = torch.bmm(key, state.flatten(0, 1)).view_as(v_t)
        written = beta_t[..., None] * (v_t - known)
        state = state + torch.bmm(key.mT, written.flatten(0, 1)[:, None, :]).view_as(state)
        out = torch.bmm(q_t.flatten(0, 1)[:, None, :], state.flatten(0, 1))
        outs.append(scale * out.view(batch, 1, heads, value_dim))
    return torch.cat(outs, dim=1), state
