"""zoo/ops/infini_attention/kernels.py: outputs and gradients against the float64 reference, and what the compiler makes
of the kernels."""

from itertools import pairwise

import pytest
import torch

from tests.ops import aot
from tests.ops.helpers import DEVICE, poisoned_memory, relative_error
from tests.ops.test_infini_attention import NAMES, SEGMENT, UPDATES, call, empty, make_inputs, masks
from tests.ops.test_linear_attention_kernels import interpreter as interpreter
from zoo.ops import backend, backends, infini_attention

kernels = pytest.importorskip("zoo.ops.infini_attention.kernels")

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}
DOCUMENTS = [0, 0, 1, 17, 17, 33, 65, 66, 90, 90]


def outputs_and_gradients(name, inputs, dtype, through=("out", "memory", "normaliser"), cu_seqlens=None, **options):
    """{"out", "memory", "normaliser", and the gradient of each input}; gate and memory at least float32."""
    device = "cpu" if name == "reference" else DEVICE
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        n: x.detach().to(device, wide if n in ("gate", "M", "z") else dtype, copy=True).requires_grad_()
        for n, x in inputs.items()
    }
    if cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"].to(device)
    with backend(name):
        out, m, z = call(leaves, **options)
    assert out.dtype == dtype and m.dtype == z.dtype == wide
    results = {"out": out, "memory": m, "normaliser": z}
    generator = torch.Generator().manual_seed(1)
    d_results = {n: torch.randn(x.shape, generator=generator).bfloat16().to(x) for n, x in results.items()}
    # What no token reaches has no gradient at all on one backend and zeros on another.
    loss = sum((results[n] * d_results[n]).sum() for n in through)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return results | {f"d_{n}": x for n, x in zip(leaves, gradients, strict=True)}


def check(inputs, dtype=torch.float32, **options):
    expected = outputs_and_gradients("reference", inputs, torch.float64, **options)
    with poisoned_memory():
        got = outputs_and_gradients("triton", inputs, dtype, **options)
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_the_kernels_are_there():
    assert backends("infini_attention") == ("reference", "torch", "triton")


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(dtype, update):
    check(make_inputs(2, 41, 4, 2, 16, 24), dtype, update=update)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("length", [2, 15, 16, 17, 32, 33])
def test_lengths_from_an_empty_memory(length, update):
    check(empty(make_inputs(1, length, 2, 2, 6, 5)), update=update)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("segment", [1, 5, 32, 33, 70])
def test_segments_beside_the_tile(segment, update):
    check(make_inputs(1, 71, 1, 1, 6, 5), update=update, segment=segment)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("heads", "kv_heads", "shared"), [(3, 3, False), (6, 2, True), (4, 1, True)])
def test_grouped_heads(heads, kv_heads, shared, update):
    inputs = make_inputs(2, 35, heads, kv_heads, 6, 5, shared=shared)
    check(inputs, update=update)
    check(empty(inputs), update=update)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(5, 40), (40, 16), (20, 3)])
def test_head_dims(key_dim, value_dim):
    check(make_inputs(1, 35, 2, 1, key_dim, value_dim), update="delta")


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("past", "length"), [(15, 2), (3, 13), (3, 14), (9, 40)])
def test_queries_align_with_the_last_keys(past, length, update):
    check(make_inputs(2, length, 4, 2, 6, 5, past=past), update=update)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_documents(dtype, update):
    check(make_inputs(1, 90, 4, 2, 6, 5, rows=9), dtype, update=update, cu_seqlens=DOCUMENTS)


@pytest.mark.parametrize("update", UPDATES)
def test_packed_documents_equal_each_alone(update):
    inputs = {n: x.float().to(DEVICE) for n, x in make_inputs(1, 90, 4, 2, 6, 5, rows=9).items()}
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32, device=DEVICE)
    with backend("triton"), poisoned_memory():
        out, m, z = call(inputs, update=update, cu_seqlens=cu_seqlens)
        for n, (start, end) in enumerate(pairwise(DOCUMENTS)):
            if start == end:
                assert torch.equal(m[n], inputs["M"][n]) and torch.equal(z[n], inputs["z"][n])
                continue
            own = {x: inputs[x][:, start:end] for x in ("q", "k", "v", "q_mem", "k_mem")}
            own |= {"gate": inputs["gate"], "M": inputs["M"][n : n + 1], "z": inputs["z"][n : n + 1]}
            alone = call(own, update=update)
            for got, wanted in zip((out[:, start:end], m[n : n + 1], z[n : n + 1]), alone, strict=True):
                assert relative_error(got, wanted) < 1e-6


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("past", "length"), [(0, 9), (0, 50), (7, 45)])
def test_padded_rows(past, length, update):
    inputs = make_inputs(7, length, 4, 2, 6, 5, past=past)
    inputs["z"][1], inputs["M"][1] = 0, 0  # rows fill at different times
    check(inputs, update=update, key_mask=masks(past, length))


@pytest.mark.parametrize("update", UPDATES)
def test_rows_of_padding_alone_leave_the_memory(update):
    inputs = make_inputs(7, 9, 4, 2, 6, 5)
    out, m, z = call(inputs, update=update, key_mask=torch.zeros(inputs["q"].shape[:2], dtype=torch.bool))
    assert not out.any() and torch.equal(m, inputs["M"]) and torch.equal(z, inputs["z"])


def test_masked_tokens_count_for_nothing():
    mask = masks(7, 45)
    inputs = make_inputs(7, 45, 4, 2, 6, 5, past=7)
    garbage = {n: x.clone() for n, x in inputs.items()}
    for n in ("q", "k", "v", "q_mem", "k_mem"):
        garbage[n][~mask[:, 52 - garbage[n].shape[1] :]] = -1e4
    plain, other = (
        outputs_and_gradients("triton", x, torch.float32, key_mask=mask, update="delta") for x in (inputs, garbage)
    )
    assert not other["out"][~mask[:, 7:]].any()
    for n, x in plain.items():
        assert torch.equal(other[n], x), n


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("through", ["out", "memory", "normaliser"])
def test_one_result_alone(through, update):
    check(make_inputs(1, 40, 2, 1, 6, 5), update=update, through=(through,))


@pytest.mark.parametrize("wanted", NAMES)
def test_one_input_alone_needs_a_gradient(wanted):
    gradients = []
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        inputs = {n: x.to(DEVICE, dtype) for n, x in make_inputs(1, 40, 2, 1, 6, 5).items()}
        inputs[wanted].requires_grad_()
        with backend(name):
            out, *_ = call(inputs, update="delta")
        gradients += torch.autograd.grad(out.square().sum(), inputs[wanted])
    assert relative_error(gradients[1], gradients[0]) < TOLERANCE[torch.float32]


def test_very_negative_features_are_not_rounded_to_nothing():
    """ELU + 1 in float32 is 0 below -17: with no epsilon, 0 / 0."""
    inputs = empty(make_inputs(1, 40, 2, 2, 6, 5))
    for n in ("q_mem", "k_mem"):
        inputs[n] = inputs[n] - 25
    check(inputs, update="delta")


def test_a_second_run_gives_the_same_bits():
    inputs = make_inputs(1, 90, 4, 2, 6, 5, rows=9)
    first, second = (
        outputs_and_gradients("triton", inputs, torch.bfloat16, update="delta", cu_seqlens=DOCUMENTS) for _ in range(2)
    )
    assert all(torch.equal(second[n], x) for n, x in first.items())


@torch.no_grad()
def test_pieces_equal_the_whole():
    """Chunked prefill, then one token at a time; what is carried is the memory and the unfinished segment."""
    inputs = {n: x.float().to(DEVICE) for n, x in make_inputs(2, 75, 4, 2, 6, 5, shared=True).items()}
    with backend("triton"), poisoned_memory():
        whole, *memory = call(inputs, update="delta")
        m, z, begun, pieces = inputs["M"], inputs["z"], 0, []
        for start, end in pairwise([0, 16, 21, 30, 66, 71, 72, 73, 74, 75]):
            piece = {n: inputs[n][:, start:end] for n in ("q", "q_mem")}
            piece |= {n: inputs[n][:, start - begun : end] for n in ("k", "v", "k_mem")}
            out, m, z = call(piece | {"gate": inputs["gate"], "M": m, "z": z}, update="delta")
            pieces.append(out)
            begun = end % SEGMENT
    for got, wanted in zip((torch.cat(pieces, 1), m, z), (whole, *memory), strict=True):
        assert relative_error(got, wanted) < 1e-6


def test_views_into_a_larger_projection():
    """All heads of a token side by side, as projections leave them, and the gradient of the output transposed."""
    inputs, results = make_inputs(2, 40, 2, 2, 6, 6), {}
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        joint = torch.cat([inputs[n] for n in ("q", "k", "v", "q_mem", "k_mem")], -1).to(DEVICE, dtype).requires_grad_()
        parts = dict(zip(("q", "k", "v", "q_mem", "k_mem"), joint.split(6, -1), strict=True))
        memory = {n: inputs[n].to(DEVICE, dtype) for n in ("gate", "M", "z")}
        with backend(name):
            out, *_ = call(parts | memory, update="delta")
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out).mT.contiguous().mT
        results[name] = [out, *torch.autograd.grad(out, [joint], d_out)]
    assert max(map(relative_error, results["triton"], results["reference"])) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("cu_seqlens", [None, [0, 33, 33, 40]])
@pytest.mark.parametrize("delta", [False, True])
def test_operator_contracts(delta, cu_seqlens):
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    rows = 1 if cu_seqlens is None else 3
    inputs = {n: x.to(DEVICE).float() for n, x in make_inputs(1, 40, 2, 1, 6, 5, rows=rows, shared=True).items()}
    local = torch.randn(1, 40, 2, 5, device=DEVICE)
    tensors = [local, *(inputs[n] for n in ("q_mem", "k_mem", "v", "gate", "M", "z"))]
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*(x.requires_grad_() for x in tensors), SEGMENT, delta, cu_seqlens)
    torch.library.opcheck(kernels._operator, arguments, test_utils=utils)
    out, m, z, *between = (x.detach() for x in kernels._operator(*arguments))
    tensors = [x.detach() for x in tensors[:5]]
    arguments = (out, m, z, *tensors, *between, SEGMENT, delta, cu_seqlens)
    torch.library.opcheck(kernels._backward_operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("update", UPDATES)
def test_compiles_into_one_graph(update):
    inputs = {n: x.float().to(DEVICE).requires_grad_() for n, x in make_inputs(1, 40, 2, 1, 6, 5).items()}

    def run(*tensors):
        with backend("triton"):
            return sum(x.sin().sum() for x in call(dict(zip(inputs, tensors, strict=True)), update=update))

    leaves = list(inputs.values())
    expected = run(*leaves)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert relative_error(got, expected) < 1e-6
    assert max(map(relative_error, *(torch.autograd.grad(x, leaves) for x in (got, expected)))) < 1e-6


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((1, 3, 1, 16), torch.float64, "float64 inputs"), ((1, 3, 1, 272), torch.float32, "head dims above 256")],
)
def test_refusals(shape, dtype, message):
    x = torch.zeros(shape, dtype=dtype, device=DEVICE)
    with backend("triton"), pytest.raises(ValueError, match=f"{message}; use reference, torch, auto"):
        infini_attention(x, x, x, torch.zeros(1, device=DEVICE), segment=2)


def launch():
    """Both updates in bfloat16 at the head dims of large models, in float32, and of packed documents."""
    for dtype, key_dim, value_dim, cu_seqlens in (
        (torch.bfloat16, 128, 128, None),
        (torch.bfloat16, 256, 64, torch.tensor([0, 100, 128], dtype=torch.int32)),
        (torch.float32, 128, 128, None),
        (torch.float16, 64, 64, None),
    ):
        documents = 1 if cu_seqlens is None else 2
        q, k = torch.zeros(1, 128, 4, key_dim, dtype=dtype), torch.zeros(1, 128, 2, key_dim, dtype=dtype)
        local, v = torch.zeros(1, 128, 4, value_dim, dtype=dtype), torch.zeros(1, 128, 2, value_dim, dtype=dtype)
        gate, m, z = torch.zeros(4), torch.zeros(documents, 2, key_dim, value_dim), torch.zeros(documents, 2, key_dim)
        for delta in (False, True):
            out, m, z, *between = kernels._forward(local, q, k, v, gate, m, z, 64, delta, cu_seqlens)
            kernels._backward(out, m, z, local, q, k, v, gate, *between, 64, delta, cu_seqlens)


def test_compiles_for_an_h100():
    compiled = aot.in_a_process(__name__, "launch")
    assert {kernel.name for kernel in compiled} == {
        "_read_kernel", "_weights_kernel", "_features_kernel", "_sum_kernel", "_chain_kernel"
    }  # fmt: skip
    for kernel in compiled:
        # Two programs fit a multiprocessor at least; a number or two may be on the stack.
        assert kernel.shared <= aot.SHARED_LIMIT // 2 and kernel.spilled <= 16, kernel
