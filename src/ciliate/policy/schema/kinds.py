"""The vocabulary in which the fields of policy objects are declared. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A string. ``pattern`` must match the whole of it, ``what`` says in words what matches (``is not a DNS name``).

    ``folded``: case does not count for ``enum``. ``format``: a format that Kubernetes knows (``cidr``).
    """

    enum: tuple[str, ...] = ()
    folded: bool = False
    pattern: str = ""
    what: str = ""
    least: int = 0
    most: int = 0
    format: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """An integer from ``low`` to ``high``."""

    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberOrText:
    """An integer, or a string that matches ``pattern``."""

    pattern: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """true or false."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """A mapping of strings to strings that match ``pattern``."""

    pattern: str = ""
    most: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Anything:
    """A mapping that is not looked into (``metadata``, ``status``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Many:
    """A list. ``unique``: no item twice."""

    of: "Kind"
    least: int = 0
    most: int | None = None
    unique: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """A mapping with known fields. ``one_of``: exactly one of these is set. ``any_of``: at least one.

    ``name`` is the headline of its own table in the reference; empty: it stands in its parent's table. ``growing``:
    later versions of the API may add to ``one_of``, so that where unknown fields are no error none of the known need
    be set.
    """

    fields: Mapping[str, "Field"]
    name: str = ""
    one_of: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    growing: bool = False
    required: tuple[str, ...] = field(init=False)
    """The fields that must be set."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "required", tuple(name for name, one in self.fields.items() if one.required))


Kind = Text | Number | NumberOrText | Flag | Pairs | Anything | Many | Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field: its kind, and what the reference says of it.

    ``refused``: why nothing may be in it. ``note``: what of it is special here.
    """

    of: Kind
    text: str
    required: bool = False
    refused: str = ""
    note: str = ""


def fields(**named: Field) -> Mapping[str, Field]:
    """Return fields by name."""
    return named
