"""Which of a file's modules and state_dicts is meant: one, or several read side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from gradflow.loading.file_kinds import PICKLED
from gradflow.loading.members import Member, kind_of, members_of, tensors_in
from gradflow.loading.shells import Shell, tensors_of
from gradflow.loading.words import article, some

PREFERRED = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network"),
    *("module", "weights", "params", "parameters"),
)


@dataclass(frozen=True)
class Found:
    """The part of a file's contents that matters: members to read, and those left alone."""

    kind: str  # "a state_dict", "a training checkpoint", "a list of 3 items", ...
    members: tuple[Member, ...]  # read; named only where there are several
    others: tuple[Member, ...] = ()
    notes: tuple[str, ...] = ()
    said: tuple[str, ...] = ()  # sentences that a reader must see

    @property
    def module(self) -> nn.Module | Shell | None:
        """The one module that is read, if it is one."""
        return self.members[0].module if len(self.members) == 1 else None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is read as one state_dict; the keys of several members begin with their names."""
        return merged(self.members)


def merged(members: Iterable[Member]) -> dict[str, Tensor]:
    """The tensors of several members under their names; of one member as they are."""
    parts = list(members)
    if len(parts) == 1:
        return parts[0].tensors
    return {f"{part.name}.{key}": value for part in parts for key, value in part.tensors.items()}


def locate(value: object, kind: str) -> Found:
    """Find the state_dict or module in what a file held; raises ValueError naming what it is."""
    if isinstance(value, nn.Module) or (isinstance(value, Shell) and value.is_module):
        return Found(_pickle_of(value), (_whole(value),))
    plain = "a state_dict" if kind in PICKLED else f"{article(kind)} file"
    direct = tensors_in(value) if isinstance(value, Mapping) else {}
    members = members_of(value)
    whole = Member("", None, direct)
    if whole.recurrent:
        said = _not_read([whole], [member for member in members if member.recurrent])
        return Found(plain, (whole,), notes=_left_out(value, direct), said=said)
    chosen, notes, said = _choose(members)
    # A lone counter beside the real weights is no state_dict; the larger part is.
    weighty = any(member.recurrent or member.module is not None for member in chosen)
    if direct and not weighty and whole.size >= sum(member.size for member in chosen):
        return Found(plain, (whole,), notes=_left_out(value, direct))
    if not chosen:
        raise ValueError(name_of(value))
    others = tuple(member for member in members if member not in chosen)
    return Found(_container(value, chosen), tuple(chosen), others, notes, said)


def _whole(value: nn.Module | Shell) -> Member:
    if isinstance(value, Shell):
        return Member("", value, tensors_of(value))
    return Member("", value, {k: v for k, v in value.state_dict().items() if isinstance(v, Tensor)})


def _pickle_of(value: nn.Module | Shell) -> str:
    return "a pickle of torch modules" if isinstance(value, Shell) else "a pickle of a whole model"


def _container(value: object, chosen: list[Member]) -> str:
    if isinstance(value, list | tuple):
        return name_of(value).partition(" (")[0]
    modules = [member.module for member in chosen if member.module is not None]
    if modules:
        return _pickle_of(modules[0])
    lightning = isinstance(value, Mapping) and any(
        str(key).startswith("pytorch-lightning") for key in value
    )
    return "a Lightning checkpoint" if lightning else "a training checkpoint"


def name_of(value: object) -> str:
    """Name an object that is not weights, in words.

    >>> name_of([nn.CrossEntropyLoss(), None])
    'a list of 2 items (a CrossEntropyLoss, None)'
    """
    if isinstance(value, Tensor):
        return f"a single tensor of shape {tuple(value.shape)}"
    if isinstance(value, Shell):
        return f"an object of the class {value.path}"
    if isinstance(value, Mapping):
        keys = ", ".join(str(key)[:40] for key in list(value)[:5])
        return f"a mapping without tensors (keys: {keys})" if keys else "an empty mapping"
    if isinstance(value, list | tuple):
        kinds = list(dict.fromkeys(kind_of(item) for item in value))
        held = f" ({some(kinds)})" if kinds else ""
        return f"{article(type(value).__name__)} of {len(value)} items{held}"
    return "None" if value is None else f"an object of type {type(value).__name__}"


def is_data(value: object) -> bool:
    """Whether it is tensors and numbers only, in lists and tuples: what a batch is made of.

    >>> is_data((Tensor(), [Tensor(), 3])), is_data([Tensor(), None, nn.GRU(1, 1)]), is_data([3])
    (True, False, False)
    """
    leaves = list(_leaves(value))
    kinds = (Tensor, bool, int, float, str, type(None))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    # Parameters are saved by who means a model
    named = all(isinstance(leaf, Parameter) for leaf in tensors)
    return bool(tensors) and not named and all(isinstance(leaf, kinds) for leaf in leaves)


def _leaves(value: object, depth: int = 0) -> Iterable[object]:
    if isinstance(value, list | tuple) and depth < 4:
        for item in value:
            yield from _leaves(item, depth + 1)
    else:
        yield value


def _left_out(value: object, taken: Mapping[str, Tensor]) -> tuple[str, ...]:
    other = (
        [str(key)[:60] for key in value if key not in taken] if isinstance(value, Mapping) else []
    )
    if not other:
        return ()
    return (f"entries that are no tensors were left out: {some(other)}",)


def _rank(member: Member) -> tuple[int, int]:
    last = member.name.rpartition(".")[2]
    known = PREFERRED.index(last) if last in PREFERRED else len(PREFERRED)
    return known, member.name.count(".")


def _choose(members: list[Member]) -> tuple[list[Member], tuple[str, ...], tuple[str, ...]]:
    """The members to read, notes on where they are, and what a reader must be told."""
    recurrent = [member for member in members if member.recurrent]
    if not recurrent:
        modules = [member for member in members if member.module is not None]
        pool = modules or members
        known = [member for member in pool if _rank(member)[0] < len(PREFERRED)]
        return ([min(known, key=_rank)] if known else pool), (), ()
    # What can be read without running a file's code goes first
    pool = [member for member in recurrent if not member.foreign] or recurrent
    best = min(pool, key=_rank)
    if len(pool) == 1 or _rank(best)[0] < len(PREFERRED):
        return [best], *_about_one(best, members, recurrent)
    names = some([repr(member.name) for member in pool], 6)
    said = f"the members {names} were read side by side; --member {pool[0].name} takes one alone"
    return pool, (), (said, *_not_read(pool, recurrent))


def _about_one(
    one: Member, members: list[Member], recurrent: list[Member]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    where = f"the weights were found under {one.name!r}"
    if one.module is not None:
        where = f"of the file, the member {one} was read"
    others = [member for member in members if member is not one]
    if len(recurrent) == 1 and others:
        where += f"; the others have no recurrent weights ({_named(others)})"
    said = _not_read([one], recurrent)
    usual = not others and _rank(one)[0] < len(PREFERRED)
    return ((where,), said) if usual else ((), (where, *said))


def _named(members: list[Member]) -> str:
    """Names and kinds of members, without their layers."""
    return some(
        [f"{member.name!r}, {kind_of(member.module, member.tensors)}" for member in members]
    )


def _not_read(chosen: list[Member], recurrent: list[Member]) -> tuple[str, ...]:
    left = [member for member in recurrent if member not in chosen]
    if not left:
        return ()
    names = some([repr(member.name) for member in left])
    reads = f"--member {left[0].name} reads {'it' if len(left) == 1 else 'the first'}"
    return (f"recurrent weights under {names} were not read; {reads}",)
