"""Random models, run as they are and recorded: no bit differs, and nothing of gradflow's is raised."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import BFLOAT16_LSTM
from hostile import Cell
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.errors import RecordingError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

WIDTH = 4


class Doubled(torch.autograd.Function):
    """An operation of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.0 * grad


class Drawn(nn.Module):
    """A cell whose step is drawn: what is done to the state, one after the other."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.3)
        self.does = rng.sample(
            ["norm", "drop", "own", "in place", "view", "mask", "noise", "half", "detached"], 3
        )

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        new = torch.tanh(self.x(x) + self.h(h))
        for what in self.does:
            if what == "norm":
                new = self.norm(new)
            elif what == "drop":
                new = self.drop(new)
            elif what == "own":
                new = Doubled.apply(new)
            elif what == "in place":
                new = new.clone().mul_(0.5)
            elif what == "view":
                new = new.reshape(-1).view(new.shape)
            elif what == "mask":
                new = torch.where(x > 0, new, h)
            elif what == "noise":
                new = new + 0.1 * torch.randn_like(new)
            elif what == "half":
                new = new.bfloat16().to(x.dtype)
            else:
                new = new + 0.1 * h.detach()
        return new


class Model(nn.Module):
    """Two to four parts, each a layer or a loop of some kind, one after the other."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        kinds = ["lstm", "gru", "stock", "own", "drawn", "tap", "hand", "checkpoint", "vmap"]
        self.kinds = rng.choices(kinds, k=rng.randint(2, 4))
        self.parts = nn.ModuleList([self._part(kind, rng) for kind in self.kinds])

    @staticmethod
    def _part(kind: str, rng: random.Random) -> nn.Module:
        if kind in ("lstm", "gru"):
            layers = rng.randint(1, 2)
            make = nn.LSTM if kind == "lstm" else nn.GRU
            return make(WIDTH, WIDTH, layers, dropout=0.2 if layers > 1 else 0.0)
        if kind in ("stock", "checkpoint"):
            return nn.GRUCell(WIDTH, WIDTH)
        return Drawn(rng) if kind in ("drawn", "vmap", "tap", "hand") else _Narrow()

    def forward(self, x: Tensor) -> Tensor:
        for kind, part in zip(self.kinds, self.parts, strict=True):
            x = self._run(kind, part, x)
        return x

    def _run(self, kind: str, part: nn.Module, x: Tensor) -> Tensor:
        if kind in ("lstm", "gru"):
            return part(x)[0]
        if kind == "vmap":
            weights = {k: torch.stack([v, v]) for k, v in part.named_parameters()}
            part.eval()  # no random numbers under vmap
            part.does = [w for w in part.does if w not in ("noise", "own")]  # type: ignore[assignment]
            zero = x.new_zeros(x.shape[1:])
            two = vmap(lambda w: functional_call(part, w, (x[0], zero)))(weights)
            return x + two.mean(0)
        h, found = x.new_zeros(x.shape[1:]), []
        for x_t in x:
            if kind == "checkpoint":
                h = checkpoint(part, x_t, h, use_reentrant=False)
            elif kind == "hand":
                h = torch.tanh(part.x(x_t) + part.h(h))
            else:
                h = part(x_t, h)
            if kind == "tap":
                h = gradflow.tap(h=h)
            found.append(h)
        return torch.stack(found)


class _Narrow(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(WIDTH, WIDTH)


def run(seed: int, *, recorded: bool) -> tuple[dict[str, Any], Any]:
    """Two training steps: all that could differ, how often hooks were called, and the recording."""
    torch.manual_seed(seed)
    model, rng, heard = Model(seed), random.Random(seed), dict[str, int]()

    def count(what: str) -> Any:
        return lambda *_: heard.__setitem__(what, heard.get(what, 0) + 1)

    if rng.random() < 0.7:
        for name, module in model.named_modules():
            module.register_forward_hook(count(f"{name} forward"))
        for name, weight in model.named_parameters():
            weight.register_hook(count(f"{name} grad"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    able = BFLOAT16_LSTM or not any(isinstance(m, nn.LSTM) for m in model.modules())
    dtype = torch.bfloat16 if rng.random() < 0.2 and able else None
    twice, last, found = rng.random() < 0.2, rng.random() < 0.5, dict[str, Any]()
    with gradflow.record(model) if recorded else nullcontext() as recording:
        for number in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
                out = model(torch.randn(4, 3, WIDTH)).float()
            loss = (out[-1] if last else out).pow(2).sum()
            loss.backward(retain_graph=twice)
            if twice:
                loss.backward()
            grads = [p.grad for p in model.parameters()]
            found |= {f"{number} grad {i}": g.clone() for i, g in enumerate(grads) if g is not None}
            optimizer.step()
            found |= {f"{number} out": out.detach(), f"{number} rng": torch.get_rng_state()}
    return found | {"heard": heard}, recording


@pytest.mark.parametrize("seed", range(16))
def test_a_random_model_is_not_disturbed(seed: int) -> None:
    (plain, _), (seen, recording) = run(seed, recorded=False), run(seed, recorded=True)
    assert plain.pop("heard") == seen.pop("heard")
    assert plain.keys() == seen.keys()
    assert [name for name in plain if not torch.equal(plain[name], seen[name])] == []
    said = [*recording.notes, *(note for track in recording.values() for note in track.notes)]
    assert not [note for note in said if "could not be" in note and "Error:" in note]
    try:
        gradflow.analyze(recording)
    except RecordingError:
        assert not len(recording)
