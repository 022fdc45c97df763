"""Links: what happens to a state between the call that returned it and the one that starts from it.

S is the width of the full state (h, c) of one layer. A link into a call holds two factors:
``into``, ∂(its initial state)/∂(the state returned before), and ``around``, ∂(its initial
state)/∂(the initial state of the call before) on paths that do not go through that call (zoneout).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradflow.hooks.call import Call
from gradflow.hooks.graph import Between, Edge, NotReadable, edge_of

DENSE = 64  # widest state for which a link that is not elementwise is written out

Factor = Tensor | None  # (layers, B, S) elementwise, (layers, B, S, S) dense, None: see `Link`


@dataclass(frozen=True)
class Link:
    """How a state came from one call to the next."""

    into: Factor  # None: the identity
    around: Factor  # None: nothing
    cut: Tensor  # (B,) true where nothing of the previous state arrives
    unknown: str = ""  # why the factors are not known, if they are not


@dataclass(eq=False)
class End:
    """The last call of a chain, with live tensors: what the next call may start from."""

    call: Call
    returned: dict[str, Tensor]  # output, h_n, c_n, those there are
    entry: dict[str, Edge | None]  # h, c -> where its initial states sat in the graph
    edges: dict[Edge, str] = field(default_factory=dict)  # of what it returned -> its name

    def __post_init__(self) -> None:
        for name in ("output", "c_n", "h_n"):  # for a single-step function h is both
            edge = edge_of(self.returned[name]) if name in self.returned else None
            if edge is not None:
                self.edges[edge] = name


def find(end: End, initial: dict[str, Tensor], call: Call) -> Link | None:
    """The link from an earlier call's end into a call with these initial states (h, c), if any."""
    known = end.call
    if known.h0.shape != call.h0.shape or set(initial) != set(end.entry):
        return None
    link = _by_graph(end, initial, call)
    return link if link is not None else _by_value(end, initial, call)


# ------------------------------------------------------------------------------- in the graph


def _by_graph(end: End, initial: dict[str, Tensor], call: Call) -> Link | None:
    roots = {name: edge for name, tensor in initial.items() if (edge := edge_of(tensor))}
    if not roots or not end.edges:
        return None
    batch = call.h0.shape[1]
    no_cut = torch.zeros(batch, dtype=torch.bool, device=call.h0.device)
    if len(roots) == len(initial) and all(
        end.edges.get(edge) == f"{name}_n" for name, edge in roots.items()
    ):
        return Link(None, None, no_cut)
    returned_nodes = {node for node, _ in end.edges}
    entry = {edge: name for name, edge in end.entry.items() if edge is not None}
    between = Between(list(roots.values()), returned_nodes | {node for node, _ in entry})
    if not between.reached & returned_nodes:
        return None
    pull = _Pull(end, entry, roots, between, call)
    try:
        into, around = pull.factors()
    except NotReadable as error:
        return Link(None, None, no_cut, f"between two of its calls lies {error}")
    if isinstance(into, str) or isinstance(around, str):
        return Link(None, None, no_cut, str(into if isinstance(into, str) else around))
    return Link(into, around, ~(_touches(into) | _touches(around)))


def _touches(factor: Factor) -> Tensor:
    """(B,) whether anything gets through."""
    if factor is None:
        return torch.zeros((), dtype=torch.bool)
    return (factor != 0).transpose(0, 1).flatten(1).any(1)


@dataclass(frozen=True)
class _Pull:
    """Vector-Jacobian products of the new initial state, as flat blocks (layers, B, S)."""

    end: End
    entry: dict[Edge, str]
    roots: dict[str, Edge]
    between: Between
    call: Call

    def __call__(self, seed: Tensor) -> tuple[Tensor, Tensor]:
        width = self.call.h0.shape[2]
        parts = {"h": seed[..., :width], "c": seed[..., width:]}
        seeds = [
            (edge, parts[name][0] if self.call.single else parts[name])
            for name, edge in self.roots.items()
        ]
        found = self.between.pull(seeds)
        into, around = torch.zeros_like(seed), torch.zeros_like(seed)
        blocks = {"h": slice(0, width), "c": slice(width, None)}
        for edge, grad in found.items():
            if edge in self.end.edges:
                name = self.end.edges[edge]
                if name == "output":
                    into[-1, :, :width] += self._at_last_step(grad)
                else:
                    into[..., blocks[name[0]]] += grad
            elif edge in self.entry:
                around[..., blocks[self.entry[edge]]] += grad
        return into, around

    def _at_last_step(self, grad: Tensor) -> Tensor:
        if self.end.call.batch_first:
            grad = grad.transpose(0, 1)
        if bool((grad[:-1] != 0).any()):
            raise NotReadable("a mixture of several steps' outputs")
        return grad[-1]

    def factors(self) -> tuple[Factor | str, Factor | str]:
        """into and around, each elementwise, dense, or the reason why it is neither."""
        states = [self.call.h0] + ([] if self.call.c0 is None else [self.call.c0])
        like = torch.cat(states, dim=2)
        probe = probe_of(like)
        ones, probed = self(torch.ones_like(like)), self(probe)
        found: list[Factor | str] = []
        dense: tuple[Tensor, Tensor] | None = None
        for place in (0, 1):
            if close_to(probed[place], probe * ones[place], ones[place] * probe):
                found.append(ones[place])
                continue
            dense = self._dense(like) if dense is None and like.shape[2] <= DENSE else dense
            found.append(_checked(dense[place] if dense else None, probe, probed[place]))
        into, around = found
        if isinstance(around, Tensor) and not bool(around.any()):
            around = None
        return into, around

    def _dense(self, like: Tensor) -> tuple[Tensor, Tensor]:
        rows: list[tuple[Tensor, Tensor]] = []
        for place in range(like.shape[2]):
            seed = torch.zeros_like(like)
            seed[..., place] = 1.0
            rows.append(self(seed))
        into, around = zip(*rows, strict=True)
        return torch.stack(into, dim=2), torch.stack(around, dim=2)


def _checked(dense: Tensor | None, probe: Tensor, probed: Tensor) -> Tensor | str:
    if dense is None:
        return (
            f"the states are mixed between two of its calls, and at more than {DENSE} of them that "
            "is not written out"
        )
    again = (probe.unsqueeze(2) @ dense).squeeze(2)
    size = (probe.abs().unsqueeze(2) @ dense.abs()).squeeze(2)
    if not close_to(probed, again, size):
        return "sequences or layers are mixed between two of its calls"
    return dense


def probe_of(like: Tensor) -> Tensor:
    """Numbers between 1/2 and 3/2 without a pattern, and without touching a random generator."""
    numbers = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    return (numbers * 0.6180339887498949).frac().add(0.5).view(like.shape).to(like.dtype)


def close_to(mine: Tensor, theirs: Tensor, size: Tensor) -> bool:
    """Equal up to the rounding of a few operations, per sequence."""
    bound = 256 * torch.finfo(mine.dtype).eps * size.abs().amax(dim=-1, keepdim=True)
    return bool(((mine - theirs).abs() <= bound).all())


# ------------------------------------------------------------------------------ outside a graph


def _by_value(end: End, initial: dict[str, Tensor], call: Call) -> Link | None:
    """A state that was detached, cloned or carried without gradient, by storage or by its values."""
    equal, zero, telling = _compared(end, call)
    shared = any(
        _shares_storage(tensor, end.returned.get(other))
        for name, tensor in initial.items()
        for other in (f"{name}_n", "output")
    )
    fits = bool((equal | zero).all()) and bool(telling.any())
    if not (fits or shared):
        return None
    if call.differentiable or end.call.differentiable:
        return Link(None, None, torch.ones_like(equal))
    if not bool((equal | zero).all()):
        return Link(None, None, ~equal & zero, "a state is changed in place between two calls")
    cut = zero & ~equal
    into = None
    if bool(cut.any()):
        size = call.h0.shape[2] + (0 if call.c0 is None else call.c0.shape[2])
        keep = (~cut).to(call.h0.dtype).view(1, -1, 1)
        into = keep.expand(call.h0.shape[0], -1, size)
    return Link(into, None, cut)


def _compared(end: End, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) each: all states equal, all zero, equal and not all zero."""
    pairs = [(call.h0, end.call.returned["h_n"])]
    if call.c0 is not None:
        pairs.append((call.c0, end.call.returned["c_n"]))

    def whole(marks: Tensor) -> Tensor:
        return marks.transpose(0, 1).flatten(1).all(1)

    equal = torch.stack([whole(new == old) for new, old in pairs]).all(0)
    zero = torch.stack([whole(new == 0) for new, _ in pairs]).all(0)
    return equal, zero, equal & ~zero


def _shares_storage(new: Tensor, old: Tensor | None) -> bool:
    if old is None or new.device != old.device or not new.numel():
        return False
    return new.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()
