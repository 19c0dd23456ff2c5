"""zoo/ops/varlen.py: packed documents and their chunks."""

import pytest
import torch

from zoo.ops.varlen import DocumentChunks, RowChunks, check_cu_seqlens, document_ids, max_chunks, real_first


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("cu_seqlens", [int32(0, 7), int32(0, 0, 3, 3, 7, 7)])
def test_good_cu_seqlens_pass(cu_seqlens):
    check_cu_seqlens(cu_seqlens, 1, 7)


@pytest.mark.parametrize(
    ("cu_seqlens", "batch", "message"),
    [
        (torch.tensor([0, 7]), 1, r"must be int32 \[n\+1\], got torch.int64 \[2\]"),
        (int32(0), 1, r"must be int32 \[n\+1\]"),
        (int32(0, 7)[None], 1, r"must be int32 \[n\+1\]"),
        (int32(0, 7), 2, "batch of 1"),
        (int32(1, 7), 1, "ascend from 0 to the length 7"),
        (int32(0, 6), 1, "ascend from 0 to the length 7"),
        (int32(0, 5, 3, 7), 1, "ascend from 0 to the length 7"),
    ],
)
def test_bad_cu_seqlens_are_refused(cu_seqlens, batch, message):
    with pytest.raises(ValueError, match=message):
        check_cu_seqlens(cu_seqlens, batch, 7)


@pytest.mark.parametrize("length", [0, 1, 7, 100])
def test_real_tokens_come_first(length):
    mask = torch.rand(5, length) < torch.tensor([0.0, 0.2, 0.5, 0.9, 1.1])[:, None]
    assert torch.equal(real_first(mask), (~mask).int().argsort(dim=1, stable=True))


def test_document_ids_skip_empty_documents():
    assert document_ids(int32(0, 0, 2, 2, 5, 5), 5).tolist() == [1, 1, 3, 3, 3]


def test_row_chunks():
    layout = RowChunks(2, 10, 4, torch.device("cpu"))
    assert layout.chunk == 4
    assert layout.positions == 3 and layout.lanes == 2
    assert layout.tokens.tolist() == [4, 4, 4, 4, 2, 2]
    assert layout.starts == {0: slice(0, 2)} and layout.ends == {2: slice(0, 2)}
    x = torch.arange(1.0, 2 * 10 * 3 + 1).view(2, 10, 3, 1)
    spread = layout.spread(x)
    assert spread.shape == (6, 3, 4, 1)
    assert torch.equal(spread[3, 1, :, 0], x[1, 4:8, 1, 0])
    assert spread[4:, :, 2:].count_nonzero() == 0
    assert torch.equal(layout.gather(spread), x)


def test_document_chunks():
    layout = DocumentChunks(int32(0, 5, 5, 6, 16), 16, 4)
    assert layout.chunk == 4
    assert layout.tokens.tolist() == [4, 1, 1, 4, 4, 2]
    assert layout.positions == 6 <= max_chunks(16, 4, 4)
    assert layout.starts == {0: slice(0, 1), 2: slice(2, 3), 3: slice(3, 4)}
    assert layout.ends == {1: slice(0, 1), 2: slice(2, 3), 5: slice(3, 4)}
    x = torch.arange(1.0, 16 * 3 + 1).view(1, 16, 3, 1)
    spread = layout.spread(x)
    assert spread.shape == (6, 3, 4, 1)
    assert torch.equal(spread[3, 1, :, 0], x[0, 6:10, 1, 0])
    assert spread[:, 0, :, 0].count_nonzero(-1).tolist() == layout.tokens.tolist()
    assert torch.equal(layout.gather(spread), x)


@pytest.mark.parametrize(("documents", "mean"), [(1000, 1), (300, 3), (50, 20), (7, 63), (3, 1000)])
def test_padding_stays_within_three_times_the_tokens(documents, mean):
    """Thousands of tiny documents must not cost a whole chunk each."""
    torch.manual_seed(0)
    bounds = torch.nn.functional.pad(torch.randint(0, 2 * mean + 1, (documents,)).cumsum(0), (1, 0)).int()
    length = int(bounds[-1])
    layout = DocumentChunks(bounds, length, 64)
    assert length <= len(layout.tokens) * layout.chunk <= 3 * length
    assert len(layout.tokens) == layout.positions <= max_chunks(length, documents, 64)
    assert int(layout.tokens.sum()) == length
