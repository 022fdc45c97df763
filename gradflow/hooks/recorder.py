"""The recorder: what every recurrent call was given and returned, and the gradients that reach it."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradflow.hooks.ancestry import clean, holder_of, title_of
from gradflow.hooks.call import Call
from gradflow.hooks.closed.afresh import REASON
from gradflow.hooks.closed.notice import ClosedLoops, is_of
from gradflow.hooks.copies import Copies, stamp_of
from gradflow.hooks.dense import Place
from gradflow.hooks.graph import Edge
from gradflow.hooks.guard import (
    NO_NUMBERS,
    NO_SEQUENCE,
    WRAPPED,
    Point,
    Withheld,
    guarded,
    has_no_numbers,
    is_wrapped,
    why_hidden,
)
from gradflow.hooks.lengths import GivenLengths, Lengths, ShownPadding
from gradflow.hooks.linear.linear_calls import LinearCalls
from gradflow.hooks.linear.linear_source import LinearSource
from gradflow.hooks.linear.scanned import Scanned
from gradflow.hooks.loops.loop import Loop
from gradflow.hooks.loops.loop_source import LoopSource
from gradflow.hooks.loops.stitch import Chain, Stitcher
from gradflow.hooks.own.forwards import Ran, Watching
from gradflow.hooks.own.own_cells import OwnCells
from gradflow.hooks.own.returned import leaves
from gradflow.hooks.parity import WeightUses
from gradflow.hooks.seen import SeenCall
from gradflow.hooks.tapped import UNROLLED, Mark, TapSource
from gradflow.hooks.taps import Taps
from gradflow.hooks.unrolled.sources import FLAT, FLAT_IN_TIME, PLAIN
from gradflow.hooks.unrolled.watch import Watch
from gradflow.recording.track import Track, unnumbered
from gradflow.recording.tracks import Recording, Unseen, matches_any


class Recorder:
    """The observer behind one ``with record(model)`` block."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[str] | None,
        lengths: Lengths,
        scaler: Any,
        jacobians: bool | None = None,
        recording: Recording | None = None,
        exact: bool = True,
    ) -> None:
        self.thread = threading.get_ident()
        self.model = model
        self.layers = layers
        self.lengths = GivenLengths(lengths)
        self.shown = ShownPadding(model)
        self.scaler = scaler
        self.processes = 1  # whose losses are taken as one, their mean
        self.jacobians, self.exact = jacobians, exact
        self.training = model.training
        self.recording = Recording(title_of(model)) if recording is None else recording
        self.recording.lengths_given = self.lengths.known
        self.uses = WeightUses(model)
        self.calls: list[Call] = []
        self.handles: list[RemovableHandle] = []
        self.runs: Counter[str] = Counter()
        self.strangers: dict[str, None] = {}  # recurrent calls that are not the model's, in words
        self.scalers_scale: Callable[[], float] | None = None  # of a scaler that was not given
        self.withheld = Withheld()
        self.ran: Ran | None = None  # both as far as they could be opened
        self.watching: Watching | None = None
        self.stitcher = Stitcher()
        self.closed = ClosedLoops(self)
        self.taps = Taps(self)
        self.linear = LinearCalls(self)
        self.watch = Watch(self, model)
        self._copies = Copies(self.lengths, lambda weight: self.uses.key(weight, self.scale))
        self._paths = {id(module): clean(name) for name, module in model.named_modules()}
        self.own = OwnCells(self, model, self._paths)
        self._holders = {
            id(parameter): clean(name).rpartition(".")[0]
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self.handles += self.watch.listen(self.withheld.remark)

    # -- what the patch calls ----------------------------------------------------------------

    def wants(self, weights: tuple[Tensor, ...], module: nn.Module | None) -> bool:
        """A call belongs to this recording if its module or its weights are the model's."""
        hidden = why_hidden()
        if hidden:
            path = None if module is None else self._paths.get(id(module))
            if path is not None or module is None:
                self.did_not_see(path or ("a layer" if module is None else "the layer"), hidden)
            return False
        if self.withheld.stock(self._paths.get(id(module), "")):
            return False
        if any(has_no_numbers(weight) for weight in weights):
            self.own.unseen[clean(self._owner(weights, module) or "a layer")] = NO_NUMBERS
            return False
        mine = self._owner(weights, module) is not None
        if not mine:
            kind = (
                "a function of torch" if module is None else f"a module ({type(module).__name__})"
            )
            self.strangers[kind] = None
        return mine

    def _owner(self, weights: tuple[Tensor, ...], module: nn.Module | None) -> str | None:
        if module is not None and id(module) in self._paths:
            return self._paths[id(module)]
        for weight in weights:
            if id(weight) in self._holders:
                return self._holders[id(weight)]
        return holder_of(weights, self._holders)

    def saw(self, seen: SeenCall) -> None:
        """Copy one call and listen for its gradients."""
        owner = self._owner(seen.weights, seen.module)
        if owner is None:
            return
        name = owner or ("cell" if seen.single else seen.cell)
        if _any_wrapped(seen):
            self.did_not_see(name, WRAPPED)
        elif not seen.initial[0].numel():
            self.own.unseen[name] = NO_SEQUENCE
        else:
            self._admit(self._copies.call(seen, owner), seen)
            self.own.saw_stock(owner, seen.results)
            self.watch.saw_stock((seen.data, *seen.initial), seen.results)

    def missed(self, module: nn.Module | None, why: str) -> None:
        """A call of a stock layer was not recorded as a whole: what is known of that layer goes."""
        path = self._paths.get(id(module)) if module is not None else None
        self.withheld.leave_stock(path, why)

        def concerned(chain: Chain) -> bool:
            return path in (None, chain.calls[0].owner)

        self.closed.leave(concerned, why)
        self._drop(lambda t: isinstance(t.source, LoopSource) and concerned(t.source.loop.chain))
        joint = [
            loop.track
            for loop in self.closed.loops
            if any(is_of(part, concerned) for part in loop.parts)
        ]
        self._drop(lambda t: any(t is track for track in joint))

    def did_not_see(self, name: str, why: str) -> None:
        """Something ran where nothing may be read."""
        self.own.unseen[name] = why

    def missed_tap(self, name: str, why: str) -> None:
        """The same of a tap."""
        self.withheld.leave(name, why)
        self._drop(lambda t: t.cell == "tap" and unnumbered(t.name) == name)

    def missed_cell(self, module: nn.Module, why: str) -> None:
        """The same of a cell of the user's own."""
        path = self._paths.get(id(module), "")
        self.withheld.leave(path or type(module).__name__, why)
        self.own.leave(module)
        base = path or "cell"
        self._drop(lambda t: t.cell != "tap" and unnumbered(t.name) == base)

    def scale_unknown(self, why: str) -> None:
        """A loss was multiplied by a scale that is not known."""
        self.withheld.remark(f"the gradients are perhaps scaled: {why}")

    def graph_unknown(self, why: str) -> None:
        """The graph of a backward was not looked at as a whole."""
        self.withheld.remark(f"{why}: what it would have shown of these layers is not known")
        self.closed.unread(why)
        self._drop(lambda t: isinstance(t.source, TapSource) and t.source.words is UNROLLED)

    def _drop(self, concerned: Callable[[Track], bool]) -> None:
        for track in [track for track in self.recording.values() if concerned(track)]:
            self.recording.drop(track)

    def saw_tap(
        self, name: str, states: dict[str, Tensor], rows: dict[str, Tensor], frame: FrameType
    ) -> None:
        """Copy the states that a hand-written loop marks; every recording of the thread does."""
        self.taps.saw(name, states, rows, frame)

    def saw_inside(self, given: list[Tensor], results: list[Tensor]) -> None:
        """A function whose recurrence is known ran: its inside is stepped over."""
        self.watch.saw_stock(given, results)

    def modules(self) -> Iterable[nn.Module]:
        """All modules of the model."""
        return nn.Module.modules(self.model)

    def path_of(self, module: nn.Module) -> str | None:
        """Where a module is in the model; None where it is none of it."""
        return self._paths.get(id(module))

    def saw_scan(self, scanned: Scanned, code: tuple[object, ...] = ()) -> None:
        """A scan over all steps of a linear recurrence: marked by the user, or a known function's."""
        self.linear.saw(scanned, code)
        if scanned.states is not None and scanned.states.grad_fn is not None:
            self.watch.scanned.add(scanned.states.grad_fn._sequence_nr())

    def missed_scan(self, name: str, why: str) -> None:
        """Something of such a scan could not be read."""
        self.withheld.leave(name, why)
        self._drop(lambda t: isinstance(t.source, LinearSource) and unnumbered(t.name) == name)

    def saw_scaler(self, scaler: Any) -> None:
        """Note that a loss was multiplied by somebody's scale."""
        if self.scaler is None and scaler.is_enabled():
            self.scalers_scale = scaler.get_scale

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Modules as they are without a recording."""
        if self.ran is not None:
            self.ran.close()
        if self.watching is None:
            yield
            return
        self.watching.close()
        try:
            yield
        finally:
            self.watching.open()

    def before_backward(self, roots: tuple[Any, ...], create_graph: bool) -> None:
        """A backward is about to run from these tensors: their graph is complete, nothing is freed."""
        if torch._C._current_graph_task_id() == -1:
            self.closed.decide(roots)
            self.watch.before_backward(roots, create_graph)

    def after_backward(self) -> None:
        """That backward is over."""
        if torch._C._current_graph_task_id() == -1:
            self.watch.after_backward()

    def is_told(self, weights: Collection[str]) -> bool:
        """Whether it is said already why nothing was read of a module that holds all these weights."""
        told = {name.partition(" (")[0] for name in self.own.unseen}
        parts = [name.split(".") for name in weights]
        holders = [{".".join(some[:n]) for n in range(1, len(some))} for some in parts]
        return bool(holders) and any(path in told for path in set.intersection(*holders))

    def marked_at(self, edges: Iterable[Edge], source: TapSource) -> None:
        """States of a track sit at these edges of the graph."""
        self.watch.marked(edges, source)

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module that may be a cell of the user's own is called."""
        if torch.is_grad_enabled():
            self.watch.held.hold(leaves((args, kwargs)).values())
            self.watch.held.hold_locals()
        call = self.own.entered(module, args, kwargs)
        if call is not None and self.own.is_outermost(call):
            self.recording.paddings += self.shown.of_model(args, kwargs)
        return call

    def left(self, call: Any, result: Any) -> None:
        """That call is over; result is None where it raised."""
        self.own.left(call, result)
        if torch.is_grad_enabled():
            self.watch.held.hold(leaves(result).values())

    def wants_track(self, name: str) -> bool:
        """Whether a tap or a cell of this name is picked."""
        return not self.withheld.has(name) and (
            self.layers is None or matches_any(name, self.layers)
        )

    def add_track(self, base: str, track: Track) -> None:
        """Take up a new loop, tapped or over a cell, under a name of its own."""
        self.runs[base] += 1
        while f"{base}@{self.runs[base]}" in self.recording._tracks:  # some were dropped
            self.runs[base] += 1
        track.name = base if self.runs[base] == 1 else f"{base}@{self.runs[base]}"
        track.stamp = stamp_of(self.model)
        self.recording.add(track)

    def saw_mark(self, source: TapSource, track: Track, place: Place, mark: Mark) -> None:
        """One more step of a loop that is tapped, or over a cell of the user's own."""
        if len(source.marks) <= 1:
            track.turned = self.shown.turns(node for node, _ in place.edges.values())
        self.closed.saw_mark(source, track, place, mark)

    def drop_tracks(self, tracks: list[Track]) -> None:
        """Forget loops over one cell that turned out to be part of another."""
        for track in tracks:
            self.recording.drop(track)
            self.runs[unnumbered(track.name)] -= 1

    def drop_sources(self, sources: list[TapSource]) -> None:
        """Forget the loops over modules that turned out to be only part of a step."""
        self.own.ignore(sources)
        self.drop_tracks([track for track in self.recording.values() if track.source in sources])

    def drop_cell(self, module: nn.Module) -> None:
        """Forget a module as a cell: the loop is inside it."""
        self.drop_tracks(self.own.tracks_of(module))
        self.own.leave(module)

    def in_closed_loop(self) -> bool:
        """Whether some stock layer's input depends on its own earlier state."""
        return bool(self.closed.loops)

    def _admit(self, call: Call, seen: SeenCall) -> None:
        data, initial, results = seen.data, seen.initial, seen.results
        task = torch._C._current_graph_task_id()
        if task != -1:
            known = self._recomputed(call)
            if known is None:
                return  # a non-reentrant checkpoint: the first call's own tensors get the gradients
            kept = {name: getattr(known, name) for name in ("grads", "graph_tasks", "entering")}
            vars(known).update(vars(call) | kept | {"within": task})
            self.stitcher.made_again(known, initial, results)
            self.closed.given.made_again(known, data, results, lambda w: id(w) in self._holders)
            self._listen(known, seen)
            return
        self._listen(call, seen)
        self.calls.append(call)
        chain, end = self.stitcher.place(call, initial, results)
        self.closed.saw(chain, end, data)
        if len(chain.calls) == 1:
            self._add_tracks(chain, data)
            for track in chain.tracks:
                track.turned = self.shown.turns([data.grad_fn]) if call.single else None
            self.shown.made(results, (track.name for track in chain.tracks))
        elif _goes_around(chain):
            for name, tensor in zip(call.initial, initial, strict=True):
                self.handles += call.listen_at_entry(name, tensor, self.scale)

    def _listen(self, call: Call, seen: SeenCall) -> None:
        names = [name for name in call.returned if not call.single or name != "h"]
        for name, tensor in zip(names, seen.results, strict=True):
            self.handles += call.listen(name, tensor, self.scale)
        for inner, (_, *tensors) in zip(call.inner, seen.inner, strict=True):
            self.handles += call.listen_inside(inner, tensors, self.scale)

    def scale(self) -> float:
        """What the loss is multiplied by at this moment: by the scaler, and as one of a mean."""
        return self.processes * self.scalers()

    def scalers(self) -> float:
        """The scaler's scale, or 1."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _recomputed(self, call: Call) -> Call | None:
        """The call made without gradient that a reentrant checkpoint is now making again."""
        for known in reversed(self.calls):
            if (
                known.owner == call.owner
                and not known.differentiable
                and known.data.shape == call.data.shape
                and known.h0.shape == call.h0.shape
                and torch.equal(known.data, call.data)
                and torch.equal(known.h0, call.h0)
            ):
                return known
        return None

    # -- tracks ------------------------------------------------------------------------------

    def _add_tracks(self, chain: Chain, data: Tensor) -> None:
        call = chain.calls[0]
        picked = [
            (layer, direction, name)
            for layer, direction, name in _names(call)
            if self.layers is None or matches_any(name, self.layers)
        ]
        if not picked:
            return
        notes: list[str] = []
        padding, below = self.shown.of_input(data, call.batch_first)
        made = self.shown.is_made(data)
        if chain.sizes == [1] and call.batch_sizes is None:
            chain.lengths = self.lengths.of_steps(chain.batch)
            notes += self.lengths.notes
        loop = Loop(chain)
        replay = loop.groups[0].replay
        self.runs[call.owner] += 1
        run = self.runs[call.owner]
        picked = [(i, j, base if run == 1 else f"{base}@{run}") for i, j, base in picked]
        for layer, direction, name in picked:
            source = LoopSource(loop, layer, direction, self.uses)
            self.uses.note(LoopSource(loop, layer, direction, None))
            track = Track(
                name=name,
                cell=call.cell,
                reverse=bool(direction),
                lengths=replay.lengths,
                mask=replay.mask,
                cuts=torch.zeros_like(replay.mask),
                weights=replay.weights(layer, direction).named(),
                foreign=self.uses.foreign(replay.weight_keys(layer, direction)),
                source=source,
                training=call.training,
                batch_first=call.batch_first,
                notes=list(notes),
                owner=call.owner,
                above=tuple(upper for i, _, upper in picked if i == layer + 1),
                below=below if layer == 0 else (),
                padding=padding,
                reads_states=made or layer > 0,
            )
            chain.tracks.append(track)
            self.recording.add(track)

    @property
    def marked(self) -> list[TapSource]:
        """All loops that were tapped or run over a cell of the user's own."""
        return [t.source for t in self.recording.values() if isinstance(t.source, TapSource)]

    @property
    def linears(self) -> list[LinearSource]:
        """All linear recurrences."""
        return [t.source for t in self.recording.values() if isinstance(t.source, LinearSource)]

    def unseen(self) -> tuple[Unseen, ...]:
        """Recurrences that are in no track, of those that are picked."""
        return tuple(
            one
            for one in (*self.watch.unseen.values(), *self._of_outputs())
            if not self.is_told(one.weights)
            and (
                self.layers is None
                or any(matches_any(name, self.layers) for name in (one.module, *one.weights))
            )
        )

    def _of_outputs(self) -> list[Unseen]:
        """Layers whose calls start afresh, each on what came of the call before."""
        found = []
        for path, (runs, single, batch_first) in self.closed.afresh.found().items():
            names = [n for key, n in self.watch.names.items() if self._holders.get(key) == path]
            form = PLAIN if single else FLAT if batch_first else FLAT_IN_TIME
            if names:
                found.append(self.watch.unseen_loop(names, path, runs, REASON, form))
        return found

    def out_of_reach(self) -> list[str]:
        """Torch's own layers that a backward went through, though no call of theirs was seen."""
        seen = {call.owner for call in self.calls}
        return [
            f"{path or type(module).__name__} ({type(module).__name__})"
            for path, module in self.watch.fused.items()
            if path not in seen
        ]

    def close(self) -> None:
        """Stop listening; the recording keeps what it has."""
        guarded(Point.CLOSING, self.graph_unknown, self.closed.close)
        for close in (
            self._remove_handles,
            self.uses.close,
            self.stitcher.close,
            self.shown.close,
            self.taps.close,
            self.linear.close,
            self.own.close,
            self.watch.close,
            self._copies.clear,
            self._let_tracks_go,
        ):
            guarded(Point.CLOSING, self.withheld.remark, close)

    def _remove_handles(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _let_tracks_go(self) -> None:
        afresh = self.closed.afresh.found()
        for track in self.recording.values():
            if isinstance(track.source, LoopSource) and track.owner in afresh:
                track.afresh = afresh[track.owner][0]
            if isinstance(track.source, LoopSource):
                track.source.loop.chain.tracks.clear()

    def forget(self) -> None:
        """Hold on to nothing that was recorded: from now on only the user does."""
        self.recording, self.uses = Recording(""), WeightUses(nn.Module())
        self.calls.clear()
        del self.taps, self.linear, self.own, self.watch, self.closed, self._copies


def _any_wrapped(seen: SeenCall) -> bool:
    return any(map(is_wrapped, (seen.data, *seen.initial, *seen.weights, *seen.results)))


def _names(call: Call) -> list[tuple[int, int, str]]:
    """(layer, direction, name) of every track of a call."""
    if call.single:
        return [(0, 0, call.owner or "cell")]
    found = []
    for layer in range(call.layers):
        for direction in range(1 + call.bidirectional):
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            found.append((layer, direction, f"{call.owner}.{suffix}" if call.owner else suffix))
    return found


def _goes_around(chain: Chain) -> bool:
    """Whether the last call's initial state holds some of that of the call before (zoneout)."""
    link = chain.links[-1]
    return link is not None and link.around is not None
