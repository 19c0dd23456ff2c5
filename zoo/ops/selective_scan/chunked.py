"""The selective scan in chunks of tokens: parallel inside a chunk, sequential from chunk to chunk.

The decay differs for every (token, channel, state) triple, so there is no matmul form as in Mamba-2. Inside a chunk the
recurrence h_t = a_t h_{t-1} + x_t is solved by a work-efficient parallel prefix (Brent and Kung, 1982; in place,
2 log2(CHUNK) vectorised steps). Only a few `[CHUNK, batch, state, channels]` buffers ever exist: the forward keeps one
state per chunk for the backward, which recomputes the rest. Tensors are time-major and channels innermost, so that
each step runs over contiguous memory.

Legend: S chunk, T length, b batch, N state, D channels.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

from zoo.ops.dispatch import implements

# A power of two. Measured with 512 channels x 16 states on AVX-512: 32, 64 and 128 are within 10% of each other, 16 is
# slower, and a longer chunk keeps fewer states for the backward but needs larger buffers.
CHUNK = 64


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
    decay = torch.exp(delta.transpose(1, 2) * A)
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

    chunk = _chunk_size(length)
    decay, h = (u.new_empty(chunk, batch, *A.shape) for _ in range(2))
    scan = _Scan(decay, h)
    out = u.new_empty(length, batch, channels)
    chunk_states = u.new_empty(-(-length // CHUNK) if keep_states else 0, batch, *A.shape)
    carry = u.new_zeros(batch, *A.shape) if documents else states.clone()
    for start in range(0, length, chunk):
        if keep_states:
            chunk_states[start // chunk] = carry
        now = slice(start, min(start + chunk, length))
        _fill(decay, h, delta[now], delta_u[now], A, B[now])
        rows, which = documents.starting(now)
        if len(rows):
            h.index_add_(0, rows, decay[rows] * states[which, None])
            decay.index_fill_(0, rows, 0)
        h[0].addcmul_(decay[0], carry)
        scan.run()
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
    grad_states = torch.zeros_like(states) if grad_state is None else grad_state.transpose(1, 2).contiguous()
    grad_final = grad_states.clone()
    grad_y = u.new_zeros(length, batch, channels) if grad_out is None else _time_major(grad_out)
    u, delta, B, C = (_time_major(x) for x in (u, delta, B, C))
    delta_u = delta * u
    A = A.t().contiguous()

    grad_delta, grad_delta_u = torch.empty_like(u), torch.empty_like(u)
    grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
    grad_A = torch.zeros_like(A)
    chunk = _chunk_size(length)
    decay, g, product = (u.new_empty(chunk, batch, *A.shape) for _ in range(3))
    # Row 0 is the state before the chunk, so h[:-1] is h_{t-1}.
    h = u.new_empty(chunk + 1, batch, *A.shape)
    # The scans destroy their decays. Going back, token t decays by a_{t+1}: hence one row more.
    scratch = u.new_ones(chunk + 1, batch, *A.shape)
    scan, scan_back = _Scan(scratch[:-1], h[1:]), _Scan(scratch[1:], g, reverse=True)
    carry = torch.zeros_like(chunk_states[0]) if documents else grad_final.clone()
    for start in reversed(range(0, length, chunk)):
        now = slice(start, min(start + chunk, length))
        tokens = now.stop - now.start
        starts, starting = documents.starting(now)

        h[0] = chunk_states[start // chunk]
        _fill(decay, h[1:], delta[now], delta_u[now], A, B[now])
        scratch[:-1].copy_(decay)
        if len(starts):
            h.index_add_(0, starts + 1, decay[starts] * states[starting, None])
            scratch.index_fill_(0, starts, 0)
        h[1].addcmul_(scratch[0], h[0])
        scan.run()

        torch.mul(C[now, :, :, None], grad_y[now, :, None], out=g[:tokens])
        g[tokens:].zero_()
        scratch[:-1].copy_(decay)
        if len(starts):
            scratch.index_fill_(0, starts, 0)
        ends, ending = documents.ending(now)
        if len(ends):
            g.index_add_(0, ends, grad_final[ending, None])
        g[-1].add_(carry)
        scan_back.run()

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


class _Scan:
    """h_t = a_t h_{t-1} + h_t in place over the first dimension, a power of two; `reverse` runs from the end.

    An up-sweep folds neighbours together, doubling the span each time, and a down-sweep fills in what lies between
    (Brent and Kung). It overwrites `decay`. The views are made once and serve every chunk: at this size, slicing costs
    as much as computing.
    """

    def __init__(self, decay: Tensor, h: Tensor, reverse: bool = False) -> None:
        size = h.shape[0]
        self.up, self.down = [], []
        span = 1
        while span < size:
            pair = 2 * span
            later, earlier = slice(pair - 1, None, pair), slice(span - 1, None, pair)
            between, before = slice(pair + span - 1, None, pair), slice(pair - 1, size - 1, pair)
            if reverse:  # the same rows mirrored, t -> size - 1 - t
                later, earlier = slice(0, None, pair), slice(span, None, pair)
                between, before = slice(span, size - pair, pair), slice(pair, None, pair)
            self.up.append((h[later], decay[later], h[earlier], decay[earlier]))
            self.down.append((h[between], decay[between], h[before]))
            span = pair
        self.down.reverse()

    def run(self) -> None:
        for h, decay, earlier_h, earlier_decay in self.up:
            h.addcmul_(decay, earlier_h)
            _flush(decay.mul_(earlier_decay))
        for h, decay, earlier_h in self.down:
            h.addcmul_(decay, earlier_h)


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
    """a_t = exp(delta_t A) and x_t = delta_t u_t B_t for one chunk; rows past its last token change nothing."""
    tokens = delta.shape[0]
    _flush(torch.mul(delta.unsqueeze(2), A, out=decay[:tokens]).exp_())
    torch.mul(delta_u.unsqueeze(2), B.unsqueeze(3), out=h[:tokens])
    decay[tokens:].fill_(1)
    h[tokens:].zero_()


def _flush(decay: Tensor) -> None:
    """Decays too small to square become 0: a product that underflows costs a CPU a hundred times a normal one."""
    torch.threshold_(decay, torch.finfo(decay.dtype).tiny ** 0.5, 0.0)


def _chunk_size(length: int) -> int:
    return min(CHUNK, 1 << (length - 1).bit_length())


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


_forward.register_autograd(_differentiate, setup_context=_save)
