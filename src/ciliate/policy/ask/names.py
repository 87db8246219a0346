"""Which DNS names a rule's ``matchName`` or ``matchPattern`` means."""

import re
from functools import lru_cache

from ciliate.policy.rules import FqdnPeer


def name_meant(peer: FqdnPeer, name: str) -> bool:
    """Return whether a peer means a name (lower case, no final dot)."""
    return peer.name == name if peer.name else _compiled(peer.pattern).fullmatch(name) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """``*``: every name; ``**.`` in front: one label or more; ``*`` elsewhere: any characters within a label."""
    if pattern == "*":
        return re.compile(".*")
    rest = pattern.removeprefix("**.")
    labels = "[-a-z0-9_]*".join(re.escape(part) for part in rest.split("*"))
    return re.compile((r"([-a-z0-9_]+\.)+" if rest != pattern else "") + labels)
