"""What the hooks support and what they refuse, as data; the README's table is made from it.

    python tests/support.py        # writes the table into README.md, between its two markers

Every row runs: a supported one gives a recording, whose tracks must have exact-parity gradients; a
refused one gives the text that was raised, warned or noted, in which its words must stand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow.cells import CELLS
from gradflow.errors import GradflowWarning, RecordingError
from gradflow.hooks import tape
from gradflow.recording import Recording

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- made by: python tests/support.py -->", "<!-- made until here -->"
MODULES = {"LSTM": "nn.LSTM", "GRU": "nn.GRU", "RNN_TANH": "nn.RNN", "RNN_RELU": "nn.RNN"}


@dataclass(frozen=True)
class Supported:
    """Something that is recorded and analyzed."""

    what: str
    how: str
    run: Callable[[], Recording]


@dataclass(frozen=True)
class Refused:
    """Something that is not, and the words that say so; `given` is what is to be had all the same."""

    what: str
    given: str
    words: str
    run: Callable[[], str]


def data(steps: int = 5, batch: int = 2) -> Tensor:
    """x, (T, B, 3)."""
    return torch.randn(steps, batch, 3)


def recorded(model: nn.Module, run: Callable[[], Tensor], **options: Any) -> Recording:
    """What is seen while the model runs; the loss is the sum of what it gives."""
    with gradflow.record(model, **options) as recording:
        run().sum().backward()
    return recording


def loop(cell: nn.Module, x: Tensor, between: Callable[..., Tensor] = lambda h: h) -> Tensor:
    """The last h of a loop over a cell."""
    state = None
    for x_t in x:
        if isinstance(state, tuple):
            state = tuple(between(part) for part in state)
        elif state is not None:
            state = between(state)
        state = cell(x_t, state)
    return state[0] if isinstance(state, tuple) else state


# ------------------------------------------------------------------------------------- supported


def every_layer() -> Recording:
    kinds = [nn.LSTM(3, 4), nn.GRU(3, 4), nn.RNN(3, 4), nn.RNN(3, 4, nonlinearity="relu")]
    model = nn.ModuleList(kinds)
    return recorded(model, lambda: sum(layer(data())[0].sum() for layer in model))


def every_shape() -> Recording:
    model = nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True, proj_size=2, bias=False)
    packed = pack_padded_sequence(data(4, 5), [2, 4, 3, 1], True, enforce_sorted=False)
    return recorded(model, lambda: model(packed)[0].data)


def every_call() -> Recording:
    model = nn.ModuleDict({"drop": nn.GRU(3, 4), "norm": nn.RNN(3, 4)})
    parametrizations.weight_norm(model["norm"], "weight_hh_l0")
    h, settings = torch.zeros(1, 2, 4), (True, 1, 0.0, True, False, False)

    def run() -> Tensor:
        weights = [F.dropout(weight, 0.2) for weight in model["drop"].parameters()]
        return torch.gru(data(), h, weights, *settings)[0] + model["norm"].forward(data())[0]

    return recorded(model, run)


def closed(cell: nn.Module, *, remembering: bool = False) -> Tensor:
    """The last h of a decoder on its own output, or on the mean of all of them."""
    outputs = [torch.ones(2, 4)]
    h = torch.zeros(2, 4)
    for _ in range(6):
        h = cell(torch.stack(outputs).mean(0) if remembering else outputs[-1], h)
        outputs.append(torch.tanh(h))
    return h


def every_loop() -> Recording:
    cells = {"cell": nn.LSTMCell(3, 4), "stepwise": nn.GRU(3, 4), "decoder": nn.GRUCell(4, 4)}
    model = nn.ModuleDict(cells)

    def run() -> Tensor:
        state = None
        for x_t in data():
            _, state = model["stepwise"](x_t[None], state)
        masked = loop(model["cell"], data(), lambda h: h * torch.tensor([[1.0], [0.0]]))
        return masked.sum() + state.sum() + closed(model["decoder"]).sum()

    return recorded(model, run)


class Leaky(nn.Module):
    """A cell of one's own."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.mix = nn.Linear(3 + width, width)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.9 * h + 0.1 * torch.tanh(self.mix(torch.cat([x, h], 1)))


def own_cell() -> Recording:
    cell = Leaky()

    def run() -> Tensor:
        h = torch.zeros(2, 4)
        for x_t in data():
            h = cell(x_t, h)
        return h

    return recorded(cell, run)


def truncated() -> Recording:
    cell, optimizer_steps = nn.GRUCell(3, 4), 0
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    with gradflow.record(cell) as recording:
        h = torch.zeros(2, 4)
        for x_t in data(6):
            h = cell(x_t, h)
            if optimizer_steps == 3:
                h.sum().backward()
                optimizer.step()
                h, optimizer_steps = h.detach(), 0
            optimizer_steps += 1
        h.sum().backward()
    return recording


def by_hand() -> Recording:
    inner, outer = nn.Linear(3, 4), nn.Linear(4, 4)
    model = nn.ModuleList([inner, outer])

    def run() -> Tensor:
        h = torch.zeros(2, 4)
        for x_t in data():
            h = torch.tanh(inner(x_t) + outer(h))
        return h

    return recorded(model, run)


def trained() -> Recording:
    model, x = nn.LSTM(3, 4, 2, dropout=0.3), data().requires_grad_()

    def run() -> Tensor:
        other = checkpoint(lambda v: model(v)[0], x, use_reentrant=False)
        return model(x)[0].sum() + other.sum()

    return recorded(model, run)


def half() -> Recording:
    model, scaler = nn.GRU(3, 4), torch.amp.GradScaler("cpu")
    with gradflow.record(model, scaler=scaler) as recording:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(data())[0]
        scaler.scale(output.float().sum()).backward()
    return recording


def padded() -> Recording:
    model = nn.GRU(3, 4)
    return recorded(model, lambda: model(data())[0][0], lengths=[5, 3])


def parallel_scan() -> Recording:
    """h_t = z_t h_{t−1} + (1 − z_t) n_t of all steps at once, through sums of logarithms."""
    model = nn.Linear(3, 8)

    def run() -> Tensor:
        z, n = model(data().transpose(0, 1)).chunk(2, dim=-1)
        z = z.sigmoid()
        kept = z.log().cumsum(1).exp()
        h = kept * ((1 - z) * n / kept).cumsum(1)
        return gradflow.scan(h, decay=z)[:, -1]

    return recorded(model, run)


SUPPORTED = [
    Supported(
        "layers",
        ", ".join(f"`{name}`" for name in dict.fromkeys(MODULES[cell] for cell in sorted(CELLS)))
        + " (tanh, relu)",
        every_layer,
    ),
    Supported(
        "shapes",
        "any number of layers, bidirectional, `batch_first`, unbatched, packed (sorted or not), "
        "`proj_size`, no bias, given initial states",
        every_shape,
    ),
    Supported(
        "calls",
        "of a module, of its `forward`, of `torch.lstm` and its like; several of one layer (`@2`), which "
        "`analyze` pools (`pool=False` keeps them apart); weights that are dropped, pruned, normed, "
        "parametrized or made by another layer",
        every_call,
    ),
    Supported(
        "loops",
        "over `nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`, and over layers that carry their state on, "
        "each as one track; detached, masked, dropped out or zoned out between two steps; closed by "
        "their own inputs (own output fed back, attention, cells that feed each other, graphs, whole "
        "chunks), also where the batch shrinks or is reordered",
        every_loop,
    ),
    Supported(
        "cells of your own",
        "found by the state that they return and take again (peephole, coupled gates, layer norm, any "
        "signature)",
        own_cell,
    ),
    Supported(
        "loops by hand",
        "where their states can be told from the graph; all that mark them with `gradflow.tap`",
        by_hand,
    ),
    Supported(
        "linear recurrences",
        "unmodified in transformers 5 (Mamba, Falcon-Mamba, Jamba, Mamba-2, Bamba, Falcon-H1, "
        "Granite-hybrid, Nemotron-H, Zamba2, RecurrentGemma, RWKV-4, Qwen3-Next, Qwen3.5, OLMo-hybrid, "
        "Kimi Linear, xLSTM), minGRU-pytorch, mambapy, xlstm; kernels of mamba_ssm and fla by their "
        "signatures; of your own with `gradflow.scan`: real or complex decays, one per head, delta rules",
        parallel_scan,
    ),
    Supported(
        "truncation",
        "carried and detached states, one track with cuts, with updates between",
        truncated,
    ),
    Supported(
        "training",
        "dropout between layers, several backwards, both kinds of checkpoint, an optimizer step inside, "
        "`torch.compile` (layers), DistributedDataParallel and FSDP2 (each rank's own gradients, or "
        "`gather=True`)",
        trained,
    ),
    Supported(
        "precision",
        "float64, float32, bfloat16 and float16 weights, autocast, `GradScaler` (`scaler=`)",
        half,
    ),
    Supported("padding", "packed sequences, or `lengths=`", padded),
]


# --------------------------------------------------------------------------------------- refused


def said(run: Callable[[], object]) -> str:
    """What was warned of, or raised, in words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # torch's own, of its imports
        warnings.simplefilter("always", GradflowWarning)
        try:
            run()
        except RecordingError as error:
            return str(error)
    return " ".join(str(warning.message) for warning in caught)


def double_backward() -> str:
    model, x = nn.LSTM(3, 4), data().requires_grad_()

    def run() -> None:
        with gradflow.record(model):
            (slope,) = torch.autograd.grad(model(x)[0].sum(), x, create_graph=True)
            slope.pow(2).sum().backward()

    return said(run)


class Decoder(nn.Module):
    """A loop over a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return loop(self.cell, x)


def compiled_cells() -> str:
    model, x = nn.ModuleDict({"rnn": nn.GRU(3, 4), "decoder": Decoder()}), data(2)

    def run() -> None:
        model["decoder"].compile(backend="aot_eager")
        recorded(model, lambda: model["rnn"](x)[0] + model["decoder"](x))
        torch._dynamo.reset()

    return said(run)


def nobodys_weights() -> str:
    model = nn.ModuleDict({"head": nn.Linear(4, 1)})
    hidden = nn.GRU(3, 4)
    return said(lambda: recorded(model, lambda: model["head"](hidden(data())[0])))


def no_gradient() -> str:
    model = nn.GRU(3, 4)

    def run() -> None:
        with gradflow.record(model), torch.no_grad():
            model(data())

    return said(run)


def mixed_sequences() -> str:
    cell = nn.GRUCell(3, 4)
    track = recorded(cell, lambda: loop(cell, data(), lambda h: h + h.flip(0)))["cell"]
    return said(track.operator)


def wide_mixture() -> str:
    cell, turn = nn.GRUCell(3, 65), torch.randn(65, 65) / 8
    track = recorded(cell, lambda: loop(cell, data(), lambda h: h @ turn))["cell"]
    return said(track.operator)


def other_dropout() -> str:
    model = nn.GRU(3, 4, 2, dropout=0.5)
    recording = recorded(model, lambda: model(data())[0])
    (call,) = recording["l0"].source.calls  # type: ignore[attr-defined]
    torch.rand(1)
    call.rng = torch.get_rng_state()  # as where the kernel's own generator drew the mask
    return said(lambda: recording["l0"].h)


def wide_cell() -> str:
    cell = Leaky(65)

    def run() -> Tensor:
        h = torch.zeros(2, 65)
        for x_t in data():
            h = cell(x_t, h)
        return h

    with mock.patch.object(tape, "MOST_KEPT", 1000):
        return said(recorded(cell, run)["cell"].operator)


def own_outputs() -> str:
    cell = nn.GRUCell(4, 4)
    return said(recorded(cell, lambda: closed(cell, remembering=True))["cell"].operator)


def closed_in_a_checkpoint() -> str:
    cell, x = nn.GRUCell(4, 4), torch.ones(2, 4, requires_grad=True)
    run = recorded(cell, lambda: checkpoint(loop_on_itself, cell, x, use_reentrant=True))
    return said(run["cell"].operator)


def loop_on_itself(cell: nn.Module, x: Tensor) -> Tensor:
    h = torch.zeros(2, 4)
    for _ in range(6):
        x = h = cell(x, h)
    return h


def closed_packed() -> str:
    rnn, state, x = nn.GRU(3, 3), None, data(4, 2)

    def run() -> Tensor:
        nonlocal state, x
        for _ in range(4):
            _, state = rnn(pack_padded_sequence(x, [4, 3]), state)
            x = data(4, 2) + state
        return state

    return said(recorded(rnn, run)["l0"].operator)


def chunks_of_many_lengths() -> str:
    rnn, state, x = nn.GRU(3, 3), None, data(2)

    def run() -> Tensor:
        nonlocal state, x
        for _ in range(4):
            x, state = rnn(torch.cat([x, x[:1]]), state)
        return state

    return said(recorded(rnn, run)["l0"].operator)


def batch_normed() -> str:
    norm = nn.BatchNorm1d(4)

    def run() -> Tensor:
        h = torch.randn(3, 4)
        for _ in range(3):
            h = gradflow.tap(h=torch.tanh(norm(h)))
        return h

    return said(recorded(norm, run)["loop"].operator)


def growing_memory() -> str:
    model = nn.Linear(4, 4)

    def run() -> Tensor:
        h, memory = torch.ones(2, 4), []
        for _ in range(5):
            memory.append(model(h))
            h = torch.stack(memory).mean(0)
        return h

    return said(lambda: recorded(model, run))


REFUSED = [
    Refused(
        "a penalty on gradients",
        "states, gains",
        "a backward with create_graph=True came through it, and what it brings is not a total",
        double_backward,
    ),
    Refused(
        "a loop over cells that torch.compile made a graph of",
        "the layers beside it",
        "cell loops inside a compiled graph are not seen",
        compiled_cells,
    ),
    Refused(
        "weights that are not the model's, and not computed from its parameters under autograd",
        "nothing",
        "ran with weights that are neither its parameters nor computed from them",
        nobodys_weights,
    ),
    Refused(
        "a loop by hand without a tap that carries a growing memory, or whose states cannot be told",
        "its weights, steps and line",
        "it was not taken up by itself",
        growing_memory,
    ),
    Refused(
        "a model that runs without gradient",
        "states, gains",
        "it ran inside torch.no_grad() or torch.inference_mode()",
        no_gradient,
    ),
    Refused(
        "sequences or layers mixed between two calls (a beam search)",
        "totals",
        "sequences or layers are mixed between two of its calls",
        mixed_sequences,
    ),
    Refused(
        "attention over all earlier outputs of a layer itself, a memory that grows",
        "states, totals, the layer alone",
        "more goes around it than its states",
        own_outputs,
    ),
    Refused(
        "a loop closed by its inputs inside a checkpoint",
        "states, totals",
        "record one step without the checkpoint",
        closed_in_a_checkpoint,
    ),
    Refused(
        "the same over packed calls",
        "states, totals, the layer alone",
        "lengths of their own within a call, and the states between calls are read of calls in which all",
        closed_packed,
    ),
    Refused(
        "the same over calls of many lengths, all of whose outputs go on",
        "states, totals, the layer alone",
        "give chunks of one length",
        chunks_of_many_lengths,
    ),
    Refused(
        "more than 64 states mixed between two calls",
        "totals",
        "the states are mixed between two of its calls, and at more than 64 of them that is not written",
        wide_mixture,
    ),
    Refused(
        "inner layers of a stack with dropout where its mask cannot be drawn again (cuDNN)",
        "the top layer",
        "on this backend the dropout between layers is not reproducible",
        other_dropout,
    ),
    Refused(
        "a cell of your own or a tapped loop of more than 64 states whose steps read too much to keep",
        "states, totals",
        "record fewer sequences or fewer steps",
        wide_cell,
    ),
    Refused(
        "the same whose step mixes sequences (batch normalisation)",
        "states, totals",
        "batch normalisation in training, which mixes the sequences of a batch",
        batch_normed,
    ),
]


# ------------------------------------------------------------------------------------- the table


def table() -> str:
    """The README's section, between its markers."""
    lines = [START, "", "| recorded and analyzed | |", "|---|---|"]
    lines += [f"| {row.what} | {row.how} |" for row in SUPPORTED]
    lines += ["", "| refused | what is given | in these words |", "|---|---|---|"]
    lines += [f"| {row.what} | {row.given} | “{row.words}” |" for row in REFUSED]
    return "\n".join([*lines, "", END])


def written(text: str) -> str:
    """The README's text with the table as it should be.

    Raises:
        ValueError: the markers are not there.
    """
    start, end = text.index(START), text.index(END) + len(END)
    return text[:start] + table() + text[end:]


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
