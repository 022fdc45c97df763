"""Links: what happens to a state between the call that returned it and the one that starts from it.

S is the width of the full state (h, c) of one layer. A link into a call holds two factors:
``into``, ∂(its initial state)/∂(the state returned before), and ``around``, ∂(its initial
state)/∂(the initial state of the call before) on paths that do not go through that call (zoneout).
Sequences are in the user's order, also of packed calls; B are those of the later call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradflow.hooks.by_value import compared, moved_rows, share_storage
from gradflow.hooks.call import Call
from gradflow.hooks.graph import Between, Edge, NotReadable, edge_of
from gradflow.hooks.loops import rows as rows_of
from gradflow.hooks.loops.rows import MIXED
from gradflow.limits import LINK_WIDEST, ROW_ROUNDING
from gradflow.recording.track import CUT_KINDS

Factor = Tensor | None  # (layers, B, S) elementwise, (layers, B, S, S) dense, None: see `Link`


@dataclass(frozen=True)
class Link:
    """How a state came from one call to the next."""

    into: Factor  # None: the identity
    around: Factor  # None: nothing
    cut: Tensor  # (B,) true where nothing of the previous state arrives
    unknown: str = ""  # why the factors are not known, if they are not
    # (B,) the sequence before that each is, −1 a new one; None: the same
    rows: Tensor | None = None
    kind: Tensor | None = None  # (B,) what each cut is, a place in CUT_KINDS; None: there is none
    # (B before,) the step of a padded call after which each goes on, −1 none; None: the last one
    ends: Tensor | None = None


@dataclass(eq=False)
class End:
    """The last call of a chain, with live tensors: what the next call may start from."""

    call: Call
    returned: dict[str, Tensor]  # output and the last states by name, those there are
    entry: dict[str, Edge | None]  # state name -> where its initial value sat in the graph
    edges: dict[Edge, str] = field(default_factory=dict)  # of what it returned -> its name

    def __post_init__(self) -> None:
        for name in sorted(self.returned, key=lambda name: (name != "output", name)):
            edge = edge_of(self.returned[name])
            if edge is not None:
                self.edges[edge] = name


def find(end: End, initial: dict[str, Tensor], call: Call) -> Link | None:
    """The link from an earlier call's end into a call with these initial states (h, c), if any."""
    known = end.call
    if set(initial) != set(end.entry) or _but_sequences(known.h0) != _but_sequences(call.h0):
        return None
    link = _by_graph(end, initial, call)
    link = link if link is not None else _by_value(end, initial, call)
    if link is not None and bool(link.cut.any()):
        link = replace(link, kind=_kind(link, known, call))
    return None if link is None else _in_users_order(link, known, call)


def _kind(link: Link, known: Call, call: Call) -> Tensor | None:
    """(B,) by value: the state that was returned goes on, or zeros do, or others; kernel's order."""
    new, old = call.started(), rows_of.picked(known.ended(), link.rows, 1)
    if new.shape != old.shape or link.ends is not None:
        return None
    alike, zero = compared(_as_rows(new), _as_rows(old))
    masked = zero if link.into is not None else torch.zeros_like(zero)
    kind = torch.full_like(zero, CUT_KINDS.index("reset to other values"), dtype=torch.int8)
    for name, holds in (
        ("reset to zeros", zero),
        ("detached", alike),
        ("masked with zeros", masked),
    ):
        kind[holds] = CUT_KINDS.index(name)
    return kind


def _as_rows(states: Tensor) -> Tensor:
    """(B, layers · S) from (layers, B, S)."""
    return states.transpose(0, 1).flatten(1)


def _but_sequences(state: Tensor) -> tuple[int, int]:
    return int(state.shape[0]), int(state.shape[2])


def _in_users_order(link: Link, known: Call, call: Call) -> Link | None:
    """From the kernel's order of sequences; None where the batches differ and no sequence is the same."""
    rows = link.rows
    grew = known.h0.shape[1] != call.h0.shape[1]
    if grew and rows is not None and bool((rows < 0).all()):
        return None
    if known.unsorted is None and call.unsorted is None:
        return link
    count = call.h0.shape[1]
    rows = torch.arange(count, device=call.h0.device) if rows is None else rows
    cut, kind, into, around = link.cut, link.kind, link.into, link.around
    if known.unsorted is not None:  # kernel row -> user's row
        places = known.unsorted.to(rows.device).argsort()
        rows = torch.where(rows < 0, -1, places[rows.clamp(min=0)])
    if call.unsorted is not None:
        order = call.unsorted.to(rows.device)
        rows, cut = rows[order], cut[order]
        kind = None if kind is None else kind[order]
        into = None if into is None else into.index_select(1, order)
        around = None if around is None else around.index_select(1, order)
    same = known.h0.shape[1] == count and bool((rows == torch.arange(count)).all())
    return Link(into, around, cut, link.unknown, None if same else rows, kind, link.ends)


# ------------------------------------------------------------------------------- in the graph


def _by_graph(end: End, initial: dict[str, Tensor], call: Call) -> Link | None:
    roots = {name: edge for name, tensor in initial.items() if (edge := edge_of(tensor))}
    if not roots or not end.edges:
        return None
    batch = call.h0.shape[1]
    no_cut = torch.zeros(batch, dtype=torch.bool, device=call.h0.device)
    if len(roots) == len(initial) and all(
        end.edges.get(edge) == name for name, edge in roots.items()
    ):
        return Link(None, None, no_cut)
    returned_nodes = {node for node, _ in end.edges}
    entry = {edge: name for name, edge in end.entry.items() if edge is not None}
    between = Between(list(roots.values()), returned_nodes | {node for node, _ in entry})
    if not between.reached & returned_nodes:
        return None
    pull = _Pull(end, entry, roots, between, call)
    link = _pulled_through(pull, no_cut, same=end.call.h0.shape[1] == batch)
    return None if link is None else replace(link, ends=pull.known_ends())


def _pulled_through(pull: _Pull, no_cut: Tensor, *, same: bool) -> Link | None:
    try:
        into, around, rows = pull.factors()
    except NotReadable as error:
        return Link(None, None, no_cut, f"between two of its calls lies {error}") if same else None
    if isinstance(into, str) or isinstance(around, str):
        reason = str(into if isinstance(into, str) else around)
        return Link(None, None, no_cut, reason, rows) if same or rows is not None else None
    cut = ~(_touches(into) | _touches(around))
    if rows is not None:
        cut = cut & (rows >= 0)
    return Link(into, around, cut, rows=rows)


def _touches(factor: Factor) -> Tensor:
    """(B,) whether anything gets through."""
    if factor is None:
        return torch.zeros((), dtype=torch.bool)
    return (factor != 0).transpose(0, 1).flatten(1).any(1)


@dataclass
class _Pull:
    """Vector-Jacobian products of the new initial state, as flat blocks (layers, B, S)."""

    end: End
    entry: dict[Edge, str]
    roots: dict[str, Edge]
    between: Between
    call: Call
    ends: Tensor | None = None  # see `Link`

    def __call__(self, seed: Tensor, *, opened: bool = False) -> tuple[Tensor, Tensor]:
        blocks = self.call.columns()
        parts = {name: seed[..., block] for name, block in blocks.items()}
        seeds = [
            (edge, parts[name][0] if self.call.single else parts[name])
            for name, edge in self.roots.items()
        ]
        found = self.between.pull(seeds, opened=opened)
        into = torch.zeros_like(self.end.call.started())
        around = torch.zeros_like(into)
        for edge, grad in found.items():
            if edge in self.end.edges:
                name = self.end.edges[edge]
                if name != "output":
                    into[..., blocks[name]] += grad
            elif edge in self.entry:
                around[..., blocks[self.entry[edge]]] += grad
        beside = (into != 0).transpose(0, 1).flatten(1).any(1)
        for edge, grad in found.items():
            if self.end.edges.get(edge) == "output":
                into[-1, :, blocks["h"]] += self._at_one_step(grad, beside)
        return into, around

    def _at_one_step(self, grad: Tensor, beside: Tensor) -> Tensor:
        """(b, P) at the step of every sequence that goes on; beside (b,) where a last state does, too."""
        known = self.end.call
        if known.batch_sizes is not None:
            return _at_ends(grad, known.batch_sizes)
        grad = grad.transpose(0, 1) if known.batch_first else grad
        arrives, last = (grad != 0).any(2), len(grad) - 1
        ends = torch.where(arrives.any(0), arrives.byte().argmax(0), -1)
        if self.ends is None:
            self.ends = ends
        apart = (ends >= 0) & (self.ends >= 0) & (ends != self.ends)
        if bool((arrives.sum(0) > 1).any() | apart.any()):
            raise NotReadable("a mixture of several steps' outputs")
        self.ends = torch.maximum(ends, self.ends)
        if bool((beside & (ends >= 0) & (ends < last)).any()):
            raise NotReadable("an output of one step beside the last state of another")
        return grad.sum(0)

    def known_ends(self) -> Tensor | None:
        """See `Link`."""
        known = self.end.call
        if self.ends is None or known.single or known.batch_sizes is not None:
            return None
        steps = known.returned["output"].shape[1 if known.batch_first else 0]
        return self.ends if bool(((self.ends >= 0) & (self.ends < steps - 1)).any()) else None

    def factors(self) -> tuple[Factor | str, Factor | str, Tensor | None]:
        """into and around, each elementwise, dense, or the reason why it is neither; and the rows."""
        like = self.call.started()
        if self.end.call.h0.shape[1] == self.call.h0.shape[1]:
            found = self._elementwise(like, None)
            if not any(factor is None for factor in found):
                return found[0], _nothing_as_none(found[1]), self._begun(found, like)
        rows = self._rows(like)
        if isinstance(rows, str):
            return rows, rows, None
        found = self._elementwise(like, rows)
        if any(factor is None for factor in found):
            dense = self._dense(like, rows) if like.shape[2] <= LINK_WIDEST else None
            probe = probe_of(like)
            probed = self._taken(self(probe), rows)
            found = tuple(
                _checked(dense[place] if dense else None, probe, probed[place])
                if factor is None
                else factor
                for place, factor in enumerate(found)
            )
        return found[0], _nothing_as_none(found[1]), rows

    @staticmethod
    def _taken(found: tuple[Tensor, Tensor], rows: Tensor | None) -> tuple[Tensor, Tensor]:
        into, around = (rows_of.picked(part, rows, 1) for part in found)
        return into, around

    def _elementwise(self, like: Tensor, rows: Tensor | None) -> tuple[Factor | str, ...]:
        """into and around where they multiply entry by entry, None for one that does not."""
        probe = probe_of(like)
        ones = self._taken(self(torch.ones_like(like)), rows)
        probed = self._taken(self(probe), rows)
        return tuple(
            one if close_to(mine, probe * one, one * probe) else None
            for one, mine in zip(ones, probed, strict=True)
        )

    def _begun(self, found: tuple[Factor | str, ...], like: Tensor) -> Tensor | None:
        """Rows of sequences that begin in the place of others; None where all go on or are masked."""
        alike = torch.stack([_touches(f) for f in found if isinstance(f, Tensor)]).any(0)
        if bool(alike.all()):
            return None
        every = torch.arange(len(alike), device=like.device)
        rows = rows_of.with_cut(torch.where(alike, every, -1), self._of_rows(like))
        return None if bool((rows == every).all()) else rows

    def _of_rows(self, like: Tensor) -> Callable[..., Tensor]:
        """A pull from some rows, as `rows.origins` takes it."""
        probe = probe_of(like)

        def pull(chosen: Tensor, *, opened: bool = False) -> Tensor:
            found = self(probe * chosen.to(probe.dtype).view(1, -1, 1), opened=opened)
            return torch.cat(found, dim=2).transpose(0, 1)

        return pull

    def _rows(self, like: Tensor) -> Tensor | str | None:
        """Where the sequences came from, None for where they were; or why that is not known."""
        count, batch = like.shape[1], int(self.end.call.h0.shape[1])
        found = rows_of.found(self._of_rows(like), count, like.device)
        if found is None:
            return MIXED
        unmoved = count == batch and bool((found == torch.arange(count, device=found.device)).all())
        return None if unmoved else found

    def _dense(self, like: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        made: list[tuple[Tensor, Tensor]] = []
        for place in range(like.shape[2]):
            seed = torch.zeros_like(like)
            seed[..., place] = 1.0
            made.append(self._taken(self(seed), rows))
        into, around = zip(*made, strict=True)
        return torch.stack(into, dim=2), torch.stack(around, dim=2)


def _nothing_as_none(factor: Factor | str) -> Factor | str:
    """None for a factor that lets nothing through."""
    return None if isinstance(factor, Tensor) and not bool(factor.any()) else factor


def _at_ends(grad: Tensor, batch_sizes: Tensor) -> Tensor:
    """(b, P) at the last step of every sequence, from a packed (·, P), kernel's order."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    ranks = torch.arange(int(batch_sizes[0]))
    ends = (batch_sizes.unsqueeze(1) > ranks).sum(0) - 1
    places = (starts[ends] + ranks).to(grad.device)
    rest = grad.index_fill(0, places, 0)
    if bool((rest != 0).any()):
        raise NotReadable("a mixture of several steps' outputs")
    return grad[places]


def _checked(dense: Tensor | None, probe: Tensor, probed: Tensor) -> Tensor | str:
    if dense is None:
        return (
            f"the states are mixed between two of its calls, and at more than {LINK_WIDEST} of them that "
            "is not written out"
        )
    again = (probe.unsqueeze(2) @ dense).squeeze(2)
    size = (probe.abs().unsqueeze(2) @ dense.abs()).squeeze(2)
    if not close_to(probed, again, size):
        return MIXED
    return dense


def probe_of(like: Tensor) -> Tensor:
    """Numbers between 1/2 and 3/2 without a pattern, and without touching a random generator."""
    numbers = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    return (numbers * 0.6180339887498949).frac().add(0.5).view(like.shape).to(like.dtype)


def close_to(mine: Tensor, theirs: Tensor, size: Tensor) -> bool:
    """Equal up to the rounding of a few operations, per sequence."""
    bound = ROW_ROUNDING * torch.finfo(mine.dtype).eps * size.abs().amax(dim=-1, keepdim=True)
    return bool(((mine - theirs).abs() <= bound).all())


def after_rest(
    earlier: list[tuple[Call, dict[Edge, str], dict[str, Edge]]], call: Call, entry: dict[str, Edge]
) -> tuple[Link, Tensor] | None:
    """The link into a call of one step whose sequences come from any of the calls before it.

    With it (b,) which of the rows of all calls before each is, −1 a new one. None where a sequence comes
    from several of them, or is not only multiplied on the way.
    """
    like, blocks = call.started(), call.columns()
    nodes = {node for _, edges, _ in earlier for node, _ in edges}
    if not call.single or not entry:
        return None
    between = Between(list(entry.values()), nodes)

    def pull(seed: Tensor, *, opened: bool = False) -> Tensor:
        seeds = [(edge, seed[0][:, blocks[name]]) for name, edge in entry.items()]
        found = between.pull(seeds, opened=opened)
        every = []
        for known, edges, _ in earlier:
            into = torch.zeros_like(known.started())
            for edge, name in edges.items():
                if edge in found:
                    into[0, :, blocks[name]] += found[edge]
            every.append(into)
        return torch.cat(every, dim=1)

    probe = probe_of(like)

    def of_rows(chosen: Tensor, *, opened: bool = False) -> Tensor:
        return pull(probe * chosen.to(probe.dtype).view(1, -1, 1), opened=opened)[0]

    try:
        rows = rows_of.found(of_rows, like.shape[1], like.device)
        if rows is None:
            return None
        ones, probed = (
            rows_of.picked(pull(seed), rows, 1) for seed in (torch.ones_like(like), probe)
        )
    except NotReadable:
        return None
    if not close_to(probed, probe * ones, ones * probe):
        return None
    held = bool((ones[:, rows >= 0] == 1).all())
    return Link(None if held else ones, None, ~_touches(ones) & (rows >= 0)), rows


# ------------------------------------------------------------------------------ outside a graph


def _by_value(end: End, initial: dict[str, Tensor], call: Call) -> Link | None:
    """A state that was detached, cloned or carried without gradient, by storage or by its values."""
    if end.call.h0.shape != call.h0.shape:
        return _moved(end, call)
    equal, zero = compared(_as_rows(call.started()), _as_rows(end.call.ended()))
    telling = equal & ~zero
    shared = any(
        share_storage(tensor, end.returned.get(other))
        for name, tensor in initial.items()
        for other in (name, "output")
    )
    fits = bool((equal | zero).all()) and bool(telling.any())
    moved = None if fits else _moved(end, call)
    if moved is not None:
        return moved
    ends = None if fits or shared else _ends_by_value(end, call)
    if ends is not None:
        cut = torch.full_like(equal, call.differentiable or end.call.differentiable)
        return Link(None, None, cut, ends=ends)
    if not (fits or shared):
        return None
    if call.differentiable or end.call.differentiable:
        return Link(None, None, torch.ones_like(equal))
    if not bool((equal | zero).all()):
        return Link(None, None, ~equal & zero, "a state is changed in place between two calls")
    return Link(_keeping(call, zero & ~equal), None, zero & ~equal)


def _keeping(call: Call, cut: Tensor) -> Factor:
    """The factor 1, and 0 where it is cut; None if nothing is."""
    if not bool(cut.any()):
        return None
    keep = (~cut).to(call.h0.dtype).view(1, -1, 1)
    return keep.expand(call.started().shape)


def _moved(end: End, call: Call) -> Link | None:
    """States that are all some sequence's of those returned, or zero, by their values."""
    new, old = call.started(), end.call.ended()
    found = moved_rows(_as_rows(new), _as_rows(old))
    if found is None:
        return None
    rows, zero = found
    if call.differentiable or end.call.differentiable:
        return Link(None, None, rows >= 0, rows=rows)
    return Link(_keeping(call, zero), None, zero, rows=rows)


def _ends_by_value(end: End, call: Call) -> Tensor | None:
    """The steps (B,) of a padded call whose outputs this call starts from; None where it does not."""
    known, h = end.call, call.h0[-1]
    if known.single or known.batch_sizes is not None or known.layers > 1 or len(known.initial) > 1:
        return None
    output = known.returned["output"]
    output = output.transpose(0, 1) if known.batch_first else output
    same = (output == h).all(2) & (h != 0).any(1)
    return len(same) - 1 - same.flip(0).byte().argmax(0) if bool(same.any(0).all()) else None
