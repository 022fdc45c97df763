"""Loops whose inputs depend on their own earlier states, as models with a step of their own.

``step(state, t)`` leads from the joint state after step t − 1, state name -> tensor, to that after
step t, so that the oracle can run the rest of a loop from any state as independent leaves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
T, B, H = 8, 3, 4


class Loop(nn.Module):
    """A model that is run step by step; `names` are its states in gradflow's order."""

    track = "cell"  # that holds the joint state
    names: tuple[str, ...] = ("h",)
    begins = 1  # the first step at which the joint state is whole
    whole = True  # whether it is whole at the last step too: else only h goes on

    @property
    def widths(self) -> list[int]:
        """Of the states."""
        return [H] * len(self.names)

    def begin(self, batch: int) -> State:
        widths = zip(self.names, self.widths, strict=True)
        return {name: torch.zeros(batch, width, dtype=torch.float64) for name, width in widths}

    def step(self, state: State, t: int) -> State:
        raise NotImplementedError

    def forward(self, batch: int = B, steps: int = T) -> list[State]:
        torch.manual_seed(3)
        self.noise = torch.randn(steps, batch, H, dtype=torch.float64)  # given inputs, masks, draws
        state, found = self.begin(batch), []
        for t in range(steps):
            state = self.step(state, t)
            found.append(state)
        return found


def made(model: type[Loop], *args: object) -> Loop:
    """The model in float64, with weights that neither fade nor explode at once."""
    torch.manual_seed(1)
    built = model(*args).double()
    for weight in built.parameters():
        with torch.no_grad():
            weight.mul_(1.5)
    return built


class Decoder(Loop):
    """A decoder on its own output."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.out = kind(H, H), nn.Linear(H, H)
        self.names = ("h", "c") if isinstance(self.cell, nn.LSTMCell) else ("h",)

    def feed(self, h: Tensor, t: int) -> Tensor:
        return self.out(h) if t else self.noise[0]

    def step(self, state: State, t: int) -> State:
        x = self.feed(state["h"], t)
        if len(self.names) == 2:
            h, c = self.cell(x, (state["h"], state["c"]))
            return {"h": h, "c": c}
        return {"h": self.cell(x, state["h"])}


class Fused(Decoder):
    """The same over a fused layer called with one step at a time."""

    track = "cell.l0"

    def __init__(self, kind: Callable[..., nn.Module], batch_first: bool) -> None:
        super().__init__(lambda i, h: kind(i, h, batch_first=batch_first))
        self.axis = 1 if batch_first else 0
        self.names = ("h", "c") if isinstance(self.cell, nn.LSTM) else ("h",)

    def step(self, state: State, t: int) -> State:
        x = self.feed(state["h"], t).unsqueeze(self.axis)
        if len(self.names) == 2:
            start = state["h"].unsqueeze(0), state["c"].unsqueeze(0)
            output, (_, c) = self.cell(x, start)
            return {"h": output.squeeze(self.axis), "c": c[0]}
        output, h = self.cell(x, state["h"].unsqueeze(0))
        return {"h": h[0]}


class Forced(Decoder):
    """Teacher forcing for three steps, then free running."""

    def feed(self, h: Tensor, t: int) -> Tensor:
        return self.noise[t] if t < 3 else self.out(h)


class Sampled(Decoder):
    """Scheduled sampling: each sequence reads its own output or the teacher's."""

    def feed(self, h: Tensor, t: int) -> Tensor:
        own = (self.noise[t, :, :1] > 0) & (t > 0)
        return torch.where(own, self.out(h), self.noise[t])


class Imputing(Decoder):
    """What is missing of an observation is what the state says."""

    def feed(self, h: Tensor, t: int) -> Tensor:
        seen = (self.noise[t].roll(1, 1) > 0).double()
        return seen * self.noise[t] + (1 - seen) * self.out(h)


class Detached(Decoder):
    """The output is fed back without its gradient: the path is cut."""

    def feed(self, h: Tensor, t: int) -> Tensor:
        return super().feed(h, t).detach()


class Attending(Decoder):
    """Attention over an encoder's memory, the context fed back as input."""

    def __init__(self) -> None:
        super().__init__(nn.GRUCell)
        self.encoder = nn.GRU(H, H)

    def begin(self, batch: int) -> State:
        self.memory, last = self.encoder(self.noise)
        return {"h": last[0]}

    def feed(self, h: Tensor, t: int) -> Tensor:
        weights = torch.softmax((self.memory * h).sum(2), dim=0)
        return self.noise[t] + (weights.unsqueeze(2) * self.memory).sum(0)


class WorldModel(Decoder):
    """An RSSM: a latent is drawn from the state and read by the next step."""

    def __init__(self) -> None:
        super().__init__(nn.GRUCell)
        self.prior, self.into = nn.Linear(H, 2 * H), nn.Linear(H, H)

    def feed(self, h: Tensor, t: int) -> Tensor:
        mean, spread = self.prior(h).chunk(2, dim=1)
        latent = mean + nn.functional.softplus(spread) * self.noise[t]
        return torch.tanh(self.into(latent))


class Own(nn.Module):
    """A cell of one's own."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.into(x) + self.back(h))


class Beside(Decoder):
    """Something crosses beside the state of the cell."""

    track = "loop"
    begins = 2

    def __init__(self, kind: Callable[..., nn.Module] = nn.GRUCell) -> None:
        super().__init__(kind)
        self.names = ("h", "carried")

    def begin(self, batch: int) -> State:
        return {
            "h": torch.zeros(batch, H, dtype=torch.float64),
            "carried": torch.zeros(batch, H, dtype=torch.float64),
        }


class Running(Beside):
    """The output is a sum over all steps: it crosses beside the state."""

    def step(self, state: State, t: int) -> State:
        y = state["carried"] + (0.5 * self.out(state["h"]) if t else self.noise[0])
        return {"h": self.cell(y, state["h"]), "carried": y}


class Delayed(Beside):
    """The input is the state two steps back."""

    def step(self, state: State, t: int) -> State:
        h = self.cell(self.noise[t] + state["carried"], state["h"])
        return {"h": h, "carried": state["h"]}


class TwoCells(Loop):
    """Two cells, of which the upper one feeds the lower one."""

    track = "loop"
    names = ("lower.h", "upper.h", "upper.c")

    def __init__(self, kind: Callable[..., nn.Module] = nn.GRUCell) -> None:
        super().__init__()
        self.lower, self.upper, self.out = kind(H, H), nn.LSTMCell(H, H), nn.Linear(H, H)

    def step(self, state: State, t: int) -> State:
        x = self.noise[t, : len(state["upper.h"])] + (self.out(state["upper.h"]) if t else 0.0)
        low = self.lower(x, state["lower.h"])
        h, c = self.upper(low, (state["upper.h"], state["upper.c"]))
        return {"lower.h": low, "upper.h": h, "upper.c": c}


class Stack(Loop):
    """A fused stack of two layers, called with one step at a time."""

    track = "loop"
    names = ("rnn.l0.h", "rnn.l0.c", "rnn.l1.h", "rnn.l1.c")

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(H, H, num_layers=2), nn.Linear(H, H)

    def step(self, state: State, t: int) -> State:
        x = self.noise[t] + (self.out(state["rnn.l1.h"]) if t else 0.0)
        h = torch.stack([state["rnn.l0.h"], state["rnn.l1.h"]])
        c = torch.stack([state["rnn.l0.c"], state["rnn.l1.c"]])
        _, (h, c) = self.rnn(x.unsqueeze(0), (h, c))
        values = (h[0], c[0], h[1], c[1])
        return dict(zip(self.names, values, strict=True))


class Late(Loop):
    """Each step reads a key that was made of the state three steps before it."""

    track = "loop"
    names = ("h", "carried", "carried2", "carried3")
    begins = 4
    whole = False

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.key = kind(H, H), nn.Linear(H, H)

    def begin(self, batch: int) -> State:
        return {name: torch.zeros(batch, H, dtype=torch.float64) for name in self.names}

    def step(self, state: State, t: int) -> State:
        keys = (self.key(state["h"]), *(state[name] for name in self.names[1:]))
        h = self.cell(keys[3] if t > 3 else self.noise[t], state["h"])
        return dict(zip(self.names, (h, *keys[:3]), strict=True))


class Chunks(Loop):
    """Three steps at a time; each chunk reads the end of the one before."""

    track = "loop"
    names = ("h",)

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(H, H), nn.Linear(H, H)

    def step(self, state: State, t: int) -> State:
        x = self.noise[t] + (self.out(state["h"]) if t else 0.0)
        return {"h": self.rnn(x.expand(3, -1, -1), state["h"].unsqueeze(0))[1][0]}


SHRINKING = ([0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1], [0, 1], [0, 1], [0], [0])
KEPT = ([0, 1, 2], [0, 1, 2], [0, 2], [0, 1], [1, 0], [1, 0], [1, 0], [0])
PERMUTED = ([0, 1, 2], [2, 0, 1], [0, 1, 2], [1, 0, 2], [0, 1, 2], [2, 1, 0], [2, 0, 1], [0, 2, 1])


class Changing(Decoder):
    """Sequences end early, are dropped or change their places; `rows` picks those of every step."""

    def __init__(self, kind: Callable[..., nn.Module], rows: tuple[list[int], ...]) -> None:
        super().__init__(kind)
        self.rows = rows

    def step(self, state: State, t: int) -> State:
        return super().step({name: value[self.rows[t]] for name, value in state.items()}, t)


class ChangingFused(Fused):
    """The same of a fused layer."""

    def __init__(self, kind: Callable[..., nn.Module], rows: tuple[list[int], ...]) -> None:
        super().__init__(kind, True)
        self.rows = rows

    def step(self, state: State, t: int) -> State:
        return super().step({name: value[self.rows[t]] for name, value in state.items()}, t)


class ChangingTwo(TwoCells):
    """The same of two cells."""

    def __init__(self, kind: Callable[..., nn.Module], rows: tuple[list[int], ...]) -> None:
        super().__init__(kind)
        self.rows = rows

    def step(self, state: State, t: int) -> State:
        return super().step({name: value[self.rows[t]] for name, value in state.items()}, t)


class WholeChunks(Loop):
    """Three steps at a time; each chunk reads all outputs of the one before."""

    track = "loop"

    def __init__(self, kind: Callable[..., nn.Module], layers: int, batch_first: bool) -> None:
        super().__init__()
        self.rnn = kind(H, H, num_layers=layers, batch_first=batch_first)
        self.out, self.time = nn.Linear(H, H), 1 if batch_first else 0
        self.states = ("h", "c") if kind is nn.LSTM else ("h",)
        each = [f"rnn.l{i}.{s}" for i in range(layers) for s in self.states]
        known = list(self.states) if layers == 1 else each
        self.names = (*known, "output" if layers == 1 else f"rnn.l{layers - 1}.output")

    @property
    def widths(self) -> list[int]:
        return [H] * (len(self.names) - 1) + [2 * H]

    def step(self, state: State, t: int) -> State:
        *known, before = state.values()
        h, *c = (torch.stack(known[i :: len(self.states)]) for i in range(len(self.states)))
        last = h[-1].unsqueeze(self.time)
        before = before.unflatten(1, (2, H))
        outputs = torch.cat([before if self.time else before.transpose(0, 1), last], self.time)
        x = self.noise[t].unsqueeze(self.time) + (self.out(outputs) if t else 0.0)
        x = x.expand(*([len(last), 3] if self.time else [3, len(h[0])]), H)
        output, end = self.rnn(x, (h, *c) if c else h)
        end = end if c else (end,)
        found = [part[i] for i in range(len(h)) for part in end]
        found[-len(self.states)] = output.select(self.time, -1)
        before = output.narrow(self.time, 0, 2)
        before = before if self.time else before.transpose(0, 1)
        return dict(zip(self.names, [*found, before.flatten(1)], strict=True))


class Ring(Loop):
    """Message passing on a ring: the nodes are the batch."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.GRUCell) -> None:
        super().__init__()
        self.cell, self.out = kind(H, H), nn.Linear(H, H)

    def begin(self, batch: int) -> State:
        return {"h": self.noise[0]}

    def step(self, state: State, t: int) -> State:
        message = self.out(state["h"].roll(1, 0) + state["h"].roll(-1, 0))
        return {"h": self.cell(message, state["h"])}


class Normed(Decoder):
    """Batch normalisation of what is fed back."""

    def __init__(self) -> None:
        super().__init__(nn.GRUCell)
        self.norm = nn.BatchNorm1d(H)

    def feed(self, h: Tensor, t: int) -> Tensor:
        return self.norm(self.out(h)) if t else self.noise[0]


class Remembering(Decoder):
    """Attention over all earlier states of its own."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.GRUCell) -> None:
        super().__init__(kind)
        self.key = nn.Linear(H, H)

    def begin(self, batch: int) -> State:
        self.keys: list[Tensor] = []
        return super().begin(batch)

    def feed(self, h: Tensor, t: int) -> Tensor:
        if not t:
            return self.noise[0]
        self.keys.append(self.key(h))
        memory = torch.stack(self.keys)
        weights = torch.softmax((memory * h).sum(2), dim=0)
        return (weights.unsqueeze(2) * memory).sum(0)


class Open(Loop):
    """Two cells, one above the other, over a given input: nothing is closed."""

    track = "upper"

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.GRUCell(H, H), nn.RNNCell(H, H)
        self.emb = nn.Linear(H, H)

    def begin(self, batch: int) -> State:
        self.embedded = self.emb(self.noise)
        return {
            "low": torch.zeros(batch, H, dtype=torch.float64),
            "h": torch.zeros(batch, H, dtype=torch.float64),
        }

    def step(self, state: State, t: int) -> State:
        low = self.lower(self.embedded[t], state["low"])
        return {"low": low, "h": self.upper(nn.functional.dropout(low, 0.1), state["h"])}


def advanced(model: Loop, rows: Tensor, start: int, end: int) -> Tensor:
    """The joint state (B, S) after step `end`, from that after step `start`."""
    state = dict(zip(model.names, rows.split(model.widths, dim=1), strict=True))
    for t in range(start + 1, end + 1):
        state = model.step(state, t)
    return torch.cat([state[name] for name in model.names], dim=1)
