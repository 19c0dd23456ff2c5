"""The selective scan, one token after another, all channels, states and rows of a batch at once.

The decay differs for every (token, channel, state) triple, so there is no matmul form as in Mamba-2. What does not
depend on the token before (decays, inputs, outputs) is computed for a chunk of tokens at a time; only the recurrence
h_t = a_t h_{t-1} + x_t itself is a loop, one fused multiply-add over `[batch, state, channels]` for each token. (A
parallel prefix over the chunk does three times that work, and multiplies decays until they underflow.) Only a few
`[CHUNK, batch, state, channels]` buffers ever exist: the forward keeps one state per chunk for the backward, which
recomputes the rest. Tensors are time-major and channels innermost, so that each step runs over contiguous memory.
Decays are powers of two, 2^(delta_t A log2 e): torch computes those four times as fast as powers of e.

Legend: S chunk, T length, b batch, N state, D channels.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

from zoo.ops.dispatch import implements, outside_autocast

# Measured with 512 channels x 16 states: 8 to 32 are within 10% of each other, and from 64 on buffers leave the cache.
# The states kept for the backward are then as large as u.
CHUNK = 16
LOG2_E = math.log2(math.e)


@implements("selective_scan", "torch")
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, state)` as the public function documents them."""
    out_dtype = u.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
    if u.shape[1] == 1 and cu_seqlens is None:
        out, state = _step(u, delta, A, B, C, initial_state)
    else:
        inputs = [x for x in (u, delta, A, B, C, initial_state) if x is not None]
        keep_states = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        out, state, _ = _forward(u, delta, A, B, C, initial_state, cu_seqlens, keep_states)
    if D is not None:
        out = torch.addcmul(out, u, D.to(dtype))
    return out.to(out_dtype), state


def _step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if initial_state is None:
        initial_state = u.new_zeros(u.shape[0], *A.shape)
    decay = torch.exp2(delta.transpose(1, 2) * (A * LOG2_E))
    state = torch.addcmul((delta * u).transpose(1, 2) * B, decay, initial_state)
    return (state @ C.transpose(1, 2)).transpose(1, 2), state


# Opaque operators: torch.compile would otherwise unroll the loop over chunks into its graph.


@torch.library.custom_op("zoo::selective_scan_forward", mutates_args=())
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out [b,T,D], state [rows,D,N], chunk_states [chunks,b,N,D])`; no chunk states unless `keep_states`."""
    batch, length, channels = u.shape
    documents = _Documents(cu_seqlens)
    final = _initial_states(u, A, initial_state, cu_seqlens)
    states = final.clone()
    delta, delta_u, B, C = (_time_major(x) for x in (delta, delta * u, B, C))
    A = A.t().contiguous()
    rates = A * LOG2_E

    chunk = _chunk_size(length)
    decay, h = (u.new_empty(chunk, batch, *A.shape) for _ in range(2))
    recurrence = _Recurrence(decay, h)
    out = u.new_empty(length, batch, channels)
    chunk_states = u.new_empty(-(-length // CHUNK) if keep_states else 0, batch, *A.shape)
    carry = u.new_zeros(batch, *A.shape) if documents else states.clone()
    for start in range(0, length, chunk):
        if keep_states:
            chunk_states[start // chunk] = carry
        now = slice(start, min(start + chunk, length))
        _fill(decay, h, delta[now], delta_u[now], rates, B[now])
        rows, which = documents.starting(now)
        if len(rows):
            h.index_add_(0, rows, decay[rows] * states[which, None])
            decay.index_fill_(0, rows, 0)
        h[0].addcmul_(decay[0], carry)
        recurrence.run()
        carry.copy_(h[-1])
        rows, which = documents.ending(now)
        if len(rows):
            final[which] = h[rows, 0]
        tokens = now.stop - now.start
        torch.matmul(C[now, :, None], h[:tokens], out=out[now].unsqueeze(2))
    if not documents:
        final = carry
    return _batch_major(out), final.transpose(1, 2).contiguous(), chunk_states


@torch.library.custom_op("zoo::selective_scan_backward", mutates_args=())
def _backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C and the initial state.

    With g_t = dL/dh_t:  g_t = C_t dL/dy_t + a_{t+1} g_{t+1},  and  w_t = dL/d(delta_t A) = g_t a_t h_{t-1}.
    """
    length, batch, channels = u.shape[1], u.shape[0], u.shape[2]
    documents = _Documents(cu_seqlens)
    states = _initial_states(u, A, initial_state, cu_seqlens)
    grad_states = torch.zeros_like(states)
    if grad_state is not None:
        grad_states.copy_(grad_state.transpose(1, 2))
    grad_final = grad_states.clone()
    grad_y = u.new_zeros(length, batch, channels) if grad_out is None else _time_major(grad_out)
    u, delta, B, C = (_time_major(x) for x in (u, delta, B, C))
    delta_u = delta * u
    A = A.t().contiguous()
    rates = A * LOG2_E

    grad_delta, grad_delta_u = torch.empty_like(u), torch.empty_like(u)
    grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
    grad_A = torch.zeros_like(A)
    chunk = _chunk_size(length)
    decay, g, product = (u.new_empty(chunk, batch, *A.shape) for _ in range(3))
    # Row 0 is the state before the chunk, so h[:-1] is h_{t-1}.
    h = u.new_empty(chunk + 1, batch, *A.shape)
    # A document's first token receives nothing, so its decay counts as 0; the gradient of its state needs it as it is.
    passed = torch.empty_like(decay) if documents else decay
    recurrence, back = _Recurrence(passed, h[1:]), _Recurrence(passed, g, reverse=True)
    carry = torch.zeros_like(chunk_states[0]) if documents else grad_final.clone()
    for start in reversed(range(0, length, chunk)):
        now = slice(start, min(start + chunk, length))
        tokens = now.stop - now.start
        starts, starting = documents.starting(now)

        h[0] = chunk_states[start // chunk]
        _fill(decay, h[1:], delta[now], delta_u[now], rates, B[now])
        if documents:
            passed.copy_(decay)
        if len(starts):
            h.index_add_(0, starts + 1, decay[starts] * states[starting, None])
            passed.index_fill_(0, starts, 0)
        h[1].addcmul_(passed[0], h[0])
        recurrence.run()

        torch.mul(C[now, :, :, None], grad_y[now, :, None], out=g[:tokens])
        g[tokens:].zero_()
        ends, ending = documents.ending(now)
        if len(ends):
            g.index_add_(0, ends, grad_final[ending, None])
        g[-1].add_(carry)
        back.run()

        torch.matmul(h[1 : tokens + 1], grad_y[now, :, :, None], out=grad_C[now].unsqueeze(3))
        torch.matmul(g[:tokens], delta_u[now, :, :, None], out=grad_B[now].unsqueeze(3))
        torch.matmul(B[now, :, None], g[:tokens], out=grad_delta_u[now].unsqueeze(2))
        w = g[:tokens].mul_(decay[:tokens])
        carry.copy_(w[0])
        if len(starts):
            grad_states[starting] = w[starts, 0]
            h[starts, 0] = states[starting]
            if starts[0] == 0:
                carry.zero_()
        w.mul_(h[:tokens])
        torch.sum(torch.mul(w, A, out=product[:tokens]), 2, out=grad_delta[now])
        grad_A += w.mul_(delta[now, :, None]).sum((0, 1))
    if not documents:
        grad_states = carry
    grad_delta.addcmul_(grad_delta_u, u)
    grad_u = grad_delta_u.mul_(delta)
    return (
        _batch_major(grad_u),
        _batch_major(grad_delta),
        grad_A.t().contiguous(),
        _batch_major(grad_B),
        _batch_major(grad_C),
        grad_states.transpose(1, 2).contiguous(),
    )


class _Recurrence:
    """h_t = a_t h_{t-1} + h_t in place over the first dimension; or, in `reverse`, h_t = a_{t+1} h_{t+1} + h_t.

    The views are made once and serve every chunk: at this size, slicing costs as much as computing.
    """

    def __init__(self, decay: Tensor, h: Tensor, reverse: bool = False) -> None:
        rows, decays = h.unbind(), decay.unbind()[1:]
        self.steps = list(zip(rows[1:], decays, rows[:-1], strict=True))
        if reverse:
            self.steps = [(before, decay, after) for after, decay, before in reversed(self.steps)]

    def run(self) -> None:
        for h, decay, previous in self.steps:
            h.addcmul_(decay, previous)


class _Documents:
    """The documents of `cu_seqlens` that have tokens; false, and empty everywhere, where there is no `cu_seqlens`."""

    def __init__(self, cu_seqlens: Tensor | None) -> None:
        self.packed = cu_seqlens is not None
        bounds = [] if cu_seqlens is None else cu_seqlens.tolist()
        self.which = [i for i in range(len(bounds) - 1) if bounds[i] < bounds[i + 1]]
        self.first = [bounds[i] for i in self.which]
        self.last = [bounds[i + 1] - 1 for i in self.which]
        self.device = None if cu_seqlens is None else cu_seqlens.device

    def __bool__(self) -> bool:
        return self.packed

    def starting(self, now: slice) -> tuple[Tensor, Tensor]:
        """`(rows, which)`: the rows of the chunk where a document starts, and the documents' numbers."""
        return self._within(self.first, now)

    def ending(self, now: slice) -> tuple[Tensor, Tensor]:
        """`(rows, which)`: the rows of the chunk where a document ends, and the documents' numbers."""
        return self._within(self.last, now)

    def _within(self, tokens: list[int], now: slice) -> tuple[Tensor, Tensor]:
        found = slice(bisect_left(tokens, now.start), bisect_left(tokens, now.stop))
        rows = torch.tensor([t - now.start for t in tokens[found]], dtype=torch.int64, device=self.device)
        return rows, torch.tensor(self.which[found], dtype=torch.int64, device=self.device)


def _fill(decay: Tensor, h: Tensor, delta: Tensor, delta_u: Tensor, A: Tensor, B: Tensor) -> None:
    """a_t = 2^(delta_t A) and x_t = delta_t u_t B_t for one chunk; rows past its last token change nothing."""
    tokens = delta.shape[0]
    torch.mul(delta.unsqueeze(2), A, out=decay[:tokens]).exp2_()
    torch.mul(delta_u.unsqueeze(2), B.unsqueeze(3), out=h[:tokens])
    decay[tokens:].fill_(1)
    h[tokens:].zero_()


def _chunk_size(length: int) -> int:
    return min(CHUNK, length)


def _initial_states(u: Tensor, A: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`[rows, N, D]`, a fresh tensor."""
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        return u.new_zeros(rows, A.shape[1], A.shape[0])
    return initial_state.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _time_major(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def _batch_major(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


@_forward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    chunks = (length + CHUNK - 1) // CHUNK if keep_states else 0
    return (
        u.new_empty(batch, length, channels),
        u.new_empty(rows, *A.shape),
        u.new_empty(chunks, batch, A.shape[1], A.shape[0]),
    )


@_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    contiguous = (u.new_empty(x.shape) for x in (u, delta, A, B, C))
    return *contiguous, u.new_empty(rows, *A.shape)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    chunk_states = output[2]
    ctx.mark_non_differentiable(chunk_states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, chunk_states)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, _: None) -> tuple[Any, ...]:
    u, delta, A, B, C, initial_state, cu_seqlens, chunk_states = ctx.saved_tensors
    *grads, grad_initial = _backward(grad_out, grad_state, u, delta, A, B, C, initial_state, cu_seqlens, chunk_states)
    return *grads, None if initial_state is None else grad_initial, None, None


_forward.register_autograd(outside_autocast(_differentiate), setup_context=_save)
