"""Observe: note what every recurrent call was given and returned, and the gradients that reach it."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradflow._version import __version__
from gradflow.errors import GradflowWarning, InputError, must_be
from gradflow.hooks import circumstances, mistakes
from gradflow.hooks.ancestry import clean, holder_of
from gradflow.hooks.call import Call
from gradflow.hooks.forwards import watching
from gradflow.hooks.loop import Loop
from gradflow.hooks.owncells import OwnCells
from gradflow.hooks.parity import WeightUses
from gradflow.hooks.patch import CellCall, FusedCall, observing
from gradflow.hooks.source import LoopSource
from gradflow.hooks.stitch import Chain, Stitcher
from gradflow.hooks.tapped import TapSource
from gradflow.hooks.taps import Taps
from gradflow.hooks.unseen import NO_NUMBERS, NO_SEQUENCE, has_no_numbers
from gradflow.recording import Recording, Track, matches_any

Lengths = Tensor | list[int] | Callable[..., Any] | None
ASKED_OF_SEQUENCES = (
    "lengths= was a function, which is asked of whole sequences and not of single steps: all steps "
    "count as real; give the lengths themselves"
)


class Recorder:
    """The observer behind one ``with record(model)`` block."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[str] | None,
        lengths: Lengths,
        scaler: Any,
        jacobians: bool | None = None,
    ) -> None:
        self.thread = threading.get_ident()
        self.model = model
        self.layers = layers
        self.lengths = lengths
        self.scaler = scaler
        self.jacobians = jacobians
        self.training = model.training
        self.recording = Recording(type(model).__name__)
        self.uses = WeightUses(model)
        self.calls: list[Call] = []
        self.handles: list[RemovableHandle] = []
        self.runs: Counter[str] = Counter()
        self.strangers: dict[str, None] = {}  # recurrent calls that are not the model's, in words
        self.scalers_scale: Callable[[], float] | None = None  # of a scaler that was not given
        self.stitcher = Stitcher()
        self.taps = Taps(self)
        self._copies: dict[object, Tensor] = {}  # by id, or by owner and place
        self._paths = {id(module): clean(name) for name, module in model.named_modules()}
        self.own = OwnCells(self, model, self._paths)
        self._holders = {
            id(parameter): clean(name).rpartition(".")[0]
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }

    # -- what the patch calls ----------------------------------------------------------------

    def wants(self, weights: tuple[Tensor, ...], module: nn.Module | None) -> bool:
        """A call belongs to this recording if its module or its weights are the model's."""
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

    def saw(self, seen: FusedCall) -> None:
        """Copy one fused call and listen for its gradients."""
        owner = self._owner(seen.weights, seen.module)
        if owner is not None and not seen.initial[0].numel():
            self.own.unseen[owner or seen.cell] = NO_SEQUENCE
        elif owner is not None:
            self._admit(self._copy(seen, owner), seen.initial, seen.results)
            self.own.saw_stock(owner, seen.results)

    def saw_cell(self, seen: CellCall) -> None:
        """Copy one call of a single-step function and listen for its gradients."""
        owner = self._owner(seen.weights, seen.module)
        if owner is not None and not seen.initial[0].numel():
            self.own.unseen[owner or "cell"] = NO_SEQUENCE
        elif owner is not None:
            self._admit(self._copy_cell(seen, owner), seen.initial, seen.results)
            self.own.saw_stock(owner, seen.results)

    def saw_tap(
        self, name: str, states: dict[str, Tensor], rows: dict[str, Tensor], frame: FrameType
    ) -> None:
        """Copy the states that a hand-written loop marks; every recording of the thread does."""
        self.taps.saw(name, states, rows, frame)

    def saw_scaler(self, scaler: Any) -> None:
        """Note that a loss was multiplied by somebody's scale."""
        if self.scaler is None and scaler.is_enabled():
            self.scalers_scale = scaler.get_scale

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module that may be a cell of the user's own is called."""
        return self.own.entered(module, args, kwargs)

    def left(self, call: Any, result: Any) -> None:
        """That call is over; result is None where it raised."""
        self.own.left(call, result)

    def wants_track(self, name: str) -> bool:
        """Whether a tap or a cell of this name is picked."""
        return self.layers is None or matches_any(name, self.layers)

    def add_track(self, base: str, track: Track) -> None:
        """Take up a new loop, tapped or over a cell, under a name of its own."""
        self.runs[base] += 1
        while f"{base}@{self.runs[base]}" in self.recording._tracks:  # some were dropped
            self.runs[base] += 1
        track.name = base if self.runs[base] == 1 else f"{base}@{self.runs[base]}"
        self.recording.add(track)

    def drop_tracks(self, tracks: list[Track]) -> None:
        """Forget loops over one cell that turned out to be part of another."""
        for track in tracks:
            self.recording.drop(track)
            self.runs[track.name.partition("@")[0]] -= 1

    def _admit(self, call: Call, initial: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
        task = torch._C._current_graph_task_id()
        if task != -1:
            known = self._recomputed(call)
            if known is None:
                return  # a non-reentrant checkpoint: the first call's own tensors get the gradients
            kept = {name: getattr(known, name) for name in ("grads", "graph_tasks", "entering")}
            vars(known).update(vars(call) | kept | {"within": task})
            self.stitcher.made_again(known, initial, results)
            self._listen(known, results)
            return
        self._listen(call, results)
        self.calls.append(call)
        chain, new = self.stitcher.place(call, initial, results)
        if new:
            self._add_tracks(chain)
        elif _goes_around(chain):
            for name, tensor in zip("hc", initial, strict=False):
                self.handles += call.listen_at_entry(name, tensor, self.scale)

    def _listen(self, call: Call, results: tuple[Tensor, ...]) -> None:
        names = ("output", "c_n") if call.single else ("output", "h_n", "c_n")
        for name, tensor in zip(names, results, strict=False):
            self.handles += call.listen(name, tensor, self.scale)

    def scale(self) -> float:
        """What losses are multiplied by at this moment: the scaler's scale, or 1."""
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

    # -- copies ------------------------------------------------------------------------------

    def _copy(self, seen: FusedCall, owner: str) -> Call:
        device = seen.data.device.type
        return Call(
            cell=seen.cell,
            owner=owner,
            data=copied(seen.data),
            batch_sizes=seen.batch_sizes,
            unsorted=seen.unsorted,
            h0=copied(seen.initial[0]),
            c0=copied(seen.initial[1]) if len(seen.initial) == 2 else None,
            weights=self._weights(owner, seen.weights),
            weight_keys=tuple(self.uses.key(weight, self.scale) for weight in seen.weights),
            has_biases=seen.has_biases,
            layers=seen.layers,
            dropout=seen.dropout,
            training=seen.training,
            bidirectional=seen.bidirectional,
            batch_first=seen.batch_first,
            rng=seen.rng,
            autocast=_autocast(device),
            returned={
                name: copied(tensor)
                for name, tensor in zip(("output", "h_n", "c_n"), seen.results, strict=False)
            },
            grad_enabled=torch.is_grad_enabled(),
            differentiable=any(tensor.requires_grad for tensor in seen.results),
            lengths=self._given_lengths(seen),
        )

    def _copy_cell(self, seen: CellCall, owner: str) -> Call:
        """A single step as a fused call of one layer and T = 1."""
        h = seen.results[0]
        c = seen.results[1] if len(seen.results) == 2 else None
        output = copied(h).unsqueeze(0)
        returned = {"output": output, "h_n": output}
        if c is not None:
            returned["c_n"] = copied(c).unsqueeze(0)
        self.lengths_of(seen.data.shape[0])
        return Call(
            cell=seen.cell,
            owner=owner,
            data=copied(seen.data).unsqueeze(0),
            batch_sizes=None,
            unsorted=None,
            h0=copied(seen.initial[0]).unsqueeze(0),
            c0=copied(seen.initial[1]).unsqueeze(0) if len(seen.initial) == 2 else None,
            weights=self._weights(owner, seen.weights),
            weight_keys=tuple(self.uses.key(weight, self.scale) for weight in seen.weights),
            has_biases=len(seen.weights) > 2,
            layers=1,
            dropout=0.0,
            training=seen.training,
            bidirectional=False,
            batch_first=False,
            rng=None,
            autocast=_autocast(seen.data.device.type),
            returned=returned,
            grad_enabled=torch.is_grad_enabled(),
            differentiable=any(tensor.requires_grad for tensor in seen.results),
            lengths=None,
            single=True,
            # nn.LSTMCell on a CPU computes h from c's own tensor; one kernel for both does not
            c_is_total=c is not None and h.grad_fn is not c.grad_fn,
        )

    def _weights(self, owner: str, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Copies of the weights as they are now; one copy serves all calls that saw the same values.

        A weight is known by itself or, where it is computed anew for every call, by its place.
        """
        found = []
        for place, weight in enumerate(weights):
            known = [self._copies.get(id(weight)), self._copies.get((owner, place))]
            same = [k for k in known if k is not None and _equal(k, weight)]
            found.append(same[0] if same else copied(weight))
            self._copies[id(weight)] = self._copies[owner, place] = found[-1]
        return tuple(found)

    def lengths_of(self, batch: int) -> Tensor | None:
        """The user's lengths for a loop over a batch of this size, checked."""
        lengths = self._loop_lengths()
        if lengths is not None and (lengths.shape != (batch,) or bool((lengths < 1).any())):
            raise InputError(
                must_be(
                    "lengths",
                    f"{batch} whole numbers of at least 1",
                    lengths.tolist(),
                    "give one length per sequence of the batch",
                )
            )
        return lengths

    def _loop_lengths(self) -> Tensor | None:
        """The user's lengths for a loop over a cell: real steps of the whole loop."""
        if self.lengths is None or callable(self.lengths):
            return None
        try:
            return torch.as_tensor(self.lengths).cpu().long()
        except (TypeError, ValueError, RuntimeError):
            return torch.empty(0, dtype=torch.long)

    def _given_lengths(self, seen: FusedCall) -> Tensor | None:
        if self.lengths is None or seen.batch_sizes is not None:
            return None
        batch, steps = (0, 1) if seen.batch_first else (1, 0)
        batch, steps = seen.data.shape[batch], seen.data.shape[steps]
        if steps == 1:  # a step of a loop, whose real steps they are
            self.lengths_of(batch)
            return None
        given = seen.data if seen.module_input is None else seen.module_input
        lengths = self.lengths(given) if callable(self.lengths) else self.lengths
        try:
            found = torch.as_tensor(lengths).cpu()
        except (TypeError, ValueError, RuntimeError):
            found = torch.empty(0)
        whole = found.shape == (batch,) and bool((found == found.long()).all())
        if not whole or bool((found < 1).any()) or bool((found > steps).any()):
            raise InputError(
                must_be(
                    "lengths",
                    f"{batch} whole numbers between 1 and {steps}",
                    lengths.tolist() if isinstance(lengths, Tensor) else repr(lengths),
                    "give one length per sequence of the batch",
                )
            )
        return found.long()

    # -- tracks ------------------------------------------------------------------------------

    def _add_tracks(self, chain: Chain) -> None:
        call = chain.calls[0]
        picked = [
            (layer, direction, name)
            for layer, direction, name in _names(call)
            if self.layers is None or matches_any(name, self.layers)
        ]
        if not picked:
            return
        notes = []
        if chain.sizes == [1] and call.batch_sizes is None:
            chain.lengths = self._loop_lengths()
            notes += [ASKED_OF_SEQUENCES] if callable(self.lengths) else []
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
                source=source,
                training=call.training,
                batch_first=call.batch_first,
                notes=list(notes),
                owner=call.owner,
                above=tuple(upper for i, _, upper in picked if i == layer + 1),
            )
            chain.tracks.append(track)
            self.recording.add(track)

    @property
    def marked(self) -> list[TapSource]:
        """All loops that were tapped or run over a cell of the user's own."""
        return [t.source for t in self.recording if isinstance(t.source, TapSource)]

    def close(self) -> None:
        """Stop listening; the recording keeps what it has."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.uses.close()
        self.stitcher.close()
        self.taps.close()
        self.own.close()
        self._copies.clear()
        for track in self.recording:
            if isinstance(track.source, LoopSource):
                track.source.loop.chain.tracks.clear()

    def forget(self) -> None:
        """Hold on to nothing that was recorded: from now on only the user does."""
        self.recording, self.uses = Recording(""), WeightUses(nn.Module())
        self.calls.clear()
        del self.taps, self.own


def _patterns(layers: object) -> list[str] | None:
    """The names or globs of ``layers``, checked."""
    if layers is None:
        return None
    patterns = [layers] if isinstance(layers, str) else layers
    if isinstance(patterns, list | tuple) and all(isinstance(name, str) for name in patterns):
        return list(patterns)
    expected = "a name, a glob or a list of them"
    raise InputError(must_be("layers", expected, repr(layers), "names look like 'rnn.l0'"))


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


def _autocast(device: str) -> tuple[str, bool, torch.dtype]:
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy outside any graph."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


@contextmanager
def record(
    model: nn.Module,
    *,
    layers: str | list[str] | None = None,
    lengths: Lengths = None,
    jacobians: bool | None = None,
    scaler: Any = None,
) -> Iterator[Recording]:
    """Record every recurrent layer and cell of an unmodified model while the block runs.

    The model's outputs, loss, parameter gradients and random numbers are bit-identical with and
    without a recording. Read the result after the backward pass: ``recording["rnn.l0"].grad_c``.

    Args:
        model: any module that holds, somewhere, `nn.RNN`, `nn.LSTM`, `nn.GRU`, one of their cells, or a
            cell of your own: a module with weights that is given again what it returned before.
        layers: names or globs of the tracks to keep; all by default.
        lengths: (B,) real steps of each sequence of a padded batch, or a callable of the layer's
            input that gives them. Packed input needs none. Of a loop over single steps they are
            the real steps of the loop; a callable is not asked there.
        jacobians: step Jacobians of cells of your own and of loops that mark their states with
            `gradflow.tap`, at one backward of the step per unit: by default up to 64 units, with True
            at any width, with False never.
            Stock layers have theirs in closed form and need no such request.
        scaler: the GradScaler whose scale multiplies the loss; it is divided out.

    Returns:
        A context manager that gives the `Recording`: name -> `Track`, filled while the block runs.

    Raises:
        InputError: an argument is not what it must be.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> _ = torch.nn.init.constant_(rnn.weight_ih_l0, 1.0)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.ones(4, 1, 1))[0][-1].sum().backward()
    >>> [round(g, 4) for g in recording["l0"].grad_h.flatten().tolist()]   # 0.9 ** (T - t)
    [0.729, 0.81, 0.9, 1.0]
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            must_be("model", "a torch.nn.Module", type(model).__name__, "pass the model itself")
        )
    if jacobians is not None and not isinstance(jacobians, bool):
        expected = "True, False or left out"
        raise InputError(must_be("jacobians", expected, repr(jacobians), "leave it out"))
    patterns = _patterns(layers)
    if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
        kind = type(scaler).__name__
        raise InputError(must_be("scaler", "a GradScaler", kind, "leave it out without one"))
    recorder = Recorder(model, patterns, lengths, scaler, jacobians)
    recording = recorder.recording
    before, ran = mistakes.gradient_marks(model), mistakes.Ran(model)
    watched = [] if mistakes.something_is_compiled() else recorder.own.modules
    try:
        with observing(recorder), watching(watched):
            yield recording
    finally:
        recorder.close()
        ran.close()
        marks_changed = mistakes.gradient_marks(model) != before
        seen = any(call.graph_tasks for call in recorder.calls) or any(
            source.graph_tasks for source in recorder.marked
        )
        _describe(recorder, list(ran.names), ran_backward=marks_changed or seen)
        sentences = [*mistakes.found(recording), *_misleading(recorder)]
        recorder.forget()
    for sentence in sentences:
        warnings.warn(sentence, GradflowWarning, stacklevel=3)


def _notes(track: Track) -> list[str]:
    """What a reader should know about a track that is a loop of calls."""
    source = track.source
    if isinstance(source, TapSource):
        return source.notes()
    assert isinstance(source, LoopSource)
    chain = source.loop.chain
    notes = []
    reason = source.loop.why_no_operator()
    if reason:
        notes.append(f"its step Jacobians and last loss step alone are not known: {reason}")
    elif any(link is not None and link.around is not None for link in chain.links):
        notes.append(
            "between two calls its state is mixed with the one before (zoneout): gains are those of "
            "the states that enter the calls, and the last loss step alone is not told apart"
        )
    if len({tuple(id(weight) for weight in call.weights) for call in chain.calls}) > 1:
        notes.append("its weights changed within the loop; every step is read with its own")
    return notes


def _misleading(recorder: Recorder) -> list[str]:
    """What makes the numbers other than they seem, or leaves some out: warned of, and in the report."""
    found = []
    if recorder.scalers_scale is not None and any(t.backwards for t in recorder.recording):
        found.append(circumstances.perhaps_scaled(recorder.scalers_scale()))
    unseen, _ = _unseen(recorder)
    return found + ([circumstances.not_seen(unseen)] if unseen else [])


def _unseen(recorder: Recorder) -> tuple[list[str], list[str]]:
    """See `circumstances.unseen_cells`; nothing where there is no track at all, which says enough."""
    if not len(recorder.recording):
        return [], []
    return circumstances.unseen_cells(recorder.model, {call.owner for call in recorder.calls})


def _describe(recorder: Recorder, ran: list[str], *, ran_backward: bool) -> None:
    """Write down what shapes the numbers, and what to say where there are none."""
    recording, calls = recorder.recording, recorder.calls
    ran_some = bool(calls) or recorder.taps.seen or recorder.own.seen
    recording.empty_reason = mistakes.why_no_track(
        recorder.model,
        recorder.layers,
        ran_some,
        ran,
        recorder.own.without_state,
        recorder.strangers,
        recorder.own.unseen or recorder.own.model_unseen,
    )
    training = [call.training for call in calls] or [recorder.training]
    tensors = [call.weights[0] for call in calls] + [
        state for source in recorder.marked for state in source.marks[0].states.values()
    ]
    for track in recording:
        track.source.ran_backward = ran_backward  # type: ignore[attr-defined]
        track.notes += _notes(track)
    recording.notes += [*circumstances.per_rank(recorder.model), *_misleading(recorder)]
    recording.notes += circumstances.without_dropout(recorder.model)
    _, perhaps = _unseen(recorder)
    recording.notes += [circumstances.perhaps_not_seen(perhaps)] if perhaps else []
    recording.provenance = {
        "model": recording.model_name,
        "gradflow": __version__,
        "torch": str(torch.__version__),
        "mode": "training" if any(training) else "evaluation",
        "device": sorted({tensor.device.type for tensor in tensors}),
        "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
    }
