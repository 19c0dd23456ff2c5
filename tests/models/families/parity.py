"""Random small configurations of every family, unusual on purpose, and what must agree with transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.ops.helpers import in_torch, relative_error
from zoo import yaml
from zoo.models.families import FAMILIES
from zoo.models.families.convert import saved_tensors

COMMON = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# By family: `configs`, small ones, where head_dim is not hidden / heads, with groups, odd vocabularies, biases, tied or
# not, ends of a mix; `published`, sizes as released; `notes`, what transformers gets wrong; `refused`, ways of running
# (measure.py) that a configuration has not.
FILES = {file.stem: yaml.load_file(file) for file in sorted((Path(__file__).parent / "cases").glob("*.yaml"))}
CONFIGS: dict[str, list[dict[str, Any]]] = {family: file["configs"] for family, file in FILES.items()}
CASES = [(family, i) for family, configs in CONFIGS.items() for i in range(len(configs))]


def theirs(family: str, index: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of transformers of a small configuration."""
    torch.manual_seed(index)
    return random_model(transformers.AutoConfig.for_model(family, **COMMON | CONFIGS[family][index])).to(dtype)


def random_model(config: PreTrainedConfig, scale: float = 0.15) -> PreTrainedModel:
    """A model of transformers, every weight perturbed so that no two of them could be confused."""
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    in_torch(sys.modules[type(net).__module__])
    with torch.no_grad():
        for name, tensor in saved_tensors(net).items():
            if not name.endswith(FAMILIES[config.model_type].derived or ("\0",)):
                tensor.add_(torch.randn_like(tensor), alpha=scale if tensor.dim() > 1 else 0.1)
    return net.eval()


def ids(net: PreTrainedModel, batch: int = 2, length: int = 21) -> Tensor:
    return torch.randint(3, net.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(7))


def close(one: Tensor, other: Tensor, bound: float = 1e-5) -> bool:
    return relative_error(one, other) <= bound
