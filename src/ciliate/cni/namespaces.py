"""What a path that the runtime gives for a network namespace is."""

import fcntl
import os
from enum import Enum, auto
from pathlib import Path
from typing import Final

_NS_GET_NSTYPE: Final = 0xB703
"""ioctl of a namespace file: which kind it is. Source: include/uapi/linux/nsfs.h."""
_CLONE_NEWNET: Final = 0x40000000
_OWN: Final = Path("/proc/self/ns/net")


class Kind(Enum):
    """``OWN``: the agent's, so the node's."""

    POD = auto()
    OWN = auto()
    MISSING = auto()
    OTHER = auto()


def kind_of(path: str) -> Kind:
    """Return what is at a path; never blocks, whatever it is."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, ProcessLookupError):
        return Kind.MISSING
    except (OSError, ValueError):
        return Kind.OTHER
    try:
        if fcntl.ioctl(handle, _NS_GET_NSTYPE) != _CLONE_NEWNET:
            return Kind.OTHER
        return Kind.OWN if os.path.samestat(os.fstat(handle), _OWN.stat()) else Kind.POD
    except OSError:
        return Kind.OTHER
    finally:
        os.close(handle)
