"""What a mixer is told of the sequence: positions, packing, mistakes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.blocks.helpers import random_input
from zoo.blocks import SequenceContext

X = torch.zeros(2, 4, 3)


def cu(*offsets):
    return torch.tensor(offsets, dtype=torch.int32)


def test_positions_count_from_zero():
    assert SequenceContext.of(X).position_ids.tolist() == [[0, 1, 2, 3]] * 2


def test_positions_count_real_tokens():
    context = SequenceContext.of(X, padding_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
    assert context.position_ids.tolist()[0][2:] == [0, 1]
    assert context.position_ids.tolist()[1][:3] == [0, 1, 2]
    assert (context.position_ids >= 0).all()


def test_positions_go_on_from_the_past():
    seen = torch.tensor([10, 3])
    assert SequenceContext.of(X, seen=seen).position_ids.tolist() == [[10, 11, 12, 13], [3, 4, 5, 6]]
    padded = SequenceContext.of(X, seen=seen, padding_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    assert padded.position_ids[:, 1:].tolist() == [[10, 11, 12], [4, 5, 6]]


def test_positions_start_again_in_every_document():
    context = SequenceContext.of(X[:1], cu_seqlens=cu(0, 1, 1, 4))
    assert context.position_ids.tolist() == [[0, 0, 1, 2]]


def test_given_positions_win():
    given_ids = torch.tensor([[7, 8, 9, 10]])
    context = SequenceContext.of(X, position_ids=given_ids, seen=torch.tensor([5, 5]))
    assert context.position_ids.tolist() == [[7, 8, 9, 10]] * 2


def test_a_mask_without_padding_is_no_mask():
    context = SequenceContext.of(X, padding_mask=torch.ones(2, 4, dtype=torch.long))
    assert context.padding_mask is context.real_tokens is context.row_offsets is None
    packed, offsets = context.pack(X)
    assert packed is X and offsets is None and context.unpack(X) is X


def test_packed_documents_stay_as_they_are():
    context = SequenceContext.of(X[:1], cu_seqlens=cu(0, 1, 4), padding_mask=torch.ones(1, 4))
    packed, offsets = context.pack(X[:1])
    assert packed is not None and torch.equal(packed, X[:1]) and offsets.tolist() == [0, 1, 4]


@pytest.mark.parametrize("mask_type", [torch.bool, torch.long, torch.float32])
def test_pack_keeps_the_real_tokens_in_order(mask_type):
    x, mask = random_input(3, 4, 2), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).to(mask_type)
    context = SequenceContext.of(x, padding_mask=mask)
    packed, offsets = context.pack(x)
    assert torch.equal(packed, torch.cat([x[0, 1:3], x[2]])[None])
    assert offsets.tolist() == [0, 2, 2, 6] and offsets.dtype == torch.int32


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_unpack_is_the_inverse(data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor(data.draw(st.lists(rows, min_size=batch, max_size=batch)))
    x = random_input(batch, length, 2)
    context = SequenceContext.of(x, padding_mask=mask)
    back = context.unpack(context.pack(x)[0])
    assert torch.equal(back, x * mask[..., None])


def test_pack_and_unpack_are_differentiable():
    x = random_input(2, 3, 2).requires_grad_()
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    context = SequenceContext.of(x, padding_mask=mask)
    context.unpack(context.pack(x)[0] * 3).sum().backward()
    assert torch.equal(x.grad, 3.0 * mask[..., None].expand(2, 3, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding_mask": torch.ones(2, 3)}, r"padding_mask must be \[2, 4\], got \[2, 3\]"),
        ({"padding_mask": torch.ones(4)}, r"padding_mask must be \[2, 4\], got \[4\]"),
        ({"position_ids": torch.zeros(2, 3).long()}, r"position_ids must be \[2, 4\] or \[1, 4\], got \[2, 3\]"),
        ({"position_ids": torch.zeros(3, 4).long()}, r"position_ids must be \[2, 4\] or \[1, 4\], got \[3, 4\]"),
        ({"cu_seqlens": cu(0, 4)}, "batch of 2"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "int32"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SequenceContext.of(X, **arguments)


@pytest.mark.parametrize("offsets", [(0, 3), (0, 5), (1, 4), (0, 3, 2, 4)])
def test_offsets_that_do_not_fit(offsets):
    with pytest.raises(ValueError, match="ascend from 0 to the length 4"):
        SequenceContext.of(X[:1], cu_seqlens=cu(*offsets))


def test_padding_and_documents_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        SequenceContext.of(X[:1], padding_mask=torch.tensor([[0, 1, 1, 1]]), cu_seqlens=cu(0, 4))
