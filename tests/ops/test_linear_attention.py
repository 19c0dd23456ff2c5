"""zoo/ops/linear_attention: the chunked backend against the float64 recurrence, the recurrence against transformers."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from tests.ops.helpers import relative_error
from zoo.ops import backend, linear_attention
from zoo.ops.linear_attention import chunked

NAMES = ("q", "k", "v", "log_decay", "initial_state")


def make_inputs(batch, length, groups, heads, key_dim, value_dim, decay, cu_seqlens=None, weakest=-7.0, strongest=0.5):
    """float64 inputs; log decays -e^u with u uniform between weakest and strongest."""
    torch.manual_seed(length)
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    shape = {"none": None, "head": (heads,), "token": (batch, length, heads)}[decay]
    # Rounded to bfloat16 so that every precision starts from the same numbers.
    return [
        torch.randn(batch, length, groups, key_dim).bfloat16().double(),
        torch.randn(batch, length, groups, key_dim).bfloat16().double(),
        torch.randn(batch, length, heads, value_dim).bfloat16().double(),
        None if shape is None else -torch.empty(shape).uniform_(weakest, strongest).exp().double(),
        torch.randn(rows, heads, key_dim, value_dim).double(),
    ]


def outputs_and_gradients(name, inputs, dtype, *, scale=1.0, cu_seqlens=None):
    """{"out", "state", and each input's gradient} on backend `name`; q, k, v in dtype, the rest at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [
        None if x is None else x.detach().to(dtype if i < 3 else wide, copy=True).requires_grad_()
        for i, x in enumerate(inputs)
    ]
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    with backend(name):
        out, state = linear_attention(
            *leaves[:4], scale=scale, initial_state=leaves[4], return_state=True, cu_seqlens=cu
        )
    assert out.dtype == dtype and state.dtype == wide
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator).bfloat16().to(dtype)).sum(dtype=wide)
    loss = loss + (state * torch.randn(state.shape, generator=generator)).sum()
    loss.backward()
    results = {"out": out, "state": state}
    return results | {n: x.grad for n, x in zip(NAMES, leaves, strict=True) if x is not None}


def assert_torch_equals_reference(inputs, dtype, tolerance, cancelling=None, **options):
    """`cancelling` is the bound of the decay's gradient, where it may be a sum over tokens that comes to little."""
    expected = outputs_and_gradients("reference", inputs, torch.float64, **options)
    got = outputs_and_gradients("torch", inputs, dtype, **options)
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    if cancelling is not None:
        assert errors.pop("log_decay", 0) < cancelling
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("length", [1, 2, 31, 63, 64, 65, 127, 128, 129, 257, 300])
def test_torch_equals_reference(decay, length):
    inputs = make_inputs(2, length, 2, 4, 6, 10, decay)
    assert_torch_equals_reference(inputs, torch.float32, 2e-6, scale=0.4)
    assert_torch_equals_reference(inputs, torch.float64, 1e-13, scale=0.4)


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("length", [2, 8, 64, 128])
def test_one_head_in_whole_chunks(decay, length):
    """Where laying out in chunks copies nothing, nothing may be written into the input."""
    inputs = make_inputs(1, length, 1, 1, 6, 10, decay)
    assert_torch_equals_reference(inputs, torch.float32, 2e-6)
    assert_torch_equals_reference(inputs, torch.float64, 1e-13)


@pytest.mark.parametrize("decay", ["head", "token"])
def test_long_enough_for_several_blocks_of_states(decay):
    """2,500 tokens are 40 chunks: the states chain across two blocks of 32."""
    inputs = make_inputs(1, 2500, 1, 2, 4, 4, decay, weakest=-12.0, strongest=-6.0)
    assert_torch_equals_reference(inputs, torch.float32, 2e-6)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [0, 200],
        [0, 0, 1, 70, 70, 134, 198, 199, 200, 200],
        [0, 0, 64, 192, 200],
        list(range(31)),
        [0, *range(20, 41), 300],
    ],
)
def test_packed_documents(decay, cu_seqlens):
    inputs = make_inputs(1, cu_seqlens[-1], 2, 4, 6, 10, decay, cu_seqlens)
    assert_torch_equals_reference(inputs, torch.float32, 2e-6, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_packed_documents_equal_each_alone(name):
    bounds = [0, 5, 5, 75, 140]
    q, k, v, g, state = make_inputs(1, 140, 2, 4, 6, 10, "token", bounds)
    with backend(name):
        out, final = linear_attention(
            q, k, v, g, initial_state=state, return_state=True, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)
        )
        for n, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                assert torch.equal(final[n], state[n])
                continue
            alone = linear_attention(
                *(x[:, start:end] for x in (q, k, v, g)), initial_state=state[n : n + 1], return_state=True
            )
            assert relative_error(out[:, start:end], alone[0]) < 1e-13
            assert relative_error(final[n : n + 1], alone[1]) < 1e-13


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_pieces_equal_the_whole(name, decay):
    """Chunked prefill, then one token at a time."""
    q, k, v, g, state = make_inputs(2, 150, 2, 4, 6, 10, decay)
    with backend(name):
        whole, final = linear_attention(q, k, v, g, initial_state=state, return_state=True)
        pieces = []
        for start, end in [(0, 64), (64, 77), (77, 147), (147, 148), (148, 149), (149, 150)]:
            piece = g[:, start:end] if decay == "token" else g
            out, state = linear_attention(
                q[:, start:end], k[:, start:end], v[:, start:end], piece, initial_state=state, return_state=True
            )
            pieces.append(out)
    assert relative_error(torch.cat(pieces, dim=1), whole) < 1e-13
    assert relative_error(state, final) < 1e-13


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_bfloat16(decay):
    inputs = make_inputs(1, 700, 2, 4, 32, 24, decay)
    assert_torch_equals_reference(inputs, torch.bfloat16, 2e-2)


def test_bfloat16_over_20000_tokens():
    q, k, v, g, _ = make_inputs(1, 20_000, 1, 1, 16, 16, "head", weakest=-7.0, strongest=-7.0)
    low = [x.bfloat16() for x in (q, k, v)]
    with torch.no_grad():
        with backend("reference"):
            expected = linear_attention(q, k, v, g, return_state=True)
        with backend("torch"):
            got = linear_attention(*low, g.float(), return_state=True)
            exact = linear_attention(q, k, v, g, return_state=True)
    for low_result, double_result, reference in zip(got, exact, expected, strict=True):
        assert relative_error(double_result, reference) < 1e-12
        assert relative_error(low_result, reference) < 1e-2
    # The end of the sequence is no worse than the whole: nothing drifts.
    assert relative_error(got[0][:, -500:], expected[0][:, -500:]) < 1e-2


@pytest.mark.parametrize(("weakest", "strongest"), [(-16.1, 3.4), (3.3, 3.4), (-16.1, -16.0)])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_log_decays_from_minus_30_to_minus_a_ten_millionth(decay, weakest, strongest):
    inputs = make_inputs(1, 300, 2, 4, 6, 10, decay, weakest=weakest, strongest=strongest)
    assert_torch_equals_reference(inputs, torch.float32, 3e-6)


def test_weak_decay_between_strong_ones_keeps_its_precision():
    """Sums of strong decays are near -1,900 in a chunk, where float32 would lose the weak ones among them."""
    q, k, v, g, state = make_inputs(1, 128, 1, 1, 4, 4, "token")
    g[:] = -30.0
    g[:, 1::2] = -1e-3
    assert_torch_equals_reference([q, k, v, g, state], torch.float32, 2e-6)


def test_positive_log_decay_counts_as_zero():
    q, k, v, _, _ = make_inputs(1, 70, 1, 2, 4, 4, "none")
    for name in ("reference", "torch"):
        with backend(name):
            assert torch.equal(linear_attention(q, k, v, torch.ones(2).double()), linear_attention(q, k, v))


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_a_log_decay_of_minus_infinity_forgets(name):
    q, k, v, g, _ = make_inputs(1, 100, 1, 2, 4, 4, "token")
    g[:, [20, 21, 70]] = -torch.inf
    bounds = torch.tensor([0, 20, 21, 70, 100], dtype=torch.int32)
    with backend(name):
        out = linear_attention(q, k, v, g)
        assert relative_error(out, linear_attention(q, k, v, g.clamp(min=-50), cu_seqlens=bounds)) < 1e-13


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (2, 4)])
def test_only_some_inputs_need_gradients(wanted):
    inputs = make_inputs(1, 70, 1, 2, 4, 4, "token")
    gradients = {}
    for name in ("reference", "torch"):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        with backend(name):
            linear_attention(*leaves[:4], initial_state=leaves[4]).square().sum().backward()
        gradients[name] = [x.grad for x in leaves]
    for i, (got, expected) in enumerate(zip(gradients["torch"], gradients["reference"], strict=True)):
        assert (got is not None) == (i in wanted)
        if i in wanted:
            assert relative_error(got, expected) < 1e-13


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name, decay):
    cu_seqlens = [0, 3, 3, 8]
    inputs = [x if x is None else x.requires_grad_() for x in make_inputs(1, 8, 1, 2, 2, 3, decay, cu_seqlens)]

    def run(q, k, v, g, state):
        return linear_attention(
            q, k, v, g, scale=0.7, initial_state=state, return_state=True, cu_seqlens=torch.tensor(cu_seqlens).int()
        )

    with backend(name):
        assert torch.autograd.gradcheck(run, inputs)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_shapes(data):
    draw = data.draw
    groups = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(any))
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    inputs = make_inputs(
        1,
        cu_seqlens[-1],
        groups,
        groups * draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from(["none", "head", "token"])),
        cu_seqlens,
    )
    assert_torch_equals_reference(inputs, torch.float32, 5e-6, cancelling=1e-3, cu_seqlens=cu_seqlens)


def test_equals_minimax_of_transformers():
    """Their chunked prefill and ours, on one layer's weights; the decay comes from their slopes."""
    torch.manual_seed(0)
    config = MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_hidden_layers=4, block_size=32
    )
    layer = MiniMaxLightningAttention(config, layer_idx=1).double()
    x = torch.randn(2, 100, 32).double()
    with torch.no_grad():
        expected, _ = layer(x, position_embeddings=None, attention_mask=None)
        q, k, v = layer.act_fn(layer.qkv_proj(x)).view(2, 100, 4, 24).split(8, dim=-1)
        out = linear_attention(q, k, v, -layer.slope_rate.flatten().double())
        out = layer.norm(out.flatten(2))
        got = layer.out_proj(torch.sigmoid(layer.output_gate(x)) * out)
    # Their slopes are stored in float32.
    assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("groups", [1, 4])
def test_reference_counts_its_flops(groups):
    q = torch.randn(2, 7, groups, 8)
    with backend("reference"), FlopCounterMode(display=False) as counter:
        linear_attention(q, q, torch.randn(2, 7, 4, 16), -torch.rand(4))
    assert counter.get_total_flops() == 2 * 7 * 4 * (4 * 8 * 16)


def test_backward_keeps_no_score_matrices():
    """Saved for backward: the inputs and one state per chunk, nothing of size length x chunk."""
    length, heads, dim = 1024, 2, 16
    q = torch.randn(1, length, heads, dim, requires_grad=True)
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_attention(q, q * 2, q * 3, -torch.rand(1, length, heads))
    inputs = 3 * length * heads * dim * 4
    states = length // 64 * heads * dim * dim * 4
    assert sum(sizes.values()) < 1.2 * (inputs + states)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 30, 30, 31, 100]])
def test_compiles_into_one_graph(cu_seqlens):
    q, k, v, g, state = (x.float().requires_grad_() for x in make_inputs(1, 100, 1, 2, 4, 4, "token"))
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
        state = torch.randn(4, *state.shape[1:], requires_grad=True)

    def run(*inputs):
        options = dict(initial_state=inputs[4], return_state=True, cu_seqlens=cu_seqlens)
        out, final = linear_attention(*inputs[:4], scale=0.5, **options)
        return out.sin().sum() + final.cos().sum()

    inputs = (q, k, v, g, state)
    expected = run(*inputs)
    # aot_eager traces and lowers forward and backward as inductor would, without half a minute of C++ compilation.
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    assert relative_error(got, expected) < 1e-5
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 5, 70]])
def test_operator_contracts(decay, cu_seqlens):
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    q, k, v, g, state = (x.requires_grad_() for x in make_inputs(1, 70, 1, 2, 4, 4, decay))
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
        state = torch.randn(3, *state.shape[1:], dtype=state.dtype, requires_grad=True)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(chunked._forward, (q, k, v, g, state, cu_seqlens, True), test_utils=utils)


def test_shapes_on_the_meta_device():
    q = torch.empty(2, 100, 2, 8, device="meta")
    out, state = linear_attention(q, q, torch.empty(2, 100, 4, 6, device="meta"), return_state=True)
    assert out.shape == (2, 100, 4, 6) and state.shape == (2, 4, 8, 6) and out.device.type == "meta"


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_no_rows_at_all_over_several_chunks(decay):
    leaves = [None if x is None else x.requires_grad_() for x in make_inputs(0, 150, 1, 2, 4, 6, decay)]
    out, state = linear_attention(*leaves[:4], initial_state=leaves[4], return_state=True)
    (out.sum() + state.sum()).backward()
    assert out.shape == (0, 150, 2, 6) and all(x is None or x.grad.shape == x.shape for x in leaves)


def test_mixed_precision_is_the_widest_and_out_is_like_v():
    q, k, v, g, _ = make_inputs(1, 70, 1, 2, 4, 4, "head")
    out, state = linear_attention(q.bfloat16(), k.bfloat16(), v.float(), g, return_state=True)
    assert out.dtype == state.dtype == torch.float32
    assert relative_error(out, linear_attention(q, k, v, g)) < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 4)}, "q must be"),
        ({"q": torch.zeros(2, 0, 2, 4)}, "at least one token"),
        ({"k": torch.zeros(2, 5, 2, 3)}, "k must be shaped like q"),
        ({"v": torch.zeros(2, 6, 4, 3)}, r"v must be \[2, 5, heads, value_dim\]"),
        ({"v": torch.zeros(2, 5, 3, 3)}, "v's 3 heads must be a multiple of q's 2"),
        ({"log_decay": torch.zeros(2)}, r"log_decay must be \[4\]"),
        ({"log_decay": torch.zeros(2, 5, 1)}, r"log_decay must be \[4\]"),
        ({"initial_state": torch.zeros(2, 4, 3, 4)}, r"initial_state must be \[2, 4, 4, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "batch of 1"),
    ],
)
def test_wrong_arguments(changes, message):
    arguments = {"q": torch.zeros(2, 5, 2, 4), "k": torch.zeros(2, 5, 2, 4), "v": torch.zeros(2, 5, 4, 3)} | changes
    with pytest.raises(ValueError, match=message) as error:
        linear_attention(**arguments)
    assert "\n" not in str(error.value)
