"""zoo/ops/block_sparse_attention/kernels.py: outputs and gradients against the float64 reference, and what the compiler
makes of the kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import aot
from tests.ops.helpers import DEVICE, poisoned_memory, relative_error
from tests.ops.test_block_sparse_attention import NAMES, make, padding
from tests.ops.test_linear_attention_kernels import interpreter  # noqa: F401  (a fixture)
from zoo.ops import backend, block_sparse_attention

kernels = pytest.importorskip("zoo.ops.block_sparse_attention.kernels")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DOCUMENTS = [0, 0, 1, 9, 9, 10, 19, 19]


def run(
    name: str, tensors: list[Tensor], indices: Tensor, dtype: torch.dtype, through: str = "both", **options: Any
) -> dict[str, Tensor]:
    """out, exp(lse) (0 for an empty row), and the gradients of q, k and v."""
    device = "cpu" if name == "reference" else DEVICE
    leaves = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in tensors]
    options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()}
    with backend(name), poisoned_memory():
        out, lse = block_sparse_attention(*leaves, indices.to(device), return_lse=True, **options)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    results = {"out": out, "lse": lse.exp()}
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(x.shape, generator=generator).bfloat16().to(x) for n, x in results.items()}
    wanted = [n for n in results if through in (n, "both")]
    with poisoned_memory():
        chosen = [results[n] for n in wanted], leaves, [weights[n] for n in wanted]
        gradients = torch.autograd.grad(*chosen, allow_unused=True, materialize_grads=True)
    return dict(zip(NAMES, (*gradients, *results.values()), strict=True))


def check(tensors: list[Tensor], indices: Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    expected = run("reference", tensors, indices, torch.float64, **options)
    got = run("triton", tensors, indices, dtype, **options)
    scale = max(x.norm().item() for x in expected.values())
    for name, ref in expected.items():
        # A query that sees one key has no gradient but rounding: then compare with the rest.
        negligible = ref.norm() <= 1e-12 * scale
        error = got[name].norm().item() / scale if negligible else relative_error(got[name], ref)
        assert error < TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(dtype: torch.dtype) -> None:
    """Two rows, GQA, blocks named twice, of the future or none at all, and another head dim for v."""
    check(*make(2, 13, 13, size=4), dtype, block_size=4, scale=0.7)


@pytest.mark.parametrize("size", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("length", [1, 19])
def test_lengths_and_block_sizes(length: int, size: int) -> None:
    check(*make(1, length, length, (2, 1), size=size, blocks=3), block_size=size)


@pytest.mark.parametrize(("heads", "dims"), [((3, 1), (20, 33)), ((2, 2), (48, 16)), ((5, 1), (80, 3))])
def test_heads_and_dims(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    check(*make(1, 9, 9, heads, dims, size=4, blocks=3), block_size=4)


def test_a_group_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_ROWS", 16)
    check(*make(1, 7, 7, (18, 1), size=4, blocks=3), block_size=4)


@pytest.mark.parametrize(("dims", "dtype"), [((64, 80), torch.bfloat16), ((16, 64), torch.float16)])
def test_low_precision_with_its_own_tiles(dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(*make(1, 70, 70, (2, 1), dims, size=64, blocks=2), dtype, block_size=64)


@pytest.mark.parametrize(("length", "key_length"), [(1, 21), (7, 21)])
def test_fewer_queries_than_keys(length: int, key_length: int) -> None:
    check(*make(2, length, key_length, (2, 1), size=4), block_size=4)


@pytest.mark.parametrize("bounds", [[0, 1], DOCUMENTS])
def test_documents(bounds: list[int]) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    check(*make(1, bounds[-1], bounds[-1], size=4), block_size=4, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("kind", ["left", "right", "interior"])
@pytest.mark.parametrize("length", [1, 5, 14])
def test_padded_rows(kind: str, length: int) -> None:
    """Whatever stands at the padding, be it infinite."""
    tensors, indices = make(3, length, 14, (2, 1), size=4)
    mask = padding(kind, 14)
    check(tensors, indices, block_size=4, key_mask=mask)
    dirty = [tensors[0], *(x.masked_fill(~mask[..., None, None], torch.nan) for x in tensors[1:])]
    clean = run("triton", tensors, indices, torch.float32, block_size=4, key_mask=mask)
    for name, x in run("triton", dirty, indices, torch.float32, block_size=4, key_mask=mask).items():
        assert torch.equal(x, clean[name]), name


@pytest.mark.parametrize("through", ["out", "lse"])
def test_one_result_alone(through: str) -> None:
    check(*make(1, 9, 9, (2, 1), size=4), block_size=4, through=through)


@pytest.mark.parametrize("wanted", range(3))
def test_one_input_alone_needs_a_gradient(wanted: int) -> None:
    tensors, indices = make(1, 9, 9, (2, 1), size=4)
    gradients = []
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        inputs = [x.to(DEVICE, dtype) for x in tensors]
        inputs[wanted].requires_grad_()
        with backend(name):
            out = block_sparse_attention(*inputs, indices.to(DEVICE), block_size=4)
        gradients += torch.autograd.grad(out.square().sum(), inputs[wanted])
    assert relative_error(gradients[1], gradients[0]) < TOLERANCE[torch.float32]


def test_a_block_that_everybody_chose_is_cut_into_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one by all, the others by few: with a hundredth of the choices in a segment, several each."""
    (q, k, v), indices = make(2, 25, 25, (2, 2), size=4, blocks=2)
    indices[..., 0] = 0
    starts = []
    monkeypatch.setattr(kernels, "SEGMENT", 0.5)
    check([q, k, v], indices, block_size=4)
    kernel = kernels._keys_kernel
    monkeypatch.setattr(kernels, "_keys_kernel", {})

    class Watch(dict):
        def __missing__(self, grid: tuple[int, ...]) -> Any:
            starts.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "_keys_kernel", Watch())
    check([q, k, v], indices, block_size=4)
    assert starts[0][0] > 2 * 2 * 7  # rows, heads, blocks


def test_a_second_run_gives_the_same_bits() -> None:
    tensors, indices = make(1, 25, 25, (2, 1), size=4)
    first, second = (run("triton", tensors, indices, torch.float32, block_size=4) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_views_into_a_larger_projection() -> None:
    """k and v of one tensor and with their heads first; the gradient of the output comes transposed."""
    (q, k, v), indices = make(2, 9, 9, (2, 1), (8, 8), size=4)
    results = {}
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        joint = torch.cat([k, v], 1).transpose(1, 2).contiguous().to(DEVICE, dtype).requires_grad_()
        queries = q.mT.contiguous().mT.to(DEVICE, dtype).requires_grad_()
        keys, values = joint.transpose(1, 2).split(9, 1)
        with backend(name):
            out = block_sparse_attention(queries, keys, values, indices.to(DEVICE), block_size=4)
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out).mT.contiguous().mT
        results[name] = [out, *torch.autograd.grad(out, (joint, queries), d_out)]
    assert max(map(relative_error, results["triton"], results["reference"])) < TOLERANCE[torch.float32]


@torch.no_grad()
def test_decoding_reads_the_chosen_blocks_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator, no copy of a cache 2^31 elements long, of which only the chosen blocks are ever touched."""
    monkeypatch.setattr(kernels, "_operator", None)
    length = 2**27
    (q, k, v), _ = make(1, 1, 8, (2, 1), (16, 16))
    cache = torch.empty(1, length, 1, 32, dtype=torch.bfloat16, device=DEVICE)
    near = torch.cat([k, v], -1).to(cache)
    cache[:, 64:68], cache[:, -4:] = near[:, :4], near[:, 4:]
    indices = torch.tensor([16, length // 4 - 1], device=DEVICE).expand(1, 1, 1, -1)
    # The columns of a cache that is padded are as many numbers: not here.
    with backend("triton"):
        keys, values = cache.split(16, -1)
        monkeypatch.setattr(kernels.Places, "per_key", lambda self: torch.tensor([[length - 1]], device=DEVICE))
        monkeypatch.setattr(kernels.Places, "of_queries", lambda self, x: x.flatten())
        out = block_sparse_attention(q.to(cache), keys, values, indices, block_size=4)
    with backend("reference"):
        expected = block_sparse_attention(q, k, v, torch.tensor([0, 1]).expand(1, 1, 1, -1), block_size=4)
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]


@torch.no_grad()
def test_without_any_block() -> None:
    (q, k, v), indices = make(1, 5, 5)
    with backend("triton"), poisoned_memory():
        for blocks in (indices[..., :0], torch.full_like(indices, -1)):
            inputs = [x.to(DEVICE).float().requires_grad_() for x in (q, k, v)]
            with torch.enable_grad():
                out, lse = block_sparse_attention(*inputs, blocks.to(DEVICE), block_size=8, return_lse=True)
                ones = torch.ones_like(out), torch.full_like(lse, torch.nan)
                gradients = torch.autograd.grad([out, lse], inputs, ones)
            assert not out.any() and (lse == -torch.inf).all()
            assert not any(gradient.any() for gradient in gradients)


def test_operator_contracts() -> None:
    """Fake shapes, aliasing and the autograd registration, as torch.library checks them."""
    (q, k, v), indices = make(1, 9, 9, (2, 1), size=4)
    q, k, v = (x.to(DEVICE).float().requires_grad_() for x in (q, k, v))
    rest = indices.to(DEVICE), 4, 0.5, None, None
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._operator, (q, k, v, *rest), test_utils=utils)
    out, lse, blocks = (x.detach() for x in kernels._operator(q, k, v, *rest))
    arguments = (out, lse, q.detach(), k.detach(), v.detach(), blocks, out, lse, *rest[1:])
    torch.library.opcheck(kernels._backward_operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_into_one_graph() -> None:
    (q, k, v), indices = make(1, 9, 9, (2, 1), size=4)
    inputs, indices = tuple(x.to(DEVICE).float().requires_grad_() for x in (q, k, v)), indices.to(DEVICE)

    def attend(*inputs: Tensor) -> Tensor:
        with backend("triton"):
            return block_sparse_attention(*inputs, indices, block_size=4).sin().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*inputs), attend(*inputs)
    assert relative_error(got, expected) < 1e-6
    assert max(map(relative_error, *(torch.autograd.grad(x, inputs) for x in (got, expected)))) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [(torch.float64, 16, "float64 inputs"), (torch.float32, 257, "head dims above 256")],
)
def test_refusals(dtype: torch.dtype, dim: int, message: str) -> None:
    x, indices = torch.zeros(1, 3, 1, dim, dtype=dtype, device=DEVICE), torch.zeros(1, 3, 1, 1, device=DEVICE).long()
    with backend("triton"), pytest.raises(ValueError, match=f"{message}; use reference, torch, auto"):
        block_sparse_attention(x, x, x, indices, block_size=2)


# Query heads, key heads, head dims and dtype: NSA's own, half of it, MoBA's, one with small heads, and float32.
CALLS = {
    "nsa": (64, 4, 192, 128, torch.bfloat16),
    "nsa 128": (64, 4, 128, 128, torch.bfloat16),
    "mqa 64": (64, 1, 64, 64, torch.bfloat16),
    "moba": (8, 8, 128, 128, torch.float16),
    "largest": (8, 2, 256, 256, torch.bfloat16),
    "small": (4, 2, 32, 64, torch.bfloat16),
    "float32": (16, 1, 128, 128, torch.float32),
}


def launch() -> None:
    """The kernels of every call, forward and backward; none of their products on wgmma takes a computed tile on the
    left, nor has a dimension below 64: see kernels.py."""
    from triton.runtime.jit import JITFunction

    compiled, run = [], JITFunction.run

    def keep(*args: Any, **kwargs: Any) -> None:
        compiled.append(run(*args, **kwargs))

    JITFunction.run = keep  # type: ignore[method-assign]
    for name, (heads, kv_heads, dim, v_dim, dtype) in CALLS.items():
        q, k, v = (torch.zeros(1, 64, n, d, dtype=dtype) for n, d in ((heads, dim), (kv_heads, dim), (kv_heads, v_dim)))
        indices = torch.zeros(1, 64, kv_heads, 16, dtype=torch.int64)
        masks = [None, torch.ones(1, 64, dtype=torch.bool)]
        for mask in masks if name == "largest" else masks[:1]:
            out, lse, blocks = kernels._forward(q, k, v, indices, 64, 1.0, None, mask)
            kernels._backward(out, lse, q, k, v, blocks, out, lse, 64, 1.0, None, mask)
    for kernel in compiled:
        for line in kernel.asm["ptx"].splitlines():
            if "wgmma.mma_async" in line:
                assert line.count("{") == 1 and "m64n64" in line, line


def test_compiles_for_an_h100() -> None:
    compiled = aot.in_a_process(__name__, "launch")
    assert {kernel.name for kernel in compiled} == {"_forward_kernel", "_queries_kernel", "_keys_kernel", "_sum_kernel"}
    for kernel in compiled:
        assert kernel.shared <= aot.SHARED_LIMIT and kernel.spilled <= 512, kernel
