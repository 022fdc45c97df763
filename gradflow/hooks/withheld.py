"""Withheld: what is left out of a recording because gradflow did not get to the end with it."""

from __future__ import annotations


class Withheld:
    """The layers that are left out, why, and what else could not be done, in sentences."""

    def __init__(self) -> None:
        self._why: dict[str, str] = {}  # name of a layer, a cell or a tap -> what failed
        self._remarks: dict[str, None] = {}
        self._stock: set[str] = set()  # paths of layers of torch's own
        self._every_stock = False

    def leave(self, name: str, why: str) -> None:
        """Leave out what has this name; the first reason is the one that is given."""
        self._why.setdefault(str(name), why)

    def leave_stock(self, path: str | None, why: str) -> None:
        """Leave out a layer of torch's own, all of them where it is not known which one failed."""
        self._stock.add(path or "")
        self._every_stock |= path is None
        self.leave(path or ("a recurrent layer" if path is None else "the layer"), why)

    def remark(self, sentence: str) -> None:
        """Note what concerns no single layer."""
        self._remarks[sentence] = None

    def has(self, name: str) -> bool:
        """Whether a cell or a tap of this name is left out."""
        return name in self._why

    def stock(self, path: str) -> bool:
        """Whether a layer of torch's own is left out."""
        return self._every_stock or path in self._stock

    @property
    def layers(self) -> list[str]:
        """What is left out, a sentence each."""
        return [
            f"{name} is left out of the recording: {why}; the model's own step ran as it does without"
            for name, why in self._why.items()
        ]

    @property
    def sentences(self) -> list[str]:
        """All there is to say."""
        return [*self.layers, *self._remarks]
