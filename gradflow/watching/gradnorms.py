"""Norms of parameter gradients, of the whole model and of each layer, before and after clipping."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gradflow.distributed import holders, is_shared_out, local_part
from gradflow.hooks.ancestry import clean
from gradflow.recording.track import unnumbered


class GradNorms:
    """‖∂L/∂W‖₂ of a model and of the parameters of its layers, at one moment.

    Of parameters that are shared out among processes (FSDP2) each knows its own part: the norms of these
    are NaN until `together` has put the parts of all in one.

    Args:
        model: whose gradients are read.
        scale: what the loss was multiplied by.
    """

    def __init__(self, model: nn.Module, scale: float) -> None:
        self.scale = scale
        self._norms: dict[str, float] = {}
        self._shared: dict[str, int] = {}  # those shared out -> processes with the same part
        names, norms = [], []
        for name, parameter in nn.Module.named_parameters(model):
            if parameter.grad is not None:
                names.append(clean(name))
                norms.append(_norm(local_part(parameter.grad)))
                if is_shared_out(parameter.grad):
                    self._shared[names[-1]] = holders(parameter.grad)
        if norms:
            found = torch.stack([norm.to(norms[0].device) for norm in norms]) / scale
            self._norms = dict(zip(names, found.tolist(), strict=True))

    @staticmethod
    def together(parts: Sequence[GradNorms]) -> GradNorms:
        """The norms of whole parameters from what each of all processes holds of them.

        Args:
            parts: of all of them; what is not shared out is read from the first.
        """
        found = copy.copy(parts[0])
        found._norms = dict(found._norms)
        for name, same in found._shared.items():
            every = [part._norms.get(name, 0.0) for part in parts]
            found._norms[name] = math.hypot(*every) / math.sqrt(same)
        found._shared = {}
        return found

    def divided(self, scale: float) -> GradNorms:
        """The same of a loss that was multiplied by a scale that was not known.

        Args:
            scale: what it was multiplied by.
        """
        found = copy.copy(self)
        found.scale = self.scale * scale
        found._norms = {name: norm / scale for name, norm in self._norms.items()}
        return found

    @property
    def all(self) -> float:
        """Of all parameters; NaN without a gradient."""
        return self._total(self._norms)

    def of_layer(self, layer: str) -> float:
        """Of the parameters of one layer, by its track's name; NaN where they are not known.

        Args:
            layer: "rnn.l0_reverse" has the parameters "rnn.weight_hh_l0_reverse", …; a cell those
                of its module.
        """
        return self._total(self._names_of(layer))

    def knows(self, layer: str) -> bool:
        """Whether some parameters are those of this layer.

        Args:
            layer: its track's name.
        """
        return bool(self._names_of(layer))

    def _names_of(self, layer: str) -> list[str]:
        whole = unnumbered(layer)
        path, _, last = whole.rpartition(".")
        own = [
            name
            for name in self._norms
            if name.rpartition(".")[0] == path and name.rpartition(".")[2].endswith(f"_{last}")
        ]
        inside = [name for name in self._norms if name.startswith(f"{whole}.")]
        if layer == "cell" and not inside:  # the model is the cell
            inside = [name for name in self._norms if "." not in name]
        return own or inside

    def _total(self, names: Iterable[str]) -> float:
        some = list(names)
        if not some or self._shared.keys() & set(some):
            return math.nan
        return math.hypot(*(self._norms[name] for name in some))


def _norm(grad: Tensor) -> Tensor:
    if grad.is_sparse:
        grad = grad.coalesce().values()
    return torch.linalg.vector_norm(grad.detach(), dtype=torch.float64)
