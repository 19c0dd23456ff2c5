"""Parity of our modules with other people's: copy the weights across, compare outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tests.ops.helpers import relative_error
from zoo import ZooConfig, load_config
from zoo.blocks import SequenceContext, kind_of

Weights = Mapping[str, str | tuple[str, Callable[[Tensor], Tensor]]]
"""Our parameter -> theirs, or (theirs, a linear map from their layout to ours)."""

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def model_config(
    *, hidden_size: int, mixer: dict | None = None, ffn: dict | None = None, num_layers: int = 1, **fields
) -> ZooConfig:
    """A model whose every layer is the same block."""
    block = {"mixer": mixer, "ffn": ffn}
    pattern = f"b*{num_layers}"
    return load_config(
        {"vocab_size": 8, "hidden_size": hidden_size, "blocks": {"b": block}, "pattern": pattern} | fields
    )


def build_part(config: ZooConfig, role: str = "mixer", layer_idx: int = 0) -> nn.Module:
    """The mixer or ffn of one layer, standing alone."""
    part = getattr(config.layers[layer_idx], role)
    return kind_of(role, part.kind).module_class(part.config, config, layer_idx)


def perturb(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, the biases, norms, rates and skips that initialise to constants too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            # Vectors are norms, rates and biases: keep what they start from, or a norm of mean zero hides mistakes.
            parameter.copy_((parameter + noise) if parameter.dim() == 1 else noise)
    return module


def copy_weights(ours: nn.Module, theirs: nn.Module, weights: Weights) -> None:
    """Load `theirs` into `ours`; every parameter on both sides must be named."""
    target, source = dict(ours.named_parameters()), dict(theirs.named_parameters())
    names = {name if isinstance(name, str) else name[0] for name in weights.values()}
    assert set(weights) == set(target), set(weights) ^ set(target)
    assert names == set(source), names ^ set(source)
    with torch.no_grad():
        for name, parameter in target.items():
            mapped = translated(weights[name], source)
            assert mapped.shape == parameter.shape, (name, mapped.shape, parameter.shape)
            parameter.copy_(mapped)


def translated(rule: str | tuple[str, Callable[[Tensor], Tensor]], tensors: Mapping[str, Tensor]) -> Tensor:
    """Their tensor in our layout."""
    return tensors[rule] if isinstance(rule, str) else rule[1](tensors[rule[0]])


def assert_close(ours: Tensor | None, theirs: Tensor, what: str = "output", tolerance: float | None = None) -> None:
    """Relative error within `tolerance` (by default that of the dtype), of something that is not zero."""
    assert theirs.norm() > 0, f"{what}: the reference is zero and proves nothing"
    error = relative_error(ours, theirs)
    assert error <= (TOLERANCE[theirs.dtype] if tolerance is None else tolerance), f"{what}: relative error {error:.2e}"


def random_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run_mixer(mixer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: mixer(x, SequenceContext.of(x))


def run_ffn(ffn: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: ffn(x, SequenceContext.of(x))[0]


def assert_parity(
    ours: nn.Module,
    run_ours: Callable[[Tensor], Tensor],
    theirs: nn.Module,
    run_theirs: Callable[[Tensor], Tensor],
    weights: Weights,
    x: Tensor,
) -> None:
    """Outputs, and the gradients of the input and of every parameter, agree once `theirs` is random and copied."""
    perturb(theirs)
    copy_weights(ours, theirs, weights)
    results = []
    for module, run in ((ours, run_ours), (theirs, run_theirs)):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y * random_input(*y.shape, dtype=y.dtype, seed=2)).sum().backward()
        results.append((y, leaf.grad, {name: p.grad for name, p in module.named_parameters()}))
    (y, dx, gradients), (y_ref, dx_ref, gradients_ref) = results
    assert_close(y, y_ref)
    assert_close(dx, dx_ref, "input gradient")
    for name, gradient in gradients.items():
        assert_close(gradient, translated(weights[name], gradients_ref), f"gradient of {name}")
