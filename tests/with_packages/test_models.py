"""Whole models of transformers, unmodified: tracks, totals against explicit loops, nothing disturbed.

The oracle: the function that a layer calls is put aside for the explicit loop of its equations, whose
states are graph tensors, in float64; what autograd says of them are the totals. Where the model itself
computes in float32 its activations are those of float32, and the bound is that of float32.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import explicit
import pytest
import torch
from compare import assert_steps_close
from models import CONFIGURATIONS, tokens, transformers_model
from torch import Tensor, nn

import gradflow

# the packages round to float32 here and there in a float64 model
ROUNDED = 3e-5


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    targets = ids[:, 1:].reshape(-1)
    loss: Tensor = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), targets)
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_recording_changes_no_bit(name: str) -> None:
    model, ids = transformers_model(name), tokens()
    state = torch.get_rng_state()
    plain = loss_of(model, ids)
    plain.backward()
    wanted, drawn = gradients(model), torch.get_rng_state()
    model.zero_grad()
    torch.set_rng_state(state)
    with gradflow.record(model) as recording:
        loss = loss_of(model, ids)
        loss.backward()
    assert torch.equal(loss, plain)
    assert torch.equal(torch.get_rng_state(), drawn)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(recording)
    for track in recording.values():
        assert track.grad_h is not None
        assert torch.isfinite(track.grad_h).all()
        assert (track.grad_h != 0).any()


def _mamba(given: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    assert given["delta_softplus"]
    names = ("hidden_states", "dt", "A", "B", "C", "D", "z", "delta_bias")
    return explicit.mamba(*(given[name].double() for name in names))


def _mamba2(given: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    assert given["dt_softplus"]
    names = ("hidden_states", "dt", "A", "B", "C", "D", "dt_bias")
    u, *rest = (given[name].double() for name in names)
    first = u.new_zeros(u.shape[0], *u.shape[2:], rest[2].shape[-1])
    return explicit.mamba2(u, *rest, first, limit=given["dt_limit"])


def _delta(given: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    q, k, v, g, beta = (given[n].double() for n in ("query", "key", "value", "g", "beta"))
    normed = given["use_qk_l2norm_in_kernel"]
    return explicit.delta_rule(q, k, v, g, beta, None, normed=normed)


def _rg_lru(given: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    gate, x = given["recurrent_gate"].double(), given["hidden_states"].double()
    return explicit.rg_lru(gate, x, given["reset"], x.new_zeros(x[:, 0].shape))


def _rwkv(given: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    names = ("time_decay", "time_first", "key", "value")
    return explicit.rwkv(*(given[name].double() for name in names))


LOOPS: dict[str, Callable[[dict[str, Any]], tuple[Tensor, list[Tensor]]]] = {
    "mamba_selective_scan": _mamba,
    "mamba2_chunk_scan": _mamba2,
    "torch_chunk_gated_delta_rule": _delta,
    "chunk_kimi_delta_attention": _delta,
    "_rnn_scan": _rg_lru,
    "rwkv_linear_attention": _rwkv,
}
PAIRS = ("_rnn_scan", "gated_delta_rule", "kimi_delta_attention")


def put_loops_in(model: nn.Module, patch: pytest.MonkeyPatch) -> list[Tensor]:
    """The explicit loops in the model's functions; gives what will be the states of every call."""
    every: list[Tensor] = []

    def stand_in(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(original).bind(*args, **kwargs)
            bound.apply_defaults()
            y, states = LOOPS[name](bound.arguments)
            for state in states:
                state.retain_grad()
            every.append(states)  # type: ignore[arg-type]
            if name == "rwkv_linear_attention":
                return y, None
            return (y, states[-1]) if name.endswith(PAIRS) else y

        return function

    module = sys.modules[type(model).__module__]
    for space in (module, *(v for v in vars(module).values() if isinstance(v, type))):
        for name in LOOPS:
            if name in vars(space):
                patch.setattr(space, name, stand_in(getattr(space, name), name))
    return every


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_totals_are_those_of_the_explicit_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = transformers_model(name).double(), tokens()
    with gradflow.record(model) as recording:
        loss_of(model, ids).backward()
    every = put_loops_in(model, monkeypatch)
    loss_of(model, ids).backward()
    assert len(every) == len(recording)
    for track, states in zip(recording.values(), every, strict=True):
        # RWKV reads a state one step later, its last one never
        grads = [torch.zeros_like(s) if s.grad is None else s.grad for s in states]
        totals = torch.stack([grad.flatten(1) for grad in grads])
        values = torch.stack([state.detach().flatten(1) for state in states])
        mask = torch.ones(totals.shape[:2], dtype=torch.bool)
        assert track.grad_h is not None
        assert_steps_close(track.h.double(), values, mask, what="states", bound=ROUNDED)
        assert_steps_close(track.grad_h.double(), totals, mask, what="totals", bound=ROUNDED)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Qwen3Next", "RecurrentGemma", "Rwkv"])
def test_half_precision_is_read_in_float32(name: str, autocast: bool) -> None:
    model, ids = transformers_model(name), tokens()
    model = model if autocast else model.bfloat16()
    with gradflow.record(model) as recording:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, ids)
        loss.backward()
    for track in recording.values():
        assert track.grad_h is not None
        assert track.grad_h.dtype == torch.float32
        assert torch.isfinite(track.grad_h).all()


def test_an_attention_mask_tells_the_real_steps() -> None:
    model, ids = transformers_model("Qwen3Next"), tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:], mask[2, 5:] = 0, 0
    with gradflow.record(model) as recording:
        model(
            input_ids=ids, attention_mask=mask, labels=ids * mask - 100 * (1 - mask)
        ).loss.backward()
    for track in recording.values():
        assert track.lengths.tolist() == [12, 9, 5]
        assert track.grad_h is not None
        assert torch.isnan(track.grad_h[5:, 2]).all()
        assert torch.isfinite(track.grad_h[:5, 2]).all()
    with gradflow.record(model) as recording:
        model(input_ids=ids, attention_mask=mask.flip(1), labels=ids).loss.backward()
    assert all("0 before or within" in " ".join(track.notes) for track in recording.values())


def test_attention_beside_the_recurrences_is_told() -> None:
    model, ids = transformers_model("Qwen3Next"), tokens()
    with gradflow.record(model) as recording:
        loss_of(model, ids).backward()
    (note,) = [note for note in recording.notes if "attention" in note]
    assert "1 layer of it, model.layers.3.self_attn (Qwen3NextAttention)" in note
    assert "is not in the picture" in note
    alone = transformers_model("Mamba2")
    with gradflow.record(alone) as recording:
        loss_of(alone, ids).backward()
    assert not [note for note in recording.notes if "attention" in note]


def test_lightning_attention_is_named_as_what_cannot_be_seen() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MiniMaxConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        block_size=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention"],
    )
    config._experts_implementation = "eager"
    model = transformers.MiniMaxForCausalLM(config).train()
    left_out = pytest.warns(gradflow.GradflowWarning, match=r"layers\.0\.self_attn is left out")
    with left_out, gradflow.record(model) as recording:
        loss_of(model, tokens()).backward()
    (note,) = [note for note in recording.notes if "left out" in note]
    assert "its states cannot be seen; a head keeps exp(−slope_rate) a step" in note
