"""The policy maps as the kernel has them, for display."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from ciliate.datapath.maps import Table
from ciliate.identity.numbers import Scope
from ciliate.policy.image import RowVerdict

Tables = Callable[[str], Table]
_CLASS_BITS, _PROTOCOL_BITS = 32, 16
"""Of a row key's prefix: the class, then the protocol with a zero octet."""


def list_policies(tables: Tables) -> Iterator[dict[str, Any]]:
    """Yield each policy: its classes by scope, and the identities that have a class of their own."""
    members: dict[int, dict[int, int]] = defaultdict(dict)
    keys, values = tables("policy_classes").dump()
    for key, value in zip(keys, values.tolist(), strict=True):
        members[int(key["policy"])][int(key["identity"])] = int(value)
    keys, values = tables("policies").dump()
    for number, value in sorted(zip(keys.tolist(), values, strict=True), key=lambda pair: int(pair[0])):
        yield {
            "policy": int(number),
            "default_rule": int(value["default_rule"]),
            "classes": {scope.name.lower(): int(value["classes"][scope]) for scope in Scope},
            "unknown": {scope.name.lower(): int(value["unknown"][scope]) for scope in Scope},
            "members": {str(identity): one for identity, one in sorted(members[int(number)].items())},
        }


def list_rows(tables: Tables) -> Iterator[dict[str, Any]]:
    """Yield each row of each class; protocol 0: any, ``port`` the lowest of 2^(16 - bits)."""
    keys, values = tables("policy_rows").dump()
    for key, value in zip(keys, values, strict=True):
        bits = int(key["prefixlen"]) - _CLASS_BITS
        yield {
            "class": int(key["class"]),
            "protocol": int(key["protocol"]) if bits else 0,
            "port": int(key["port"]),
            "bits": max(bits - _PROTOCOL_BITS, 0),
            "verdict": RowVerdict(int(value["verdict"])).name,
            "l7": int(value["l7"]),
            "rule": int(value["rule"]),
        }
