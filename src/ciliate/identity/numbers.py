"""Security identity numbers: which are reserved, and to which scope a number belongs.

Numbering as in Cilium (pkg/identity/numericidentity.go): 1-255 reserved, 256-65535 allocated in a cluster with the
cluster id in bits 16-23, node-local CIDR identities from 1<<24, remote-node identities from 2<<24.
"""

from enum import IntEnum
from typing import Final, NewType

IdentityId = NewType("IdentityId", int)

LOCAL_SCOPE_BASE: Final = 1 << 24
REMOTE_NODE_SCOPE_BASE: Final = 2 << 24
ALLOCATED_MIN: Final = 256
ALLOCATED_MAX: Final = 65535


class Reserved(IntEnum):
    """Identities with a fixed number; the label is ``reserved:<name>``."""

    UNKNOWN = 0
    HOST = 1
    WORLD = 2
    UNMANAGED = 3
    HEALTH = 4
    INIT = 5
    REMOTE_NODE = 6
    KUBE_APISERVER = 7
    INGRESS = 8
    WORLD_IPV4 = 9
    WORLD_IPV6 = 10


class Scope(IntEnum):
    """Where an identity belongs; the values are those of ``enum scope`` in bpf/lib/maps.h."""

    RESERVED = 0
    CLUSTER = 1
    MESH = 2
    WORLD = 3
    NODE = 4


_WORLD: Final[frozenset[int]] = frozenset({Reserved.WORLD, Reserved.WORLD_IPV4, Reserved.WORLD_IPV6})


def scope_of(identity: IdentityId, cluster_id: int = 0) -> Scope:
    """Return the scope of ``identity`` as the datapath of cluster ``cluster_id`` (0-255) sees it."""
    if identity < ALLOCATED_MIN:
        return Scope.WORLD if identity in _WORLD else Scope.RESERVED
    match identity >> 24:
        case 0:
            return Scope.CLUSTER if identity >> 16 == cluster_id else Scope.MESH
        case 1:
            return Scope.WORLD
        case _:
            return Scope.NODE
