"""Tiny models of other packages, made at random and never downloaded."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

VOCABULARY = 11
_PLAIN = {"vocab_size": VOCABULARY, "hidden_size": 8}
_LAYERS = _PLAIN | {
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {"num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2}
_MAMBA2 = {
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 4,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 5,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
_EXPERTS = {
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}
_LATENT = {
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "moe_intermediate_size": 8,
}

# name of the configuration's class, without its end -> its arguments
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "Mamba": _PLAIN | _MAMBA,
    "FalconMamba": _PLAIN | _MAMBA,
    "Jamba": _LAYERS
    | {"mamba_d_state": 4, "mamba_dt_rank": 2, "attn_layer_period": 4, "attn_layer_offset": 2}
    | {"num_experts": 2, "num_experts_per_tok": 1},
    "Zamba": _LAYERS
    | {"mamba_d_state": 4, "mamba_dt_rank": 2, "n_mamba_heads": 2}
    | {"attention_hidden_size": 16, "attention_head_dim": 8, "num_hidden_layers": 4}
    | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "Mamba2": _PLAIN
    | {"num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 4, "n_groups": 2}
    | {"chunk_size": 5},
    "Bamba": _LAYERS | _MAMBA2 | {"attn_layer_indices": [2]},
    "FalconH1": _LAYERS | _MAMBA2 | {"mamba_d_ssm": 16, "num_hidden_layers": 2},
    "GraniteMoeHybrid": _LAYERS
    | _MAMBA2
    | {"layer_types": ["mamba", "mamba", "attention", "mamba"], "shared_intermediate_size": 8}
    | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Zamba2": _LAYERS
    | {"mamba_d_state": 4, "n_mamba_heads": 4, "mamba_headdim": 4, "mamba_ngroups": 2}
    | {"chunk_size": 5, "layers_block_type": ["mamba", "hybrid", "mamba", "mamba"]}
    | {"hybrid_layer_ids": [1]},
    "NemotronH": _LAYERS
    | {"layers_block_type": ["mamba", "attention", "mamba", "moe"], "ssm_state_size": 4}
    | {"mamba_num_heads": 4, "mamba_head_dim": 4, "n_groups": 2, "chunk_size": 5}
    | {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    | {"moe_shared_expert_intermediate_size": 8, "n_group": 1, "topk_group": 1},
    "RecurrentGemma": _PLAIN
    | {"num_hidden_layers": 3, "lru_width": 8, "num_attention_heads": 2, "intermediate_size": 16}
    | {"attention_window_size": 8},
    "Rwkv": _PLAIN | {"num_hidden_layers": 2, "attention_hidden_size": 8},
    "Qwen3Next": _LAYERS | _DELTA | _EXPERTS,
    "Qwen3_5": _LAYERS | _DELTA,
    "OlmoHybrid": _LAYERS | _DELTA,
    "KimiLinear": _LAYERS
    | _LATENT
    | {"num_experts": 2, "num_experts_per_token": 1, "head_dim": 8}
    | {"linear_num_heads": 2, "linear_head_dim": 4},
    "BailingHybrid": _LAYERS
    | _LATENT
    | {"num_experts": 8, "num_experts_per_token": 2, "num_expert_group": 2, "topk_group": 1}
    | {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
}


def transformers_model(name: str, **changes: Any) -> nn.Module:
    """A language model of transformers with random weights, in training mode."""
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    configuration = model_class.config_class(**(CONFIGURATIONS[name] | changes))
    configuration._experts_implementation = "eager"  # the other one takes no float64
    model: nn.Module = model_class(configuration).train()
    return model


def tokens(batch: int = 2, steps: int = 17) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, steps))
