"""Observe an unmodified model while a block runs, and say what shapes the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradflow._version import __version__
from gradflow.distributed import AllProcesses, ApartError, can_be_sent, world
from gradflow.errors import InputError, must_be, warn
from gradflow.hooks import circumstances, mistakes
from gradflow.hooks.ancestry import clean, title_of
from gradflow.hooks.guard import BATCHED, Point, guarded
from gradflow.hooks.lengths import Lengths
from gradflow.hooks.linear.linear_calls import tensors_of
from gradflow.hooks.linear.linear_source import LinearSource
from gradflow.hooks.loops.arrivals import read_beyond
from gradflow.hooks.loops.loop_source import LoopSource
from gradflow.hooks.own.forwards import Ran, Watching
from gradflow.hooks.patch import (
    listen,
    nothing_is_under_way,
    something_is_compiled,
    stop_listening,
)
from gradflow.hooks.recorder import Recorder
from gradflow.hooks.tapped import TapSource
from gradflow.recording.pooled import of_all_processes
from gradflow.recording.track import Track
from gradflow.recording.tracks import Recording


@contextmanager
def record(
    model: nn.Module,
    *,
    layers: str | list[str] | None = None,
    lengths: Lengths = None,
    jacobians: bool | None = None,
    exact: bool = True,
    scaler: Any = None,
    gather: bool = False,
) -> Iterator[Recording]:
    """Record every recurrent layer and cell of an unmodified model while the block runs.

    Outputs, loss, parameter gradients and random numbers are bit-identical with and without a recording,
    but for ``exact=False``. Read the result after the backward pass: ``recording["rnn.l0"].grad_c``.

    Args:
        model: any module that holds, somewhere, `nn.RNN`, `nn.LSTM`, `nn.GRU`, one of their cells, or a
            cell of your own: a module with weights that is given again what it returned before.
        layers: names or globs of the tracks to keep; all by default.
        lengths: (B,) real steps of each sequence of a padded batch, or a callable of the layer's
            input that gives them. Packed input needs none. Of a loop over single steps they are
            the real steps of the loop; a callable is not asked there.
        jacobians: step Jacobians of cells of your own and of loops that mark their states with
            `gradflow.tap`. By default they are written out up to 64 units, at one backward of the step
            per unit; beyond, each step is kept as products with vectors, at about one backward of the
            step. With True they are written out at any width, with False there are none.
        exact: with False, stacks of torch's own layers, and on a GPU single ones, run with phantom inputs,
            so that one backward through torch's own kernel gives all totals. For stacks that is faster,
            and on a GPU the calls for totals grow with log T, not T; outputs, gradients and totals are
            those of a plain step up to rounding. Half precision, autocast: as with True.
        scaler: the GradScaler whose scale multiplies the loss; it is divided out.
        gather: of a model that several processes train: at the end of the block each has the sequences
            of all, and gradients of the mean of their losses; see `gradflow.distributed`. By default
            each has its own.

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
    patterns = _checked(model, layers, jacobians, scaler, exact)
    processes, apart = _all_processes(gather)
    recording = Recording(title_of(model))
    failed: list[str] = []
    given = (model, patterns, lengths, scaler, jacobians, recording, exact)
    recorder = guarded(Point.OPENING, failed.append, Recorder, *given)
    if recorder is None:
        recording.empty_reason = f"nothing was recorded: {failed[0]}"
        processes.leave("recorded nothing")
        yield recording
        warn(recording.empty_reason, stacklevel=3)
        return
    recorder.processes = processes.size
    block = OpenRecording(recorder)
    whole = False
    try:
        try:
            block.open()
            yield recording
            whole = True
        finally:
            sentences = block.close()
    finally:  # where Ctrl-C came before that line
        block.put_back()
        if not whole:
            processes.leave("left the block of its recording by an exception")
    if processes.size > 1:
        sentences += gathered(recording, processes)
    for sentence in [*apart, *sentences]:
        warn(sentence, stacklevel=3)


def _checked(
    model: object, layers: object, jacobians: object, scaler: Any, exact: object
) -> list[str] | None:
    """The patterns of the layers to keep; arguments that are out of range are refused."""
    if not isinstance(model, nn.Module):
        raise InputError(
            must_be("model", "a torch.nn.Module", type(model).__name__, "pass the model itself")
        )
    if jacobians is not None and not isinstance(jacobians, bool):
        expected = "True, False or left out"
        raise InputError(must_be("jacobians", expected, repr(jacobians), "leave it out"))
    if not isinstance(exact, bool):
        raise InputError(must_be("exact", "True or False", repr(exact), "leave it out"))
    if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
        kind = type(scaler).__name__
        raise InputError(must_be("scaler", "a GradScaler", kind, "leave it out without one"))
    return patterns_of(layers)


def _all_processes(gather: object) -> tuple[AllProcesses, list[str]]:
    """Those whose sequences are put together; where they do not meet this one alone, and why."""
    try:
        return AllProcesses(gather), []
    except ApartError as error:
        return AllProcesses(False), [_alone(error)]


def _alone(error: ApartError) -> str:
    return f"the recording is of rank {world()[0]} alone: {error}"


def gathered(recording: Recording, processes: AllProcesses) -> list[str]:
    """Put the sequences of all processes into a recording; gives the sentences to warn of."""
    mine, left = Recording(recording.model_name), []
    for track in recording.values():
        mine.add(track)
    if not can_be_sent(mine):
        for track in list(mine.values()):
            if not can_be_sent(track):
                mine.drop(track)
                left.append(track.name)
    sentences = [
        f"{name} is of rank {processes.rank} alone: how its function makes its states cannot be sent to "
        "another process"
        for name in left
    ]
    try:
        parts = processes.every("the end of a recording", mine)
    except ApartError as error:
        return [_alone(error)]
    of_all_processes(recording, parts)
    recording.notes += sentences
    return sentences


class OpenRecording:
    """What is opened for one recording, and closed whatever happened in between."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.marks: list[tuple[int, int] | None] | None = None
        self._is_back = False  # all that was replaced

    def open(self) -> None:
        """Begin to watch; what cannot be watched is noted."""
        nothing_is_under_way()
        model, remark = self.recorder.model, self.recorder.withheld.remark
        self.marks = guarded(Point.OPENING, remark, mistakes.gradient_marks, model)
        self.recorder.ran = guarded(Point.OPENING, remark, Ran, model)
        self.recorder.watching = guarded(
            Point.OPENING, remark,
            lambda: Watching([] if something_is_compiled() else self.recorder.own.modules),
        )  # fmt: skip
        guarded(Point.OPENING, remark, listen, self.recorder)
        for opened in (self.recorder.ran, self.recorder.watching):
            if opened is not None:
                guarded(Point.OPENING, remark, opened.open)

    def close(self) -> list[str]:
        """Put everything back; gives the sentences to warn of."""
        self.put_back()
        recorder, recording = self.recorder, self.recorder.recording
        names = [] if self.recorder.ran is None else list(self.recorder.ran.names)
        sentences: list[str] = []
        remark = recorder.withheld.remark
        before = recording.empty_reason
        guarded(Point.CLOSING, remark, lambda: _describe(recorder, names, self._ran_backward()))
        if recorder.withheld.sentences and recording.empty_reason == before:  # it could not be told
            recording.empty_reason = recorder.withheld.sentences[0]
        guarded(Point.CLOSING, remark, lambda: sentences.extend(mistakes.found(recording)))
        guarded(Point.CLOSING, remark, lambda: sentences.extend(_misleading(recorder)))
        said = recorder.withheld.sentences
        recording.notes += [sentence for sentence in said if sentence not in recording.notes]
        recorder.forget()
        return [*dict.fromkeys([*sentences, *said])]

    def put_back(self) -> None:
        """Put everything back, if that is still to be done."""
        if self._is_back:
            return
        remark = self.recorder.withheld.remark
        guarded(Point.CLOSING, remark, stop_listening, self.recorder)
        for opened in (self.recorder.watching, self.recorder, self.recorder.ran):
            if opened is not None:
                guarded(Point.CLOSING, remark, opened.close)
        self._is_back = True

    def _ran_backward(self) -> bool:
        recorder = self.recorder
        seen = any(call.graph_tasks for call in recorder.calls)
        seen |= any(source.graph_tasks for source in recorder.marked)
        seen |= any(source.graph_tasks for source in recorder.linears)
        return self.marks != mistakes.gradient_marks(self.recorder.model) or seen


def _notes(track: Track) -> list[str]:
    """What a reader should know about a track that is a loop of calls."""
    source = track.source
    if not isinstance(source, LoopSource):
        return source.notes() if isinstance(source, TapSource | LinearSource) else []
    chain = source.loop.chain
    notes = [BATCHED] if chain.batched else []
    reason = source.loop.why_no_operator()
    if chain.closed is not None:
        notes.append(chain.closed.note(track.name))
    elif reason:
        notes.append(f"its step Jacobians and last loss step alone are not known: {reason}")
    elif any(link is not None and link.around is not None for link in chain.links):
        notes.append(
            "between two calls its state is mixed with the one before (zoneout, a mask): gains are those "
            "of the states that enter the calls, and the last loss step alone is not told apart"
        )
    if read_beyond(source.loop):
        notes.append(
            "the loss also reads steps of a call that come after those of this track (padding, or what its "
            "state does not go on from): they are not shown, and the last loss step alone is not told apart"
        )
    if chain.layout.padding:
        notes.append(
            "its state goes on through the padding of a call, which therefore counts as steps; to go on from "
            "the last real step, pack the batch (pack_padded_sequence)"
        )
    if len({tuple(id(weight) for weight in call.weights) for call in chain.calls}) > 1:
        notes.append("its weights changed within the loop; every step is read with its own")
    return notes


def _misleading(recorder: Recorder) -> list[str]:
    """What makes the numbers other than they seem, or leaves some out: warned of, and in the report."""
    found = []
    if recorder.scalers_scale is not None and any(t.backwards for t in recorder.recording.values()):
        found.append(circumstances.perhaps_scaled(recorder.scalers_scale()))
    if len(recorder.recording):  # without a track they are why there is none
        hidden = recorder.out_of_reach()
        found += [mistakes.out_of_reach(hidden)] if hidden else []
        found += [one.sentence for one in recorder.recording.unseen]
    unseen, _ = _unseen(recorder)
    return found + ([circumstances.not_seen(unseen)] if unseen else [])


def _unseen(recorder: Recorder) -> tuple[list[str], list[str]]:
    """See `circumstances.unseen_cells`; nothing where there is no track at all, which says enough."""
    if not len(recorder.recording):
        return [], []
    return circumstances.unseen_cells(recorder.model, {call.owner for call in recorder.calls})


def _describe(recorder: Recorder, ran: list[str], ran_backward: bool) -> None:
    """Write down what shapes the numbers, and what to say where there are none."""
    recording, calls = recorder.recording, recorder.calls
    recording.unseen = recorder.unseen()
    ran_some = bool(calls) or recorder.taps.seen or recorder.linear.seen or recorder.own.seen
    recording.empty_reason = mistakes.why_no_track(
        recorder.model,
        recorder.layers,
        ran_some,
        ran,
        mistakes.CellsThatRan(
            recorder.own.without_state,
            {} if recorder.watch.walked else recorder.own.loops_inside(),
            recorder.own.kept_inside(),
            recorder.out_of_reach(),
        ),
        recorder.strangers,
        recorder.own.unseen or recorder.own.model_unseen,
        recording.unseen,
    )
    if recorder.withheld.layers:
        recording.empty_reason = "; ".join(recorder.withheld.layers)
    training = [call.training for call in calls] or [recorder.training]
    tensors = [call.weights[0] for call in calls] + [
        state for source in recorder.marked for state in source.marks[0].states.values()
    ]
    tensors += tensors_of(recorder.linears)
    for track in recording.values():
        track.source.ran_backward = ran_backward  # type: ignore[attr-defined]
        track.inputs_unknown = recorder.closed.given.unknown(track)
        track.notes += _notes(track)
    recording.notes += [
        *circumstances.per_rank(recorder.model, recorder.processes),
        *_misleading(recorder),
    ]
    recording.notes += circumstances.without_dropout(recorder.model)
    linear = {track.owner for track in recording.values() if isinstance(track.source, LinearSource)}
    recording.notes += circumstances.beside_attention(recorder.model, linear)
    recording.notes += circumstances.left_out(recorder.own.unseen) if len(recording) else []
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


def patterns_of(layers: object) -> list[str] | None:
    """The names or globs of ``layers``, checked."""
    if layers is None:
        return None
    patterns = [layers] if isinstance(layers, str) else layers
    if isinstance(patterns, list | tuple) and all(isinstance(name, str) for name in patterns):
        # names as the tracks have them, and as the modules do, with "module" and "_orig_mod"
        return [name for name in dict.fromkeys([*patterns, *map(clean, patterns)]) if name]
    expected = "a name, a glob or a list of them"
    raise InputError(must_be("layers", expected, repr(layers), "names look like 'rnn.l0'"))
