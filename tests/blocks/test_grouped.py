"""Grouped matrix multiplication against a plain loop."""

import pytest
import torch

from tests.blocks.helpers import assert_close, random_input
from zoo.blocks.grouped import grouped_mm

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("K", "N"), [(8, 16), (12, 8), (16, 6), (7, 5)], ids=str)
@pytest.mark.parametrize("counts", [(3, 4, 2), (0, 5, 0, 4), (0, 0, 0), (1,)], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_equals_a_loop(dtype, K, N, counts, transposed):
    rows, groups = sum(counts), len(counts)
    ends = torch.tensor(counts).cumsum(0).int()
    x = random_input(rows, K, dtype=dtype).requires_grad_()
    weight = random_input(*((groups, N, K) if transposed else (groups, K, N)), dtype=dtype).requires_grad_()
    matrices = weight.transpose(1, 2) if transposed else weight
    out = grouped_mm(x, weight, ends, transposed)
    assert out.shape == (rows, N) and out.dtype == dtype
    grad = random_input(rows, N, dtype=dtype, seed=2)
    gradients = torch.autograd.grad(out, [x, weight], grad)
    if rows == 0:
        assert not gradients[1].any()
        return
    parts = zip(x.double().split(counts), matrices.double(), strict=True)
    reference = torch.cat([part @ matrix for part, matrix in parts])
    expected = torch.autograd.grad(reference, [x, weight], grad.double())
    for ours, theirs in zip([out, *gradients], [reference, *expected], strict=True):
        assert_close(ours, theirs, tolerance=TOLERANCE[dtype])
    for group, count in enumerate(counts):
        assert count or not gradients[1][group].any()


def test_an_expanded_gradient():
    x, ends = random_input(5, 8).requires_grad_(), torch.tensor([2, 5], dtype=torch.int32)
    grouped_mm(x, random_input(2, 8, 8), ends).sum().backward()
    assert x.grad.isfinite().all() and x.grad.norm() > 0
