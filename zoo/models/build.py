"""From a configuration to a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.config import ZooConfig, load_config
from zoo.models.modeling import ZooForCausalLM


def build(
    config: ZooConfig | Mapping[str, Any] | str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ZooForCausalLM:
    """A freshly initialised model.

    Args:
        config: a checked configuration, or what `load_config` reads.
        device: where; "meta" gives shapes without memory, to be materialised with `materialize`.
        dtype: of the weights (default torch's); rates, decays and states stay float32.

    Raises:
        ConfigError: the configuration is wrong.
    """
    if not isinstance(config, ZooConfig):
        config = load_config(config)
    with torch.device("meta"):
        model = ZooForCausalLM(config)
    model = model.to(dtype or torch.get_default_dtype())
    device = torch.get_default_device() if device is None else torch.device(device)
    return model if device.type == "meta" else materialize(model, device)


def materialize(model: ZooForCausalLM, device: torch.device | str) -> ZooForCausalLM:
    """Give a model on the meta device memory on `device`, and initialise every parameter and buffer there."""
    model = model.to_empty(device=device)
    model.tie_weights()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model
