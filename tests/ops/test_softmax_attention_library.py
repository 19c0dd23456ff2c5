"""softmax_attention by FlexAttention: its masks, and its forward pass where a CPU has one, uncompiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import relative_error
from tests.ops.test_pattern import PATTERNS
from tests.ops.test_softmax_attention import DOCUMENTS, make, padding
from zoo.ops import dispatch, explain
from zoo.ops.softmax_attention import Pattern, library, softmax_attention

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no backward pass on a CPU")
EVERY = [Pattern(), Pattern(5), Pattern(5, 3), *PATTERNS, Pattern(4, 3, stride=4, random_blocks=2, block_size=8)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": 30, "num_sinks": 2, "softcap": 0.8},
    {"pattern": PATTERNS[-1]},
    {"key_mask": padding("left", 150)[:2], "window": 9},
    {"key_mask": padding("interior", 150)[:2], "pattern": PATTERNS[2]},
    {"cu_seqlens": torch.tensor(DOCUMENTS, dtype=torch.int32), "pattern": PATTERNS[6]},
]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library._block_mask_of_rows.cache_clear()
    if not torch.cuda.is_available():
        monkeypatch.setattr(library, "_compiled", lambda function: function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        yield


@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_masks_are_the_pattern(pattern: Pattern) -> None:
    def mask(length: int, key_length: int, *packing: Any, row: int = 0) -> Tensor:
        visible = library.mask_mod(True, pattern, length, key_length, *packing, torch.device("cpu"))
        i, j = torch.arange(length)[:, None], torch.arange(key_length)
        return visible(torch.tensor(row), torch.tensor(0), i, j)

    rank = torch.arange(150)
    expected = pattern.visible(rank[:, None], rank)
    assert torch.equal(mask(150, 150, None, None), expected)
    assert torch.equal(mask(40, 150, None, None), expected[-40:])
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
    packed = torch.block_diag(*(expected[:n, :n].int() for n in cu_seqlens.diff().tolist())).bool()
    assert torch.equal(mask(150, 150, cu_seqlens, None), packed)
    for kind in ("left", "interior"):
        for row, real in enumerate(key_mask := padding(kind, 150)):
            padded = torch.zeros_like(expected)
            tokens, count = rank[real], int(real.sum())
            padded[tokens[:, None], tokens] = expected[:count, :count]
            assert torch.equal(mask(40, 150, None, key_mask, row=row), padded[-40:])


def test_training_may_find_the_mask_of_an_inference() -> None:
    arguments = True, Pattern(5, random_blocks=1, block_size=8), 40, 40, torch.device("cpu")
    with torch.inference_mode():
        library._block_mask_of_rows(*arguments)
    mask = library._block_mask_of_rows(*arguments)
    assert library._block_mask_of_rows.cache_info().hits == 1
    assert not any(x.is_inference() for x in mask.as_tuple() if isinstance(x, Tensor))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [130, 150])
@torch.no_grad()
def test_forward_equals_reference(length: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():  # where the dispatch would not let it run
        monkeypatch.setattr(dispatch, "_cannot_run", lambda op, name, device: None)
    length = 150 if "cu_seqlens" in options else length
    tensors = make(1 if "cu_seqlens" in options else 2, length, 150, dims=(16, 24))
    with dispatch.backend("reference"):
        expected = softmax_attention(*tensors, return_lse=True, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    with dispatch.backend("library"):
        out, lse = softmax_attention(*(x.to(device).float() for x in tensors), return_lse=True, **options)
    assert relative_error(out, expected[0]) < 2e-6 and relative_error(lse.exp(), expected[1].exp()) < 2e-6
    assert lse.dtype == torch.float32


@CUDA
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_equal_reference(options: dict[str, Any]) -> None:
    tensors = make(1 if "cu_seqlens" in options else 2, 150, 150, dims=(16, 16))
    gradients = []
    for name, device, dtype in (("reference", "cpu", torch.float64), ("library", "cuda", torch.float32)):
        leaves = [x.to(device, dtype).requires_grad_() for x in tensors]
        given = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}
        with dispatch.backend(name):
            out, lse = softmax_attention(*leaves, return_lse=True, **given)
        gradients.append(torch.autograd.grad(out.square().sum() + lse.exp().sum(), leaves))
    assert max(map(relative_error, gradients[1], gradients[0])) < 1e-5


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 200, 2, 16), torch.float64, "one dtype, float32 at most"),
        ((1, 200, 2, 8), torch.float32, "head dims from 16 to 256"),
        ((1, 20, 2, 16), torch.float32, "fewer than 128 queries"),
    ],
)
def test_refusals(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    choice = explain("softmax_attention", dict.fromkeys("qkv", shape), dtype, "cuda")
    assert choice.others["library"] == message


def test_plain_attention_on_a_gpu_stays_with_torch_until_measured() -> None:
    def choice(dtype: torch.dtype = torch.bfloat16, v_head_dim: int = 64, **more: tuple[int, ...]) -> str:
        shapes = {"q": (1, 4096, 8, 64), "k": (1, 4096, 2, 64), "v": (1, 4096, 2, v_head_dim)} | more
        return explain("softmax_attention", shapes, dtype, "cuda").backend

    assert choice() == choice(torch.float32) == choice(q=(1, 1, 8, 64)) == "torch"
    assert choice(v_head_dim=32) == choice(cu_seqlens=(3,)) == choice(q=(1, 100, 8, 64)) == "triton"
    assert choice(key_mask=(1, 4096)) == "triton" and choice(torch.float64, v_head_dim=32) == "torch"
    kind = dispatch._kinds["softmax_attention"].of
    q = torch.empty(1, 64, 2, 16, device="meta")
    plain: dict[str, Any] = {"causal": True, "window": None, "num_sinks": 0, "softcap": None, "cu_seqlens": None}
    plain |= {"key_mask": None, "pattern": None, "return_lse": False}
    for change, expected in (
        ({}, None),
        ({"window": 64}, None),
        ({"window": 9}, "window"),
        ({"window": 9, "num_sinks": 2}, "sinks"),
        ({"softcap": 1.0}, "softcap"),
        ({"return_lse": True}, "other"),
        ({"pattern": PATTERNS[0]}, "dilated"),
        ({"pattern": PATTERNS[-1]}, "strided+random"),
    ):
        assert kind(q, q, q, **plain | change) == expected
