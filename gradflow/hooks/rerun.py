"""Rerun: the recorded calls once more, forward only, with changed weights.

A fused stack runs as a whole, so its upper layers read what the changed lower ones return, under the
same dropout. A loop goes from call to call through its recorded links. What comes from outside the
recurrent calls (inputs, first states, factors between two calls) is taken as it was recorded, and no
loss is run: what comes back has states, gates and step Jacobians, but no gradients.

Letters: B sequences, S the width of one layer's full state (h, c), G gates, H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradflow.cells import CELLS, CellSpec, Keeper
from gradflow.errors import RecordingError
from gradflow.hooks.call import Call
from gradflow.hooks.loops.linked import pushed
from gradflow.hooks.loops.links import Factor, Link, close_to
from gradflow.hooks.loops.loop import Loop
from gradflow.hooks.loops.loop_source import LoopSource
from gradflow.hooks.loops.rows import picked
from gradflow.hooks.loops.stitch import Chain
from gradflow.hooks.replay import whole_call
from gradflow.limits import SEED
from gradflow.recording.source import Parity
from gradflow.recording.track import Track
from gradflow.recording.tracks import Recording

UNCHANGED = "the weights were changed and the loss was not run again"


@dataclass(frozen=True)
class WeightChange:
    """What to change in one layer and direction."""

    forget_bias: float = 0.0  # added to the pre-activation of the gate that keeps the state
    chrono: float = 0.0  # T: these gates' biases become ln u, u spread evenly over 1 … T − 1
    orthogonal: float = 0.0  # W_hh starts orthogonal times this, gate by gate; 0: as it is
    scale_hh: float = 1.0  # what W_hh is multiplied by
    scale_ih: float = 1.0  # what W_ih is multiplied by: as if it read so much of its input

    @property
    def of_biases(self) -> bool:
        """Whether it is the keeping gate's biases that change."""
        return bool(self.forget_bias or self.chrono)


@dataclass(frozen=True)
class Rerun:
    """The changed layers as a recording, and a sentence on each layer that is not as it would be."""

    recording: Recording
    refused: Mapping[str, str]  # track name -> why it could not be run again
    notes: Mapping[str, str]  # track name -> what was taken as recorded; "" for nothing


class ChangedSource(LoopSource):
    """A layer of a rerun: everything but gradients."""

    def parity(self) -> Parity:
        """There is no gradient to hold against anything."""
        return Parity("not applicable", None, UNCHANGED)

    def why_no_gradient(self) -> str:
        """Why there is none here."""
        return UNCHANGED


def rerun(recording: Recording, changes: Mapping[str, WeightChange]) -> Rerun:
    """Run the recorded calls again with changed weights; the recording stays as it is.

    changes: track name -> what to change there; layers that are not named keep their weights. Gives the
    named tracks with new states, gates, weights and step Jacobians, and why some could not be run again.
    """
    known: dict[int, Chain | str] = {}  # by id of the recorded chain: run again, or why not
    made = Recording(recording.model_name)
    made.notes = list(recording.notes)
    made.provenance = dict(recording.provenance)
    refused, notes = {}, {}
    several = len({id(_chain(track)) for track in recording.values()}) > 1
    for track in recording.values():
        if track.name not in changes:
            continue
        reason = _cannot(track, changes[track.name])
        chain = _chain(track)
        if chain is not None and not reason:
            if id(chain) not in known:
                own = {
                    (source.layer, source.direction): changes[other.name]
                    for other in recording.values()
                    if other.name in changes
                    and isinstance(source := other.source, LoopSource)
                    and source.loop.chain is chain
                }
                known[id(chain)] = _again(chain, own)
            again = known[id(chain)]
            if isinstance(again, Chain):
                made.add(_track(track, again))
                notes[track.name] = _as_recorded(chain, several)
                continue
            reason = again
        refused[track.name] = reason
    return Rerun(made, refused, notes)


def changed(source: LoopSource, change: WeightChange) -> tuple[ChangedSource, dict[str, Tensor]]:
    """One layer run again with changed weights, the others of its stack with theirs, and the weights.

    Raises:
        RecordingError: it cannot be run again, in words.
    """
    reason = _refuses(source, change)
    if reason:
        raise RecordingError(reason)
    again = _again(source.loop.chain, {(source.layer, source.direction): change})
    if isinstance(again, str):
        raise RecordingError(again)
    return _of_chain(source, again)


def _of_chain(source: LoopSource, chain: Chain) -> tuple[ChangedSource, dict[str, Tensor]]:
    loop = Loop(chain)
    weights = loop.groups[0].replay.weights(source.layer, source.direction).named()
    return ChangedSource(loop, source.layer, source.direction, source.uses), weights


def _chain(track: Track) -> Chain | None:
    return track.source.loop.chain if isinstance(track.source, LoopSource) else None


def _cannot(track: Track, change: WeightChange) -> str:
    """Why this track cannot be run again with this change, or nothing."""
    if not isinstance(track.source, LoopSource):
        return "its steps are the user's own code, which is not run again"
    return _refuses(track.source, change)


def _refuses(source: LoopSource, change: WeightChange) -> str:
    if source.closed is not None:
        return (
            "it is part of a closed loop: its inputs would change with it, and are the user's own"
        )
    spec = CELLS[source.calls[0].cell]
    if change.of_biases and spec.keeper is None:
        return f"a {'vanilla ' if spec.vanilla else ''}{spec.kind} has no gate that keeps its state"
    if (change.scale_hh != 1.0 or change.orthogonal) and "weight_hh" not in spec.weights:
        return f"a {spec.kind} has no recurrent weights"
    return ""


def _as_recorded(chain: Chain, several: bool) -> str:
    if len(chain.calls) > 1:
        return "every call of the loop reads its input as it was recorded"
    return "what other modules feed it is taken as it was recorded" if several else ""


def _track(track: Track, chain: Chain) -> Track:
    assert isinstance(track.source, LoopSource)
    source, weights = _of_chain(track.source, chain)
    return replace(
        track,
        lengths=track.lengths.clone(),
        mask=track.mask.clone(),
        cuts=track.cuts.clone(),
        weights=weights,
        source=source,
        notes=list(track.notes),
        _cache={},
    )


# ------------------------------------------------------------------------------------ the calls


def _again(chain: Chain, changes: Mapping[tuple[int, int], WeightChange]) -> Chain | str:
    """The chain with changed weights by (layer, direction), or why it cannot be run again."""
    if chain.rests:
        return "sequences rest for some of its calls, and that is not run again with other weights"
    weights = _ChangedWeights(changes)
    calls: list[Call] = []
    try:
        for place, call in enumerate(chain.calls):
            if call.rng is not None and call.data.device.type != "cpu":
                raise RecordingError("its dropout cannot be drawn again on this device")
            changed = replace(
                call,
                weights=weights.of(call),
                weight_keys=(),
                has_biases=call.has_biases or weights.with_biases,
            )
            if place:
                link = chain.links[place]
                assert link is not None
                state = _started(link, chain.calls[place - 1], call, calls[-1])
                changed = replace(changed, initial=state)
            calls.append(_run(changed))
        again = Chain(calls, list(chain.links), lengths=chain.lengths)
        for group in again.groups():
            _ = group.replay.layers  # a stack that cannot be replayed says so here
    except RecordingError as error:
        return str(error)
    return again


def _run(call: Call) -> Call:
    """The call with what it returns now, and no gradients."""
    results = list(whole_call(call))
    if call.single:  # its h stands as output and as the last h
        results[1] = results[0]
    return replace(
        call,
        returned=dict(zip(call.returned, results, strict=True)),
        grads={},
        graph_tasks=set(),
        lost="",
        within=None,
        entering={},
    )


class _ChangedWeights:
    """Changed weights of calls; weights that shared a copy go on sharing one."""

    def __init__(self, changes: Mapping[tuple[int, int], WeightChange]) -> None:
        self.changes = changes
        self.with_biases = any(change.of_biases for change in changes.values())
        self._known: dict[tuple[int, ...], list[Tensor]] = {}

    def of(self, call: Call) -> tuple[Tensor, ...]:
        """All weights of a call, in its own order; biases are added where one is to be raised."""
        directions = 1 + call.bidirectional
        count = len(call.weights) // (call.layers * directions)
        found: list[Tensor] = []
        for place in range(call.layers * directions):
            weights = call.weights[place * count : (place + 1) * count]
            key = (place, *map(id, weights))
            if key not in self._known:
                change = self.changes.get(divmod(place, directions), WeightChange())
                self._known[key] = self._changed(call, list(weights), change)
            found += self._known[key]
        return tuple(found)

    def _changed(self, call: Call, weights: list[Tensor], change: WeightChange) -> list[Tensor]:
        spec = CELLS[call.cell]
        names = spec.weight_names(len(weights), has_biases=call.has_biases)
        named = dict(zip(names, weights, strict=True))
        if self.with_biases and not call.has_biases:
            nothing = named["weight_ih"].new_zeros(len(named["weight_ih"]))
            named |= {name: nothing for name in spec.weights if name.startswith("bias")}
        if change.of_biases and spec.keeper is not None:
            named |= _with_biases(named, spec, spec.keeper, change)
        if change.scale_ih != 1.0:
            named["weight_ih"] = named["weight_ih"] * change.scale_ih
        if "weight_hh" in named:
            if change.orthogonal:
                named["weight_hh"] = _orthogonal(named["weight_hh"], spec.blocks, change.orthogonal)
            named["weight_hh"] = named["weight_hh"] * change.scale_hh
        return [named[name] for name in spec.weights if name in named]


def _orthogonal(weight: Tensor, blocks: int, gain: float) -> Tensor:
    """Recurrent weights that neither shrink nor stretch, but by the gain: the same ones every time."""
    generator = torch.Generator().manual_seed(SEED)
    parts = [torch.empty(part.shape, dtype=torch.float64) for part in weight.chunk(blocks)]
    for part in parts:
        torch.nn.init.orthogonal_(part, gain, generator)
    return torch.cat(parts).to(weight)


def _with_biases(
    named: Mapping[str, Tensor], spec: CellSpec, keeper: Keeper, change: WeightChange
) -> dict[str, Tensor]:
    """The biases of a layer with those of its keeping gate changed, with chrono also of its opposite."""
    hidden = len(named["weight_ih"]) // spec.blocks
    kept, biases = spec.block(keeper.gate, hidden), named["bias_ih"].clone()
    biases[kept] += change.forget_bias
    if not change.chrono:
        return {"bias_ih": biases}
    longest = max(change.chrono - 1, 2.0)
    biases[kept] = torch.linspace(1.0, longest, hidden, dtype=torch.float64).log().to(biases)
    found = {"bias_ih": biases}
    if keeper.opposite:
        biases[spec.block(keeper.opposite, hidden)] = -biases[kept]
    if "bias_hh" in named:
        found["bias_hh"] = named["bias_hh"].clone()
        found["bias_hh"][: kept.stop] = 0.0
    return found


# ------------------------------------------------------------------------------- between two calls


def _started(link: Link, earlier: Call, call: Call, before: Call) -> dict[str, Tensor]:
    """The initial states of a call, from what the changed call before it returned.

    earlier and call are the recorded ones, before is the changed call before this one. What multiplied
    the state is taken as recorded; a state that was made from the one before in any other way cannot
    be foretold.
    """
    if link.unknown:
        raise RecordingError(link.unknown)
    entered = _in_users_order(call, call.started())
    was, now = _through(link, earlier), _through(link, before)
    start = torch.where(link.cut.view(-1, 1), _past_a_cut(link, earlier, before, entered), now)
    size = _through(link, earlier, absolute=True).abs()
    held = link.cut
    if link.rows is not None:  # sequences that begin here begin as they did
        start = torch.where((link.rows < 0).view(-1, 1), entered, start)
        held = held | (link.rows < 0)
    if not close_to(entered[:, ~held], was[:, ~held], size[:, ~held]):
        raise RecordingError(
            "between two of its calls the state is not only multiplied: what that would make of a "
            "changed state is not known"
        )
    if call.unsorted is not None:
        start = start.index_select(1, call.unsorted.to(start.device).argsort())
    parts = {name: start[..., block].contiguous() for name, block in call.columns().items()}
    return {name: part.to(call.h0.dtype) for name, part in parts.items()}


def _past_a_cut(link: Link, earlier: Call, before: Call, entered: Tensor) -> Tensor:
    """States without a gradient: carried where they were what was returned, else as recorded."""
    returned = picked(_returned(earlier, link), link.rows, 1)
    carried = (entered == returned).transpose(0, 1).flatten(1).all(1)
    reset = (entered == 0).transpose(0, 1).flatten(1).all(1)
    if link.into is None and not bool((carried | reset)[link.cut].all()):
        raise RecordingError("the state is changed in place between two of its calls")
    if link.into is not None:
        carried = carried & ~reset  # multiplied by zero
    return torch.where(carried.view(-1, 1), picked(_returned(before, link), link.rows, 1), entered)


def _through(link: Link, call: Call, *, absolute: bool = False) -> Tensor:
    """What the link makes of the state a call returned, and of the one that entered it."""
    result = _times(link.into, picked(_returned(call, link), link.rows, 1), absolute)
    if link.around is not None:
        entered = _in_users_order(call, call.started())
        result = result + _times(link.around, picked(entered, link.rows, 1), absolute)
    return result


def _times(factor: Factor, state: Tensor, absolute: bool) -> Tensor:
    if absolute:
        factor, state = None if factor is None else factor.abs(), state.abs()
    if factor is None:
        return state
    factor = factor.to(state.dtype)
    layers = [pushed(part, rows.unsqueeze(1)) for part, rows in zip(factor, state, strict=True)]
    return torch.stack(layers).squeeze(2)


def _returned(call: Call, link: Link) -> Tensor:
    """What the call returned last, or at the steps of a padded call from which its sequences go on."""
    states = _in_users_order(call, call.ended())
    if link.ends is None:
        return states
    output = call.returned["output"]
    output = output.transpose(0, 1) if call.batch_first else output
    h = output[link.ends.clamp(min=0), torch.arange(output.shape[1], device=output.device)]
    on = (link.ends >= 0).unsqueeze(1)
    states[-1, :, call.columns()["h"]] = torch.where(on, h, states[-1, :, call.columns()["h"]])
    return states


def _in_users_order(call: Call, state: Tensor) -> Tensor:
    """(layers, B, S) from the kernel's order of sequences."""
    return state if call.unsorted is None else state[:, call.unsorted.to(state.device)]
