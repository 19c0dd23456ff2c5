"""zoo/ops/select_blocks/kernels.py: the same blocks as the float64 reference chooses, and what the compiler makes of
the kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import aot
from tests.ops.helpers import DEVICE, poisoned_memory
from tests.ops.test_linear_attention_kernels import interpreter  # noqa: F401  (a fixture)
from tests.ops.test_select_blocks import NSA, RULES, compressed_of
from zoo.ops import backend, interval_attention, select_blocks

kernels = pytest.importorskip("zoo.ops.select_blocks.kernels")


def choose(name: str, *tensors: Tensor, dtype: torch.dtype = torch.float32, **rule: Any) -> Tensor:
    q, k, *where = (x.to("cpu" if name == "reference" else DEVICE) for x in tensors)
    with backend(name), poisoned_memory():
        return select_blocks(q.to(dtype), k.to(dtype), *where, **rule).cpu().sort(-1).values


def check(*tensors: Tensor, dtype: torch.dtype = torch.float32, truth: torch.dtype = torch.float64, **rule) -> None:
    expected = choose("reference", *tensors, dtype=truth, **rule)
    assert torch.equal(choose("triton", *tensors, dtype=dtype, **rule), expected)


def inputs(batch: int, length: int, rule: dict[str, Any], heads=(4, 2), dim: int = 6) -> tuple[Tensor, ...]:
    """Rounded to bfloat16, so that every precision starts from the same numbers."""
    torch.manual_seed(length)
    q = torch.randn(batch, length, heads[0], dim).bfloat16().double()
    k = torch.randn(batch, compressed_of(length, rule), heads[1], dim).bfloat16().double()
    position = torch.arange(length).expand(batch, -1)
    return q, k, torch.zeros_like(position), position


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [1, 31])
def test_equals_reference(length: int, rule: dict[str, Any]) -> None:
    # Which weights are rounded to 0 depends on the precision.
    check(*inputs(2, length, rule), truth=torch.float32 if rule.get("scale") == 500 else torch.float64, **rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 64), ((3, 1), 20)])
def test_low_precision_with_its_own_tiles(heads: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    check(*inputs(1, 70, RULES[0], heads, dim), dtype=dtype, **RULES[0])


@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (20, 1)])
def test_heads(heads: tuple[int, int]) -> None:
    check(*inputs(1, 21, RULES[0], heads), **RULES[0])


def test_lse_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_lse_kernel", None)
    q, k, first, position = inputs(2, 23, RULES[0])
    visible = ((position + 1 - 4) // 2 + 1).clamp(min=0)
    lse = interval_attention(q, k, k, first, visible, return_lse=True)[1].float().to(DEVICE)
    expected = choose("reference", q, k, first, position, dtype=torch.float64, **RULES[0])
    assert torch.equal(choose("triton", q, k, first, position, lse=lse, **RULES[0]), expected)


@pytest.mark.parametrize("scores", [1, 60])
def test_some_queries_at_a_time(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_SCORES", scores)
    check(*inputs(2, 23, RULES[0]), **RULES[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="looks at what the interpreter reads")
def test_nothing_is_read_past_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(kernels, "MAX_SCORES", 60)
    q, k, first, position = inputs(1, 23, RULES[0])
    room = torch.zeros(64, dtype=torch.int64)
    first, read = room[None, :23].copy_(first), set()
    load = InterpreterBuilder.create_masked_load

    def watch(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        read.update(pointers.data[mask.data].flatten().tolist())
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watch)
    check(q, k, first, position, **RULES[0])
    assert {first.data_ptr() + 8 * i for i in range(23)} <= read
    assert not {first.data_ptr() + 8 * i for i in range(23, 64)} & read


@pytest.mark.parametrize("recent", [2, 4])
def test_recent_blocks(recent: int) -> None:
    rule = RULES[0] | {"select_block": 4, "recent_blocks": recent, "top_n": 5}
    tensors = inputs(1, 60, rule)
    check(*tensors, **rule)
    chosen = choose("triton", *tensors, **rule)[0, -1]
    assert set(chosen.flatten().tolist()) <= {-1, 0, *range(15 - recent, 15)}


def test_documents_in_one_tile_and_queries_that_are_none() -> None:
    """Documents of 14, 3 and 21 tokens, with a query between them that is none."""
    rule, lengths = RULES[0], [14, 3, 21]
    parts = [inputs(1, length, rule) for length in lengths]
    counts = [part[1].shape[1] for part in parts]
    none = torch.zeros_like(parts[0][0][:, :1])
    q = torch.cat([parts[0][0], none, parts[1][0], parts[2][0]], 1)
    k = torch.cat([part[1] for part in parts], 1)
    positions = [part[3] for part in parts]
    position = torch.cat([positions[0], torch.tensor([[-1]]), *positions[1:]], 1)
    first = torch.tensor([[0] * 15 + [counts[0]] * 3 + [counts[0] + counts[1]] * 21])
    check(q, k, first, position, **rule)
    whole = choose("triton", q, k, first, position, **rule)
    assert (whole[:, 14] == -1).all()
    whole = torch.cat([whole[:, :14], whole[:, 15:]], 1)
    for part, alone in zip(whole.split(lengths, 1), parts, strict=True):
        assert torch.equal(part, choose("triton", *alone, **rule))


def test_one_token_at_a_time_chooses_the_same() -> None:
    rule = RULES[4]
    q, k, first, position = inputs(1, 40, rule)
    whole = choose("triton", q, k, first, position, **rule)
    for t in range(40):
        seen = k[:, : compressed_of(t + 1, rule)]
        one = choose("triton", q[:, t, None], seen, first[:, :1], position[:, t, None], **rule)
        assert torch.equal(one[:, 0], whole[:, t])


def test_of_equal_scores_the_latest_is_the_best() -> None:
    """All keys are alike: the blocks between the ends have the same score, the first lacks what reaches into it."""
    position = torch.tensor([[1023]])
    q, k = torch.ones(1, 1, 2, 6), torch.ones(1, 63, 1, 6)
    chosen = choose("triton", q, k, 0 * position, position, **NSA, top_n=6)
    assert chosen.flatten().tolist() == [0, 11, 12, 13, 14, 15]


def test_a_view_of_a_larger_cache() -> None:
    rule = RULES[0]
    q, k, first, position = inputs(2, 25, rule)
    room = torch.full((2, 40, 2, 9), torch.nan).double()
    room[:, : k.shape[1], :, :6] = k
    assert torch.equal(
        choose("triton", q, room[:, : k.shape[1], :, :6], first, position, **rule),
        choose("reference", q, k, first, position, dtype=torch.float64, **rule),
    )


def test_operator_contract_and_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[0]
    q, k, first, position = (x.to(DEVICE) for x in inputs(1, 9, rule))
    q, k = q.float(), k.float()
    arguments = (q, k, first, position, None, 4, 2, 8, 4, 1, 2, None, 0.5)
    torch.library.opcheck(kernels._operator, arguments, test_utils=("test_schema", "test_faketensor"))

    def call(q: Tensor, k: Tensor) -> Tensor:
        with backend("triton"):
            return select_blocks(q, k, first, position, **rule)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k), call(q, k))
    monkeypatch.setattr(kernels, "_operator", None)  # decoding goes without
    call(q, k)


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [(torch.float64, 16, "float64 inputs"), (torch.float32, 257, "head dims above 256")],
)
def test_refusals(dtype: torch.dtype, dim: int, message: str) -> None:
    q, k, first, position = (x.to(DEVICE) for x in inputs(1, 9, RULES[0], dim=dim))
    with backend("triton"), pytest.raises(ValueError, match=f"{message}; use reference, torch, auto"):
        select_blocks(q.to(dtype), k.to(dtype), first, position, **RULES[0])


# Query heads, key heads, head dim and dtype.
CALLS = {
    "nsa": (64, 4, 192, torch.bfloat16),
    "mqa": (64, 1, 64, torch.bfloat16),
    "moba": (8, 8, 128, torch.float16),
    "small": (4, 2, 32, torch.bfloat16),
    "float32": (16, 1, 128, torch.float32),
}


def launch() -> None:
    """The kernels of every call; no product on wgmma has a computed operand or a dimension below 64."""
    from triton.runtime.jit import JITFunction

    compiled, run = [], JITFunction.run

    def keep(*args: Any, **kwargs: Any) -> None:
        compiled.append(run(*args, **kwargs))

    JITFunction.run = keep  # type: ignore[method-assign]
    for heads, kv_heads, dim, dtype in CALLS.values():
        q, k = torch.zeros(1, 128, heads, dim, dtype=dtype), torch.zeros(1, 7, kv_heads, dim, dtype=dtype)
        position = torch.zeros(1, 128, dtype=torch.int64)
        for recent in (None, 1024):
            kernels._select_blocks(q, k, position, position, None, 32, 16, 64, 16, 1, 2, recent, 1.0)
    for kernel in compiled:
        for line in kernel.asm["ptx"].splitlines():
            if "wgmma.mma_async" in line:
                assert line.count("{") == 1 and "m64n64" in line, line


def test_compiles_for_an_h100() -> None:
    compiled = aot.in_a_process(__name__, "launch")
    assert {kernel.name for kernel in compiled} == {"_lse_kernel", "_score_kernel", "_top_kernel"}
    for kernel in compiled:
        assert kernel.shared <= aot.SHARED_LIMIT // 2 and kernel.spilled == 0, kernel
