"""zoo/ops/delta_rule: the chunked backend against the float64 recurrence, that against transformers and fla."""

from inspect import unwrap
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from tests.ops.helpers import relative_error
from zoo.ops import backend, backends, delta_rule, explain
from zoo.ops.delta_rule import chunked

NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
DECAYS = ("none", "head", "channel")


def make_inputs(batch, length, groups, heads, key_dim, value_dim, decay, cu_seqlens=None, weakest=-7.0, strongest=0.5):
    """float64 inputs; keys of unit length, beta in [0, 2], log decays -e^u with u uniform from weakest to strongest."""
    torch.manual_seed(length)
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    per_head = (batch, length, heads)
    shape = {"none": None, "head": per_head, "channel": (*per_head, key_dim)}[decay]
    # Rounded to bfloat16 so that every precision starts from the same numbers.
    return [
        torch.randn(batch, length, groups, key_dim).bfloat16().double(),
        F.normalize(torch.randn(batch, length, groups, key_dim), dim=-1).bfloat16().double(),
        torch.randn(batch, length, heads, value_dim).bfloat16().double(),
        2 * torch.rand(per_head).double(),
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
        out, state = delta_rule(*leaves[:5], scale=scale, initial_state=leaves[5], return_state=True, cu_seqlens=cu)
    assert out.dtype == dtype and state.dtype == wide
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator).bfloat16().to(dtype)).sum(dtype=wide)
    loss = loss + (state * torch.randn(state.shape, generator=generator)).sum()
    loss.backward()
    results = {"out": out, "state": state}
    return results | {n: x.grad for n, x in zip(NAMES, leaves, strict=True) if x is not None}


def assert_torch_equals_reference(inputs, *tolerances, **options):
    """`tolerances` are pairs of a dtype and its bound."""
    expected = outputs_and_gradients("reference", inputs, torch.float64, **options)
    for dtype, tolerance in tolerances:
        got = outputs_and_gradients("torch", inputs, dtype, **options)
        errors = {name: relative_error(got[name], expected[name]) for name in expected}
        assert max(errors.values()) < tolerance, (dtype, errors)


SINGLE, DOUBLE = (torch.float32, 3e-6), (torch.float64, 5e-14)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 2, 31, 63, 64, 65, 127, 128, 129, 257, 300])
def test_torch_equals_reference(decay, length):
    assert_torch_equals_reference(make_inputs(2, length, 2, 4, 6, 10, decay), SINGLE, DOUBLE, scale=0.4)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [2, 8, 64, 128])
def test_one_head_in_whole_chunks(decay, length):
    """Where laying out in chunks copies nothing, nothing may be written into the input."""
    assert_torch_equals_reference(make_inputs(1, length, 1, 1, 6, 10, decay), SINGLE, DOUBLE)


@pytest.mark.parametrize("decay", DECAYS)
def test_long_enough_for_several_blocks_of_states(decay):
    """2,500 tokens are 40 chunks, worked on 16 at a time: the states chain across blocks."""
    inputs = make_inputs(1, 2500, 1, 2, 4, 4, decay, weakest=-12.0, strongest=-6.0)
    assert_torch_equals_reference(inputs, (torch.float32, 1e-5), DOUBLE)


@pytest.mark.parametrize("decay", DECAYS)
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
    assert_torch_equals_reference(inputs, SINGLE, DOUBLE, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_packed_documents_equal_each_alone(name):
    bounds = [0, 5, 5, 75, 140]
    *tokens, state = make_inputs(1, 140, 2, 4, 6, 10, "channel", bounds)
    with backend(name):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        out, final = delta_rule(*tokens, initial_state=state, return_state=True, cu_seqlens=cu_seqlens)
        for n, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                assert torch.equal(final[n], state[n])
                continue
            one = delta_rule(*(x[:, start:end] for x in tokens), initial_state=state[n : n + 1], return_state=True)
            assert relative_error(out[:, start:end], one[0]) < 1e-13
            assert relative_error(final[n : n + 1], one[1]) < 1e-13


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("decay", DECAYS)
def test_pieces_equal_the_whole(name, decay):
    """Chunked prefill, then one token at a time."""
    *tokens, state = make_inputs(2, 150, 2, 4, 6, 10, decay)
    with backend(name):
        whole, final = delta_rule(*tokens, initial_state=state, return_state=True)
        pieces = []
        for start, end in [(0, 64), (64, 77), (77, 147), (147, 148), (148, 149), (149, 150)]:
            piece = (None if x is None else x[:, start:end] for x in tokens)
            out, state = delta_rule(*piece, initial_state=state, return_state=True)
            pieces.append(out)
    assert relative_error(torch.cat(pieces, dim=1), whole) < 1e-13
    assert relative_error(state, final) < 1e-13


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16(decay):
    assert_torch_equals_reference(make_inputs(1, 700, 2, 4, 32, 24, decay), (torch.bfloat16, 1e-2))


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_over_20000_tokens(decay):
    *tokens, _ = make_inputs(1, 20_000, 1, 1, 8, 8, decay, weakest=-7.0, strongest=-6.0)
    low = [None if x is None else x.bfloat16() if i < 3 else x.float() for i, x in enumerate(tokens)]
    with torch.no_grad():
        with backend("reference"):
            expected = delta_rule(*tokens, return_state=True)
        with backend("torch"):
            got = delta_rule(*low, return_state=True)
            exact = delta_rule(*tokens, return_state=True)
    for low_result, double_result, reference in zip(got, exact, expected, strict=True):
        assert relative_error(double_result, reference) < 1e-12
        assert relative_error(low_result, reference) < 5e-3
    # The end of the sequence is no worse than the whole: nothing drifts.
    assert relative_error(got[0][:, -500:], expected[0][:, -500:]) < 5e-3


@pytest.mark.parametrize(("weakest", "strongest"), [(-16.1, 3.4), (3.3, 3.4), (-16.1, -16.0)])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_log_decays_from_minus_30_to_minus_a_ten_millionth(decay, weakest, strongest):
    inputs = make_inputs(1, 300, 2, 4, 6, 10, decay, weakest=weakest, strongest=strongest)
    assert_torch_equals_reference(inputs, (torch.float32, 1e-5), DOUBLE)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_weak_decay_between_strong_ones_keeps_its_precision(decay):
    """Sums of strong decays are near -1,900 in a chunk, where float32 would lose the weak ones among them."""
    inputs = make_inputs(1, 128, 1, 1, 4, 4, decay)
    inputs[4][:] = -30.0
    inputs[4][:, 1::2] = -1e-3
    assert_torch_equals_reference(inputs, SINGLE)


def test_a_strong_decay_in_one_channel_leaves_the_others_alone():
    """A product of whole keys with e^-c would overflow."""
    inputs = make_inputs(1, 200, 1, 2, 4, 4, "channel")
    inputs[4][..., 1] = -900.0
    assert_torch_equals_reference(inputs, SINGLE, DOUBLE)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_one_decay_for_all_channels_is_the_decay_of_the_head(name):
    *tokens, g, state = make_inputs(1, 100, 2, 4, 6, 10, "head")
    with backend(name):
        head = delta_rule(*tokens, g, initial_state=state)
        channels = delta_rule(*tokens, g[..., None].expand(-1, -1, -1, 6), initial_state=state)
        none, zero = (delta_rule(*tokens, x, initial_state=state) for x in (None, 0 * g))
    assert relative_error(channels, head) < 1e-13 and relative_error(zero, none) < 1e-13
    assert relative_error(head, none) > 0.1


def test_beta_of_one_overwrites_and_of_zero_writes_nothing():
    torch.manual_seed(0)
    k = F.normalize(torch.randn(1, 1, 1, 4), dim=-1)
    state, v = torch.randn(1, 1, 4, 3), torch.randn(1, 1, 1, 3)
    out, after = delta_rule(k, k, v, torch.ones(1, 1, 1), initial_state=state, return_state=True)
    assert relative_error(out, v) < 1e-6 and relative_error(k[0, 0] @ after[0, 0], v[0, 0]) < 1e-6
    unchanged = delta_rule(k, k, v, torch.zeros(1, 1, 1), initial_state=state, return_state=True)[1]
    assert torch.equal(unchanged, state)


def test_positive_log_decay_counts_as_zero():
    *tokens, _, _ = make_inputs(1, 70, 1, 2, 4, 4, "none")
    for name in ("reference", "torch"):
        with backend(name):
            rising = delta_rule(*tokens, torch.ones(1, 70, 2).double())
            assert torch.equal(rising, delta_rule(*tokens, torch.zeros(1, 70, 2).double()))


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_log_decay_of_minus_infinity_forgets(name, decay):
    *tokens, g, _ = make_inputs(1, 100, 1, 2, 4, 4, decay)
    g[:, [20, 21, 70]] = -torch.inf
    bounds = torch.tensor([0, 20, 21, 70, 100], dtype=torch.int32)
    with backend(name):
        out = delta_rule(*tokens, g)
        assert relative_error(out, delta_rule(*tokens, g.clamp(min=-50), cu_seqlens=bounds)) < 1e-13


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 4), (2, 5)])
def test_only_some_inputs_need_gradients(wanted, decay):
    inputs = make_inputs(1, 70, 1, 2, 4, 4, decay)
    gradients = {}
    for name in ("reference", "torch"):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        with backend(name):
            delta_rule(*leaves[:5], initial_state=leaves[5]).square().sum().backward()
        gradients[name] = [x.grad for x in leaves]
    for i, (got, expected) in enumerate(zip(gradients["torch"], gradients["reference"], strict=True)):
        assert (got is not None) == (i in wanted)
        if i in wanted:
            assert relative_error(got, expected) < 1e-13


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name, decay):
    cu_seqlens = [0, 3, 3, 8]
    inputs = [x if x is None else x.requires_grad_() for x in make_inputs(1, 8, 1, 2, 2, 3, decay, cu_seqlens)]

    def run(*tokens_and_state):
        *tokens, state = tokens_and_state
        bounds = torch.tensor(cu_seqlens).int()
        return delta_rule(*tokens, scale=0.7, initial_state=state, return_state=True, cu_seqlens=bounds)

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
        draw(st.sampled_from(DECAYS)),
        cu_seqlens,
    )
    assert_torch_equals_reference(inputs, (torch.float64, 1e-11), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("decay", "chunk", "recurrent"),
    [
        ("head", qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule),
        ("channel", kimi.chunk_kimi_delta_attention, kimi.recurrent_kimi_delta_attention),
    ],
)
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_equals_transformers(name, decay, chunk, recurrent):
    q, k, v, beta, g, state = (x.float() for x in make_inputs(2, 100, 4, 4, 8, 6, decay))
    with backend(name):
        ours = delta_rule(q, k, v, beta, g, scale=8**-0.5, initial_state=state, return_state=True)
    for theirs in (chunk, recurrent):
        # Not the wrapper, which gives a CPU's tensors to fla's kernels where fla is installed.
        expected = unwrap(theirs)(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
        assert relative_error(ours[0], expected[0]) < 2e-6 and relative_error(ours[1], expected[1]) < 2e-6


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_equals_the_chunked_functions_of_fla(decay):
    """Its recurrent ones are in test_library.py."""
    pytest.importorskip("fla", reason="fla-core (extra fla) is not installed")
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule
    from fla.ops.kda.naive import naive_chunk_kda

    theirs = naive_chunk_gated_delta_rule if decay == "head" else naive_chunk_kda
    q, k, v, beta, g, state = (x.float() for x in make_inputs(2, 128, 4, 4, 8, 6, decay))
    ours = delta_rule(q, k, v, beta, g, scale=0.3, initial_state=state, return_state=True)
    expected = theirs(q, k, v, beta=beta, g=g, scale=0.3, initial_state=state, output_final_state=True)
    assert relative_error(ours[0], expected[0]) < 2e-6 and relative_error(ours[1], expected[1]) < 2e-6


@pytest.mark.parametrize("groups", [1, 4])
def test_reference_counts_its_flops(groups):
    q = torch.randn(2, 7, groups, 8)
    with backend("reference"), FlopCounterMode(display=False) as counter:
        delta_rule(q, q, torch.randn(2, 7, 4, 16), torch.rand(2, 7, 4))
    assert counter.get_total_flops() == 2 * 7 * 4 * (6 * 8 * 16)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_backward_keeps_no_score_matrices(decay):
    """Saved for backward: the inputs and one state per chunk, nothing of size length x chunk."""
    length, heads, dim = 1024, 2, 16
    *tokens, _ = (x.float().requires_grad_() for x in make_inputs(1, length, heads, heads, dim, dim, decay))
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        delta_rule(*tokens)
    inputs = sum(x.nbytes for x in tokens) + tokens[0].nbytes + 2 * tokens[4].nbytes  # scaled, clamped and its mask
    states = length // 64 * heads * dim * dim * 4
    assert sum(sizes.values()) < 1.2 * (inputs + states)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 30, 30, 31, 100]])
def test_compiles_into_one_graph(cu_seqlens, decay):
    inputs = [x.float().requires_grad_() for x in make_inputs(1, 100, 1, 2, 4, 4, decay, cu_seqlens)]
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)

    def run(*inputs):
        options = dict(initial_state=inputs[5], return_state=True, cu_seqlens=cu_seqlens)
        out, final = delta_rule(*inputs[:5], scale=0.5, **options)
        return out.sin().sum() + final.cos().sum()

    expected = run(*inputs)
    # aot_eager traces and lowers forward and backward as inductor would, without half a minute of C++ compilation.
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    assert relative_error(got, expected) < 1e-5
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 5, 70]])
def test_operator_contracts(decay, cu_seqlens):
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    inputs = [x.requires_grad_() for x in make_inputs(1, 70, 1, 2, 4, 4, decay, cu_seqlens)]
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(chunked._forward, (*inputs, cu_seqlens, True), test_utils=utils)


def test_shapes_on_the_meta_device():
    q, v = torch.empty(2, 100, 2, 8, device="meta"), torch.empty(2, 100, 4, 6, device="meta")
    out, state = delta_rule(q, q, v, v[..., 0], return_state=True)
    assert out.shape == (2, 100, 4, 6) and state.shape == (2, 4, 8, 6) and out.device.type == "meta"


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("length", [1, 150])
def test_no_rows_at_all(length, decay):
    inputs = [x.requires_grad_() for x in make_inputs(0, length, 1, 2, 4, 6, decay)]
    out, state = delta_rule(*inputs[:5], initial_state=inputs[5], return_state=True)
    (out.sum() + state.sum()).backward()
    assert out.shape == (0, length, 2, 6) and state.shape == (0, 2, 4, 6)
    assert all(x.grad.shape == x.shape for x in inputs)


def test_mixed_precision_is_the_widest_and_out_is_like_v():
    q, k, v, beta, g, _ = make_inputs(1, 70, 1, 2, 4, 4, "head")
    out, state = delta_rule(q.bfloat16(), k.bfloat16(), v.float(), beta, g, return_state=True)
    assert out.dtype == state.dtype == torch.float32
    assert relative_error(out, delta_rule(q, k, v, beta, g)) < 1e-6


def test_there_is_no_kernel_of_ours():
    """On a GPU it is fla's or the chunked PyTorch, and the choice says so."""
    assert backends("delta_rule") == ("reference", "torch", "library")
    q = torch.zeros(1, 3, 2, 16)
    with (
        pytest.raises(ValueError, match="delta_rule cannot run on backend 'triton': it is not implemented; use"),
        backend("triton"),
    ):
        delta_rule(q, q, q, q[..., 0])
    shapes = {"q": (1, 64, 2, 64), "k": (1, 64, 2, 64), "v": (1, 64, 2, 64), "beta": (1, 64, 2)}
    choice = explain("delta_rule", shapes, torch.float32, "cuda")
    assert choice.backend == "torch" and set(choice.others) == {"library"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 4)}, "q must be"),
        ({"q": torch.zeros(2, 0, 2, 4)}, "at least one token"),
        ({"k": torch.zeros(2, 5, 2, 3)}, "k must be shaped like q"),
        ({"v": torch.zeros(2, 6, 4, 3)}, r"v must be \[2, 5, heads, value_dim\]"),
        ({"v": torch.zeros(2, 5, 3, 3)}, "v's 3 heads must be a multiple of q's 2"),
        ({"beta": torch.zeros(2, 5, 2)}, r"beta must be \[2, 5, 4\], got \[2, 5, 2\]"),
        ({"log_decay": torch.zeros(4)}, r"log_decay must be \[2, 5, 4\]"),
        ({"log_decay": torch.zeros(2, 5, 4, 3)}, r"or \[2, 5, 4, 4\] \(per channel"),
        ({"initial_state": torch.zeros(2, 4, 3, 4)}, r"initial_state must be \[2, 4, 4, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "batch of 1"),
    ],
)
def test_wrong_arguments(changes, message):
    arguments = {
        "q": torch.zeros(2, 5, 2, 4),
        "k": torch.zeros(2, 5, 2, 4),
        "v": torch.zeros(2, 5, 4, 3),
        "beta": torch.zeros(2, 5, 4),
    } | changes
    with pytest.raises(ValueError, match=message) as error:
        delta_rule(**arguments)
    assert "\n" not in str(error.value)
