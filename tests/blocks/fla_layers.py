"""Layers of flash-linear-attention itself through the adapter: python -m tests.blocks.fla_layers prints the relative
errors by layer and check, as JSON. Without a GPU their kernels are interpreted, each with its first configuration; it
is a process of its own, because that must be said before fla is imported.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch

HIDDEN = 32
RECURRENT = {"mode": "fused_recurrent"}  # the chunked kernels ask for a driver, which the interpreter has not
# Of each: its arguments, and what the interpreter can run of its kernels.
LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "gla": ({"num_heads": 2}, "forward and backward"),
    "gsa": ({"num_heads": 2}, "forward and backward"),
    "hgrn2": ({"expand_ratio": 16}, "forward and backward"),
    "linear_attn": ({"num_heads": 2}, "forward"),
    "multiscale_retention": ({"num_heads": 2}, "forward"),
    "rwkv7": ({"head_dim": 16, "num_hidden_layers": 2}, "forward"),
    "delta_net": ({"num_heads": 2}, "nothing"),
    "gated_deltanet": ({"num_heads": 2, "head_dim": 16}, "nothing"),
}


def interpret() -> None:
    """Let Triton's interpreter run what is imported from now on."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    autotune = triton.autotune

    def first(configs: list, key: list, **options: Any) -> Any:
        kept = {name: options[name] for name in ("reset_to_zero", "restore_value") if name in options}
        return autotune(configs[:1], key, **kept)

    triton.autotune = first
    from zoo.blocks import fla

    fla.check_device = lambda layer, device: None


def check(layer: str, arguments: dict[str, Any], device: str, with_gradients: bool) -> dict[str, float]:
    """Relative errors of decoding, of packed and of padded rows, against whole rows alone."""
    from tests.blocks.helpers import build_part, model_config, perturb, random_input
    from tests.ops.helpers import relative_error
    from zoo.blocks import SequenceContext

    torch.manual_seed(0)
    mixer = build_part(model_config(hidden_size=HIDDEN, mixer={"kind": "fla", "layer": layer, **arguments}))
    mixer = perturb(mixer).to(device).eval()  # some start from an output of 0
    x = random_input(2, 9, HIDDEN).to(device).requires_grad_()
    packed = torch.cat([x[:1, :5], x[1:]], 1)
    bounds = torch.tensor([0, 5, 14], dtype=torch.int32, device=device)
    with torch.set_grad_enabled(with_gradients):  # some layers take another kernel where a gradient may be asked for
        whole = mixer(x, SequenceContext.of(x))
        documents = mixer(packed, SequenceContext.of(packed, cu_seqlens=bounds))
    with torch.no_grad():
        state = mixer.new_state(2, x.device, x.dtype)
        parts = [mixer(part, SequenceContext.of(part), state) for part in x.split([4, 3, 1, 1], 1)]
        mask = torch.ones(2, 9, dtype=torch.bool, device=device)
        mask[0, :4] = False
        spread = torch.cat([torch.cat([x[:1, 5:], x[:1, :5]], 1), x[1:]])
        padded = mixer(spread, SequenceContext.of(spread, padding_mask=mask))
    alone = torch.cat([whole[:1, :5], whole[1:]], 1)
    assert whole.norm() > 0, "an output of 0 proves nothing"
    errors = {
        "decode": relative_error(torch.cat(parts, 1), whole),
        "packing": relative_error(documents, alone),
        "padding": relative_error(padded[mask], torch.cat([whole[0, :5], whole[1]])),
    }
    if with_gradients:
        gradients = [torch.autograd.grad((y * y).sum(), x)[0] for y in (documents, alone)]
        errors["gradients"] = relative_error(*gradients)
    return errors


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        interpret()
    found: dict[str, Any] = {}
    for layer, (arguments, interpreted) in LAYERS.items():
        if device == "cpu" and interpreted == "nothing":
            continue
        mode = {} if device == "cuda" or layer in ("hgrn2", "rwkv7") else RECURRENT
        try:
            found[layer] = check(layer, arguments | mode, device, device == "cuda" or "backward" in interpreted)
        except Exception as error:
            found[layer] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
