"""The cells gradflow knows in closed form; the registry is the menu.

A cell is one file with one `CellSpec`: nothing else in gradflow names a cell.
"""

from gradflow.cells.gru import GRU
from gradflow.cells.lstm import LSTM
from gradflow.cells.rnn import RELU, TANH
from gradflow.cells.spec import (
    CELLS,
    CellPaths,
    CellSpec,
    Keeper,
    Named,
    Scan,
    Steps,
    Weights,
    previous,
)

CELLS.update({spec.name: spec for spec in (TANH, RELU, LSTM, GRU)})
IN_LOOP = " in a closed loop"  # what the kind of a cell is called there, whose loop is not its own

__all__ = [
    "CELLS", "IN_LOOP", "CellPaths", "CellSpec", "Keeper", "Named", "Scan", "Steps", "Weights",
]  # fmt: skip
__all__ += ["called", "kinds", "layer_names", "previous"]


def called(cell: str) -> CellSpec | None:
    """The spec of a track's cell, also in a closed loop: what its gates are, not its step."""
    kind = cell.removesuffix(IN_LOOP)
    return CELLS.get(kind) or next((spec for spec in CELLS.values() if spec.kind == kind), None)


def kinds() -> dict[str, CellSpec]:
    """Kind -> its first spec, of torch's own layers."""
    found: dict[str, CellSpec] = {}
    for spec in CELLS.values():
        if spec.layer is not None:
            found.setdefault(spec.kind, spec)
    return found


def layer_names(*, gated: bool = False) -> list[str]:
    """Torch's own layers as people write them: "nn.RNN", ...

    >>> layer_names(), layer_names(gated=True)
    (['nn.RNN', 'nn.LSTM', 'nn.GRU'], ['nn.LSTM', 'nn.GRU'])
    """
    return [f"nn.{kind}" for kind, spec in kinds().items() if spec.keeper or not gated]
