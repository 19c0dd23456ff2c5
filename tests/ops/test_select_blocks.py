"""zoo/ops/select_blocks: chunks of queries against the reference; that against flash-linear-attention and by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import Largest
from zoo.ops import backend, interval_attention, select_blocks
from zoo.ops.interval_attention import chunked

BACKENDS = ("reference", "torch")
NSA = {"compress_block": 32, "compress_stride": 16, "select_block": 64}


@pytest.fixture(autouse=True, params=[2**19, 500], ids=["one chunk", "many"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MAX_LOGITS", request.param)


def make(batch: int, length: int, compressed: int, heads=(4, 2)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(length)
    return torch.randn(batch, length, heads[0], 6).double(), torch.randn(batch, compressed, heads[1], 6).double()


def choose(name: str, q: Tensor, k: Tensor, first: Tensor, position: Tensor, **options: Any) -> Tensor:
    with backend(name):
        chosen = select_blocks(q, k, first, position, **options)
    return chosen.sort(-1).values


RULES = [
    {"compress_block": 4, "compress_stride": 2, "select_block": 8, "top_n": 4},
    {"compress_block": 4, "compress_stride": 4, "select_block": 4, "top_n": 3, "first_blocks": 0, "local_blocks": 1},
    {"compress_block": 6, "compress_stride": 2, "select_block": 6, "top_n": 5, "scale": 3.0},
    {"compress_block": 2, "compress_stride": 2, "select_block": 6, "top_n": 5, "first_blocks": 3},
    {"compress_block": 9, "compress_stride": 3, "select_block": 12, "top_n": 4},
    # Weights so small that many are 0.
    {"compress_block": 3, "compress_stride": 3, "select_block": 3, "top_n": 6, "scale": 500.0},
]


def compressed_of(length: int, rule: dict[str, Any]) -> int:
    return max(0, (length - rule["compress_block"]) // rule["compress_stride"] + 1)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 31, 64, 65, 131])
def test_torch_equals_reference(length: int, rule: dict[str, Any]) -> None:
    q, k = make(2, length, compressed_of(length, rule))
    position = torch.arange(length).expand(2, -1)
    where = torch.zeros_like(position), position
    assert torch.equal(choose("torch", q, k, *where, **rule), choose("reference", q, k, *where, **rule))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_documents_padding_and_chunks_equal_each_alone(rule: dict[str, Any]) -> None:
    """Documents of 50, 3 and 41 tokens in one row, with a query between them that is none."""
    lengths = [50, 3, 41]
    counts = [compressed_of(length, rule) for length in lengths]
    parts = [make(1, length, count) for length, count in zip(lengths, counts, strict=True)]
    none = make(1, 1, 0)[0]
    q = torch.cat([parts[0][0], none, parts[1][0], parts[2][0]], 1)
    k = torch.cat([k for _, k in parts], 1)
    positions = [torch.arange(length) for length in lengths]
    position = torch.cat([positions[0], torch.tensor([-1]), *positions[1:]])[None]
    first = torch.tensor([0] * 51 + [counts[0]] * 3 + [counts[0] + counts[1]] * 41)[None]
    for name in BACKENDS:
        whole = choose(name, q, k, first, position, **rule)
        assert (whole[:, 50] == -1).all()
        whole = torch.cat([whole[:, :50], whole[:, 51:]], 1).split(lengths, 1)
        for part, (own_q, own_k), where in zip(whole, parts, positions, strict=True):
            zeros = torch.zeros_like(where)[None]
            alone = choose(name, own_q, own_k, zeros, where[None], **rule)
            assert torch.equal(part, alone)
            one = [
                choose(name, own_q[:, i, None], own_k, zeros[:, :1], where[None, i, None], **rule)
                for i in range(len(where))
            ]
            assert torch.equal(torch.cat(one, 1), alone)


@pytest.mark.parametrize("name", BACKENDS)
def test_equals_flash_linear_attention(name: str) -> None:
    naive = pytest.importorskip("fla.ops.nsa.naive").naive_nsa_topk
    q, k = make(2, 90, 12)  # theirs wants the last block too, which is not seen before it ends
    position = torch.arange(90).expand(2, -1)
    rule = {"compress_block": 8, "compress_stride": 8, "select_block": 8, "top_n": 5}
    ours = choose(name, q, k, torch.zeros_like(position), position, **rule)
    assert torch.equal(ours, naive(q, k, 5, 8, 6**-0.5).sort(-1).values)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("best", range(16, 36))
def test_the_weights_are_1_2_2_2_1(name: str, best: int) -> None:
    """All attention goes to one compressed block: the selected blocks that it reaches into are chosen, 4j-1 ... 4j+3
    by block j, and 4j + 3 by block j + 1 as well."""
    position = torch.tensor([[1023]])
    k = torch.zeros(1, 63, 1, 6).double()
    k[0, best] = 10
    q, zero = torch.ones(1, 1, 1, 6).double(), torch.zeros_like(position)
    chosen = choose(name, q, k, zero, position, **NSA, top_n=4, first_blocks=1, local_blocks=2)[0, 0, 0].tolist()
    reached = {j for j in range(16) if 4 * j - 1 <= best <= 4 * j + 3}
    assert {0, 14, 15} < set(chosen) and set(chosen) - {0, 14, 15} <= reached
    chosen = choose(name, q, k, zero, position, **NSA, top_n=5, first_blocks=1, local_blocks=2)[0, 0, 0].tolist()
    assert reached <= set(chosen)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_weights_decide(name: str) -> None:
    """Blocks of equal compressed keys but one: p of 2 at an edge is worth less than 1.5 within."""
    position = torch.tensor([[1023]])
    logits = torch.full((63,), -20.0).double()
    logits[19] = 2.0  # 4j + 3 of j = 4 and 4j - 1 of j = 5: once in each
    logits[33] = 2.0 + torch.tensor(0.75).log()  # within j = 8: twice
    k = logits[None, :, None, None] * torch.eye(6)[0].double()
    q = torch.eye(6)[0].double()[None, None, None]
    chosen = choose(name, q, k, 0 * position, position, **NSA, top_n=4, scale=1.0)[0, 0, 0].tolist()
    assert chosen == [0, 8, 14, 15]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BACKENDS)
def test_of_equal_scores_the_latest_is_the_best(name: str, dtype: torch.dtype) -> None:
    """All keys are alike: the blocks between the ends have the same score, the first lacks what reaches into it."""
    position = torch.tensor([[1023]])
    q, k = torch.ones(1, 1, 2, 6, dtype=dtype), torch.ones(1, 63, 1, 6, dtype=dtype)
    for top_n in range(3, 16):
        chosen = choose(name, q, k, 0 * position, position, **NSA, top_n=top_n).flatten().tolist()
        assert chosen == [0, *range(17 - top_n, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_in_any_chunk(dtype: torch.dtype) -> None:
    """Blocks chosen at once and one query by one; logits and lse are 0, so that scores are exact."""
    rule = RULES[0]
    q, k = (torch.zeros_like(x, dtype=dtype) for x in make(1, 60, compressed_of(60, rule)))
    position, lse = torch.arange(60)[None], q[..., 0]
    whole = choose("torch", q, k, 0 * position, position, lse=lse, **rule)
    for t in range(60):
        now = slice(t, t + 1)
        alone = choose("torch", q[:, now], k, position[:, :1], position[:, now], lse=lse[:, now], **rule)
        assert torch.equal(alone[:, 0], whole[:, t])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [3, 60])
def test_lse_may_be_given(length: int, rule: dict[str, Any]) -> None:
    """That of interval_attention to the same keys; and it is used: another one orders heads by other weights."""
    q, k = make(2, length, compressed_of(length, rule))
    position = torch.arange(length).expand(2, -1)
    zero = torch.zeros_like(position)
    visible = ((position + 1 - rule["compress_block"]) // rule["compress_stride"] + 1).clamp(min=0)
    lse = interval_attention(q, k, k, zero, visible, scale=rule.get("scale"), return_lse=True)[1]
    expected = choose("reference", q, k, zero, position, **rule)
    assert torch.equal(choose("torch", q, k, zero, position, lse=lse, **rule), expected)
    if length == 60 and rule["top_n"] < 5:
        lse = lse + torch.tensor([50.0, 0.0, 50.0, 0.0])
        assert not torch.equal(choose("torch", q, k, zero, position, lse=lse, **rule), expected)


@pytest.mark.parametrize("recent", [2, 4, 15, 100])
def test_recent_blocks(recent: int) -> None:
    rule = RULES[0] | {"select_block": 4, "top_n": 5}
    q, k = make(2, 60, compressed_of(60, rule))
    position = torch.arange(60).expand(2, -1)
    every = choose("reference", q, k, 0 * position, position, **rule)
    limited = choose("reference", q, k, 0 * position, position, recent_blocks=recent, **rule)
    assert torch.equal(choose("torch", q, k, 0 * position, position, recent_blocks=recent, **rule), limited)
    own = position[..., None, None] // 4
    assert ((limited == -1) | (limited == 0) | (limited > own - recent)).all()
    assert ((limited >= 0).sum(-1) == (own[..., 0] + 1).clamp(max=min(5, recent + 1))).all()
    assert torch.equal(limited, every) == (recent >= 15)


def test_nothing_flows_back() -> None:
    q, k = make(1, 20, 5)
    position = torch.arange(20)[None]
    chosen = select_blocks(q.requires_grad_(), k.requires_grad_(), 0 * position, position, **RULES[1])
    assert not chosen.requires_grad and chosen.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 4, 3, 6)}, "k must be"),
        ({"first": (1, 8)}, "first must be whole numbers"),
        ({"position": (2, 9)}, "position must be whole numbers"),
        ({"compress_block": 7}, "compress_block must be a multiple of compress_stride"),
        ({"select_block": 5}, "select_block must be a multiple of compress_stride"),
        ({"select_block": 2}, "select_block must be at least compress_block"),
        ({"top_n": 2}, "top_n must be at least first_blocks"),
        ({"local_blocks": 0}, "top_n must be at least first_blocks"),
        ({"recent_blocks": 1}, r"recent_blocks must be at least local_blocks \(2\), got 1"),
        ({"lse": (1, 9, 2)}, "lse must be"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    shapes = {"q": (1, 9, 4, 6), "k": (1, 4, 2, 6), "first": (1, 9), "position": (1, 9)}
    shapes |= {"lse": (1, 9, 4)}
    tensors = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    for name in ("first", "position"):
        tensors[name] = tensors[name].long()
    options = RULES[0] | {key: value for key, value in change.items() if key not in shapes}
    with pytest.raises(ValueError, match=message):
        select_blocks(**tensors, **options)


def test_memory_is_linear() -> None:
    """Nothing as long as queries times compressed keys is made."""
    length, heads = 4096, 2
    q, k = (x.float() for x in make(1, length, length // 4, (heads, 1)))
    position = torch.arange(length)[None]
    options = {"compress_block": 4, "compress_stride": 4, "select_block": 16, "top_n": 4}
    with Largest() as largest:
        select_blocks(q, k, torch.zeros_like(position), position, **options)
    assert largest.numbers <= max(chunked.MAX_LOGITS, length * heads * 6)
