"""The landmark tokens of a model with landmark mixers: put into its stream, and taken out again.

One learned embedding, after every `block_size` real tokens of a row or document. All layers see landmarks as tokens of
the stream like any other, with positions of their own; whoever calls the model never sees one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.blocks import SequenceContext


class LandmarkToken(nn.Module):
    """The landmark's embedding, and where it stands."""

    def __init__(self, hidden_size: int, block_size: int, std: float) -> None:
        super().__init__()
        self.block_size, self.std = block_size, std
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)

    def in_stream(self, tokens: Tensor) -> Tensor:
        """How many tokens of the stream the first `tokens` of a row make, the landmarks behind them included."""
        return tokens + tokens // self.block_size

    def put_in(
        self, x: Tensor, context: SequenceContext, seen: Tensor | None
    ) -> tuple[Tensor, SequenceContext, Tensor]:
        """The stream of x `[batch, length, hidden]`, its context, and where each token of x came to stand in it.

        Args:
            context: that of x.
            seen: int64 `[batch]`, real tokens of each row that earlier chunks held.

        Returns:
            `[batch, stream length, hidden]`, where rows that got fewer landmarks than others end in padding; the
            context; columns `[batch, length]`, for `take_out`.
        """
        batch, length, hidden = x.shape
        mask, cu_seqlens = context.padding_mask, context.cu_seqlens
        ends = (SequenceContext.positions(x, mask, cu_seqlens, seen) + 1) % self.block_size == 0
        if mask is not None:
            ends = ends & mask
        landmarks = ends.long().cumsum(1)
        columns = torch.arange(length, device=x.device) + landmarks - ends.long()
        # Where nothing makes rows differ, the stream's length is known without asking the device.
        is_plain = mask is None and cu_seqlens is None and seen is None
        total = length + (length // self.block_size if is_plain else int(landmarks[:, -1].max()))
        stream = self.weight.to(x.dtype).expand(batch, total, hidden)
        stream = stream.scatter(1, columns[..., None].expand(-1, -1, hidden), x)
        # A landmark stands right behind its block: every token claims the next place too, and the next overrules it.
        own = self.in_stream(context.position_ids)
        places = own.new_zeros(batch, total + 1).scatter(1, columns + 1, own + 1).scatter(1, columns, own)[:, :-1]
        if cu_seqlens is not None:
            lengths = self.in_stream(cu_seqlens.diff())
            cu_seqlens = torch.cat([cu_seqlens[:1], lengths.cumsum(0, dtype=torch.int32)])
        elif not is_plain:
            is_used = torch.arange(total, device=x.device) < length + landmarks[:, -1:]
            mask = is_used if mask is None else is_used.scatter(1, columns, mask)
        token_ids = context.token_ids
        if token_ids is not None:
            token_ids = token_ids.new_full((batch, total), -1).scatter(1, columns, token_ids)
        context = SequenceContext.of(
            stream, position_ids=places, padding_mask=mask, cu_seqlens=cu_seqlens, token_ids=token_ids
        )
        return stream, context, columns


def take_out(x: Tensor, columns: Tensor) -> Tensor:
    """The tokens of the stream x `[batch, stream length, hidden]` without the landmarks."""
    return x.gather(1, columns[..., None].expand(*columns.shape, x.shape[2]))
