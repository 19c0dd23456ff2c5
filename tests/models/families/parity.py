"""Random small configurations of every family, unusual on purpose, and what must agree with transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.ops.helpers import relative_error

COMMON = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 3.0, "original_max_position_embeddings": 16}

# Configurations: head_dim is not hidden / heads, groups, odd vocabularies, biases, tied or not, ends of a mix.
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, **ATTENTION},
        {"vocab_size": 41, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "attention_bias": True,
         "mlp_bias": True, "tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 1,
         "head_dim": 8, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
        {"vocab_size": 51, "hidden_size": 36, "intermediate_size": 28, "num_hidden_layers": 2, **ATTENTION,
         "rope_parameters": YARN},
        {"vocab_size": 33, "hidden_size": 32, "intermediate_size": 28, "num_hidden_layers": 1, **ATTENTION,
         "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ],
    "mixtral": [
        {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 3,
         "num_experts_per_tok": 2, **ATTENTION},
        {"vocab_size": 43, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_local_experts": 5,
         "num_experts_per_tok": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "sliding_window": 4, "tie_word_embeddings": True, "output_router_logits": True, "router_aux_loss_coef": 0.3},
        {"vocab_size": 51, "hidden_size": 36, "intermediate_size": 16, "num_hidden_layers": 2, "num_local_experts": 4,
         "num_experts_per_tok": 4, **ATTENTION, "rope_parameters": YARN},
    ],
    "minimax": [
        {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_local_experts": 3,
         **ATTENTION, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
         "linear_attn_alpha_factor": 1.5, "linear_attn_beta_factor": 0.7, "full_attn_alpha_factor": 0.9,
         "full_attn_beta_factor": 1.1, "mlp_alpha_factor": 1.3, "mlp_beta_factor": 0.8},
        {"vocab_size": 43, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_local_experts": 5,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
         "layer_types": ["full_attention", "full_attention"]},
        {"vocab_size": 51, "hidden_size": 36, "intermediate_size": 16, "num_hidden_layers": 2, "num_local_experts": 2,
         "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8,
         "layer_types": ["linear_attention", "linear_attention"]},
    ],
    "jamba": [
        {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 4, "num_experts": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 3, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 6, "mamba_dt_rank": 5},
        {"vocab_size": 43, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2, "num_experts": 1,
         "num_attention_heads": 4, "num_key_value_heads": 1, "attn_layer_period": 8, "attn_layer_offset": 4,
         "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 2,
         "tie_word_embeddings": True},
        {"vocab_size": 51, "hidden_size": 36, "intermediate_size": 16, "num_hidden_layers": 3, "num_experts": 4,
         "num_experts_per_tok": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "attn_layer_period": 1,
         "attn_layer_offset": 0, "expert_layer_period": 2, "expert_layer_offset": 0, "mamba_dt_rank": 4},
    ],
    "mamba": [
        {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 6, "time_step_rank": 5},
        {"vocab_size": 43, "hidden_size": 20, "num_hidden_layers": 3, "state_size": 5, "expand": 3, "conv_kernel": 3,
         "use_bias": True, "tie_word_embeddings": False},
        {"vocab_size": 51, "hidden_size": 16, "num_hidden_layers": 1, "use_conv_bias": False, "time_step_rank": 1},
    ],
    "mamba2": [
        {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 8, "n_groups": 2,
         "state_size": 10, "chunk_size": 8},
        {"vocab_size": 43, "hidden_size": 20, "num_hidden_layers": 3, "num_heads": 3, "head_dim": 20, "n_groups": 1,
         "state_size": 7, "expand": 3, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False, "chunk_size": 16,
         "tie_word_embeddings": True},
        {"vocab_size": 51, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 8, "head_dim": 8, "n_groups": 8,
         "state_size": 4, "time_step_limit": (0.05, 0.4), "chunk_size": 8},
    ],
}  # fmt: skip
CASES = [(family, i) for family, configs in CONFIGS.items() for i in range(len(configs))]


def theirs(family: str, index: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of transformers, every weight perturbed so that no two of them could be confused."""
    torch.manual_seed(index)
    config = transformers.AutoConfig.for_model(family, **COMMON | CONFIGS[family][index])
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    return net.to(dtype).eval()


def ids(net: PreTrainedModel, batch: int = 2, length: int = 21) -> Tensor:
    return torch.randint(3, net.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(7))


def close(one: Tensor, other: Tensor, bound: float = 1e-5) -> bool:
    return relative_error(one, other) <= bound
