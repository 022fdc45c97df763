"""Loops as users write them by hand, without a cell and without a tap; `tap` may be put in for the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

H, INPUTS = 5, 3
Tap = Callable[..., Any] | None


class Parts(nn.Module):
    """Weights of all of them; a subclass loops over some."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h, self.g = nn.Linear(INPUTS, H), nn.Linear(H, H), nn.Linear(INPUTS + H, 4 * H)
        self.xr, self.hr = nn.Linear(INPUTS, H), nn.Linear(H, H)
        self.xz, self.hz = nn.Linear(INPUTS, H), nn.Linear(H, H)
        self.W, self.V = nn.Parameter(torch.randn(H, H) / 2), nn.Parameter(torch.randn(H, H) / 2)
        self.register_buffer("sign", torch.sign(torch.randn(H)))
        self.start = nn.Parameter(torch.randn(H) / 2)
        self.out, self.enc = nn.Linear(H, 2), nn.GRU(INPUTS, H)

    def zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[1], H)


class Vanilla(Parts):
    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        h, ys = self.zeros(x), []
        for u in x:
            h = torch.tanh(self.x(u) + self.h(h))
            if tap:
                h = tap(h=h)
            ys.append(h)
        return self.out(torch.stack(ys))


class Gated(Parts):
    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        h = self.start.expand(x.shape[1], H)
        for u in x:
            r = torch.sigmoid(self.xr(u) + self.hr(h))
            z = torch.sigmoid(self.xz(u) + self.hz(h))
            n = torch.tanh(self.x(u) + r * self.h(h))
            h = (1 - z) * n + z * h
            if tap:
                h = tap(h=h)
        return h


class LongShort(Parts):
    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        h = c = self.zeros(x)
        for t in range(len(x)):
            i, f, g, o = self.g(torch.cat([x[t], h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            if tap:
                tap(c=c, h=h)
        return self.out(h)


class Leaky(Parts):
    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        v = self.zeros(x)
        for u in x:
            v = 0.8 * v + 0.2 * (self.h(torch.tanh(v)) + self.x(u))
            if tap:
                v = tap(v=v)
        return v


class Continuous(Parts):
    """Excitatory and inhibitory units: the sign of a weight is that of its column."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        v, rates = self.zeros(x), []
        for u in x:
            r = torch.relu(v)
            v = v + 0.3 * (-v + r @ (self.W.abs() * self.sign) + self.x(u))
            if tap:
                v = tap(v=v)
            rates.append(r)
        return self.out(torch.stack(rates)) + self.out(v)


class Populations(Parts):
    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        e = i = self.zeros(x)
        for u in x:
            new_e = torch.tanh(self.x(u) + self.h(e) - i @ self.V)
            i = torch.tanh(e @ self.W + self.hr(i))
            e = new_e
            if tap:
                tap(e=e, i=i)
        return e + self.out(i).sum(1, keepdim=True)


class Euler(Parts):
    """Two populations in continuous time: every other use of V and W descends from the one before."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        e = i = self.zeros(x)
        for u in x:
            de = -e + torch.tanh(self.h(e) - i @ self.V + self.x(u))
            di = -i + torch.tanh(e @ self.W - self.hr(i))
            e, i = e + 0.1 * de, i + 0.2 * di
            if tap:
                tap(e=e, i=i)
        return e + self.out(i).sum(1, keepdim=True)


class Columns(Parts):
    """As equations are written, W r: a sequence is a column; input currents are made before the loop."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        v, current, rates = self.zeros(x).T, self.x(x), []
        for t in range(len(x)):
            v = v + 0.3 * (-v + self.W @ torch.tanh(v) + current[t].T)
            if tap:
                v = tap(v=v.T).T
            rates.append(torch.tanh(v))
        return self.out(torch.stack(rates).mT)


class Decoder(Parts):
    """By hand, beside a layer of torch's own."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        y, h = self.enc(x)
        h = h[0]
        for t in range(len(x)):
            h = torch.tanh(self.hr(y[t]) + self.h(h))
            if tap:
                h = tap(h=h)
        return h


def _run(model: Parts, x: Tensor, tap: Tap) -> Tensor:
    h = model.zeros(x)
    for u in x:
        h = torch.tanh(u @ model.W[:INPUTS] + h @ model.V)
        if tap:
            h = tap(h=h)
    return h


class BareFunction(Parts):
    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        return _run(self, x, tap)


class Inner(Parts):
    """The loop is in a layer of the model, with a mask on the state between two steps."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        h = self.zeros(x)
        for u in x:
            h = torch.tanh(self.x(u) + self.h(h)) * self.sign
            if tap:
                h = tap(h=h)
        return h


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Inner()

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        return self.layer(x, tap)


class RungeKutta(Parts):
    """Four calls of the right-hand side in every step."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        z = self.start.expand(x.shape[1], H)
        for _ in range(len(x)):
            a = torch.tanh(self.h(z))
            b = torch.tanh(self.h(z + 0.05 * a))
            c = torch.tanh(self.h(z + 0.05 * b))
            d = torch.tanh(self.h(z + 0.1 * c))
            z = z + 0.1 / 6 * (a + 2 * b + 2 * c + d)
            if tap:
                z = tap(z=z)
        return z


class Decay(Parts):
    """A vector of weights alone goes from step to step."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        v, read = self.zeros(x), []
        for u in x:
            v = torch.sigmoid(self.start) * v + self.x(u)
            if tap:
                v = tap(v=v)
            read.append(torch.sigmoid(v))
        return torch.stack(read)


class Quasi(Parts):
    """No weight is in the loop: gates and inputs of all steps are made before it."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        z, f = torch.tanh(self.x(x)), torch.sigmoid(self.xr(x))
        h, hs = self.zeros(x), []
        for t in range(len(x)):
            h = f[t] * h + (1 - f[t]) * z[t]
            if tap:
                h = tap(h=h)
            hs.append(h)
        return self.out(torch.tanh(torch.stack(hs)))


class QuasiStepwise(Parts):
    """The same, but that the gates of each step are made inside the loop, from its input alone."""

    def forward(self, x: Tensor, tap: Tap = None) -> Tensor:
        h, hs = self.start.expand(x.shape[1], H), []
        for u in x:
            f = torch.sigmoid(self.xr(u))
            h = f * h + (1 - f) * torch.tanh(self.x(u)) * torch.cos(h)
            if tap:
                h = tap(h=h)
            hs.append(h)
        return self.out(torch.tanh(torch.stack(hs)))


LOOPS: dict[str, tuple[type[nn.Module], list[str]]] = {  # and the names of the states
    "vanilla": (Vanilla, ["h"]),
    "gated, learned start": (Gated, ["h"]),
    "two states": (LongShort, ["c", "h"]),
    "leaky": (Leaky, ["v"]),
    "continuous time, signed weights": (Continuous, ["v"]),
    "two populations": (Populations, ["e", "i"]),
    "two populations, Euler": (Euler, ["e", "i"]),
    "columns": (Columns, ["v"]),
    "a decoder beside a GRU": (Decoder, ["h"]),
    "a bare function": (BareFunction, ["h"]),
    "a layer that loops inside": (Outer, ["h"]),
    "Runge and Kutta": (RungeKutta, ["z"]),
    "decay": (Decay, ["v"]),
    "quasi-recurrent": (Quasi, ["h"]),
    "quasi-recurrent, step by step": (QuasiStepwise, ["h"]),
}
