"""First mistakes: a sentence instead of an empty plot."""

from __future__ import annotations

import torch
from torch import nn

from gradflow.recording import Recording, Track

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def gradient_marks(model: nn.Module) -> list[tuple[int, int] | None]:
    """What changes when any backward adds to a parameter's ``.grad``."""
    return [
        None if parameter.grad is None else (id(parameter.grad), parameter.grad._version)
        for parameter in model.parameters()
    ]


def why_no_track(model: nn.Module, picked: list[str] | None, called: bool) -> str:
    """Why a recording is empty, and what to do."""
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
            f"no recurrent layer ran: {', '.join(fused)} was not called inside the block; "
            "run the model's forward pass inside `with gradflow.record(model):`"
        )
    if recurrent:
        cells = ", ".join(f"{name} ({type(m).__name__})" for name, m in recurrent.items())
        return (
            f"no recurrent layer ran: {cells} is a single-step cell, and gradflow records nn.RNN, "
            "nn.LSTM and nn.GRU so far; run the same weights through nn.LSTM, nn.GRU or nn.RNN"
        )
    kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
    return (
        f"no recurrent layer ran: {type(model).__name__} consists of {', '.join(kinds)}, none of them "
        "nn.RNN, nn.LSTM or nn.GRU; give the model that holds the recurrent layer"
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
        if not track.backwards or not track.has_gradient:
            reasons.setdefault(track.why_no_gradient, []).append(track.name)
        elif _loss_is_nan(track):
            reasons.setdefault(
                "the gradient that reaches it is not finite, so the loss was NaN or infinite; "
                "look at the loss before the gradient",
                [],
            ).append(track.name)
    sentences += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return sentences


def _loss_is_nan(track: Track) -> bool:
    """Whether what arrives from the loss is not finite although the states are."""
    call = track.source.replay.call  # type: ignore[attr-defined]
    arrived = all(bool(torch.isfinite(grad).all()) for grad in call.grads.values())
    return not arrived and bool(torch.isfinite(call.returned["output"]).all())
