"""Hierarchical sparse attention and MoBA against torch's attention, their papers' formulas written out, and fla."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.blocks.helpers import assert_close, build_part, model_config, perturb, random_input
from tests.ops.helpers import Largest
from tests.ops.test_linear_attention_kernels import interpreter  # noqa: F401  (a fixture)
from zoo import ConfigError, ops
from zoo.blocks import SequenceContext
from zoo.blocks.hierarchical import Hierarchical

HIDDEN = 16
NSA = {
    "kind": "hierarchical", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 7, "compress_block": 8,
    "compress_stride": 4, "select_block": 16, "top_n": 4,
}  # fmt: skip
MOBA = {
    "kind": "hierarchical", "num_heads": 4, "head_dim": 8, "window": None, "compress": None, "select_block": 8,
    "top_n": 3, "first_blocks": 0, "local_blocks": 1,
}  # fmt: skip
ALL = 100  # blocks, more than there are


def build(**fields: object) -> Hierarchical:
    """Random weights, in float64."""
    return perturb(build_part(model_config(hidden_size=HIDDEN, mixer=fields)).double())


def only(mixer: Hierarchical, tier: str) -> Hierarchical:
    """One tier wide open and the others shut, for inputs whose first dimension is 1."""
    gates = mixer.gate_proj.weight.data.zero_()[:, 0].view(len(mixer.config.tiers), mixer.num_heads)
    gates.fill_(-1e4)[mixer.config.tiers.index(tier)] = 1e4
    return mixer


def ones_first(batch: int, length: int) -> Tensor:
    x = random_input(batch, length, HIDDEN, dtype=torch.float64)
    x[..., 0] = 1
    return x


def projected(mixer: Hierarchical, x: Tensor, tier: str, rotate: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a tier, `[batch, heads, length, head_dim]`, keys and values repeated for their query heads."""
    tiers = len(mixer.config.tiers)
    q = mixer.q_proj(x).unflatten(-1, (-1, mixer.head_dim))
    k, v = (
        each(x).unflatten(-1, (tiers, -1, mixer.head_dim))[:, :, mixer.config.tiers.index(tier)]
        for each in (mixer.k_proj, mixer.v_proj)
    )
    if rotate and mixer.rotary is not None:
        q, k = mixer.rotary(q, k, SequenceContext.of(x).position_ids)
    shared = mixer.num_heads // mixer.num_kv_heads
    k, v = (each.repeat_interleave(shared, 2) for each in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def written(mixer: Hierarchical, out: Tensor) -> Tensor:
    return mixer.o_proj(out.transpose(1, 2).flatten(-2))


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with all its probabilities; a query that sees nothing gets 0."""
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    p = logits.softmax(-1).nan_to_num(0)
    return p @ v, p


@pytest.mark.parametrize("compress", ["mlp", "mean", "stride"])
@pytest.mark.parametrize("length", [1, 16, 75])
def test_the_top_of_all_blocks_is_dense_attention(length: int, compress: str) -> None:
    mixer, x = only(build(**NSA | {"top_n": ALL, "compress": compress}), "select"), ones_first(2, length)
    out = F.scaled_dot_product_attention(*projected(mixer, x, "select"), is_causal=True)
    assert_close(mixer(x, SequenceContext.of(x)), written(mixer, out), tolerance=1e-13)


@pytest.mark.parametrize("length", [1, 16, 75])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_moba_of_all_blocks_is_dense_attention(length: int, kv_heads: int) -> None:
    mixer, x = build(**MOBA | {"top_n": ALL, "num_kv_heads": kv_heads}), ones_first(2, length)
    out = F.scaled_dot_product_attention(*projected(mixer, x, "select"), is_causal=True)
    assert_close(mixer(x, SequenceContext.of(x)), written(mixer, out), tolerance=1e-13)


def test_a_window_of_everything_is_dense_attention() -> None:
    mixer, x = only(build(**NSA | {"window": 75}), "window"), ones_first(2, 75)
    out = F.scaled_dot_product_attention(*projected(mixer, x, "window"), is_causal=True)
    assert_close(mixer(x, SequenceContext.of(x)), written(mixer, out), tolerance=1e-13)


def compressed(mixer: Hierarchical, x: Tensor, name: str) -> Tensor:
    """`x` `[batch, heads, length, dim]` a block at a time, as the paper's equation 7 has it."""
    block, stride = mixer.config.compressed
    phi = getattr(mixer, f"compress_{name}")
    blocks = []
    for start in range(0, x.shape[2] - block + 1, stride):
        tokens = x[:, :, start : start + block]
        if phi.how == "mlp":
            hidden = F.silu((tokens + phi.positions).flatten(-2) @ phi.up_proj.weight.T)
            blocks.append(hidden @ phi.down_proj.weight.T)
        else:
            blocks.append(tokens.mean(2) if phi.how == "mean" else tokens[:, :, -1])
    return torch.stack(blocks, 2)


@pytest.mark.parametrize("compress", ["mlp", "mean", "stride"])
def test_the_whole_of_nsa_written_out(compress: str) -> None:
    """With T x T probabilities, weights for the blocks' scores typed by hand, and masks for what is chosen."""
    length = 150
    mixer, x = build(**NSA | {"compress": compress}), random_input(2, length, HIDDEN, dtype=torch.float64)
    t, j = torch.arange(length)[:, None], torch.arange(length)
    causal = j <= t
    window, _ = attend(*projected(mixer, x, "window"), causal & (j > t - 7))
    q, k, v = projected(mixer, x, "compress", rotate=False)
    short_k, short_v = compressed(mixer, k, "k"), compressed(mixer, v, "v")
    ends = torch.arange(short_k.shape[2]) * 4 + 7
    coarse, p = attend(q, short_k, short_v, ends <= t)
    p = p.unflatten(1, (2, 2)).sum(2)  # the two heads of a group
    chosen = torch.zeros(2, 2, length, length, dtype=torch.bool)
    padded = F.pad(p, (1, 20))  # compressed block i is padded[i + 1]
    for query in range(length):
        own = query // 16
        blocks = range(own + 1)
        score = {
            b: sum(w * padded[:, :, query, 4 * b + i] for i, w in enumerate((1, 2, 2, 2, 1)))
            for b in blocks
        }  # fmt: skip
        forced = {0, own - 1, own} & set(blocks)
        for row in range(2):
            for group in range(2):
                rest = sorted((b for b in blocks if b not in forced), key=lambda b: -score[b][row, group])
                for b in [*forced, *rest[: 4 - len(forced)]]:
                    chosen[row, group, query, 16 * b : 16 * b + 16] = True
    fine, _ = attend(*projected(mixer, x, "select"), causal & chosen.repeat_interleave(2, 1))
    gates = mixer.gate_proj(x).sigmoid().unflatten(-1, (3, 4)).permute(2, 0, 3, 1)[..., None]
    expected = written(mixer, gates[0] * window + gates[1] * coarse + gates[2] * fine)
    assert_close(mixer(x, SequenceContext.of(x)), expected, tolerance=1e-12)
    assert not chosen[..., -1, :].all()  # there was a choice


def test_moba_written_out() -> None:
    """Equations 2 to 8: of earlier blocks those whose mean key has the largest product with the query, and its own."""
    mixer, x = build(**MOBA), random_input(2, 70, HIDDEN, dtype=torch.float64)
    q, k, v = projected(mixer, x, "select")
    means = F.pad(k, (0, 0, 0, 2)).unflatten(2, (9, 8)).mean(3)
    t, block = torch.arange(70)[:, None], torch.arange(9)
    gate = (q @ means.mT).masked_fill(block > t // 8, -torch.inf).masked_fill(block == t // 8, torch.inf)
    chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, gate.topk(3, -1).indices, True)
    visible = chosen.repeat_interleave(8, -1)[..., :70] & (torch.arange(70) <= t)
    assert_close(mixer(x, SequenceContext.of(x)), written(mixer, attend(q, k, v, visible)[0]), tolerance=1e-12)


def test_equals_flash_linear_attention() -> None:
    """Its compressed and selected tiers, which share their keys and values and have blocks of one size."""
    naive = pytest.importorskip("fla.ops.nsa.naive")
    sizes = {"compress_block": 8, "compress_stride": 8, "select_block": 8, "top_n": 5}
    fields = NSA | sizes | {"rope": None, "compress": "mean", "num_kv_heads": 1, "window": None}
    mixer, x = build(**fields), random_input(2, 88, HIDDEN, dtype=torch.float64)
    for weight in (mixer.k_proj.weight.data, mixer.v_proj.weight.data):
        weight[8:] = weight[:8]
    q, k, v = (each.transpose(1, 2) for each in projected(mixer, x, "select"))
    k, v = k[:, :, :1], v[:, :, :1]
    short_k, short_v = (each.unflatten(1, (-1, 8)).mean(2) for each in (k, v))
    coarse, _ = naive.naive_nsa_compression(q, short_k, short_v, 8, 8**-0.5)
    chosen = naive.naive_nsa_topk(q, short_k, 5, 8, 8**-0.5)
    fine = naive.naive_nsa_selection(q, k, v, chosen, 8)
    gates = mixer.gate_proj(x).sigmoid().unflatten(-1, (2, 4))[..., None]
    expected = mixer.o_proj((gates[:, :, 0] * coarse + gates[:, :, 1] * fine).flatten(-2))
    assert_close(mixer(x, SequenceContext.of(x)), expected, tolerance=1e-6)


@pytest.mark.parametrize("fields", [NSA, MOBA], ids=["nsa", "moba"])
def test_on_the_kernels(fields: dict) -> None:
    """Every tier, and the choice, as the reference has them: outputs and gradients of padded rows."""
    mixer, x = build(**fields), random_input(2, 21, HIDDEN, dtype=torch.float64)
    mask = torch.arange(21) >= torch.tensor([[0], [6]])
    results = {}
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        mixer, given = mixer.to(dtype), x.detach().to(dtype).requires_grad_()
        mixer.zero_grad()
        with ops.backend(name):
            out = mixer(given, SequenceContext.of(given, padding_mask=mask)) * mask[..., None]
            out.sin().sum().backward()
        results[name] = [out, given.grad, *(p.grad.clone() for p in mixer.parameters())]
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        assert_close(got, expected, tolerance=1e-5)


def test_select_window_limits_how_far_back_blocks_are_chosen() -> None:
    """A token 48 tokens back, in a block that is neither first nor among the last three, is not seen in full."""
    fields = NSA | {"num_kv_heads": 1, "select_window": 48, "top_n": 4}
    length = 150
    for mixer, recent in ((build(**fields), 3), (build(**fields | {"select_window": None}), 10)):
        mixer, x = only(mixer, "select"), ones_first(1, length).requires_grad_()
        reached = torch.zeros(length, length // 16 + 1)
        out = mixer(x, SequenceContext.of(x))
        for query in range(96, length, 7):
            (gradient,) = torch.autograd.grad(out[0, query].sum(), x, retain_graph=True)
            blocks = (gradient[0].norm(dim=-1) > 1e-12).nonzero().squeeze(1) // 16
            reached[query, blocks] = 1
            assert all(block == 0 or block > query // 16 - recent for block in blocks.tolist())
        beyond = reached[:, 1:].nonzero()
        assert (beyond[:, 1] + 1 <= beyond[:, 0] // 16 - 3).any() == (recent > 3)


def test_moba_has_no_gradient_through_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = build(**MOBA), random_input(1, 40, HIDDEN, dtype=torch.float64)
    mixer(x, SequenceContext.of(x)).sum().backward()
    with_choice = [p.grad.clone() for p in mixer.parameters()]
    mixer.zero_grad()
    choose, chosen = ops.select_blocks, []
    monkeypatch.setattr(ops, "select_blocks", lambda q, k, *a, **kw: chosen.append(k) or choose(q, k, *a, **kw))
    mixer(x, SequenceContext.of(x)).sum().backward()
    assert not chosen[0].requires_grad
    for parameter, gradient in zip(mixer.parameters(), with_choice, strict=True):
        assert_close(parameter.grad, gradient)


def test_positions_count_relative_to_each_other() -> None:
    """Shifted positions turn queries and keys alike; compressed keys have no position but that within their block."""
    mixer, x = build(**NSA), random_input(1, 60, HIDDEN, dtype=torch.float64)
    shifted = SequenceContext.of(x, position_ids=torch.arange(60)[None] + 1000)
    assert_close(mixer(x, shifted), mixer(x, SequenceContext.of(x)), tolerance=1e-4)  # float32 angles


@torch.no_grad()
@pytest.mark.parametrize("fields", [NSA, MOBA], ids=["nsa", "moba"])
def test_the_cache_of_padded_rows_grows_with_the_text(fields: dict) -> None:
    """Rows of other lengths complete their compressed blocks at other steps, but no row has a column for each step."""
    mixer, x = build(**fields), random_input(8, 8 + 64, HIDDEN, dtype=torch.float64)
    mask = torch.arange(8) >= torch.arange(8)[:, None]
    state = mixer.new_state(8, x.device, x.dtype)
    seen = mask.sum(1)
    mixer(x[:, :8], SequenceContext.of(x[:, :8], padding_mask=mask), state)
    for i in range(64):
        token = x[:, 8 + i, None]
        out = mixer(token, SequenceContext.of(token, seen=seen + i), state)
    block, stride = mixer.config.compressed
    columns = {name: part["mask"].shape[1] for name, part in state.by_name.items()}
    assert columns["compressed"] == (8 + 64 - block) // stride + 1  # of the row without padding
    assert columns["unfinished"] <= block + stride
    alone = mixer(x[3:4, 3:], SequenceContext.of(x[3:4, 3:]))
    assert_close(out[3:4], alone[:, -1:], tolerance=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("fields", [NSA, MOBA], ids=["nsa", "moba"])
def test_decoding_reads_the_chosen_blocks_only(fields: dict) -> None:
    """One token later, nothing is made that is as large as the keys of all tokens."""
    length = 4000

    mixer, x = build(**fields), random_input(1, length + 2, HIDDEN, dtype=torch.float64)
    state = mixer.new_state(1, x.device, x.dtype)
    whole = mixer(x, SequenceContext.of(x))
    seen = torch.tensor([length])
    mixer(x[:, :length], SequenceContext.of(x[:, :length]), state)
    for i in range(2):
        token = x[:, length + i, None]
        context = SequenceContext.of(token, seen=seen + i)
        with Largest() as largest:
            out = mixer(token, context, state)
        assert_close(out, whole[:, length + i, None], tolerance=1e-10)
    # The first of them moved the keys to a buffer that grows. Compressed keys are all read, 1 for 4 tokens or 8.
    assert largest.numbers <= length * mixer.num_kv_heads * mixer.head_dim // 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compress_block": 10}, r"compress_block: must be a multiple of compress_stride \(4\), got 10"),
        ({"select_block": 18}, r"select_block: must be a multiple of compress_stride \(4\), got 18"),
        ({"select_block": 4}, r"select_block: must be at least compress_block \(8\), got 4"),
        ({"top_n": 2}, r"top_n: must be at least 3, as 3 blocks are always chosen .* got 2"),
        ({"window": -1}, r"window: must be a whole number >= 1, got -1"),
        ({"num_kv_heads": 3}, r"num_kv_heads: must divide num_heads \(4\), got 3"),
        ({"num_heads": 3, "num_kv_heads": 3, "head_dim": None}, r"num_heads: must divide hidden_size \(16\), got 3"),
        ({"rope": {"rotary_dim": 3}}, r"rope.rotary_dim: must be even"),
        ({"compress": None}, r"compress_block: has no use with compress: null"),
        ({"compress": None, "compress_block": None}, r"compress_stride: has no use with compress: null"),
        ({"compress": "max"}, r"compress: must be one of mlp, mean, stride, got 'max'"),
        ({"local_blocks": 0}, r"local_blocks: must be a whole number >= 1, got 0"),
        ({"window": 0}, r"window: must be a whole number >= 1, got 0"),
        ({"compress_stride": 0}, r"compress_stride: must be a whole number >= 1, got 0"),
        ({"first_blocks": -1}, r"first_blocks: must be a whole number >= 0, got -1"),
        ({"select_window": -64}, r"select_window: must be a whole number >= 1, got -64"),
        ({"select_window": 40}, r"select_window: must be a multiple of select_block \(16\), got 40"),
        ({"select_window": 32}, r"top_n: must be at most 3, the blocks there are to choose from .* got 4"),
    ],
)
def test_mistakes_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(hidden_size=HIDDEN, mixer=NSA | fields)


def test_a_state_and_packed_documents_exclude_each_other() -> None:
    mixer, x = build(**NSA), ones_first(1, 8)
    context = SequenceContext.of(x, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match="pad the rows"):
        mixer(x, context, mixer.new_state(1, x.device, x.dtype))
