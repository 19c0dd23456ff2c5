"""The `library` backends: what they refuse, what they hand to the libraries, and on a GPU what comes back.

Without a GPU the libraries cannot run. Stand-ins written from their interfaces take their place, as strict about
layouts and dtypes as they are, and lacking the same gradients; the recurrences themselves are the reference's.
"""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from tests.ops.helpers import DEVICE, relative_error
from zoo import ops
from zoo.ops import dispatch

library = {
    op: importlib.import_module(f"zoo.ops.{op}.library")
    for op in ("linear_attention", "delta_rule", "selective_scan", "causal_conv1d")
}
simple, ssd = (importlib.import_module(f"zoo.ops.linear_attention.{name}") for name in ("simple_gla", "ssd"))
reference = {op: importlib.import_module(f"zoo.ops.{op}.reference") for op in library}
MISSING = {
    "linear_attention": "fla is not installed, nor is mamba_ssm",
    "delta_rule": "fla is not installed",
    "selective_scan": "selective_scan_cuda is not installed",
    "causal_conv1d": "causal_conv1d is not installed",
}
BATCH, HEADS, DIM, CHANNELS, STATE, WIDTH = 2, 4, 16, 16, 4, 4
ROUNDED = 2e-2  # of bfloat16 inputs


def needs_gpu(op):
    """Why the library itself cannot run here, as a mark."""
    missing = dispatch._cannot_run(op, "library", DEVICE)
    return pytest.mark.skipif(missing is not None, reason=f"library of {op}: {missing}")


def inputs(op, length=70, dtype=torch.bfloat16, device="cpu", decay="token", groups=HEADS, width=WIDTH, **more):
    """The implementations' arguments in order, every tensor a leaf with a gradient."""
    torch.manual_seed(0)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=dtype, device=device)

    wide = torch.float32
    if op == "linear_attention":
        shape = (HEADS,) if decay == "head" else (BATCH, length, HEADS)
        given = {
            "q": random(BATCH, length, groups, DIM),
            "k": random(BATCH, length, groups, DIM),
            "v": random(BATCH, length, HEADS, DIM),
            "log_decay": -torch.rand(shape, device=device) * 3,
            "scale": 0.5,
            "initial_state": random(BATCH, HEADS, DIM, DIM, dtype=wide),
            "cu_seqlens": None,
        }
    elif op == "delta_rule":
        shape = (BATCH, length, HEADS) if decay == "token" else (BATCH, length, HEADS, DIM)
        given = {
            "q": random(BATCH, length, groups, DIM),
            "k": torch.nn.functional.normalize(random(BATCH, length, groups, DIM).float(), dim=-1).to(dtype),
            "v": random(BATCH, length, HEADS, DIM),
            "beta": torch.rand(BATCH, length, HEADS, device=device),
            "log_decay": -torch.rand(shape, device=device) * 3,
            "scale": 0.5,
            "initial_state": random(BATCH, HEADS, DIM, DIM, dtype=wide),
            "cu_seqlens": None,
        }
    elif op == "selective_scan":
        given = {
            "u": random(BATCH, length, CHANNELS),
            "delta": torch.rand(BATCH, length, CHANNELS, device=device),
            "A": -torch.rand(CHANNELS, STATE, device=device) - 0.1,
            "B": random(BATCH, length, STATE),
            "C": random(BATCH, length, STATE),
            "D": random(CHANNELS, dtype=wide),
            "initial_state": None,
            "cu_seqlens": None,
        }
    else:
        given = {
            "x": random(BATCH, length, CHANNELS),
            "weight": random(CHANNELS, width),
            "bias": random(CHANNELS, dtype=wide),
            "activation": "silu",
            "initial_state": random(BATCH, CHANNELS, width - 1, dtype=wide).to(dtype).to(wide),
            "cu_seqlens": None,
        }
    given |= more
    for x in given.values():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    return given


def results(function, given, dtype=None):
    """`(out, state)` and the gradients of a random loss of both, by name; with `dtype`, all computed in it."""

    def convert(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad)

    given = {name: convert(x) for name, x in given.items()}
    out, state = function(*given.values())
    torch.manual_seed(1)
    loss = sum((y.double() * torch.randn(y.shape, dtype=torch.float64, device=y.device)).sum() for y in (out, state))
    leaves = {name: x for name, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "state": state} | dict(zip(leaves, found, strict=True))


def check(op, given, limit, function=None):
    """Outputs and every gradient against the float64 reference; returns the relative errors."""
    found = results(function or getattr(library[op], op), given)
    expected = results(getattr(reference[op], op), given, torch.float64)
    errors = {name: relative_error(found[name], ref) for name, ref in expected.items()}
    assert max(errors.values()) < limit, errors
    assert found["state"].dtype == torch.float32
    assert found["out"].dtype == next(iter(given.values())).dtype
    return errors


# Stand-ins


@pytest.fixture
def simple_gla(monkeypatch):
    """fla's two functions, which note how they are called."""
    calls = []

    def stand_in(name, chunk):
        def run(
            q, k, v, g=None, g_gamma=None, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
        ):
            assert q.dtype == k.dtype == v.dtype == torch.bfloat16
            assert q.shape == k.shape and q.shape[:3] == v.shape[:3]
            assert (g is None) != (g_gamma is None)
            calls.append((name, "g" if g_gamma is None else "g_gamma"))
            if g is None:
                assert v.shape[1] % chunk == 0, "an unfinished chunk turns to NaN"
                g = g_gamma.detach().expand(v.shape[:3])
            assert g.shape == v.shape[:3] and output_final_state
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            out, state = reference["linear_attention"].linear_attention(
                *(x.float() for x in (q, k, v)), g, scale, initial_state, cu_seqlens
            )
            return out.to(q.dtype), state

        return run

    module = types.ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = stand_in("chunk", 64)
    module.fused_recurrent_simple_gla = stand_in("recurrent", 1)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    return calls


@pytest.fixture
def fla_delta(monkeypatch):
    """fla's four functions of the delta rule, which note how they are called."""
    calls = []

    def stand_in(name, channels, differentiable):
        def run(*, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
            assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and initial_state.dtype == torch.float32
            assert q.shape == k.shape and v.shape[2] % q.shape[2] == 0 and beta.shape == v.shape[:3]
            assert g.shape == (*v.shape[:3], *q.shape[3:]) if channels else g.shape == v.shape[:3]
            assert output_final_state and (differentiable or not torch.is_grad_enabled())
            calls.append(name)
            out, state = reference["delta_rule"].delta_rule(
                *(x.float() for x in (q, k, v)), beta, g, scale, initial_state, cu_seqlens
            )
            return out.to(q.dtype), state

        return run

    for package, op, channels in (("gated_delta_rule", "gated_delta_rule", False), ("kda", "kda", True)):
        module = types.ModuleType(f"fla.ops.{package}")
        setattr(module, f"chunk_{op}", stand_in(f"chunk_{op}", channels, True))
        setattr(module, f"fused_recurrent_{op}", stand_in(f"fused_recurrent_{op}", channels, False))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return calls


@pytest.fixture
def mamba_ssm(monkeypatch):
    """mamba-ssm's selective_scan_fn, whose last state has no gradient."""
    dtypes = []

    def selective_scan_fn(u, delta, A, B, C, D=None, *, return_last_state=False):
        assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == torch.float32
        assert D is None or D.dtype == torch.float32
        assert u.shape == delta.shape and B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2])
        assert return_last_state and A.is_contiguous()
        dtypes.append(u.dtype)
        inputs = [x.transpose(1, 2).float() for x in (u, delta)], [x.transpose(1, 2).float() for x in (B, C)]
        out, state = reference["selective_scan"].selective_scan(*inputs[0], A, *inputs[1], D, None, None)
        return out.transpose(1, 2).to(u.dtype), state.detach()

    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return dtypes


@pytest.fixture
def ssd_alone(monkeypatch):
    """mamba-ssm's mamba_chunk_scan_combined, and no fla."""
    shapes = []

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, *, initial_states=None, return_final_states=False):
        assert x.dtype == B.dtype == C.dtype == torch.bfloat16 and dt.dtype == A.dtype == torch.float32
        assert dt.shape == x.shape[:3] and A.shape == x.shape[2:3] and B.shape == C.shape
        assert x.shape[2] % B.shape[2] == 0 and return_final_states and initial_states.is_contiguous()
        shapes.append(tuple(x.shape))
        out, state = reference["linear_attention"].linear_attention(
            *(t.float() for t in (C, B, x * dt[..., None])), dt * A, 1.0, initial_states.mT, None
        )
        return out.to(x.dtype), state.mT

    module = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    module.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "_installed", lambda package: package == "mamba_ssm")
    return shapes


@pytest.fixture
def conv(monkeypatch):
    """causal_conv1d_fn in the layout where it takes initial states."""

    def causal_conv1d_fn(x, weight, bias=None, *, initial_states=None, activation=None):
        assert x.stride(1) == 1 and x.stride(2) > 1 and x.shape[1] % 8 == 0
        assert x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0 and x.storage_offset() % 8 == 0
        assert initial_states.dtype == x.dtype and initial_states.stride(1) == 1
        assert bias is None or bias.dtype == weight.dtype
        out, _ = reference["causal_conv1d"].causal_conv1d(
            x.transpose(1, 2).float(), weight, bias, activation, initial_states.float(), None
        )
        return out.to(x.dtype).transpose(1, 2)

    module = types.ModuleType("causal_conv1d")
    module.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("length", [1, 64, 70])
def test_simple_gla(simple_gla, length, decay, groups):
    check("linear_attention", inputs("linear_attention", length, decay=decay, groups=groups), ROUNDED)
    assert simple_gla == [("recurrent" if length < 64 else "chunk", "g")]  # with a gradient: g


@pytest.mark.parametrize(("length", "form"), [(128, "g_gamma"), (70, "g"), (3, "g")])
def test_simple_gla_with_a_constant_decay(simple_gla, length, form):
    given = inputs("linear_attention", length, decay="head")
    given["log_decay"].requires_grad_(False)
    check("linear_attention", given, ROUNDED)
    assert simple_gla[0][1] == form


def test_simple_gla_with_documents(simple_gla):
    cu_seqlens = torch.tensor([0, 64, 64, 128], dtype=torch.int32)
    given = inputs("linear_attention", 128, decay="head", cu_seqlens=cu_seqlens)
    given["log_decay"].requires_grad_(False)
    for name in "qkv":
        given[name] = given[name].detach()[:1].requires_grad_()
    given["initial_state"] = torch.randn(3, HEADS, DIM, DIM, requires_grad=True)
    check("linear_attention", given, ROUNDED)
    assert simple_gla == [("chunk", "g")]


@pytest.mark.parametrize("groups", [1, HEADS])
@pytest.mark.parametrize(("decay", "name"), [("token", "gated_delta_rule"), ("channel", "kda")])
@pytest.mark.parametrize("length", [1, 70])
def test_delta_rule(fla_delta, length, decay, name, groups):
    given = inputs("delta_rule", length, decay=decay, groups=groups)
    check("delta_rule", given, ROUNDED)
    with torch.no_grad():
        library["delta_rule"].delta_rule(*given.values())
    assert fla_delta == [f"chunk_{name}", f"{'fused_recurrent' if length == 1 else 'chunk'}_{name}"]


def test_delta_rule_without_decay(fla_delta):
    given = inputs("delta_rule", 70)
    given["log_decay"] = torch.zeros(HEADS)  # as the op hands on None
    check("delta_rule", given, ROUNDED)
    assert fla_delta == ["chunk_gated_delta_rule"]


@pytest.mark.parametrize("length", [1, 70])
def test_selective_scan(mamba_ssm, length):
    """The state has its gradient, and is not rounded to the inputs' dtype; delta keeps its own precision."""
    given = inputs("selective_scan", length)
    check("selective_scan", given, ROUNDED)
    given["delta"] = given["delta"].detach().bfloat16().requires_grad_()
    errors = check("selective_scan", given, ROUNDED)
    assert errors["state"] < 1e-5
    assert mamba_ssm == [torch.float32, torch.bfloat16]


def test_selective_scan_without_gradients(mamba_ssm):
    given = inputs("selective_scan", D=None)
    with torch.no_grad():
        out, state = library["selective_scan"].selective_scan(*given.values())
        expected, expected_state = reference["selective_scan"].selective_scan(*given.values())
    assert out.shape == expected.shape
    assert relative_error(out, expected) < ROUNDED and relative_error(state, expected_state) < 1e-5


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 70])
def test_causal_conv1d(conv, length, width):
    errors = check("causal_conv1d", inputs("causal_conv1d", length, width=width), ROUNDED)
    assert errors["state"] == 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("columns", [slice(0, 16), slice(1, 17), slice(8, 24)])
@pytest.mark.parametrize("wide", [24, 30])
def test_causal_conv1d_of_a_slice(conv, batch, length, columns, wide):
    """Part of a projection, at any place in it, comes in a layout that the kernel takes."""
    x = torch.randn(batch, length, wide).bfloat16()[..., columns]
    given = inputs("causal_conv1d", length, x=x, activation=None, bias=None)
    given["initial_state"] = given["initial_state"].detach()[:batch].requires_grad_()
    function = library["causal_conv1d"].causal_conv1d
    found = function(*given.values())[0]
    assert relative_error(found, reference["causal_conv1d"].causal_conv1d(*given.values())[0]) < ROUNDED


# Refusals, by shapes and dtypes alone: the packages need not be here

BIG = {"device": "meta", "dtype": torch.bfloat16}
ONE_DOCUMENT = torch.tensor([0, 70], dtype=torch.int32)
REFUSED = [
    ("delta_rule", {"dtype": torch.float32}, "bfloat16 only"),
    ("delta_rule", {"q": torch.zeros(BATCH, 70, HEADS, 257).bfloat16()}, "keys of at most 256"),
    ("selective_scan", {"dtype": torch.float64}, "float64"),
    ("selective_scan", {"delta": torch.zeros(BATCH, 70, CHANNELS).double()}, "float64"),
    ("selective_scan", {"initial_state": torch.zeros(BATCH, CHANNELS, STATE)}, "continue from a state"),
    ("selective_scan", {"cu_seqlens": ONE_DOCUMENT}, "knows no documents"),
    ("selective_scan", {"A": torch.zeros(CHANNELS, 257)}, "states larger than 256, got 257"),
    ("selective_scan", {"u": torch.empty(1, 2**20, 2048, **BIG)}, "too many elements"),
    ("selective_scan", {"u": torch.empty(1, 2**20 - 3, 2048, **BIG)}, "too many elements"),  # with the 4 tokens added
    ("causal_conv1d", {"dtype": torch.float64}, "float64"),
    ("causal_conv1d", {"cu_seqlens": ONE_DOCUMENT}, "no states for documents"),
    ("causal_conv1d", {"weight": torch.zeros(CHANNELS, 5)}, "widths other than 2, 3 and 4, got 5"),
    ("causal_conv1d", {"weight": torch.zeros(CHANNELS, 1)}, "widths other than"),
    ("causal_conv1d", {"x": torch.zeros(BATCH, 70, 12)}, "multiple of 8, got 12"),
    ("causal_conv1d", {"x": torch.empty(1, 2**20, 4096, **BIG)}, "too many elements"),
    ("causal_conv1d", {"x": torch.empty(1, 2**20, 8192, **BIG)[..., :8]}, "too many elements"),
]


@pytest.mark.parametrize(("op", "given", "reason"), REFUSED)
def test_refusals(op, given, reason):
    assert reason in library[op]._refuses(*inputs(op, **given).values())


@pytest.mark.parametrize(
    ("module", "given", "reason"),
    [
        (simple, {"dtype": torch.float32}, "bfloat16 only"),
        (simple, {"dtype": torch.float16}, "bfloat16 only"),
        (simple, {"v": torch.zeros(BATCH, 70, HEADS, 15).bfloat16()}, "even head dims"),
        (ssd, {"dtype": torch.float32}, "bfloat16 only"),
        (ssd, {}, "decay per token"),
        (ssd, {"decay": "head", "cu_seqlens": ONE_DOCUMENT}, "no states for documents"),
        (ssd, {"decay": "head", "length": 61_000, "device": "meta"}, "61000 tokens: it is wrong from about 61000"),
    ],
)
def test_refusals_of_linear_attention(module, given, reason, monkeypatch):
    assert reason in module.refuses(*inputs("linear_attention", **given).values())
    # The backend says so of each, and serves what one of them does.
    monkeypatch.setattr(library["linear_attention"], "unusable", lambda package: None)
    problem = library["linear_attention"]._refuses(*inputs("linear_attention", **given).values())
    both = (simple.refuses, ssd.refuses)
    if all(refuses(*inputs("linear_attention", **given).values()) for refuses in both):
        assert reason in problem and "fla: " in problem and "mamba_ssm: " in problem
    else:
        assert problem is None


def test_ssd_serves_where_simple_gla_does_not(ssd_alone):
    given = inputs("linear_attention", 300, decay="head", groups=2)
    assert library["linear_attention"]._refuses(*given.values()) is None
    check("linear_attention", given, ROUNDED)
    assert ssd_alone == [(BATCH, 300, HEADS, DIM)]
    per_token = inputs("linear_attention", 300, decay="token")
    assert "fla is not installed" in library["linear_attention"]._refuses(*per_token.values())


@pytest.mark.parametrize(
    ("op", "given"),
    [
        *((op, {}) for op in library),
        ("selective_scan", {"u": torch.empty(1, 2**20 - 5, 2048, **BIG)}),
        ("causal_conv1d", {"x": torch.empty(1, 2**20, 4088, **BIG)}),
    ],
)
def test_what_is_served(op, given):
    assert library[op]._refuses(*inputs(op, **given).values()) is None


@pytest.mark.parametrize("op", library)
def test_a_compiled_graph_is_refused(op):
    given = inputs(op)
    assert torch.compile(library[op]._refuses, backend="eager", fullgraph=True)(*given.values()) is not None


def test_simple_gla_is_refused_where_triton_makes_wrong_code_of_it(monkeypatch):
    """Only its chunked backward pass with a decay per token is."""
    module = simple
    monkeypatch.setattr(module, "miscompiles", lambda device: True)

    def refused(length, decay="token", constant=False):
        given = inputs("linear_attention", length, decay=decay)
        given["log_decay"].requires_grad_(not constant)
        return module.refuses(*given.values()) is not None

    assert refused(64) and refused(64, "head") and refused(70, "head", constant=True)
    assert not refused(64, "head", constant=True) and not refused(63)
    with torch.no_grad():
        assert not refused(64)


def test_delta_rule_is_refused_where_triton_makes_wrong_code_of_it(monkeypatch):
    """Its backward pass with a decay per head is."""
    module = library["delta_rule"]
    monkeypatch.setattr(module, "miscompiles", lambda device: True)
    assert module._refuses(*inputs("delta_rule").values()) is not None
    assert module._refuses(*inputs("delta_rule", decay="channel").values()) is None
    with torch.no_grad():
        assert module._refuses(*inputs("delta_rule").values()) is None


@pytest.mark.parametrize(
    ("major", "version", "wrong"),
    [(9, "3.6.0", True), (9, "3.7.0+git1", True), (9, "3.7.1", False), (9, "3.10.0", False), (8, "3.6.0", False)],
)
def test_which_triton_makes_wrong_code(monkeypatch, major, version, wrong):
    module = simple
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(module.importlib.metadata, "version", lambda package: version)
    assert module.miscompiles(torch.device("cuda")) is wrong
    assert not module.miscompiles(torch.device("cpu"))


@pytest.mark.parametrize("op", library)
def test_a_missing_package_is_one_line(op, monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda package: False)
    x = torch.zeros(1, 2, 8, 8)
    arguments = {
        "linear_attention": (x, x, x),
        "delta_rule": (x, x, x, x[..., 0]),
        "selective_scan": (x[0], x[0], x[0, 0], x[0], x[0]),
        "causal_conv1d": (x[0], x[0, 0]),
    }
    message = f"^{op} cannot run on backend 'library': {MISSING[op]}; use .*torch"
    with pytest.raises(ValueError, match=message), ops.backend("library"):
        getattr(ops, op)(*arguments[op])


# The libraries themselves


def test_simple_gla_is_our_op():
    """fla's own slow functions, which run anywhere, agree with ours: scale, decay, state and its layout."""
    pytest.importorskip("fla", reason="fla-core (extra fla) is not installed")
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    given = inputs("linear_attention", dtype=torch.float32)

    def theirs(q, k, v, log_decay, scale, initial_state, cu_seqlens):
        return naive_recurrent_simple_gla(q, k, v, log_decay, scale=scale, initial_state=initial_state)

    check("linear_attention", given, 1e-5, theirs)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_delta_rule_of_fla_is_our_op(decay):
    """As above: beta, the decay and its place, the state and its layout."""
    pytest.importorskip("fla", reason="fla-core (extra fla) is not installed")
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.kda.naive import naive_recurrent_kda

    naive = naive_recurrent_gated_delta_rule if decay == "token" else naive_recurrent_kda
    given = inputs("delta_rule", dtype=torch.float32, decay=decay)

    def theirs(q, k, v, beta, log_decay, scale, initial_state, cu_seqlens):
        return naive(q, k, v, beta=beta, g=log_decay, scale=scale, initial_state=initial_state, output_final_state=True)

    check("delta_rule", given, 1e-5, theirs)


@needs_gpu("delta_rule")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("length", [1, 63, 128, 200])
def test_delta_rule_on_a_gpu(length, decay, gradient):
    given = inputs("delta_rule", length, decay=decay, device="cuda", groups=2)
    if not gradient:
        with torch.no_grad():
            found = library["delta_rule"].delta_rule(*given.values())
            expected = reference["delta_rule"].delta_rule(*given.values())
        assert all(relative_error(*pair) < ROUNDED for pair in zip(found, expected, strict=True))
        return
    refused = library["delta_rule"]._refuses(*given.values())
    if refused:
        pytest.skip(refused)
    check("delta_rule", given, ROUNDED)


@needs_gpu("linear_attention")
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("length", [1, 63, 128, 200])
def test_simple_gla_on_a_gpu(length, decay, constant):
    given = inputs("linear_attention", length, decay=decay, device="cuda", groups=2)
    given["log_decay"].requires_grad_(not constant)
    refused = library["linear_attention"]._refuses(*given.values())
    if refused:
        pytest.skip(refused)
    check("linear_attention", given, ROUNDED)


@needs_gpu("linear_attention")
@pytest.mark.parametrize("length", [1, 255, 600])
def test_ssd_on_a_gpu(length):
    pytest.importorskip("mamba_ssm")
    check("linear_attention", inputs("linear_attention", length, decay="head", device="cuda", groups=2), ROUNDED,
          ssd.linear_attention)  # fmt: skip


@needs_gpu("selective_scan")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, ROUNDED)])
@pytest.mark.parametrize("length", [1, 70, 2050])
def test_selective_scan_on_a_gpu(length, dtype, limit):
    check("selective_scan", inputs("selective_scan", length, dtype, "cuda"), limit)


@needs_gpu("causal_conv1d")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, ROUNDED)])
@pytest.mark.parametrize("length", [1, 2, 70])
def test_causal_conv1d_on_a_gpu(length, dtype, limit):
    check("causal_conv1d", inputs("causal_conv1d", length, dtype, "cuda"), limit)
