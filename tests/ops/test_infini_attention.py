"""zoo/ops/infini_attention: the segmented backend against the float64 reference, both against the paper's equations."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.helpers import relative_error
from zoo.ops import backend, infini_attention, softmax_attention

NAMES = ("q", "k", "v", "gate", "q_mem", "k_mem", "M", "z")
UPDATES = ("linear", "delta")
SEGMENT = 16


def make_inputs(batch, length, heads, kv_heads, key_dim, value_dim, past=0, rows=None, shared=False):
    """float64 inputs, rounded to bfloat16 so that every precision starts from the same numbers; `shared` gives one
    memory for each kv head."""
    torch.manual_seed(length)
    rows, memories = rows or batch, kv_heads if shared else heads

    def rounded(*shape):
        return torch.randn(shape).bfloat16().double()

    return {
        "q": rounded(batch, length, heads, key_dim),
        "k": rounded(batch, past + length, kv_heads, key_dim),
        "v": rounded(batch, past + length, kv_heads, value_dim),
        "gate": rounded(heads),
        "q_mem": rounded(batch, length, heads, key_dim),
        "k_mem": rounded(batch, past + length, kv_heads, key_dim),
        "M": rounded(rows, memories, key_dim, value_dim),
        "z": rounded(rows, memories, key_dim).exp(),
    }


def call(inputs, **options):
    """`(out, M, z)`; without M, from an empty memory."""
    tensors = {name: x for name, x in inputs.items() if name not in ("M", "z")}
    memory = (inputs["M"], inputs["z"]) if "M" in inputs else None
    out, (m, z) = infini_attention(
        **tensors, **({"segment": SEGMENT} | options), initial_memory=memory, return_memory=True
    )
    return out, m, z


def outputs_and_gradients(name, inputs, dtype, cu_seqlens=None, **options):
    """{"out", "memory", "normaliser", and each input's gradient} on backend `name`."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        n: x.detach().to(wide if n in ("gate", "M", "z") else dtype, copy=True).requires_grad_()
        for n, x in inputs.items()
    }
    if cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
    with backend(name):
        out, m, z = call(leaves, **options)
    assert out.dtype == dtype and m.dtype == z.dtype == wide
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.to(wide) * torch.randn(x.shape, generator=generator).to(wide)).sum() for x in (out, m, z))
    loss.backward()
    # What no token reads has no gradient at all on one backend and zeros on another.
    gradients = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
    return {"out": out, "memory": m, "normaliser": z} | gradients


def assert_torch_equals_reference(inputs, dtype, tolerance, **options):
    expected = outputs_and_gradients("reference", inputs, torch.float64, **options)
    got = outputs_and_gradients("torch", inputs, dtype, **options)
    errors = {name: relative_error(got[name], x) for name, x in expected.items()}
    assert max(errors.values()) <= tolerance, errors


def empty(inputs):
    return {name: x for name, x in inputs.items() if name not in ("M", "z")}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 31, 32, 33, 61, 64, 80])
def test_torch_equals_reference(length, update):
    inputs = make_inputs(2, length, 4, 2, 6, 5)
    for each in (inputs, empty(inputs)):
        assert_torch_equals_reference(each, torch.float64, 1e-9, update=update)
        assert_torch_equals_reference(each, torch.float32, 1e-5, update=update)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("heads", "kv_heads", "shared"), [(1, 1, False), (3, 3, False), (6, 2, True), (4, 1, True)])
def test_grouped_heads(heads, kv_heads, shared, update):
    inputs = make_inputs(2, 40, heads, kv_heads, 6, 5, shared=shared)
    for each in (inputs, empty(inputs)):
        assert_torch_equals_reference(each, torch.float64, 1e-9, update=update)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("past", "length"), [(1, 1), (15, 1), (14, 1), (15, 2), (3, 13), (3, 14), (9, 40), (15, 49)])
def test_queries_align_with_the_last_keys(past, length, update):
    """The segment was begun by earlier calls."""
    inputs = make_inputs(2, length, 4, 2, 6, 5, past=past)
    for each in (inputs, empty(inputs)):
        assert_torch_equals_reference(each, torch.float64, 1e-9, update=update)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [0, 50],
        [0, 0, 1, 17, 17, 33, 65, 66, 90, 90],
        [0, 0, 16, 48, 50],
        list(range(31)),
    ],
)
def test_packed_documents(cu_seqlens, update):
    inputs = make_inputs(1, cu_seqlens[-1], 4, 2, 6, 5, rows=len(cu_seqlens) - 1)
    for each in (inputs, empty(inputs)):
        assert_torch_equals_reference(each, torch.float64, 1e-9, update=update, cu_seqlens=cu_seqlens)
        assert_torch_equals_reference(each, torch.float32, 1e-5, update=update, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("update", UPDATES)
def test_packed_documents_equal_each_alone(name, update):
    bounds = [0, 5, 5, 53, 90]
    inputs = make_inputs(1, 90, 4, 2, 6, 5, rows=4)
    with backend(name):
        out, m, z = call(inputs, update=update, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        for n, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                assert torch.equal(m[n], inputs["M"][n]) and torch.equal(z[n], inputs["z"][n])
                continue
            own = {x: inputs[x][:, start:end] for x in ("q", "k", "v", "q_mem", "k_mem")}
            own |= {"gate": inputs["gate"], "M": inputs["M"][n : n + 1], "z": inputs["z"][n : n + 1]}
            for got, wanted in zip(
                (out[:, start:end], m[n : n + 1], z[n : n + 1]), call(own, update=update), strict=True
            ):
                assert relative_error(got, wanted) < 1e-13


def masks(past, length):
    """Rows with padding on the left, on the right, in between, everywhere and nowhere; less than a segment of the past
    is real."""
    mask = torch.ones(7, past + length, dtype=torch.bool)
    mask[0, : past + length // 3] = False
    mask[1, past + length // 2 :] = False
    mask[2, past // 2 : past + length // 4] = False
    mask[3] = False
    mask[4] = torch.arange(past + length) % 3 == 0
    mask[5, 2 * SEGMENT :] = False  # whole segments
    mask[:, : max(0, past - SEGMENT + 1)] = False
    return mask


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    ("past", "length"), [(0, 1), (0, 9), (0, 16), (0, 50), (9, 1), (15, 1), (21, 1), (7, 45), (19, 32)]
)
def test_padded_rows(past, length, update):
    inputs = make_inputs(7, length, 4, 2, 6, 5, past=past)
    inputs["z"][1], inputs["M"][1] = 0, 0  # rows fill at different times
    for each in (inputs, empty(inputs)):
        assert_torch_equals_reference(each, torch.float64, 1e-9, update=update, key_mask=masks(past, length))


def test_a_padded_token_completes_a_segment_of_some_rows():
    inputs = make_inputs(3, 1, 4, 2, 6, 5, past=17)
    mask = torch.ones(3, 18, dtype=torch.bool)
    mask[0, :2], mask[1, :5], mask[2, 4:9] = False, False, False
    for update in UPDATES:
        assert_torch_equals_reference(inputs, torch.float64, 1e-9, update=update, key_mask=mask)
    with backend("torch"):
        _, m, z = call(inputs, key_mask=mask)
    assert (m != inputs["M"]).flatten(1).any(1).tolist() == [True, False, False]
    assert (z != inputs["z"]).flatten(1).any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("value", [1e4, -1e4])
def test_masked_queries_give_zero_and_masked_keys_count_for_nothing(name, value):
    """sigma(-10,000) is 0, and so is what it would be divided by."""
    for past, length in ((0, 9), (0, 50), (9, 1), (15, 1), (7, 45)):
        inputs, mask = make_inputs(7, length, 4, 2, 6, 5, past=past), masks(past, length)
        garbage = {n: x.clone() for n, x in inputs.items()}
        for n in ("q", "k", "v", "q_mem", "k_mem"):
            garbage[n][~mask[:, mask.shape[1] - garbage[n].shape[1] :]] = value
        plain, other = (
            outputs_and_gradients(name, x, torch.float64, key_mask=mask, update="delta") for x in (inputs, garbage)
        )
        assert not other["out"][~mask[:, past:]].any()
        for n, x in plain.items():
            assert torch.equal(other[n], x), n


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("update", UPDATES)
def test_pieces_equal_the_whole(name, update):
    """Chunked prefill, then one token at a time; what is carried is the memory and the unfinished segment."""
    inputs = make_inputs(2, 75, 4, 2, 6, 5, shared=True)
    with backend(name):
        whole, *memory = call(inputs, update=update)
        m, z, begun, pieces = inputs["M"], inputs["z"], 0, []
        for start, end in pairwise([0, 16, 21, 30, 66, 71, 72, 73, 74, 75]):
            piece = {n: inputs[n][:, start:end] for n in ("q", "q_mem")}
            piece |= {n: inputs[n][:, start - begun : end] for n in ("k", "v", "k_mem")}
            out, m, z = call(piece | {"gate": inputs["gate"], "M": m, "z": z}, update=update)
            pieces.append(out)
            begun = end % SEGMENT
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-13
    for got, wanted in zip((m, z), memory, strict=True):
        assert relative_error(got, wanted) < 1e-13


def paper(q, k, v, gate, q_mem, k_mem, update):
    """The paper's equations 4 to 10, one head and one segment after another, with F.elu; written by nobody else."""
    batch, length, heads, key_dim = q.shape
    out = torch.zeros(batch, length, heads, v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            m, z = torch.zeros(key_dim, v.shape[3], dtype=q.dtype), torch.zeros(key_dim, dtype=q.dtype)
            beta = 1 / (1 + math.exp(-gate[h]))
            for s in range(0, length, SEGMENT):
                now = slice(s, s + SEGMENT)
                Q, K, V = q[b, now, h], k[b, now, g], v[b, now, g]
                scores = (Q @ K.T / math.sqrt(key_dim)).masked_fill(
                    torch.ones(len(Q), len(Q)).triu(1).bool(), -math.inf
                )
                dot = scores.softmax(-1) @ V
                sq, sk = F.elu(q_mem[b, now, h]) + 1, F.elu(k_mem[b, now, g]) + 1
                out[b, now, h] = beta * (sq @ m) / (sq @ z)[:, None] + (1 - beta) * dot if s else dot
                known = (sk @ m) / (sk @ z)[:, None] if update == "delta" and s else 0
                m, z = m + sk.T @ (V - known), z + sk.sum(0)
    return out


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("update", UPDATES)
def test_equals_the_equations_of_the_paper(name, update):
    inputs = empty(make_inputs(2, 55, 4, 2, 6, 5))
    with backend(name):
        out, *_ = call(inputs, update=update)
    assert relative_error(out, paper(**inputs, update=update)) < 1e-13


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_one_segment_or_a_closed_gate_is_local_attention(name):
    inputs = empty(make_inputs(2, 55, 4, 2, 6, 5))
    q, k, v = (inputs[n] for n in "qkv")
    with backend(name):
        for gate in (inputs["gate"], torch.full((4,), -torch.inf).double()):
            out, *_ = call(inputs | {"gate": gate}, segment=60)
            assert relative_error(out, softmax_attention(q, k, v)) < 1e-13
        # Closed, with many segments: attention within each of them.
        out, *_ = call(inputs | {"gate": gate})
        cu_seqlens = torch.tensor([0, 16, 32, 48, 55], dtype=torch.int32)
        for row in range(2):
            local = softmax_attention(*(x[row : row + 1] for x in (q, k, v)), cu_seqlens=cu_seqlens)
            assert relative_error(out[row : row + 1], local) < 1e-13


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_an_open_gate_is_the_memory_alone(name):
    """With the gate at infinity and segments of one token, what is read is the mean of all earlier values, weighted by
    sigma(q) sigma(k): linear attention with its normaliser."""
    inputs = empty(make_inputs(1, 30, 2, 2, 6, 5))
    with backend(name):
        out, *_ = call(inputs | {"gate": torch.full((2,), torch.inf).double()}, segment=1)
    weights = torch.einsum("bihk,bjhk->bhij", F.elu(inputs["q_mem"]) + 1, F.elu(inputs["k_mem"]) + 1).tril(-1)
    read = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), inputs["v"])
    assert relative_error(out[:, 1:], read[:, 1:]) < 1e-13
    assert torch.equal(out[:, :1], inputs["v"][:, :1])


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_of_equal_values_linear_gives_these_and_delta_half(name):
    """Linear weights sum to 1. z counts what delta does not write: of two segments and more it gives 1/2."""
    inputs = empty(make_inputs(1, 4 * SEGMENT, 4, 2, 6, 5))
    inputs |= {"v": torch.ones_like(inputs["v"]), "gate": torch.full((4,), torch.inf).double()}
    inputs["q_mem"], inputs["k_mem"] = (torch.zeros_like(inputs[n]) for n in ("q_mem", "k_mem"))
    with backend(name):
        (linear, *_), (delta, *_) = (call(inputs, update=update) for update in UPDATES)
    assert relative_error(linear, torch.ones_like(linear)) < 1e-13
    wanted = torch.tensor([1, 1, 0.5, 0.5]).double().repeat_interleave(SEGMENT)
    assert relative_error(delta, wanted[None, :, None, None].expand_as(delta)) < 1e-13


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_the_delta_update_writes_only_what_is_new(name):
    """A memory that gives exactly the values of all its keys is not changed; the linear one is."""
    torch.manual_seed(0)
    inputs = make_inputs(1, SEGMENT, 2, 2, 6, 5)
    features = F.elu(inputs["k_mem"]) + 1
    inputs["v"] = torch.einsum("bthk,bhkv->bthv", features, inputs["M"])
    inputs["v"] = inputs["v"] / torch.einsum("bthk,bhk->bth", features, inputs["z"])[..., None]
    with backend(name):
        _, m, z = call(inputs, update="delta")
        _, linear, _ = call(inputs)
    assert relative_error(m, inputs["M"]) < 1e-13 and relative_error(linear, inputs["M"]) > 0.1
    assert relative_error(z - inputs["z"], features.sum(1)) < 1e-13


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_without_q_mem_and_k_mem_the_turned_ones_are_taken(name):
    inputs = empty(make_inputs(1, 50, 4, 2, 6, 5))
    turned = {n: x for n, x in inputs.items() if not n.endswith("_mem")}
    with backend(name):
        out, *_ = call(turned)
        wanted, *_ = call(turned | {"q_mem": inputs["q"], "k_mem": inputs["k"]})
        other, *_ = call(inputs)
    assert torch.equal(out, wanted) and relative_error(out, other) > 0.1


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_one_memory_for_each_kv_head_is_the_same_as_copies(name):
    inputs = make_inputs(2, 40, 4, 2, 6, 5, shared=True)
    copies = inputs | {n: inputs[n].repeat_interleave(2, 1) for n in ("M", "z")}
    with backend(name):
        shared, apart = (call(each, update="delta") for each in (inputs, copies))
        _, m, z = call(empty(inputs), update="delta")
    assert relative_error(shared[0], apart[0]) < 1e-13
    for got, wanted in zip(shared[1:], apart[1:], strict=True):
        assert relative_error(got.repeat_interleave(2, 1), wanted) < 1e-13
    assert m.shape == (2, 4, 6, 5) and z.shape == (2, 4, 6)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_very_negative_features_are_not_rounded_to_nothing(name):
    """ELU + 1 in float32 is 0 below -17: with no epsilon, 0 / 0."""
    inputs = {n: x.float() for n, x in empty(make_inputs(1, 40, 2, 2, 6, 5)).items()}
    for n in ("q_mem", "k_mem"):
        inputs[n] = inputs[n] - 25
    with backend(name):
        out, *_ = call(inputs, update="delta")
        wanted, *_ = call({n: x.double() for n, x in inputs.items()}, update="delta")
    assert relative_error(out, wanted) < 1e-5


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("update", UPDATES)
def test_gradcheck(name, update):
    inputs = make_inputs(1, 9, 2, 1, 2, 3, past=2)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def run(*tensors):
        return call(dict(zip(inputs, tensors, strict=True)), update=update, segment=3)

    with backend(name):
        assert torch.autograd.gradcheck(run, leaves)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_shapes(data):
    draw = data.draw
    kv_heads, segment = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    lengths = draw(st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any))
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    inputs = make_inputs(
        1,
        cu_seqlens[-1],
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        rows=len(lengths),
        shared=draw(st.booleans()),
    )
    options = {"segment": segment, "update": draw(st.sampled_from(UPDATES)), "cu_seqlens": cu_seqlens}
    assert_torch_equals_reference(inputs, torch.float64, 1e-9, **options)


@pytest.mark.parametrize("update", UPDATES)
def test_bfloat16_is_near_float64(update):
    assert_torch_equals_reference(make_inputs(2, 80, 4, 2, 16, 16), torch.bfloat16, 2e-2, update=update)


def test_mixed_precision_out_is_like_q():
    inputs = empty(make_inputs(1, 50, 4, 2, 6, 5))
    low = inputs | {"q": inputs["q"].bfloat16(), "k": inputs["k"].bfloat16(), "v": inputs["v"].float()}
    out, m, _ = call({n: x.float() if n.endswith("mem") or n == "gate" else x for n, x in low.items()})
    assert out.dtype == torch.bfloat16 and m.dtype == torch.float32


def test_without_return_memory_the_outputs_are_the_same():
    inputs = empty(make_inputs(1, 48, 4, 2, 6, 5))
    assert torch.equal(infini_attention(**inputs, segment=SEGMENT), call(inputs)[0])


@pytest.mark.parametrize("update", UPDATES)
def test_what_is_kept_for_backward_is_linear_in_the_length(update):
    """Nothing of size length x segment beyond what a token of any length costs."""

    def kept(length):
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        inputs = {n: x.float().requires_grad_() for n, x in empty(make_inputs(1, length, 2, 1, 8, 8)).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            infini_attention(**inputs, segment=512, update=update)
        return sum(sizes.values())

    assert kept(4096) < 2.2 * kept(2048)
    assert kept(4096) < 4096 * 2 * 8 * 4 * 24  # not 4096 x 512 x 2 x 4 bytes


@pytest.mark.parametrize("update", UPDATES)
def test_compiles_into_one_graph(update):
    inputs = {n: x.float().requires_grad_() for n, x in make_inputs(2, 50, 4, 2, 6, 5, past=3).items()}

    def run(*tensors):
        return sum(x.sin().sum() for x in call(dict(zip(inputs, tensors, strict=True)), update=update))

    expected = run(*inputs.values())
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs.values())
    assert relative_error(got, expected) < 1e-5
    leaves = list(inputs.values())
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert relative_error(a, b) < 1e-5


def test_shapes_on_the_meta_device():
    inputs = {n: x.to("meta") for n, x in make_inputs(2, 50, 4, 2, 6, 5).items()}
    out, m, z = call(inputs)
    assert out.shape == (2, 50, 4, 5) and m.shape == (2, 4, 6, 5) and z.shape == (2, 4, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 4)}, "q, k and v must be"),
        ({"q": torch.zeros(2, 6, 4, 3)}, "q must have 1 to 5 tokens"),
        ({"k": torch.zeros(2, 5, 2, 4)}, "k must have q's batch 2 and head_dim 3"),
        ({"v": torch.zeros(2, 4, 2, 3)}, "v must have k's"),
        ({"k": torch.zeros(2, 5, 3, 3), "v": torch.zeros(2, 5, 3, 3)}, "q's 4 heads must be a multiple"),
        ({"gate": torch.zeros(2)}, r"gate must be \[4\]"),
        ({"segment": 0}, "segment must be at least 1"),
        ({"update": "sum"}, "update must be linear or delta"),
        ({"segment": 2, "q": torch.zeros(2, 3, 4, 3)}, r"less than a segment \(2\) of tokens before q's first, got 2"),
        ({"q_mem": torch.zeros(2, 5, 2, 3)}, r"q_mem must be shaped like q, \[2, 5, 4, 3\]"),
        ({"k_mem": torch.zeros(2, 5, 4, 3)}, r"k_mem must be shaped like k, \[2, 5, 2, 3\]"),
        ({"initial_memory": (torch.zeros(2, 3, 3, 3), torch.zeros(2, 3, 3))}, "initial_memory must be"),
        ({"initial_memory": (torch.zeros(2, 4, 3, 3), torch.zeros(2, 2, 3))}, "initial_memory must be"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "batch of 1"),
        ({"key_mask": torch.ones(2, 5)}, "key_mask must be bool"),
        ({"key_mask": torch.ones(2, 5).bool(), "cu_seqlens": torch.tensor([0, 5]).int()}, "exclude each other"),
        ({"q": torch.zeros(2, 3, 4, 3), "cu_seqlens": torch.tensor([0, 5]).int()}, "as many queries as keys"),
    ],
)
def test_wrong_arguments(changes, message):
    arguments = {
        "q": torch.zeros(2, 5, 4, 3), "k": torch.zeros(2, 5, 2, 3), "v": torch.zeros(2, 5, 2, 3),
        "gate": torch.zeros(4), "segment": 4,
    } | changes  # fmt: skip
    with pytest.raises(ValueError, match=message) as error:
        infini_attention(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_the_linear_update_is_a_sum_of_stretches(name):
    """Context parallelism: each stretch writes to an empty memory, and the memory before one is the sum of those before
    it."""
    inputs = empty(make_inputs(1, 6 * SEGMENT, 4, 2, 6, 5))
    stretches = [slice(0, 32), slice(32, 80), slice(80, 96)]
    parts = [{n: x if n == "gate" else x[:, now] for n, x in inputs.items()} for now in stretches]
    with backend(name):
        whole, *memory = call(inputs)
        written = [call(part)[1:] for part in parts]
        before = [torch.zeros_like(x) for x in memory]
        for now, part, own in zip(stretches, parts, written, strict=True):
            out, *_ = call(part | {"M": before[0], "z": before[1]})
            assert relative_error(out, whole[:, now]) < 1e-13
            before = [a + b for a, b in zip(before, own, strict=True)]
    for got, wanted in zip(before, memory, strict=True):
        assert relative_error(got, wanted) < 1e-13
