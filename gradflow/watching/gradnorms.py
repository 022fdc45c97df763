"""Norms of parameter gradients, of the whole model and of each layer, before and after clipping."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gradflow.hooks.ancestry import clean


class GradNorms:
    """‖∂L/∂W‖₂ of a model and of the parameters of its layers, at one moment.

    Args:
        model: whose gradients are read.
        scale: what the loss was multiplied by.
    """

    def __init__(self, model: nn.Module, scale: float) -> None:
        self.scale = scale
        self._norms: dict[str, float] = {}
        names, norms = [], []
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                names.append(clean(name))
                norms.append(_norm(parameter.grad))
        if norms:
            found = torch.stack([norm.to(norms[0].device) for norm in norms]) / scale
            self._norms = dict(zip(names, found.tolist(), strict=True))

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
        return _total(self._norms.values())

    def of_layer(self, layer: str) -> float:
        """Of the parameters of one layer, by its track's name; NaN where they are not known.

        Args:
            layer: "rnn.l0_reverse" has the parameters "rnn.weight_hh_l0_reverse", …; a cell those
                of its module.
        """
        path, _, last = layer.partition("@")[0].rpartition(".")
        own = [
            norm
            for name, norm in self._norms.items()
            if name.rpartition(".")[0] == path and name.rpartition(".")[2].endswith(f"_{last}")
        ]
        whole = layer.partition("@")[0]
        inside = [norm for name, norm in self._norms.items() if name.startswith(f"{whole}.")]
        if layer == "cell":
            inside = [norm for name, norm in self._norms.items() if "." not in name]
        return _total(own or inside)


def _norm(grad: Tensor) -> Tensor:
    if grad.is_sparse:
        grad = grad.coalesce().values()
    return torch.linalg.vector_norm(grad.detach(), dtype=torch.float64)


def _total(norms: Iterable[float]) -> float:
    some = list(norms)
    return math.hypot(*some) if some else math.nan
