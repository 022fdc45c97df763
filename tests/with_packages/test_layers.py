"""Layers of minGRU-pytorch, mambapy and xlstm, unmodified: names, totals, nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_jacobians_close, assert_steps_close
from torch import Tensor, nn

import gradflow
from gradflow.analyzer import step_jacobians

WIDTH = 8
STEPS = 17


def min_gru() -> nn.Module:
    layer: nn.Module = pytest.importorskip("minGRU_pytorch.minGRU").minGRU(WIDTH)
    return layer


def min_lstm() -> nn.Module:
    layer: nn.Module = pytest.importorskip("minGRU_pytorch.minLSTM").minLSTM(WIDTH)
    return layer


def mambapy(*, parallel: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        mamba = pytest.importorskip("mambapy.mamba")
        config = mamba.MambaConfig(d_model=WIDTH, n_layers=2, d_state=4, pscan=parallel)
        model: nn.Module = mamba.Mamba(config)
        return model

    return make


def xlstm_stack() -> nn.Module:
    x = pytest.importorskip("xlstm")
    mlstm = x.mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=2)
    slstm = x.sLSTMLayerConfig(backend="vanilla", num_heads=2, conv1d_kernel_size=4)
    forward = x.FeedForwardConfig(proj_factor=1.3, act_fn="gelu")
    config = x.xLSTMBlockStackConfig(
        mlstm_block=x.mLSTMBlockConfig(mlstm=mlstm),
        slstm_block=x.sLSTMBlockConfig(slstm=slstm, feedforward=forward),
        context_length=STEPS,
        num_blocks=2,
        embedding_dim=WIDTH,
        slstm_at=[1],
    )
    stack: nn.Module = x.xLSTMBlockStack(config)
    for parameter in stack.parameters():
        if not parameter.any():  # the recurrent weights begin at zero
            nn.init.normal_(parameter, std=0.3)
    return stack


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "minGRU": (min_gru, {"minGRU": "minGRU"}),
    "minLSTM": (min_lstm, {"minGRU": "minLSTM"}),
    "mambapy": (
        mambapy(parallel=True),
        {"layers.0.mixer": "Mamba", "layers.1.mixer": "Mamba"},
    ),
    "mambapy, step by step": (
        mambapy(parallel=False),
        {"layers.0.mixer": "Mamba", "layers.1.mixer": "Mamba"},
    ),
    "xlstm": (
        xlstm_stack,
        {
            "blocks.0.xlstm.mlstm_cell": "mLSTM",
            "blocks.1.xlstm.slstm_cell": "sLSTMCell_vanilla",
        },
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_recording_changes_no_bit(name: str) -> None:
    make, names = LAYERS[name]
    layer, x = make(), torch.randn(2, STEPS, WIDTH)
    plain = layer(x)
    plain.pow(2).mean().backward()
    wanted = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    with gradflow.record(layer) as recording:
        y = layer(x)
        y.pow(2).mean().backward()
    assert torch.equal(y, plain)
    found = [p.grad for p in layer.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert {track.name: track.cell for track in recording.values()} == names
    for track in recording.values():
        assert track.grad_h is not None
        assert torch.isfinite(track.grad_h).all()


def test_totals_of_an_mlstm_in_a_stack_are_those_of_its_parameters() -> None:
    """A second way: the gradient of what is written, summed with the total, is autograd's own."""
    layer, x = xlstm_stack().double(), torch.randn(2, STEPS, WIDTH).double()
    given: dict[str, Tensor] = {}
    cell = layer.get_submodule("blocks.0.xlstm.mlstm_cell")
    function = cell.backend_fn

    def seen(**arguments: Any) -> Tensor:
        given.update({n: arguments[n] for n in ("keys", "values", "igate_preact")})
        given["values"].retain_grad()
        y: Tensor = function(**arguments)
        return y

    with gradflow.record(layer) as recording:
        layer(x).pow(2).mean().backward()
    cell.backend_fn = seen  # type: ignore[assignment]
    layer.zero_grad()
    layer(x).pow(2).mean().backward()
    track = recording["blocks.0.xlstm.mlstm_cell"]
    assert track.grad_h is not None
    keys = given["keys"].movedim(2, 0) * given["keys"].shape[-1] ** -0.5  # (T, B, H, d)
    total = track.grad_h.unflatten(2, track.state_shape)[..., :-1]
    gate = given["igate_preact"].movedim(2, 0).exp()
    wanted = given["values"].grad
    assert wanted is not None
    mine = gate * (total * keys.unsqueeze(-1)).sum(-2)  # ∂L/∂v_t = i_t ∂L/∂C_tᵀ k_t
    mask = torch.ones(STEPS, 2, dtype=torch.bool)
    assert_steps_close(mine.flatten(2), wanted.movedim(2, 0).flatten(2).detach(), mask)


def slstm_in_a_net() -> tuple[nn.Module, nn.Module]:
    cells = pytest.importorskip("xlstm.blocks.slstm.cell")
    config = cells.sLSTMCellConfig(
        hidden_size=WIDTH,
        num_heads=2,
        backend="vanilla",
        dtype="float32",
        recurrent_weight_init="standard",
    )
    cell = cells.sLSTMCell(config)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(5, 4 * WIDTH)
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.cell(self.into(x))[0]
            return y

    return Net().double(), cell


def test_an_slstm_is_a_cell_with_all_four_states() -> None:
    net, cell = slstm_in_a_net()
    x = torch.randn(2, STEPS, 5).double()
    with gradflow.record(net) as recording:
        net(x).pow(2).mean().backward()
    track = recording["cell"]
    # at its first step, where n is 0, xLSTM takes another way: what follows is the recurrence
    assert any("its first step is not shown" in note for note in track.notes)
    states: list[Tensor] = []
    given: list[tuple[Tensor, ...]] = []
    pointwise = cell.pointwise

    def seen(wx: Tensor, ry: Tensor, b: Tensor, before: Tensor, constants: Any) -> Any:
        given.append((wx.detach(), b.detach(), before.detach()))
        after, gates = pointwise(wx, ry, b, before, constants=constants)
        after.retain_grad()
        states.append(after)
        return after, gates

    cell.pointwise = seen  # type: ignore[assignment]
    net(x).pow(2).mean().backward()
    mask = torch.ones(STEPS - 1, 2, dtype=torch.bool)

    def rows(array: Tensor) -> Tensor:  # (4, B, H) as (B, S)
        return array.detach().transpose(0, 1).flatten(1)

    totals = torch.stack([rows(s.grad) for s in states[1:] if s.grad is not None])
    assert_steps_close(track.h, torch.stack([rows(s) for s in states[1:]]), mask, what="states")
    assert track.grad_h is not None
    assert_steps_close(track.grad_h, totals, mask, what="totals")

    kernel = cell._recurrent_kernel.detach()  # (heads, 4 head_dim, head_dim)
    heads, gates_width, head = kernel.shape

    def step(flat: Tensor, t: int) -> Tensor:
        """One step of one sequence from its state (S,): y enters through R, (c, n, m) beside it."""
        wx, b, _ = given[t]
        before = flat.view(4, 1, WIDTH)
        ry = torch.einsum("hgd,hd->hg", kernel, before[0, 0].view(heads, head))
        ry = ry.view(heads, gates_width // head, head).transpose(0, 1).reshape(1, -1)
        after, _ = pointwise(wx[:1], ry, b, before, constants={})
        return after.reshape(-1)

    found = step_jacobians(track)[1:, :1]
    wanted = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda flat, t=t: step(flat, t), states[t - 1][:, 0].detach().reshape(-1)
            )
            for t in range(2, STEPS)
        ]
    ).unsqueeze(1)
    assert_jacobians_close(found, wanted, torch.ones(STEPS - 2, 1, dtype=torch.bool))


def test_the_mlstm_of_xlstm_large_is_observed_through_its_partial_function() -> None:
    """Its backend keeps the kernel as a functools.partial of its own."""
    pytest.importorskip("mlstm_kernels")
    transformers = pytest.importorskip("transformers")
    config = transformers.xLSTMConfig(
        vocab_size=11,
        hidden_size=16,
        embedding_dim=16,
        num_hidden_layers=2,
        num_blocks=2,
        num_heads=2,
        chunk_size=8,
        mode="train",
        return_last_states=True,
        autocast_kernel_dtype="float32",
    )
    model = transformers.xLSTMForCausalLM(config).double().train()
    ids = torch.randint(0, 11, (2, 16))
    with gradflow.record(model) as recording:
        model(input_ids=ids, use_cache=False).logits.pow(2).mean().backward()
    names = [f"backbone.blocks.{n}.mlstm_layer.mlstm_backend" for n in (0, 1)]
    assert [track.name for track in recording.values()] == names
    assert {track.cell for track in recording.values()} == {"mLSTM"}
    for track in recording.values():
        assert track.grad_h is not None  # held against what the kernel returned, on the way
        assert torch.isfinite(track.grad_h).all()
