"""causal_conv1d for all tokens at once: shifted copies of the sequence, each times its weight, summed.

    z_t = bias + sum_w weight_w x_{t-W+1+w};   y_t = SiLU(z_t)
    dL/dx_t = sum_w weight_w dL/dz_{t+W-1-w};   dL/dweight_w = sum_t dL/dz_t x_{t-W+1+w}

The rows of a batch, or packed documents, lie end to end as one sequence of N tokens, worked on in blocks that stay in
the cache: the input is read once and the result written once, forward and backward. The first W-1 tokens of each
document, the heads, look into its initial state; each of them is computed apart, from a window of its own. The backward
keeps the arguments alone and computes z again.

Legend: N tokens, D channels, W width, H heads, n documents (rows of a batch).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from zoo.ops.causal_conv1d.autograd import register
from zoo.ops.dispatch import implements

# Elements of a block per thread. Measured with 512 and 640 channels on two cores of 1 MB L2 each: half of it costs 20%
# more (each operation wakes the threads), twice as much 10%.
BLOCK = 1 << 17


@implements("causal_conv1d", "torch")
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tensors = x, weight, bias, initial_state
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if x.shape[1] == 1 and cu_seqlens is None and not differentiable:
        return _step(x, weight, bias, activation, initial_state)
    return _operator(x, weight, bias, activation, initial_state, cu_seqlens)


def _step(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each row. Calls cost more than their arithmetic here, so there are few."""
    window = torch.cat([initial_state, x.mT], 2)
    out = torch.linalg.vecdot(window, weight.to(window.dtype))
    if bias is not None:
        out += bias
    return _activate(out, activation).unsqueeze(1).to(x.dtype), window[..., 1:]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype, history = initial_state.dtype, weight.shape[1] - 1
    columns, bias = weight.t().to(dtype).contiguous(), None if bias is None else bias.to(dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, results = x.flatten(0, 1), out.flatten(0, 1)
    for start, stop in _blocks(tokens, history):
        rows = results[start:stop]
        z = rows if rows.dtype == dtype else torch.empty_like(rows, dtype=dtype)
        _convolve(tokens[start - history : stop].to(dtype), columns, bias, z)
        _activate(z, activation)
        if z is not rows:
            rows.copy_(z)
    edges = _Edges(x, history, cu_seqlens)
    windows, state = edges.gather(tokens, initial_state)
    z = _convolve_windows(windows, columns, bias)
    results.index_copy_(0, edges.heads, _activate(z, activation).to(x.dtype))
    return out, state


def _backward(
    d_out: Tensor,
    d_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, history = initial_state.dtype, weight.shape[1] - 1
    columns, wide_bias = weight.t().to(dtype).contiguous(), None if bias is None else bias.to(dtype)
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, d_tokens, d_results = x.flatten(0, 1), d_x.flatten(0, 1), d_out.flatten(0, 1)
    edges = _Edges(x, history, cu_seqlens)
    windows, _ = edges.gather(tokens, initial_state)
    d_heads = d_results[edges.heads].to(dtype)
    if activation == "silu":
        d_heads = torch.ops.aten.silu_backward(d_heads, _convolve_windows(windows, columns, wide_bias))
    d_columns, d_bias = (d_heads[:, None] * windows).sum(0), d_heads.sum(0)

    blocks = _blocks(tokens, history)
    size = max((stop - start for start, stop in blocks), default=0)
    # Before the d_z of a block lie the last ones of the block before it; behind those of the last block lie zeros.
    d_z = columns.new_empty(history + size + history, columns.shape[1])
    d_z[:history] = 0
    # d_columns for each row of a block: adding to all of them takes one pass, adding them up at once would take two.
    sums: Tensor | None = None
    for (start, stop), heads in zip(blocks, edges.heads_in(blocks), strict=True):
        count = stop - start
        window, d_y = tokens[start - history : stop].to(dtype), d_results[start:stop].to(dtype)
        now = d_z[history : history + count]
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(d_y, _convolve(window, columns, wide_bias), grad_input=now)
        else:
            now.copy_(d_y)
        now.index_fill_(0, heads, 0)
        d_bias += now.sum(0)
        factors = now[:, None], window.unfold(0, history + 1, 1).mT
        if sums is None:
            sums = torch.mul(*factors)
        else:
            sums[:count].addcmul_(*factors)
        if stop == len(tokens):
            count += history
            d_z[count : count + history] = 0
        rows = d_tokens[start - history : start - history + count]
        d_rows = rows if rows.dtype == dtype else torch.empty_like(rows, dtype=dtype)
        _convolve(d_z[: history + count], columns.flip(0), None, d_rows)
        if d_rows is not rows:
            rows.copy_(d_rows)
        d_z[:history] = d_z[count : count + history].clone()
    if sums is None:
        d_x.zero_()
    else:
        d_columns += sums.sum(0)

    d_state = torch.zeros_like(initial_state) if d_state is None else d_state
    d_initial_state = edges.scatter(d_heads[:, None] * columns, d_state, d_tokens)
    d_weight = d_columns.t().to(weight.dtype).contiguous()
    return d_x, d_weight, d_bias.to((weight if bias is None else bias).dtype), d_initial_state


def _blocks(tokens: Tensor, history: int) -> list[tuple[int, int]]:
    """Where each block of tokens begins and ends; the first `history` tokens are always heads."""
    length, channels = tokens.shape
    size = max(1, BLOCK * torch.get_num_threads() // channels)
    return [(start, min(start + size, length)) for start in range(history, length, size)]


def _convolve(window: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """z `[M,D]` of inputs `[M+W-1,D]`; columns `[W,D]`, each contiguous, which is worth a factor of 3."""
    count = len(window) - len(columns) + 1
    if bias is None:
        z = torch.mul(window[:count], columns[0], out=out)
    else:
        z = torch.addcmul(bias, window[:count], columns[0], out=out)
    for w, column in enumerate(columns[1:], start=1):
        z.addcmul_(window[w : w + count], column)
    return z


def _convolve_windows(windows: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """z `[H,D]` of windows `[H,W,D]`."""
    z = (windows * columns).sum(1)
    return z if bias is None else z + bias


def _activate(z: Tensor, activation: str | None) -> Tensor:
    """In place."""
    return functional.silu(z, inplace=True) if activation == "silu" else z


class _Edges:
    """What the blocks do not know: the windows of the heads, and the last inputs of each document.

    heads  `[H]`, the tokens nearer to their document's start than W-1, ascending

    The history of a token is the W-1 inputs before it, be they tokens or in the initial state. It is gathered for every
    head, and for the place after each document's last token, where it is the final state.
    """

    def __init__(self, x: Tensor, history: int, cu_seqlens: Tensor | None) -> None:
        batch, length, _ = x.shape
        if cu_seqlens is None:
            bounds = torch.arange(0, batch * length + 1, length, device=x.device)
        else:
            bounds = cu_seqlens.long()
        lengths, offsets = bounds.diff(), torch.arange(history, device=x.device)
        document, position = (offsets < lengths[:, None]).nonzero(as_tuple=True)
        self.heads = bounds[document] + position
        document = torch.cat([document, torch.arange(len(lengths), device=x.device)])
        # Positions in the document, from -(W-1), which stands for the oldest input of the state.
        positions = torch.cat([position, lengths])[:, None] - history + offsets
        in_state = positions < 0
        self.token_slots, self.state_slots = (m.flatten().nonzero()[:, 0] for m in (~in_state, in_state))
        self.tokens = (bounds[document, None] + positions).flatten()[self.token_slots]
        self.states = (document[:, None] * history + history + positions).flatten()[self.state_slots]

    def heads_in(self, blocks: list[tuple[int, int]]) -> list[Tensor]:
        """The heads in each block, counted from its start."""
        bounds = torch.tensor(blocks, device=self.heads.device).view(-1, 2)
        found = torch.searchsorted(self.heads, bounds).tolist()
        return [self.heads[i:j] - start for (i, j), (start, _) in zip(found, blocks, strict=True)]

    def gather(self, x: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        """The windows of the heads `[H,W,D]`, and the final state `[n,D,W-1]`."""
        documents, channels, history = initial_state.shape
        heads = len(self.heads)
        before = initial_state.new_empty((heads + documents) * history, channels)
        before[self.token_slots] = x[self.tokens].to(before.dtype)
        before[self.state_slots] = initial_state.mT.flatten(0, 1)[self.states]
        before = before.view(heads + documents, history, channels)
        windows = torch.cat([before[:heads], x[self.heads, None].to(before.dtype)], 1)
        return windows, before[heads:].mT.contiguous()

    def scatter(self, d_windows: Tensor, d_state: Tensor, d_x: Tensor) -> Tensor:
        """The gradients of what `gather` gave: added to `d_x`, and the initial state's returned."""
        documents, channels, history = d_state.shape
        d_before = torch.cat([d_windows[:, :-1], d_state.mT]).flatten(0, 1)
        d_x.index_add_(0, self.heads, d_windows[:, -1].to(d_x.dtype))
        d_x.index_add_(0, self.tokens, d_before[self.token_slots].to(d_x.dtype))
        d_states = d_state.new_zeros(documents * history, channels)
        d_states.index_add_(0, self.states, d_before[self.state_slots])
        return d_states.view(documents, history, channels).mT.contiguous()


_operator = register("causal_conv1d", _forward, _backward)
