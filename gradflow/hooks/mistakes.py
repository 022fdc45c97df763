"""First mistakes: a sentence instead of an empty plot."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable

import torch
from torch import nn

from gradflow.hooks.source import LayerSource
from gradflow.recording import Recording, Track

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def gradient_marks(model: nn.Module) -> list[tuple[int, int] | None]:
    """What changes when any backward adds to a parameter's ``.grad``."""
    return [
        None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)
        for parameter in model.parameters()
    ]


class Ran:
    """Which of a model's direct children ran; only a message needs it.

    Hooks on modules take torch off its fast paths for attention, and have compiled code compiled
    again; where either could be, nothing is hooked and the message does without.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[str, None] = {}
        delicate = (nn.MultiheadAttention, torch.jit.ScriptModule)
        self._handles = []
        if "torch._dynamo" in sys.modules or any(isinstance(m, delicate) for m in model.modules()):
            return
        for name, child in model.named_children():
            note = functools.partial(_note, self.names, f"{name} ({type(child).__name__})")
            self._handles.append(child.register_forward_pre_hook(note))

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def _note(names: dict[str, None], name: str, *_: object) -> None:
    names[name] = None


def why_no_track(
    model: nn.Module, picked: list[str] | None, called: bool, ran: Iterable[str]
) -> str:
    """Why a recording is empty, and what to do."""
    did = f"; what ran: {', '.join(ran)}" if ran else ""
    if called and picked is not None:
        return (
            f"no recurrent layer fits layers={picked}; leave layers out to record all of them, "
            "names look like 'rnn.l0'"
        )
    recurrent = {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, RECURRENT)
    }
    fused = [
        f"{name} ({type(module).__name__})"
        for name, module in recurrent.items()
        if isinstance(module, nn.RNNBase)
    ]
    if fused:
        return (
            f"no recurrent layer ran: {', '.join(fused)} was not called inside the block{did}; "
            "run the model's forward pass inside `with gradflow.record(model):`"
        )
    if recurrent:
        cells = ", ".join(f"{name} ({type(m).__name__})" for name, m in recurrent.items())
        return (
            f"no recurrent layer ran: {cells} is a single-step cell, and gradflow records nn.RNN, "
            f"nn.LSTM and nn.GRU so far{did}; run the same weights through nn.LSTM, nn.GRU or nn.RNN"
        )
    kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
    return (
        f"no recurrent layer ran: {type(model).__name__} consists of {', '.join(kinds)}, none of them "
        f"nn.RNN, nn.LSTM or nn.GRU{did}; give the model that holds the recurrent layer"
    )


def found(recording: Recording) -> list[str]:
    """The sentences to say when a block ends."""
    if not recording.tracks:
        return [recording._empty_reason]
    sentences = []
    single = [track.name for track in recording if track.steps == 1]
    if single:
        sentences.append(
            f"{', '.join(single)} ran on T = 1 step, so no recurrence is exercised; "
            "give sequences of two steps or more"
        )
    reasons: dict[str, list[str]] = {}
    for track in recording:
        reason = _reason(track)
        if reason:
            reasons.setdefault(reason, []).append(track.name)
    sentences += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return sentences


def _reason(track: Track) -> str:
    """What went wrong with one track, or nothing."""
    source = track.source
    assert isinstance(source, LayerSource)
    call = source.replay.call
    if not call.grads or call.second_order:
        return source.why_no_gradient()
    if not bool(torch.isfinite(call.returned["output"]).all()):
        return (
            "its states are not finite (NaN or infinity), so neither are its gradients; "
            "look for the first such step in recording[...].h"
        )
    if not all(bool(torch.isfinite(grad).all()) for grad in call.grads.values()):
        return (
            "the gradient that reaches it is not finite: the loss was NaN or infinite, or its own "
            "derivative is; look at the loss before the gradient"
        )
    return ""
