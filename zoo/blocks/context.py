"""What a mixer may know of the sequence beyond the hidden states: positions, padding, document boundaries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.ops.varlen import check_cu_seqlens


@dataclass(frozen=True)
class SequenceContext:
    """One chunk of a batch, as every mixer sees it. Build it with `SequenceContext.of`.

    position_ids  `[batch, length]` int64, counted over each row's real tokens and from 0 in every document.
    padding_mask  `[batch, length]` bool, True at real tokens; None when all are real.
    cu_seqlens    int32 `[documents + 1]`, for documents packed into one row; None otherwise.
    real_tokens   int64, indices of the real tokens in the flattened batch; None without padding.
    row_offsets   int32 `[batch + 1]`, where each row's real tokens begin among them; None without padding.
    token_ids     int64 `[batch, length]`, -1 at what is no token of the text (a landmark); None where the model was
                  given embeddings alone.
    rotations     the cosines and sines of `position_ids` that a layer has computed, for the layers after it.
    """

    position_ids: Tensor
    padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    real_tokens: Tensor | None = None
    row_offsets: Tensor | None = None
    token_ids: Tensor | None = None
    rotations: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        x: Tensor,
        *,
        position_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seen: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> SequenceContext:
        """The context of `x` `[batch, length, ...]`.

        Args:
            position_ids: given positions win over derived ones.
            padding_mask: `[batch, length]`, nonzero at real tokens.
            cu_seqlens: int32 `[documents + 1]`, batch 1.
            seen: int64 `[batch]`, real tokens of each row that earlier chunks held.
            token_ids: int64 `[batch, length]`.

        Raises:
            ValueError: a shape or the offsets do not fit `x`, or padding and packed documents are given together.
        """
        batch, length = x.shape[:2]
        if token_ids is not None and token_ids.shape != (batch, length):
            raise ValueError(f"token_ids must be {[batch, length]}, got {list(token_ids.shape)}")
        if padding_mask is not None:
            if padding_mask.shape != (batch, length):
                raise ValueError(f"padding_mask must be {[batch, length]}, got {list(padding_mask.shape)}")
            padding_mask = padding_mask.to(device=x.device, dtype=torch.bool)
            if bool(padding_mask.all()):
                padding_mask = None
        if padding_mask is not None and cu_seqlens is not None:
            raise ValueError("give padding_mask or cu_seqlens, not both: packed documents have no padding")
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, batch, length)
        if position_ids is None:
            position_ids = cls.positions(x, padding_mask, cu_seqlens, seen)
        elif position_ids.shape not in ((batch, length), (1, length)):
            shapes = f"{[batch, length]} or {[1, length]}"
            raise ValueError(f"position_ids must be {shapes}, got {list(position_ids.shape)}")
        else:
            position_ids = position_ids.expand(batch, length)
        if padding_mask is None:
            return cls(position_ids, cu_seqlens=cu_seqlens, token_ids=token_ids)
        real_tokens = padding_mask.flatten().nonzero().squeeze(1)
        ends = padding_mask.sum(1).cumsum(0)
        row_offsets = torch.cat([ends.new_zeros(1), ends]).int()
        return cls(position_ids, padding_mask, None, real_tokens, row_offsets, token_ids)

    @staticmethod
    def positions(
        x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """`[batch, length]`, counted over the real tokens of x `[batch, length, ...]`, as `of` derives them."""
        batch, length = x.shape[:2]
        if mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        else:
            positions = torch.arange(length, device=x.device).expand(batch, length)
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().long()
            positions = positions - cu_seqlens[:-1].long().repeat_interleave(lengths, output_size=length)
        return positions if seen is None else positions + seen[:, None]

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drop the padding: `x` and the document offsets with which a recurrent op must run.

        A padded batch `[batch, length, ...]` becomes one row of real tokens whose documents are the batch's rows, so a
        recurrence never meets a padding token: padded and packed are one mechanism. Without padding `x` is unchanged.
        """
        if self.real_tokens is None:
            return x, self.cu_seqlens
        return x.flatten(0, 1).index_select(0, self.real_tokens)[None], self.row_offsets

    def unpack(self, y: Tensor) -> Tensor:
        """The inverse of `pack`, with zeros at the padding."""
        if self.real_tokens is None:
            return y
        batch, length = self.position_ids.shape
        flat = y.new_zeros(batch * length, *y.shape[2:]).index_copy(0, self.real_tokens, y[0])
        return flat.unflatten(0, (batch, length))
