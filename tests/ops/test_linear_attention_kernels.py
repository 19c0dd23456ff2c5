"""zoo/ops/linear_attention/kernels.py: outputs and gradients against the float64 recurrence, and what the compiler
makes of the kernels."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.ops import aot
from tests.ops.helpers import DEVICE, poisoned_memory, relative_error
from tests.ops.test_linear_attention import NAMES, make_inputs
from zoo.ops import backend, linear_attention

kernels = pytest.importorskip("zoo.ops.linear_attention.kernels")

# The gradient of a head's decay is the worst: a sum over all tokens, of either sign. The interpreter multiplies float16
# exactly; a GPU, in TF32, does not.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 5e-3}
DECAYS = ["none", "head", "token"]
DOCUMENTS = [0, 0, 1, 34, 34, 66, 131, 131]
# Float32 in tiles of that size exists in these tests only; for a GPU, ptxas takes minutes for them.
COMPILES_FOR_MINUTES = pytest.mark.skipif(DEVICE == "cuda", reason="compiled, it takes minutes; interpreted it is run")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """What Triton 3.6's interpreter lacks: loops over a range of tensors (with NumPy 2.4), products of bfloat16, and
    rounding to it instead of cutting off, which in sums as long as a decay's gradient is another result. And a function
    called in a kernel does not patch the language each time, which takes half of the time."""
    from triton.runtime import interpreter

    patch, dot, convert = (
        interpreter._patch_lang_tensor,
        interpreter.InterpreterBuilder.create_dot,
        interpreter._convert_float,
    )

    def patch_and_index(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    def widened(data):
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def dot_of_float32(self, *operands):
        a, b = (
            interpreter.TensorHandle(widened(x.data), interpreter.tl.float32) if x.dtype.scalar.name == "bf16" else x
            for x in operands[:2]
        )
        return dot(self, a, b, *operands[2:])

    def convert_rounding(data, source, target, rounding_mode):
        if (source.name, target.name) == ("fp32", "bf16"):
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        if (source.name, target.name) == ("bf16", "fp32"):
            return widened(data)
        return convert(data, source, target, rounding_mode)

    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_index)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_float32)
    monkeypatch.setattr(interpreter, "_convert_float", convert_rounding)


def outputs_and_gradients(name, inputs, dtype, *, scale=1.0, cu_seqlens=None, through=("out", "state")):
    """{"out", "state", and the gradient of each input}; q, k, v in dtype, the rest at least float32."""
    device = "cpu" if name == "reference" else DEVICE
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        n: x.detach().to(device, dtype if n in "qkv" else wide, copy=True).requires_grad_()
        for n, x in zip(NAMES, inputs, strict=True)
        if x is not None
    }
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    with backend(name):
        out, state = linear_attention(**leaves, scale=scale, return_state=True, cu_seqlens=cu)
    assert out.dtype == dtype and state.dtype == wide
    results = {"out": out, "state": state}
    generator = torch.Generator().manual_seed(1)
    d_results = {n: torch.randn(x.shape, generator=generator).bfloat16().to(x) for n, x in results.items()}
    gradients = torch.autograd.grad(
        [results[n] for n in through],
        list(leaves.values()),
        [d_results[n] for n in through],
        allow_unused=True,
        materialize_grads=True,
    )
    return results | {f"d_{n}": x for n, x in zip(leaves, gradients, strict=True)}


def check(inputs, dtype=torch.float32, tolerance=None, **options):
    expected = outputs_and_gradients("reference", inputs, torch.float64, **options)
    with poisoned_memory():
        got = outputs_and_gradients("triton", inputs, dtype, **options)
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) < (tolerance or TOLERANCE[dtype]), errors


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(dtype, decay):
    check(make_inputs(1, 70, 1, 2, 16, 24, decay), dtype, scale=0.4)


@pytest.mark.parametrize("decay", DECAYS)
def test_groups_and_rows(decay):
    check(make_inputs(2, 35, 2, 4, 16, 16, decay), scale=0.4)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 97])
def test_lengths(length):
    check(make_inputs(1, length, 1, 2, 16, 16, "token"))
    check(make_inputs(1, length, 1, 2, 16, 16, "head"))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(5, 80), (80, 16), (20, 3)])
def test_head_dims(key_dim, value_dim):
    check(make_inputs(1, 35, 1, 1, key_dim, value_dim, "token"))


@COMPILES_FOR_MINUTES
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 128), (80, 96), (256, 64), (64, 256), (144, 160)])
def test_head_dims_with_the_tiles_of_bfloat16(key_dim, value_dim, monkeypatch):
    """Float32 numbers, so that the bound is sharp."""
    monkeypatch.setattr(kernels, "FLOAT32", kernels.WGMMA)
    check(make_inputs(1, 70, 1, 1, key_dim, value_dim, "token"))


def test_bfloat16_with_its_own_tiles():
    check(make_inputs(1, 130, 1, 2, 64, 80, "token"), torch.bfloat16)
    check(make_inputs(1, 130, 1, 2, 64, 80, "head"), torch.bfloat16)


@torch.no_grad()
def test_bfloat16_does_not_drift():
    length = 20_000 if DEVICE == "cuda" else 8_000
    q, k, v, g, _ = make_inputs(1, length, 1, 1, 64, 64, "head", weakest=-7.0, strongest=-7.0)
    with backend("torch"):
        expected = linear_attention(q, k, v, g, return_state=True)
    q, k, v, g = (x.to(DEVICE) for x in (q.bfloat16(), k.bfloat16(), v.bfloat16(), g.float()))
    with backend("triton"):
        out, state = linear_attention(q, k, v, g, return_state=True)
    assert relative_error(out, expected[0]) < 4e-3
    assert relative_error(out[:, -500:], expected[0][:, -500:]) < 4e-3
    assert relative_error(state, expected[1]) < 4e-3


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_several_heads_in_a_program(decay, programs, monkeypatch):
    """All four heads of a group, and two by two: dq and dk then come in two parts."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(make_inputs(1, 40, 2, 8, 16, 16, decay), scale=0.4)


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS])
def test_documents_in_segments(cu_seqlens, decay, monkeypatch):
    monkeypatch.setattr(kernels, "MIN_SEGMENT", 1)
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    rows, heads = (2, 1) if cu_seqlens is None else (1, 2)
    check(make_inputs(rows, 131, 1, heads, 16, 16, decay, cu_seqlens), scale=0.4, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_documents(decay):
    check(make_inputs(1, 131, 1, 2, 16, 16, decay, DOCUMENTS), cu_seqlens=DOCUMENTS)


def test_packed_documents_equal_each_alone():
    inputs = make_inputs(1, 131, 1, 1, 16, 16, "token", DOCUMENTS)
    packed = outputs_and_gradients("triton", inputs, torch.float32, cu_seqlens=DOCUMENTS, through=("out",))
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(packed["out"].shape, generator=generator).bfloat16().to(packed["out"])
    with backend("triton"):
        for n, (start, end) in enumerate(pairwise(DOCUMENTS)):
            if start == end:
                assert torch.equal(packed["state"][n].cpu(), inputs[4][n].float())
                continue
            alone = [x[:, start:end].to(DEVICE, torch.float32).requires_grad_() for x in inputs[:4]]
            entering = inputs[4][n : n + 1].to(DEVICE, torch.float32).requires_grad_()
            out, state = linear_attention(*alone, initial_state=entering, return_state=True)
            assert torch.equal(packed["out"][:, start:end], out)
            assert torch.equal(packed["state"][n : n + 1], state)
            gradients = torch.autograd.grad(out, [*alone, entering], d_out[:, start:end])
            for name, gradient in zip(NAMES[:4], gradients, strict=False):
                assert torch.equal(packed[f"d_{name}"][:, start:end], gradient)
            assert torch.equal(packed["d_initial_state"][n : n + 1], gradients[4])


@pytest.mark.parametrize("through", ["out", "state"])
def test_one_result_alone(through):
    check(make_inputs(1, 40, 1, 1, 16, 16, "token"), through=(through,))


@pytest.mark.parametrize(("weakest", "strongest"), [(-16.1, 3.4), (3.3, 3.4), (-16.1, -16.0)])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_log_decays_from_minus_30_to_minus_a_ten_millionth(decay, weakest, strongest):
    check(make_inputs(1, 40, 1, 2, 16, 16, decay, weakest=weakest, strongest=strongest), tolerance=3e-6)


@COMPILES_FOR_MINUTES
def test_weak_decay_between_strong_ones_keeps_its_precision(monkeypatch):
    """Sums of strong decays are near -1,900 in a chunk of 64, where float32 would lose the weak ones among them."""
    monkeypatch.setattr(kernels, "FLOAT32", kernels.WGMMA)
    inputs = make_inputs(1, 70, 1, 1, 16, 16, "token")
    inputs[3][:] = -30.0
    inputs[3][:, 1::2] = -1e-3
    check(inputs)


@pytest.mark.parametrize("decay", DECAYS)
@torch.no_grad()
def test_pieces_equal_the_whole(decay):
    """Chunked prefill, then one token at a time."""
    q, k, v, g, state = (
        None if x is None else x.to(DEVICE, torch.float32) for x in make_inputs(2, 45, 1, 1, 20, 24, decay)
    )
    with backend("triton"):
        whole, final = linear_attention(q, k, v, g, scale=0.4, initial_state=state, return_state=True)
        pieces = []
        with poisoned_memory():
            for start, end in [(0, 32), (32, 42), (42, 43), (43, 44), (44, 45)]:
                piece = g[:, start:end] if decay == "token" else g
                out, state = linear_attention(
                    *(x[:, start:end] for x in (q, k, v)), piece, scale=0.4, initial_state=state, return_state=True
                )
                pieces.append(out)
    assert relative_error(torch.cat(pieces, dim=1), whole) < 5e-7
    assert relative_error(state, final) < 5e-7


@pytest.mark.parametrize("length", [1, 35])
def test_views_into_a_larger_projection(length):
    """q and v interleaved per head, k with its heads first; the gradient of the output comes transposed."""
    q, k, v, g, _ = make_inputs(2, length, 2, 2, 16, 16, "token")
    results = {}
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        joint = torch.cat([q, v], -1).to(DEVICE, dtype).requires_grad_()
        heads_first = k.transpose(1, 2).contiguous().to(DEVICE, dtype).requires_grad_()
        decay = torch.stack([g, g], -1).to(DEVICE, dtype).requires_grad_()
        leaves = joint, heads_first, decay
        inputs = joint[..., :16], heads_first.transpose(1, 2), joint[..., 16:], decay[..., 1]
        with backend(name):
            out = linear_attention(*inputs)
            d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out).mT.contiguous().mT
            results[name] = [out, *torch.autograd.grad(out, leaves, d_out)]
            with torch.no_grad():
                results[name].append(linear_attention(*inputs))
    assert max(map(relative_error, results["triton"], results["reference"])) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 1, 1, 48), (2**30, 48, 48, 1)), ((1, 4, 1, 48), (48, 2**30, 48, 1)), ((1, 2, 4, 48), (48, 48, 2**30, 1))],
    ids=["rows", "tokens", "heads"],
)
@torch.no_grad()
def test_elements_beyond_int32(shape, strides):
    """2^30 elements apart; only those used are ever touched."""
    near = make_inputs(*shape[:2], shape[2], shape[2], 16, 16, "none")[:3]
    far = torch.empty(3 * 2**30 + 96, dtype=torch.bfloat16, device=DEVICE).as_strided(shape, strides)
    far.copy_(torch.cat(near, -1))
    with backend("reference"):
        expected = linear_attention(*near)
    with backend("triton"):
        out = linear_attention(*far.split(16, -1))
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("wanted", NAMES)
def test_one_input_alone_needs_a_gradient(wanted):
    gradients = []
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        inputs = {n: x.to(DEVICE, dtype) for n, x in zip(NAMES, make_inputs(1, 20, 1, 1, 16, 16, "head"), strict=True)}
        inputs[wanted].requires_grad_()
        with backend(name):
            gradients += torch.autograd.grad(linear_attention(**inputs).square().sum(), inputs[wanted])
    assert relative_error(gradients[1], gradients[0]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("length", [1, 40])
def test_without_gradients_no_operator_is_called(length, monkeypatch):
    monkeypatch.setattr(kernels, "_operator", None)
    q, k, v, g, _ = (x.to(DEVICE).float() for x in make_inputs(1, length, 1, 1, 16, 16, "token"))
    with backend("triton"):
        expected = linear_attention(q, k, v, g)
        with torch.no_grad():
            assert torch.equal(linear_attention(q.requires_grad_(), k, v, g), expected)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 33, 33, 40]])
def test_operator_contracts(cu_seqlens):
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    inputs = [x.to(DEVICE).float().requires_grad_() for x in make_inputs(1, 40, 1, 1, 16, 16, "token", cu_seqlens)]
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for keep_states in (True, False):
        arguments = (*inputs, 0.4, cu_seqlens, keep_states)
        torch.library.opcheck(kernels._operator, arguments, test_utils=utils if keep_states else utils[2:])
    out, state, states = kernels._operator(*inputs, 0.4, cu_seqlens, True)
    arguments = (out, state, *inputs[:4], states, 0.4, cu_seqlens)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    for decay_wanted in (True, False):
        torch.library.opcheck(kernels._backward_operator, (*arguments, decay_wanted), test_utils=("test_faketensor",))


@pytest.mark.parametrize("length", [1, 40])
def test_compiles_into_one_graph(length):
    inputs = tuple(x.to(DEVICE).float().requires_grad_() for x in make_inputs(1, length, 1, 1, 16, 16, "token"))

    def run(*inputs):
        with backend("triton"):
            out, final = linear_attention(*inputs[:4], scale=0.5, initial_state=inputs[4], return_state=True)
        return out.sin().sum() + final.cos().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*inputs), run(*inputs)
    assert relative_error(got, expected) < 1e-6
    assert max(map(relative_error, *(torch.autograd.grad(x, inputs) for x in (got, expected)))) < 1e-6
    with torch.no_grad():
        assert relative_error(compiled(*inputs), expected) < 1e-6


def test_mixed_precision_is_the_widest_and_out_is_like_v():
    q, k, v, g, _ = (x.to(DEVICE) for x in make_inputs(1, 20, 1, 1, 16, 16, "head"))
    with backend("triton"):
        out = linear_attention(q.bfloat16(), k.half(), v.bfloat16(), g.float())
    with backend("reference"):
        expected = linear_attention(q, k.half().double(), v, g)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) < 3e-3


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((1, 3, 1, 16), torch.float64, "float64 inputs"), ((1, 3, 1, 272), torch.float32, "head dims above 256")],
)
def test_refusals(shape, dtype, message):
    x = torch.zeros(shape, dtype=dtype, device=DEVICE)
    with backend("triton"), pytest.raises(ValueError, match=f"{message}; use reference, torch, auto"):
        linear_attention(x, x, x)


def launch():
    """The kernels of Lightning attention (MiniMax-Text-01), of Mamba-2 with several heads to a program, and of the
    largest head dims; and none of their products takes a computed tile on the left, see kernels.py."""
    from triton.runtime.jit import JITFunction

    run, compiled = JITFunction.run, []

    def keep(*args, **kwargs):
        compiled.append(run(*args, **kwargs))

    JITFunction.run = keep
    for groups, heads, key_dim, value_dim, per_token, length in (
        (4, 4, 128, 128, False, 64),
        (1, 64, 128, 64, True, 64 * 64),
        (4, 4, 256, 256, True, 64),
    ):
        q = torch.zeros(1, length, groups, key_dim, dtype=torch.bfloat16)
        v = torch.zeros(1, length, heads, value_dim, dtype=torch.bfloat16)
        log_decay = torch.zeros(1, length, heads) if per_token else torch.zeros(heads)
        state = torch.zeros(1, heads, key_dim, value_dim)
        out, state, states = kernels._forward(q, q, v, log_decay, state, 1.0, None, True)
        kernels._backward(out, state, q, q, v, log_decay, states, 1.0, None, per_token)
        token = [x[:, :1] for x in (q, q, v)]
        kernels._forward(*token, log_decay[:, :1] if per_token else log_decay, state, 1.0, None, False)
    for kernel in compiled:
        for line in kernel.asm["ptx"].splitlines():
            # wgmma's operands: the result's registers in braces, then the left-hand one's in braces if it has any.
            assert "wgmma.mma_async" not in line or line.count("{") == 1, line


def test_compiles_for_an_h100():
    compiled = aot.in_a_process(__name__, "launch")
    assert {kernel.name for kernel in compiled} == {
        "_walk_kernel", "_chain_kernel", "_mix_kernel", "_gradient_kernel", "_step_kernel"
    }  # fmt: skip
    for kernel in compiled:
        # Two programs fit a multiprocessor at least.
        assert kernel.shared <= aot.SHARED_LIMIT // 2 and kernel.spilled <= 512, kernel
        assert kernel.spilled == 0 or kernel.name == "_gradient_kernel", kernel


@pytest.mark.parametrize(("asked", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_is_multiplied_in_tf32_only_when_asked(asked, precision):
    """By torch's own switch; `highest` is its default."""
    before = torch.get_float32_matmul_precision()
    q, v, log_decay = torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 2, 16), torch.zeros(2)
    try:
        torch.set_float32_matmul_precision(asked)
        assert kernels._Sizes(q, v, log_decay, None).options["PRECISION"] == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert before == "highest"
