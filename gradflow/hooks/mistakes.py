"""First mistakes: a sentence instead of an empty plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradflow.cells import layer_names
from gradflow.hooks.ancestry import clean
from gradflow.hooks.call import Call
from gradflow.hooks.closed.afresh import FORKED
from gradflow.hooks.closed.joint_source import JointSource
from gradflow.hooks.guard import foreign_code
from gradflow.hooks.heard_gradients import LoopGradients
from gradflow.hooks.linear.linear_source import LinearSource
from gradflow.hooks.loops.loop_source import LoopSource
from gradflow.hooks.patch import something_is_compiled
from gradflow.hooks.tapped import TAP, TapSource
from gradflow.limits import MANY_TRACKS
from gradflow.recording.track import Track, unnumbered
from gradflow.recording.tracks import Recording, Unseen

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
FEW = 8  # names in one sentence

ONCE_OWN = (
    "was called once, so no state came back; if it is a recurrent cell, run it in a loop that gives each "
    "call the state of the one before"
)


@dataclass(frozen=True)
class CellsThatRan:
    """Modules that ran and are in no track, by name."""

    without_state: Mapping[str, int]  # that take and return what could be a state -> calls
    inside: Mapping[str, str]  # that loop in their own forward -> where
    kept: Mapping[str, str]  # that keep something in an attribute -> which
    out_of_reach: Sequence[str]  # torch's own layers whose call was not seen, but is in the graph


def out_of_reach(names: Sequence[str]) -> str:
    """What to say of torch's own layers whose call was not seen, though a backward went through it."""
    return (
        f"{listed(list(names))} ran, but its call was not seen: its function was taken from torch._VF before "
        "the block opened, perhaps; call the layer itself, or torch._VF.lstm and its like by that name"
    )


def _loops_inside(inside: Mapping[str, str]) -> str:
    said = [f"{name} loops inside its own forward ({where})" for name, where in inside.items()]
    return (
        f"{listed(said)}, and what a loop without a cell carries is read when a backward runs through it: "
        "call loss.backward() before the block ends, or mark its states: h = gradflow.tap(h=h) at the "
        "end of the loop's body"
    )


def _kept(kept: Mapping[str, str]) -> str:
    said = [f"{name} keeps {what} from one call to the next" for name, what in kept.items()]
    attribute = next(iter(kept.values()))
    short = attribute.rpartition(".")[2]
    return (
        f"{listed(said)}, where no state is seen to come back; if that is a state of the loop, mark it in "
        f"its forward: {attribute} = gradflow.tap({short}={attribute})"
    )


def gradient_marks(model: nn.Module) -> list[tuple[int, int] | None]:
    """What changes when any backward adds to a parameter's ``.grad``."""
    return [
        None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)
        for parameter in nn.Module.parameters(model)
    ]


def why_no_track(
    model: nn.Module,
    picked: list[str] | None,
    called: bool,
    ran: Iterable[str],
    cells: CellsThatRan,
    strangers: Collection[str],
    unseen: Mapping[str, str],
    unrolled: Sequence[Unseen],
) -> str:
    """Why a recording is empty, and what to do."""
    did = f"; what ran: {', '.join(ran)}" if ran else ""
    if strangers and not called:
        return _not_the_models_own(model, strangers)
    if called and picked is not None:
        return (
            f"no recurrent layer fits layers={picked}; leave layers out to record all of them, "
            "names look like 'rnn.l0'"
        )
    if unseen:
        said = {words: [n for n in unseen if unseen[n] == words] for words in unseen.values()}
        return "; ".join(f"{listed(names)} {words}" for words, names in said.items())
    if unrolled:
        return "; ".join(one.sentence for one in unrolled)
    if cells.out_of_reach:
        return out_of_reach(cells.out_of_reach)
    if cells.inside:
        return _loops_inside(cells.inside)
    if cells.kept:
        return _kept(cells.kept)
    own = cells.without_state
    once = [name for name, calls in own.items() if calls == 1]
    if once:
        return f"{listed(once)} {ONCE_OWN}"
    if own:
        often = [f"{name} was called {calls} times" for name, calls in own.items()]
        return (
            f"no state came back: {listed(often)}, but nothing that it returned was its argument "
            "again; give each call the state that the one before returned or, if the state takes "
            "another way, mark it: h, c = gradflow.tap(h=h, c=c) inside the loop"
        )
    recurrent = {
        clean(name) or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, RECURRENT)
    }
    if recurrent:
        names = ", ".join(f"{name} ({type(m).__name__})" for name, m in recurrent.items())
        graph = something_is_compiled()
        hidden = ", or ran inside a graph of torch.compile, where nothing is seen" if graph else ""
        return (
            f"no recurrent layer ran: {names} was not called inside the block{hidden}{did}; run the "
            f"{'uncompiled ' if graph else ''}model's forward pass inside `with gradflow.record(model):`"
        )
    foreign = foreign_code([*nn.Module.modules(model)])
    if foreign:
        return f"no recurrent layer ran: {foreign}"
    compiled = (
        "; where torch.compile was used cells of your own are not looked for, nor is a tap seen in its "
        "graphs: record the uncompiled model"
        if something_is_compiled()
        else ""
    )
    kinds = sorted({type(m).__name__ for m in nn.Module.modules(model) if not list(m.children())})
    return (
        f"no recurrent layer ran: {type(model).__name__} consists of {', '.join(kinds)}, none of them "
        f"{', '.join(layer_names())} or one of their cells{did}{compiled}; give the model that holds the "
        "recurrent layer or, if the model loops by hand, mark its states: "
        "h, c = gradflow.tap(h=h, c=c) inside the loop"
    )


def _not_the_models_own(model: nn.Module, strangers: Collection[str]) -> str:
    """Recurrent calls were seen, but none of them is known to be the model's."""
    return (
        f"no recurrent layer of {type(model).__name__} ran: {', '.join(strangers)} ran with weights that "
        "are neither its parameters nor computed from them with gradients on; register the layer in "
        "the model (an attribute or an nn.ModuleList, not a plain list), or give the model that holds "
        "its weights"
    )


def found(recording: Recording) -> list[str]:
    """The sentences to say when a block ends."""
    if not recording.tracks:
        return [recording.empty_reason]
    sentences = [*_too_short(recording), *_many_starts(recording)]
    reasons: dict[str, list[str]] = {}
    for track in recording.values():
        reason = _reason(track)
        if reason:
            reasons.setdefault(reason, []).append(track.name)
    sentences += [f"{listed(names)}: {reason}" for reason, names in reasons.items()]
    return sentences


def _runs(names: Iterable[str]) -> list[str]:
    """Tracks by the layer they are runs of, with how many there are."""
    counts = Counter(unnumbered(name) for name in names)
    return [name if count == 1 else f"{name} ({count} runs)" for name, count in counts.items()]


def _too_short(recording: Recording) -> list[str]:
    """Tracks of one step, which exercise no recurrence."""
    once = [one for one in recording.values() if one.steps == 1 and FORKED not in one.notes]
    marked = [track for track in once if isinstance(track.source, TapSource)]
    tapped = [track.name for track in marked if track.cell == TAP]
    afresh = [track.name for track in marked if track.cell != TAP]
    known = {one.module for one in recording.unseen}  # the sentence on these says it
    short = [t for t in once if t not in marked and t.owner not in known]
    scanned = [track.name for track in short if isinstance(track.source, LinearSource)]
    short = [track for track in short if track.name not in scanned]
    cells = [track.name for track in short if _calls(track)[0].single]
    layers = [track.name for track in short if not _calls(track)[0].single]
    names = _runs(cells)
    how = "was called once" if len(names) == len(cells) else "started afresh at each call"
    said = [
        (tapped, "was tapped once, so no state came back and no recurrence is exercised; call tap inside "
         "the loop, once per step"),
        (afresh, "took nothing of its earlier state into any of its calls, so no recurrence is exercised; "
         "give each call the state of the one before"),
        (scanned, "ran over one step, so no recurrence is exercised; give sequences of two steps or more"),
        (names, f"{how}, so no state came back and no recurrence is exercised; run it in a loop that gives "
         "each call the state of the one before"),
        (_runs(layers), "ran on T = 1 step, so no recurrence is exercised; give sequences of two steps or "
         "more, or give each call the state that the one before returned"),
    ]  # fmt: skip
    return [f"{listed(those)} {what}" for those, what in said if those]


def _many_starts(recording: Recording) -> list[str]:
    """One layer that started afresh so often that its states were hardly meant to."""
    counts = Counter(unnumbered(track.name) for track in recording.values())
    return [
        f"{name} started afresh {count} times in this block, each time as a track of its own; if the "
        "state was meant to go on, give each call the state that the one before returned, and "
        "otherwise record fewer sequences in a block"
        for name, count in counts.items()
        if count > MANY_TRACKS
    ]


def listed(names: list[str]) -> str:
    """The names, or the first few of many."""
    if len(names) <= FEW:
        return ", ".join(names)
    return f"{', '.join(names[:FEW])} and {len(names) - FEW} more"


def _calls(track: Track) -> list[Call]:
    source = track.source
    assert isinstance(source, LoopSource)
    return source.calls


def _reason(track: Track) -> str:
    """What went wrong with one track, or nothing."""
    if isinstance(track.source, JointSource):
        return ""  # the tracks of its layers say it
    if isinstance(track.source, TapSource):
        states = [state for mark in track.source.marks for state in mark.states.values()]
    elif isinstance(track.source, LinearSource):
        states = [s for s in (one.known_states for one in track.source.stretches) if s is not None]
    else:
        states = [call.returned["output"] for call in _calls(track)]
    assert isinstance(track.source, LoopGradients)
    seen = track.source.kept()
    if not any(one.grads for one in seen) or track.source.lost:
        return track.why_no_gradient
    if not _are_finite(states):
        return "its states are not finite (NaN or infinity), so neither are its gradients"
    if not _are_finite([grad for one in seen for grad in one.grads.values()]):
        return (
            "the gradient that reaches it is not finite: the loss was NaN or infinite, or its own "
            "derivative is; look at the loss before the gradient"
        )
    return ""


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no entry of any of them is NaN or infinite, told by their sums where these are finite."""
    if not tensors:
        return True
    if len({tensor.device for tensor in tensors}) == 1:
        sums = torch.stack([tensor.sum().abs().float() for tensor in tensors])
        if bool(sums.isfinite().all()):
            return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
