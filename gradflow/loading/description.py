"""``gradflow inspect``: say in plain lines what a model file is and what to type next."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gradflow.errors import printable
from gradflow.limits import LISTED_MODULES
from gradflow.loading.opened import Opened, no_recurrence, open_any
from gradflow.loading.recurrent import RecurrentModule
from gradflow.loading.words import analyze_command, some
from gradflow.process import many_objects


@dataclass(frozen=True)
class Description:
    """What a model file holds."""

    path: Path
    kind: str
    title: str
    recurrent: tuple[RecurrentModule, ...]
    others: dict[str, int] = field(default_factory=dict)  # module path -> numbers in it
    ambiguous: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""  # why it cannot be analyzed as it is, or ""
    next_command: str = ""
    broken: tuple[str, ...] = ()  # weights that hold NaN or infinite numbers
    members: tuple[str, ...] = ()  # of a file of several: names, kinds, which are read

    def lines(self) -> list[str]:
        """Plain text, one line each; control characters in names are escaped."""
        return [printable(line) for line in self._lines()]

    def _lines(self) -> list[str]:
        text = [f"{self.path} is {self.kind}."]
        if self.members:
            text += [f"members ({len(self.members)}):", *self.members[:LISTED_MODULES]]
        if self.recurrent:
            text.append(f"recurrent ({len(self.recurrent)}):")
            text += [
                f"  {layer.name or '(the module itself)'}  {layer}  {layer.parameters:,} parameters, "
                f"{str(layer.dtype).removeprefix('torch.')}"
                for layer in self.recurrent
            ]
        if self.others:
            text.append(f"other modules ({len(self.others)}):")
            shown = list(self.others.items())[:LISTED_MODULES]
            text += [f"  {name or '(top)'}  {count:,} parameters" for name, count in shown]
            if len(self.others) > len(shown):
                text.append(f"  and {len(self.others) - len(shown)} more")
        for title, sentences in (
            ("broken:", self.broken),
            ("not in the file:", self.ambiguous),
            ("notes:", self.notes),
        ):
            if sentences:
                text += [title, *(f"  {sentence}" for sentence in sentences)]
        if self.problem:
            text.append(self.problem)
        return [*text, f"next: {self.next_command}"]


def describe(
    path: str | os.PathLike[str],
    spec: str | None = None,
    trust: bool = False,
    member: str | None = None,
) -> Description:
    """Describe a model file: kind, recurrent layers, other modules, what is open, what to type.

    Raises FileError for a file that holds no weights or module, like `open_model`.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(torch.nn.GRU(3, 5).state_dict(), f"{folder}/weights.pt")
    ...     print(describe(f"{folder}/weights.pt").lines()[2])
      (the module itself)  GRU(3 → 5)  150 parameters, float32
    """
    with many_objects():
        return _described(open_any(path, spec, trust, member))


def _described(opened: Opened) -> Description:
    missing = not opened.recurrent and opened.model is None
    return Description(
        path=opened.path,
        kind=opened.kind,
        title=opened.title,
        recurrent=opened.recurrent,
        others=_others(opened.shapes, opened.recurrent),
        ambiguous=_ambiguous(opened.recurrent),
        notes=(*opened.said, *opened.notes),
        problem=no_recurrence(opened) if missing else "",
        next_command=_next(opened),
        # Modules may share one table of embeddings: what is wrong with it is said once.
        broken=tuple(dict.fromkeys(s for layer in opened.recurrent for s in layer.broken)),
        members=_members(opened),
    )


def _ambiguous(layers: tuple[RecurrentModule, ...]) -> tuple[str, ...]:
    """What the weights do not say, once, with the layers of which it is said."""
    said: dict[str, list[str]] = {}
    for layer in layers:
        for sentence in (*layer.doubts, *layer.ambiguous):
            said.setdefault(sentence, []).append(layer.name)
    if len(layers) == 1:
        return tuple(said)
    return tuple(f"{some(names)}: {sentence}" for sentence, names in said.items())


def _members(opened: Opened) -> tuple[str, ...]:
    if len(opened.members) + len(opened.others) < 2:
        return ()
    read = [f"  {part}, read" for part in opened.members]
    return (*read, *(f"  {part}" for part in opened.others))


def _others(
    shapes: Mapping[str, tuple[int, ...]], recurrent: tuple[RecurrentModule, ...]
) -> dict[str, int]:
    parts = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")
    names = {layer.name for layer in recurrent}
    counts: dict[str, int] = {}
    for key, shape in shapes.items():
        owner, _, last = key.rpartition(".")
        split = "parametrizations." in key and any(part in key for part in parts)
        if names and (last.startswith(parts) or split):
            continue
        counts[owner] = counts.get(owner, 0) + math.prod(shape)
    return counts


def _next(opened: Opened) -> str:
    options = _picked(opened)
    if opened.spec is not None:
        options += ["--model", shlex.quote(opened.spec)]
    if opened.trusted:
        options.append("--trust")
    if opened.model is None and not opened.recurrent:
        options = [*_picked(opened), "--model", "'pkg.mod:Net(...)'", "--input", "batch.pt"]
    elif opened.model is not None and (opened.spec is not None or not opened.recurrent):
        options += ["--input", "batch.pt"]
    return analyze_command(opened.path, " ".join(options))


def _picked(opened: Opened) -> list[str]:
    return [] if opened.member is None else ["--member", shlex.quote(opened.member)]


def save_snippet(path: str | os.PathLike[str], opened: Opened) -> str:
    """The lines that save a batch in the user's training code, and the command that uses it.

    >>> from gradflow.loading.opened import Opened
    >>> opened = Opened(Path("weights.pt"), "a state_dict", "weights", None, ())
    >>> print(save_snippet("weights.pt", opened).splitlines()[-1])
    gradflow analyze weights.pt --model 'pkg.mod:Net(10, 20)' --input batch.pt
    """
    options = "--input batch.pt"
    lines = [
        "# in your training code, where one batch x, y is at hand:",
        'torch.save({"input": x, "target": y}, "batch.pt")',
    ]
    if opened.model is None or opened.spec is not None:
        spec = opened.spec or "pkg.mod:Net(10, 20)"
        options = f"--model {shlex.quote(spec) if opened.spec else repr(spec)} {options}"
        if opened.spec is None:
            lines.append("# pkg.mod:Net(10, 20) is your class and its arguments")
    options = " ".join([*_picked(opened), options])
    if opened.trusted:
        options += " --trust"
    return "\n".join([*lines, "# then, in a shell:", analyze_command(Path(path), options)])
