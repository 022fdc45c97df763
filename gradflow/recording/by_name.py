"""What is asked for by name, as a dict is, and also by the start of a name that fits one only."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByName(Generic[Value]):
    """Layers or tracks by their names, in the order in which they ran."""

    def _named(self) -> Mapping[str, Value]:
        """Name -> value."""
        raise NotImplementedError

    def _matches(self, name: str) -> list[str]:
        """That name, or those that begin so."""
        if name in self._named():
            return [name]
        return [known for known in self._named() if known.startswith(name)]

    def __contains__(self, name: object) -> bool:
        """Whether asking for this name gives one."""
        return isinstance(name, str) and len(self._matches(name)) == 1

    def __iter__(self) -> Iterator[str]:
        """The names, as of a dict."""
        return iter(self._named())

    def __len__(self) -> int:
        return len(self._named())

    def keys(self) -> KeysView[str]:
        """The names, as of a dict.

        Returns:
            A view of them, in the order in which the layers ran.

        >>> import torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> list(run.keys())
        ['l0']
        """
        return self._named().keys()

    def values(self) -> ValuesView[Value]:
        """The layers, or tracks, as of a dict.

        Returns:
            A view of them, in the order in which they ran.

        >>> import torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> [layer.verdict for layer in run.values()]
        ['vanishing']
        """
        return self._named().values()

    def items(self) -> ItemsView[str, Value]:
        """Names and layers, or tracks, as of a dict.

        Returns:
            A view of the pairs, in the order in which they ran.

        >>> import torch, gradflow
        >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
        >>> [(name, layer.verdict) for name, layer in run.items()]
        [('l0', 'vanishing')]
        """
        return self._named().items()

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._named())
