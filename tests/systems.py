"""Systems whose Lyapunov exponents are known: closed forms, and numbers the literature agrees on.

Each gives its Jacobians (T, B, S, S) along B orbits from different starts, after a spin-up. A flow is
stepped by RK4 together with its tangent map; its exponents are those of one step, divided by `time`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import digamma
from torch import Tensor

State = np.ndarray  # (B, S)


@dataclass(frozen=True)
class System:
    """A map or a flow, and what is known of it."""

    name: str
    known: tuple[float, ...]  # nats per step, or per unit of time for a flow
    source: str
    jacobians: Callable[[int, int], Tensor]  # (steps, orbits) -> (T, B, S, S)
    time: float = 1.0  # of one step
    steps: int = 4000  # that settle it to about a hundredth of its scale, with sixteen orbits


def orbit(
    step: Callable[[State], tuple[State, np.ndarray]], start: Callable[[int], State], spin_up: int
) -> Callable[[int, int], Tensor]:
    """Jacobians along the orbits of a map that returns (next state, Jacobian here)."""

    def jacobians(steps: int, orbits: int) -> Tensor:
        state, found = start(orbits), []
        for t in range(spin_up + steps):
            state, jacobian = step(state)
            if t >= spin_up:
                found.append(jacobian)
        return torch.from_numpy(np.stack(found))

    return jacobians


def matrices(*rows: list[np.ndarray | float]) -> np.ndarray:
    """(B, S, S) of entries (B,) or numbers, written row by row."""
    size = max(np.size(entry) for row in rows for entry in row)
    full = [[np.broadcast_to(np.asarray(entry, float), size) for entry in row] for row in rows]
    return np.moveaxis(np.array(full), 2, 0)


def uniform(low: float, high: float, size: int, seed: int = 0) -> Callable[[int], State]:
    """Starts drawn from a box."""
    return lambda orbits: np.random.default_rng(seed).uniform(low, high, (orbits, size))


# ----------------------------------------------------------------------------------------- maps


def logistic(r: float) -> Callable[[State], tuple[State, np.ndarray]]:
    def step(state: State) -> tuple[State, np.ndarray]:
        return r * state * (1 - state), (r * (1 - 2 * state))[:, :, None]

    return step


def tent(slope: float) -> Callable[[State], tuple[State, np.ndarray]]:
    def step(state: State) -> tuple[State, np.ndarray]:
        low = state < 0.5
        return slope * np.where(low, state, 1 - state), np.where(low, slope, -slope)[:, :, None]

    return step


def cat(state: State) -> tuple[State, np.ndarray]:
    x, y = state.T
    turned = np.stack([2 * x + y, x + y], 1) % 1.0
    return turned, matrices([2 + 0 * x, 1], [1, 1])


def henon(state: State) -> tuple[State, np.ndarray]:
    x, y = state.T
    return np.stack([1 - 1.4 * x * x + y, 0.3 * x], 1), matrices([-2.8 * x, 1], [0.3, 0])


def ikeda(state: State, u: float = 0.9) -> tuple[State, np.ndarray]:
    x, y = state.T
    square = 1 + x * x + y * y
    angle = 0.4 - 6 / square
    c, s = np.cos(angle), np.sin(angle)
    p, q = x * c - y * s, x * s + y * c
    by_x, by_y = 12 * x / square**2, 12 * y / square**2
    jacobian = matrices(
        [u * (c - q * by_x), u * (-s - q * by_y)], [u * (s + p * by_x), u * (c + p * by_y)]
    )
    return np.stack([1 + u * p, u * q], 1), jacobian


# ---------------------------------------------------------------------------------------- flows


def lorenz(state: State) -> tuple[State, np.ndarray]:
    """Velocity and its derivative, at σ = 10, ρ = 28, β = 8/3."""
    x, y, z = state.T
    velocity = np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], 1)
    return velocity, matrices([-10 + 0 * x, 10, 0], [28 - z, -1, -x], [y, x, -8 / 3])


def rossler(state: State) -> tuple[State, np.ndarray]:
    """Velocity and its derivative, at a = b = 0.2, c = 5.7."""
    x, y, z = state.T
    velocity = np.stack([-y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)], 1)
    return velocity, matrices([0 * x, -1, -1], [1, 0.2, 0], [z, 0, x - 5.7])


def runge_kutta(
    flow: Callable[[State], tuple[State, np.ndarray]], dt: float
) -> Callable[[State], tuple[State, np.ndarray]]:
    """One step of RK4 for the state and for its tangent map together."""

    def step(state: State) -> tuple[State, np.ndarray]:
        eye = np.eye(state.shape[1])
        moves, turns = [], []
        for share in (0.0, 0.5, 0.5, 1.0):
            here = state + share * dt * moves[-1] if moves else state
            velocity, derivative = flow(here)
            turned = eye + share * dt * turns[-1] if turns else eye
            moves.append(velocity)
            turns.append(derivative @ turned)
        weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
        move = sum(w * m for w, m in zip(weights, moves, strict=True))
        turn = sum(w * m for w, m in zip(weights, turns, strict=True))
        return state + dt * move, eye + dt * turn

    return step


# ------------------------------------------------------------------------------ random, constant


def gaussian(size: int, seed: int = 0) -> Callable[[int, int], Tensor]:
    """Products of independent matrices with N(0, 1) entries."""

    def jacobians(steps: int, orbits: int) -> Tensor:
        random = np.random.default_rng(seed)
        return torch.from_numpy(random.normal(size=(steps, orbits, size, size)))

    return jacobians


def newman(size: int) -> tuple[float, ...]:
    """λ_i = ½ (ln 2 + ψ((N − i + 1)/2)) of such products (Newman 1986)."""
    return tuple(0.5 * (math.log(2) + digamma((size - i) / 2)) for i in range(size))


def constant(matrix: list[list[float]]) -> Callable[[int, int], Tensor]:
    """The same matrix at every step."""
    return lambda steps, orbits: torch.tensor(matrix).double().expand(steps, orbits, -1, -1)


def turned(angle: float, factor: float) -> list[list[float]]:
    c, s = factor * math.cos(angle), factor * math.sin(angle)
    return [[c, -s], [s, c]]


GOLDEN = math.log((3 + math.sqrt(5)) / 2)  # 0.9624237

SYSTEMS = [
    System("logistic map, r = 4", (math.log(2),), "conjugate to the tent map",
           orbit(logistic(4.0), uniform(0.1, 0.9, 1), 200)),
    System("logistic map, r = 3.2", (math.log(0.16) / 2,), "its orbit of period 2",
           orbit(logistic(3.2), uniform(0.1, 0.9, 1), 500)),
    System("tent map, slope 1.9", (math.log(1.9),), "constant slope",
           orbit(tent(1.9), uniform(0.1, 0.9, 1), 10)),
    System("Arnold's cat map", (GOLDEN, -GOLDEN), "eigenvalues",
           orbit(cat, uniform(0, 1, 2), 10)),
    System("Hénon map", (0.41922, -1.62319), "Sprott 2003",
           orbit(henon, uniform(-0.1, 0.1, 2), 200)),
    System("Ikeda map, u = 0.9", (0.5076, -0.7183), "Sprott 2003",
           orbit(ikeda, uniform(-0.1, 0.1, 2), 300)),
    System("Lorenz flow", (0.9056, 0.0, -14.5723), "Sprott 2003",
           orbit(runge_kutta(lorenz, 0.01), uniform(1, 10, 3), 1000), 0.01),
    System("Rössler flow", (0.0714, 0.0, -5.3943), "Sprott 2003",
           orbit(runge_kutta(rossler, 0.025), uniform(0, 1, 3), 4000), 0.025, 12_000),
    System("Gaussian products, N = 4", newman(4), "Newman 1986", gaussian(4)),
    System("diag(0.99, 0.9, 0.5)", (math.log(0.99), math.log(0.9), math.log(0.5)), "eigenvalues",
           constant([[0.99, 0, 0], [0, 0.9, 0], [0, 0, 0.5]])),
    System("triangular, not normal", (math.log(0.9), math.log(0.8), math.log(0.5)), "eigenvalues",
           constant([[0.5, 5, 0], [0, 0.8, 5], [0, 0, 0.9]])),
    System("0.95 × rotation by 1 rad", (math.log(0.95),) * 2, "both alike",
           constant(turned(1.0, 0.95))),
]  # fmt: skip
