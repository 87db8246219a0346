"""Walking an untyped document so that every error names the object and the field."""

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ciliate.policy.rules import PolicyError


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """A value and where it is: ``spec.ingress[0].toPorts[1]`` of ``CiliumNetworkPolicy default/api``."""

    object: str
    path: str
    value: Any

    def fail(self, problem: str) -> NoReturn:
        """Raise PolicyError for this place."""
        raise PolicyError(self.object, self.path, problem)

    def child(self, name: str) -> "At":
        """Return a field of a mapping; its value is None if it is absent."""
        path = f"{self.path}.{name}" if self.path else name
        return At(object=self.object, path=path, value=self.value.get(name))

    def mapping(self, known: Collection[str], *, unsupported: Collection[str] = ()) -> "At":
        """Return self if it is a mapping with known fields alone. ``unsupported``: known, but not served yet."""
        if not isinstance(self.value, Mapping):
            self.fail(f"a mapping is expected, not {_kind(self.value)}")
        for name, value in self.value.items():
            if name in unsupported:
                if value not in (None, [], {}):
                    self.child(str(name)).fail("is not supported yet")
            elif name not in known:
                close = difflib.get_close_matches(str(name), list(known), 1)
                hint = f"; did you mean {close[0]}?" if close else f" (known: {', '.join(sorted(known))})"
                self.fail(f"unknown field {name!r}{hint}")
        return self

    def items(self) -> Iterator["At"]:
        """Yield the items of a list; absent: none."""
        if self.value is None:
            return
        if not isinstance(self.value, list):
            self.fail(f"a list is expected, not {_kind(self.value)}")
        for index, one in enumerate(self.value):
            yield At(object=self.object, path=f"{self.path}[{index}]", value=one)

    def text(self) -> str:
        """Return a string."""
        if not isinstance(self.value, str):
            self.fail(f"a string is expected, not {_kind(self.value)}")
        return str(self.value)

    def pairs(self) -> dict[str, str]:
        """Return a mapping of strings to strings; absent: empty."""
        if self.value is None:
            return {}
        if not isinstance(self.value, Mapping):
            self.fail(f"a mapping is expected, not {_kind(self.value)}")
        for key, value in self.value.items():
            if not isinstance(key, str) or not isinstance(value, str):
                self.fail(f"{key!r}: strings are expected; put quotes around {value!r}")
        return dict(self.value)

    @property
    def absent(self) -> bool:
        """Whether there is nothing here."""
        return self.value is None


def _kind(value: Any) -> str:
    names = {type(None): "nothing", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    other = "a list" if isinstance(value, list) else "a mapping" if isinstance(value, Mapping) else type(value).__name__
    return names.get(type(value), other)
