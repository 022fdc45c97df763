"""The slow, obvious version: recurrent layers unrolled step by step, differentiated by autograd.

Three oracles, none of which shares code with gradflow:

1. `unroll`: PyTorch's equations (LSTM order i, f, g, o; GRU order r, z, n) as a float64 Python loop
   in which every h_t, c_t and pre-activation is a graph tensor of its own, so what autograd says
   about them *is* the graph gradient.
2. `phantom_totals`: the fused kernel itself, run with an input x'_t = [x_t, e_t], e = 0, whose
   weights make a perturbation of e_t enter the gates exactly as one of h_{t−1} does.
3. `dense_jacobians`: ∂s_t/∂s_{t−1} by `torch.autograd.functional.jacobian` on a one-step function.

Letters: T timesteps, B sequences, I inputs, H hidden units, P width of h, G gates, D directions.
Everything is time first and in the user's order of sequences; `lengths` gives packed semantics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mpmath
import numpy as np
import torch
from torch import Tensor, nn

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]  # at output, h_n, c_n


# ------------------------------------------------------------------------------------ one step


@dataclass(frozen=True)
class Step:
    """One step of a cell, with every intermediate that a test asks about."""

    h: Tensor  # (B, P)
    c: Tensor | None  # (B, H)
    gates: dict[str, Tensor]  # (B, H) each


def rnn_step(kind: str, a: Tensor, u: Tensor, h: Tensor) -> Step:
    """One RNN step from a = W_ih x + b_ih and u = W_hh h + b_hh, both (B, H)."""
    return Step(torch.tanh(a + u) if kind == "RNN_TANH" else torch.relu(a + u), None, {})


def lstm_step(a: Tensor, u: Tensor, c: Tensor, w_hr: Tensor | None) -> Step:
    """One LSTM step; w_hr is the projection or None."""
    i, f, g, o = (a + u).chunk(4, dim=1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    h = o * torch.tanh(c)
    if w_hr is not None:
        h = h @ w_hr.T
    return Step(h, c, {"i": i, "f": f, "g": g, "o": o})


def gru_step(a: Tensor, u: Tensor, h: Tensor) -> Step:
    """One GRU step, PyTorch's: z multiplies the old state, r acts after the matrix product."""
    a_r, a_z, a_n = a.chunk(3, dim=1)
    u_r, u_z, u_n = u.chunk(3, dim=1)
    r, z = torch.sigmoid(a_r + u_r), torch.sigmoid(a_z + u_z)
    n = torch.tanh(a_n + r * u_n)
    return Step((1 - z) * n + z * h, None, {"r": r, "z": z, "n": n})


def take_step(
    kind: str, a: Tensor, u: Tensor, h: Tensor, c: Tensor | None, w_hr: Tensor | None
) -> Step:
    """Dispatch on the cell's name."""
    if kind == "LSTM":
        assert c is not None
        return lstm_step(a, u, c, w_hr)
    return gru_step(a, u, h) if kind == "GRU" else rnn_step(kind, a, u, h)


# -------------------------------------------------------------------------------- whole stacks


@dataclass
class UnrolledLayer:
    """One layer in one direction. Lists have T entries in input-time order, all in the graph."""

    name: str  # "l0", "l1_reverse"
    kind: str
    reverse: bool
    weights: dict[str, Tensor]  # weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    lengths: Tensor  # (B,)
    inputs: list[Tensor]  # (B, I)
    h0: Tensor  # (B, P)
    c0: Tensor | None  # (B, H)
    h: list[Tensor] = field(default_factory=list)  # (B, P) after the step
    c: list[Tensor] = field(default_factory=list)  # (B, H)
    visible: list[Tensor] = field(default_factory=list)  # h_t as seen from outside its recurrence
    a: list[Tensor] = field(default_factory=list)  # (B, G*H) input side of the pre-activations
    u: list[Tensor] = field(default_factory=list)  # (B, G*H) recurrent side
    gates: list[dict[str, Tensor]] = field(default_factory=list)
    h_before: list[Tensor] = field(default_factory=list)  # (B, P) the state each step started from
    c_before: list[Tensor] = field(default_factory=list)

    @property
    def mask(self) -> Tensor:
        """(T, B) true on real steps."""
        return torch.arange(len(self.h))[:, None] < self.lengths[None, :]


@dataclass
class Unrolled:
    """A whole stack, as returned by `unroll`."""

    output: Tensor  # (T, B, D*P), 0 on padding
    h_n: Tensor  # (layers*D, B, P)
    c_n: Tensor | None  # (layers*D, B, H)
    layers: dict[str, UnrolledLayer]

    @property
    def returned(self) -> list[Tensor]:
        """What the module returns: output, h_n and, for an LSTM, c_n."""
        return [self.output, self.h_n] + ([] if self.c_n is None else [self.c_n])


def kind_of(module: nn.RNNBase) -> str:
    """Either "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"."""
    return module.mode


def suffixes(module: nn.RNNBase) -> list[str]:
    """PyTorch's own suffixes, in the order of h_n's first axis."""
    ends = ["", "_reverse"] if module.bidirectional else [""]
    return [f"l{layer}{end}" for layer in range(module.num_layers) for end in ends]


def layer_weights(module: nn.RNNBase, suffix: str) -> dict[str, Tensor]:
    """Detached float64 copies of one layer's weights, by their PyTorch names without the suffix."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    found = {name: getattr(module, f"{name}_{suffix}", None) for name in names}
    return {name: w.detach().double().clone() for name, w in found.items() if isinstance(w, Tensor)}


def unroll(
    module: nn.RNNBase,
    x: Tensor,
    *,
    lengths: Tensor | None = None,
    hx: tuple[Tensor, Tensor | None] | None = None,
    dropout_masks: list[Tensor] | None = None,
) -> Unrolled:
    """Run `module` on x (T, B, I) in float64, one step at a time.

    hx holds h_0 (layers*D, B, P) and c_0 (layers*D, B, H) or None; dropout_masks the factors
    (T, B, D*P) between a layer and the next, already divided by the keep probability.
    """
    steps, batch = x.shape[:2]
    lengths = torch.full((batch,), steps) if lengths is None else lengths
    names = suffixes(module)
    if hx is None:
        h_0 = x.new_zeros(len(names), batch, module.proj_size or module.hidden_size)
        c_0 = x.new_zeros(len(names), batch, module.hidden_size)
    else:
        h_0, c_0 = hx[0], hx[1] if hx[1] is not None else hx[0]
    h_0, c_0 = h_0.double(), c_0.double()
    directions = 2 if module.bidirectional else 1
    inputs = [x_t.double() for x_t in x]
    layers: dict[str, UnrolledLayer] = {}
    last_h: list[Tensor] = []
    last_c: list[Tensor] = []
    for number in range(module.num_layers):
        for direction in range(directions):
            place = number * directions + direction
            layer = UnrolledLayer(
                name=names[place],
                kind=kind_of(module),
                reverse=direction == 1,
                weights=layer_weights(module, names[place]),
                lengths=lengths,
                inputs=inputs,
                h0=h_0[place],
                c0=c_0[place] if kind_of(module) == "LSTM" else None,
            )
            h_end, c_end = _unroll_layer(layer)
            layers[layer.name] = layer
            last_h.append(h_end)
            last_c += [] if c_end is None else [c_end]
        row = [layers[name] for name in names[number * directions : (number + 1) * directions]]
        outputs = _outputs(row)
        inputs = outputs
        if dropout_masks is not None and number < module.num_layers - 1:
            factors = dropout_masks[number].double()
            inputs = [y * factor for y, factor in zip(outputs, factors, strict=True)]
    return Unrolled(
        output=torch.stack(outputs),
        h_n=torch.stack(last_h),
        c_n=torch.stack(last_c) if last_c else None,
        layers=layers,
    )


def _outputs(row: list[UnrolledLayer]) -> list[Tensor]:
    """Concatenate the directions of one layer and put 0 on padding, (B, D*P) per step."""
    outputs = []
    for t, real in enumerate(row[0].mask):
        y = torch.cat([layer.visible[t] for layer in row], dim=1)
        outputs.append(torch.where(real[:, None], y, torch.zeros_like(y)))
    return outputs


def _unroll_layer(layer: UnrolledLayer) -> tuple[Tensor, Tensor | None]:
    """Fill the lists of `layer`; return the states after each sequence's last processed step."""
    steps, batch = len(layer.inputs), layer.lengths.shape[0]
    weights = layer.weights
    zero = torch.zeros(weights["weight_hh"].shape[0], dtype=torch.float64)
    b_ih, b_hh = weights.get("bias_ih", zero), weights.get("bias_hh", zero)
    # initial states join the graph, so that autograd.grad never meets a leaf without a gradient
    h = layer.h0 = layer.h0.detach().clone().requires_grad_(True)
    c = layer.c0 = None if layer.c0 is None else layer.c0.detach().clone().requires_grad_(True)
    h_end, c_end = h, c
    blank: list[Tensor] = [torch.empty(batch, 0)] * steps
    layer.h, layer.visible, layer.a, layer.u = blank[:], blank[:], blank[:], blank[:]
    layer.c = blank[:] if c is not None else []
    layer.gates, layer.h_before, layer.c_before = [{}] * steps, blank[:], blank[:]
    for t in reversed(range(steps)) if layer.reverse else range(steps):
        layer.h_before[t] = h
        if c is not None:
            layer.c_before[t] = c
        layer.a[t] = (layer.inputs[t] @ weights["weight_ih"].T + b_ih).requires_grad_(True)
        layer.u[t] = h @ weights["weight_hh"].T + b_hh
        step = take_step(layer.kind, layer.a[t], layer.u[t], h, c, weights.get("weight_hr"))
        real = (t < layer.lengths)[:, None]
        layer.h[t], layer.gates[t] = step.h, step.gates
        layer.visible[t] = step.h.clone()  # all that is not this layer's own recurrence reads this
        h_end = torch.where(real, layer.visible[t], h_end)
        h = torch.where(real, step.h, h)
        if step.c is not None:
            assert c is not None
            assert c_end is not None
            layer.c[t] = step.c
            c = torch.where(real, step.c, c)
            c_end = c
    return h_end, c_end


# ----------------------------------------------------------------------------------- gradients


@dataclass(frozen=True)
class LayerGrads:
    """What autograd says about one layer, (T, B, ·), input-time order, 0 on padding."""

    h: Tensor  # total ∂L/∂h_t
    c: Tensor | None  # total ∂L/∂c_t
    direct: Tensor  # the part of ∂L/∂h_t that does not come through this layer's recurrence
    delta: Tensor  # ∂L/∂a_t
    delta_hh: Tensor  # ∂L/∂u_t


def pull_back(unrolled: Unrolled, grads: Grads) -> dict[str, LayerGrads]:
    """Pull gradients at (output, h_n, c_n) back to every layer's states, by autograd."""
    pairs = [(y, g) for y, g in zip(unrolled.returned, grads, strict=False) if g is not None]
    heads, seeds = [y for y, _ in pairs], [g.double() for _, g in pairs]
    return {name: _layer_grads(layer, heads, seeds) for name, layer in unrolled.layers.items()}


def _layer_grads(layer: UnrolledLayer, heads: list[Tensor], seeds: list[Tensor]) -> LayerGrads:
    lists = [layer.h, layer.c, layer.visible, layer.a, layer.u]
    wanted = [tensor for tensors in lists for tensor in tensors]
    found = torch.autograd.grad(heads, wanted, seeds, retain_graph=True, allow_unused=True)
    filled = [
        torch.zeros_like(tensor) if grad is None else grad
        for tensor, grad in zip(wanted, found, strict=True)
    ]
    results: list[Tensor | None] = []
    for tensors in lists:
        taken, filled = filled[: len(tensors)], filled[len(tensors) :]
        results.append(torch.stack(taken) if taken else None)
    h, c, direct, delta, delta_hh = results
    assert h is not None
    assert direct is not None
    assert delta is not None
    assert delta_hh is not None
    return LayerGrads(h, c, direct, delta, delta_hh)


def returned_grads(unrolled: Unrolled, loss: Tensor) -> Grads:
    """∂L at output, h_n and c_n, as hooks on what a module returns would see them."""
    found = torch.autograd.grad(loss, unrolled.returned, retain_graph=True, allow_unused=True)
    output, h_n, c_n = (*found, None, None)[:3]
    return output, h_n, c_n


def keep_one_step(grads: Grads, lengths: Tensor, bidirectional: bool, *, last: bool) -> Grads:
    """Of the gradients at what the module returned, keep each sequence's last (or first) step.

    What reaches padding of the output goes nowhere and does not count. The step kept is the last
    (first) one that is not all zero.
    """
    output, h_n, c_n = grads
    steps = max(int(lengths.max()), 1) if output is None else output.shape[0]
    batch = lengths.shape[0]
    ends = final_steps(lengths, bidirectional)
    reached = torch.zeros(steps, batch, dtype=torch.bool)
    if output is not None:
        reached |= (output != 0).any(dim=2) & (torch.arange(steps)[:, None] < lengths)
    for state in (h_n, c_n):
        for place, grad in enumerate([] if state is None else state):
            hit = (grad != 0).any(dim=1)
            when = ends[place % len(ends)]
            reached[when[hit], torch.arange(batch)[hit]] = True
    clock = torch.arange(steps)[:, None]
    kept = (
        torch.where(reached, clock, -1).amax(dim=0)
        if last
        else torch.where(reached, clock, steps).amin(dim=0)
    )  # (B,)
    return keep_steps(grads, kept, lengths, bidirectional)


def final_steps(lengths: Tensor, bidirectional: bool) -> list[Tensor]:
    """Which input step h_n and c_n of each direction belong to: the last real one, or step 0."""
    return [lengths - 1, torch.zeros_like(lengths)] if bidirectional else [lengths - 1]


def keep_steps(grads: Grads, kept: Tensor, lengths: Tensor, bidirectional: bool) -> Grads:
    """Of the gradients at what the module returned, keep one input step of each sequence, (B,)."""
    output, h_n, c_n = grads
    ends = final_steps(lengths, bidirectional)
    if output is not None:
        clock = torch.arange(output.shape[0])[:, None]
        output = output * (clock == kept)[:, :, None]
    masked: list[Tensor | None] = []
    for state in (h_n, c_n):
        if state is None:
            masked.append(None)
            continue
        at_kept = [ends[place % len(ends)] == kept for place in range(state.shape[0])]
        masked.append(state * torch.stack(at_kept)[:, :, None])
    return output, masked[0], masked[1]


# ------------------------------------------------------------------------------------- dropout


def dropout_factors(
    module: nn.RNNBase, rng_state: Tensor, data_shape: tuple[int, ...], dtype: torch.dtype
) -> list[Tensor]:
    """Replay the CPU generator: the factors a fused stack multiplied between its layers.

    data_shape is the shape of the top output as the kernel sees it: (T, B, D*P), or for packed
    input (total steps, D*P). The generator is left as it was.
    """
    before = torch.get_rng_state()
    try:
        torch.set_rng_state(rng_state)
        return [
            torch.nn.functional.dropout(torch.ones(data_shape, dtype=dtype), module.dropout, True)
            for _ in range(module.num_layers - 1)
        ]
    finally:
        torch.set_rng_state(before)


# ------------------------------------------------------------------------------ phantom inputs


def flip_real(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse each sequence's real steps, (T, B, ·); its own inverse. Padding stays in place."""
    clock = torch.arange(x.shape[0])[:, None]
    source = torch.where(clock < lengths, lengths - 1 - clock, clock)
    return x.gather(0, source[:, :, None].expand_as(x))


def phantom_totals(layer: UnrolledLayer, direct: Tensor, grad_c_end: Tensor | None) -> Tensor:
    """Total ∂L/∂h_t (T, B, P) from the fused kernel, given the direct part and ∂L/∂c_n (B, H)."""
    lengths, kind = layer.lengths, layer.kind
    turn = (lambda x: flip_real(x, lengths)) if layer.reverse else (lambda x: x)
    x, direct = turn(torch.stack(layer.inputs).detach()), turn(direct)
    width = layer.h0.shape[1] * (2 if kind == "GRU" else 1)
    e = torch.zeros(*x.shape[:2], width, dtype=torch.float64, requires_grad=True)
    fused = _phantom_module(layer, x.shape[2] + width)
    packed = nn.utils.rnn.pack_padded_sequence(torch.cat([x, e], 2), lengths, enforce_sorted=False)
    h0 = layer.h0.detach()[None]
    hx = h0 if layer.c0 is None else (h0, layer.c0.detach()[None])
    out, end = fused(packed, hx)
    output, _ = nn.utils.rnn.pad_packed_sequence(out, total_length=x.shape[0])
    heads, seeds = [output], [direct]
    if grad_c_end is not None:
        heads, seeds = [*heads, end[1]], [*seeds, grad_c_end[None]]
    (recurrent,) = torch.autograd.grad(heads, e, seeds)
    if kind == "GRU":
        return turn(_gru_totals(layer, direct, recurrent, turn))
    arrived = torch.cat([recurrent[1:], torch.zeros_like(recurrent[:1])])
    return turn(direct + arrived)


def _phantom_module(layer: UnrolledLayer, inputs: int) -> nn.RNNBase:
    """The fused module whose extra input columns act as h_{t−1} does."""
    weights, kind = layer.weights, layer.kind
    hidden, bias = _hidden(layer), "bias_ih" in weights
    if kind == "LSTM":
        proj = weights["weight_hr"].shape[0] if "weight_hr" in weights else 0
        fused: nn.RNNBase = nn.LSTM(inputs, hidden, bias=bias, proj_size=proj, dtype=torch.float64)
    elif kind == "GRU":
        fused = nn.GRU(inputs, hidden, bias=bias, dtype=torch.float64)
    else:
        phi = kind[4:].lower()
        fused = nn.RNN(inputs, hidden, bias=bias, nonlinearity=phi, dtype=torch.float64)
    columns = weights["weight_hh"]
    if kind == "GRU":  # U_r and U_z for the first H columns, identity into n for the second
        gates = columns.clone()
        gates[2 * hidden :] = 0
        candidate = torch.zeros_like(columns)
        candidate[2 * hidden :] = torch.eye(hidden, dtype=torch.float64)
        columns = torch.cat([gates, candidate], dim=1)
    with torch.no_grad():
        for name, value in weights.items():
            getattr(fused, f"{name}_l0").copy_(
                torch.cat([value, columns], dim=1) if name == "weight_ih" else value
            )
    return fused


def _gru_totals(
    layer: UnrolledLayer, direct: Tensor, e: Tensor, turn: Callable[[Tensor], Tensor]
) -> Tensor:
    """∂L/∂h_{t−1} = direct + ∂L/∂e¹_t + U_nᵀ(r_t ⊙ ∂L/∂e²_t) + z_t ⊙ ∂L/∂h_t, from the end."""
    hidden = _hidden(layer)
    u_n = layer.weights["weight_hh"][2 * hidden :]
    r = turn(torch.stack([gates["r"] for gates in layer.gates]).detach())
    z = turn(torch.stack([gates["z"] for gates in layer.gates]).detach())
    through_gates, candidate = e[..., :hidden], e[..., hidden:]
    totals = direct.clone()
    for t in reversed(range(1, direct.shape[0])):
        real = (t < layer.lengths)[:, None]
        arrived = through_gates[t] + (r[t] * candidate[t]) @ u_n + z[t] * totals[t]
        totals[t - 1] = totals[t - 1] + torch.where(real, arrived, torch.zeros_like(arrived))
    return totals


def _hidden(layer: UnrolledLayer) -> int:
    gates = {"LSTM": 4, "GRU": 3}.get(layer.kind, 1)
    return layer.weights["weight_hh"].shape[0] // gates


# ------------------------------------------------------------------------------ step Jacobians


def dense_jacobians(layer: UnrolledLayer) -> Tensor:
    """A_p = ∂s_p/∂s_{p−1}, (T, B, S, S), s = (h, c), processing order; padding is NaN."""
    steps, batch, width = len(layer.h), layer.lengths.shape[0], layer.h0.shape[1]
    s = torch.cat(layer.h_before)
    if layer.c0 is not None:
        s = torch.cat([s, torch.cat(layer.c_before)], dim=1)  # (T*B, S)
    advance = _one_step(layer, torch.cat(layer.a).detach(), width)
    # given their starting states, steps do not mix: the Jacobian of the sum holds each one's own
    dense = torch.autograd.functional.jacobian(lambda v: advance(v).sum(0), s.detach())
    stacked = dense.permute(1, 0, 2).reshape(steps, batch, *[s.shape[1]] * 2).clone()
    if layer.reverse:
        stacked = flip_real(stacked.reshape(steps, batch, -1), layer.lengths).reshape(stacked.shape)
    stacked[~layer.mask] = float("nan")
    return stacked


def _one_step(layer: UnrolledLayer, a: Tensor, width: int) -> Callable[[Tensor], Tensor]:
    weights = layer.weights
    b_hh = weights.get("bias_hh", torch.zeros(weights["weight_hh"].shape[0], dtype=torch.float64))

    def advance(s: Tensor) -> Tensor:
        h, c = s[:, :width], s[:, width:] if layer.c0 is not None else None
        u = h @ weights["weight_hh"].T + b_hh
        step = take_step(layer.kind, a, u, h, c, weights.get("weight_hr"))
        return step.h if step.c is None else torch.cat([step.h, step.c], dim=1)

    return advance


# ------------------------------------------------------------------------------------ exponents


def gram_schmidt_exponents(jacobians: np.ndarray, skip: int) -> np.ndarray:
    """Lyapunov exponents of one sequence (T, S, S) by modified Gram–Schmidt, largest first, (S,).

    From the unit vectors, in numpy's extended precision, vector by vector, as in Benettin et al.
    (1980): another starting basis, another factorisation and another precision than gradflow's.
    """
    steps, size, _ = jacobians.shape
    vectors = list(np.eye(size, dtype=np.longdouble))
    total = np.zeros(size, dtype=np.longdouble)
    for t in range(steps):
        matrix = jacobians[t].astype(np.longdouble)
        vectors = [(matrix * vector).sum(1) for vector in vectors]
        for j in range(size):
            for i in range(j):
                vectors[j] = vectors[j] - (vectors[i] * vectors[j]).sum() * vectors[i]
            length = np.sqrt((vectors[j] ** 2).sum())
            vectors[j] = vectors[j] / length
            total[j] += np.log(length) if t >= skip else 0.0
    return np.sort((total / (steps - skip)).astype(float))[::-1]


def exact_log_singular(jacobians: np.ndarray, digits: int = 200) -> list[float]:
    """ln of the singular values of A_T … A_1, computed with so many digits that none is lost."""
    with mpmath.workdps(digits):
        product = mpmath.eye(jacobians.shape[1])
        for matrix in jacobians:
            product = mpmath.matrix(matrix.tolist()) * product
        values = mpmath.svd_r(product, compute_uv=False)
        return sorted((float(mpmath.log(value)) for value in values), reverse=True)
