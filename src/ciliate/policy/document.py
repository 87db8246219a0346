"""Walking an untyped document so that every error and every warning names the object and the field."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from ciliate.policy.rules import PolicyError

SHOWN: Final = 80
"""Longest piece of a document that a message repeats, in characters."""


@dataclass(slots=True, kw_only=True)
class Reading:
    """One object that is being read. ``strict``: a field that is not known is an error, not a warning."""

    object: str
    strict: bool = True
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """A value and where it is: ``spec.ingress[0].toPorts[1]`` of ``CiliumNetworkPolicy default/api``."""

    reading: Reading
    path: str
    value: Any

    def fail(self, problem: str) -> NoReturn:
        """Raise PolicyError for this place."""
        raise PolicyError(self.reading.object, self.path, problem)

    def warn(self, problem: str) -> None:
        """Note that this place was accepted, but is probably not meant."""
        self.reading.warnings.append(f"{self.reading.object}: {self.path}: {problem}")

    def child(self, name: str) -> "At":
        """Return a field of a mapping; its value is None if it is absent."""
        return At(reading=self.reading, path=f"{self.path}.{name}" if self.path else name, value=self.value.get(name))

    def items(self) -> Iterator["At"]:
        """Yield the items of a list; absent: none."""
        for index, one in enumerate(self.value or ()):
            yield At(reading=self.reading, path=f"{self.path}[{index}]", value=one)

    def fields(self) -> Iterator["At"]:
        """Yield the fields of a mapping that are set."""
        for name in self.value:
            if self.value[name] is not None:
                yield self.child(name)

    def text(self, name: str) -> str:
        """Return a field's text; absent: empty."""
        return str(self.value.get(name) or "")

    @property
    def absent(self) -> bool:
        """Whether there is nothing here; null is nothing."""
        return self.value is None

    @property
    def name(self) -> str:
        """The field's own name, without the path to it."""
        return self.path.rpartition(".")[2]


def shown(value: Any) -> str:
    """Return a value as a message shows it: not all of a long one."""
    if isinstance(value, str):
        value = value if len(value) <= SHOWN else value[:SHOWN] + "…"
        return ascii(value) if any(0xD800 <= ord(one) <= 0xDFFF for one in value) else repr(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value) if abs(value) < 10**18 else "a very large number"
    return kind(value)


def kind(value: Any) -> str:
    """Return what a value is, with its article."""
    names = {type(None): "nothing", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    other = "a list" if isinstance(value, list) else "a mapping" if isinstance(value, Mapping) else type(value).__name__
    return names.get(type(value), other)
