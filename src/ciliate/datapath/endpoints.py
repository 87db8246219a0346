"""Rows of local endpoints and of this node's addresses (maps ``endpoints``, ``local_addrs``), and the epoch."""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Concatenate, Final, NewType, ParamSpec, TypeVar

import numpy as np

from ciliate.datapath.btf import Btf
from ciliate.datapath.maps import Array, Table, addr_bytes, addr_text

EndpointId = NewType("EndpointId", int)
P = ParamSpec("P")
T = TypeVar("T")

HOST_ENDPOINT: Final = EndpointId(65535)
"""The node itself: the last id, so that no pod has it. It exists as soon as the datapath runs."""
HOST_IDENTITY: Final = 1
"""``reserved:host``."""
NO_POLICY: Final = 0
"""Policy id: no policy selects the endpoint in this direction."""
PENDING_POLICY: Final = 0xFFFFFFFF
"""Policy id that never has a row: a new endpoint is closed until its policy is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRow:
    """A local pod as the datapath needs it. MACs have 6 octets; ``mtu`` is that of the pod's interface."""

    id: EndpointId
    identity: int
    ifindex: int
    mac: bytes
    gw_mac: bytes
    v4: IPv4Address | None = None
    v6: IPv6Address | None = None
    mtu: int
    audit: bool = False
    netns_cookie: int = 0
    """Of its network namespace, 0: not known. Redirects that pass by a pod know it by this."""

    def addresses(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """Its addresses, IPv4 first."""
        return tuple(a for a in (self.v4, self.v6) if a is not None)


class Epoch:
    """The counter by which conntrack rows notice that something changed (docs/adr/0004-conntrack-and-epochs.md)."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._lock = threading.Lock()

    @property
    def value(self) -> int:
        """The epoch now."""
        value = self._table.get(0)
        return int(value) if value is not None else 0

    def bump(self) -> int:
        """Add one, after all rows of a change are written; return the new epoch."""
        with self._lock:
            value = self.value + 1
            self._table.set(0, value)
            return value


def _locked(method: Callable[Concatenate["Endpoints", P], T]) -> Callable[Concatenate["Endpoints", P], T]:
    """Run a method of Endpoints under its lock."""

    @wraps(method)
    def run(self: "Endpoints", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return run


class Endpoints:
    """Owner of the endpoint rows. Policy ids are set by the policy reconciler, all else by ``upsert``."""

    def __init__(self, endpoints: Table, local_addrs: Table, epoch: Epoch, btf: Btf) -> None:
        self._table = endpoints
        self._addresses = local_addrs
        self._epoch = epoch
        self._audit = btf_constant(btf, "endpoint_option", "EP_OPT_AUDIT", 1)
        self._host = btf_constant(btf, "endpoint_option", "EP_OPT_HOST", 2)
        self._local_host = btf_constant(btf, "local_addr_flag", "LOCAL_HOST", 1)
        self._rows: dict[EndpointId, Array] = {}
        self._policies: dict[EndpointId, tuple[int, int]] = {}
        self._lock = threading.RLock()  # pods come and go in worker threads
        self._restore()

    def _restore(self) -> None:
        """Take over what a former agent wrote."""
        _, values = self._table.dump()
        for index in range(len(values)):
            row = values[index : index + 1].copy()
            endpoint = EndpointId(int(row["id"][0]))
            self._rows[endpoint] = row
            self._policies[endpoint] = (int(row["policy"][0][0]), int(row["policy"][0][1]))

    @property
    def ids(self) -> frozenset[EndpointId]:
        """Endpoints that have a row."""
        return frozenset(self._rows)

    def policies(self) -> Mapping[EndpointId, tuple[int, int]]:
        """Return (egress, ingress) policy ids of each endpoint."""
        return dict(self._policies)

    @_locked
    def upsert(self, row: EndpointRow) -> bool:
        """Write an endpoint's rows; return whether anything changed. A new one has ``PENDING_POLICY`` until its
        policy is set.

        Order: the endpoint's row, its addresses, the epoch; so it is reachable only when it is complete.
        """
        old = self._rows.get(row.id)
        new = self._encode(row, old)
        keys = addr_keys(self._addresses, row.addresses())
        values = np.zeros(len(keys), self._addresses.value_dtype)
        values["ifindex"], values["macs"] = row.ifindex, np.void(row.mac + row.gw_mac)
        have, found = self._addresses.lookup_many(keys)
        addresses_done = bool(found.all()) and have.tobytes() == values.tobytes()
        if old is not None and old.tobytes() == new.tobytes() and addresses_done:
            return False
        self._table.update(new["ifindex"].copy(), new)
        self._addresses.update(keys, values)
        if old is not None:
            self._drop_leftovers(old, new)
        self._rows[row.id] = new
        self._policies.setdefault(row.id, (PENDING_POLICY, PENDING_POLICY))
        self._epoch.bump()
        return True

    def _encode(self, row: EndpointRow, old: Array | None) -> Array:
        new = np.zeros(1, self._table.value_dtype)
        new["id"], new["identity"], new["ifindex"] = row.id, row.identity, row.ifindex
        new["v4"], new["v6"] = np.void(addr_bytes(row.v4)), np.void(addr_bytes(row.v6))
        new["mac"], new["gw_mac"] = np.void(row.mac), np.void(row.gw_mac)
        new["netns"] = row.netns_cookie
        new["mtu"], new["options"] = row.mtu, self._audit if row.audit else 0
        new["policy"] = self._policies.get(row.id, (PENDING_POLICY, PENDING_POLICY))
        same_addresses = old is not None and all(old[f].tobytes() == new[f].tobytes() for f in ("v4", "v6", "ifindex"))
        # Conntrack rows born before `since` belong to the addresses' former owner; one made right now has the epoch
        # of now.
        new["since"] = old["since"] if same_addresses and old is not None else self._epoch.value + 1
        return new

    @_locked
    def ensure_host(self, ifindex: int, mtu: int) -> bool:
        """Make the node itself an endpoint, keyed by the host device; return whether anything changed.

        Unlike a pod it starts without a policy, hence open: a node must come up. A restart keeps policies and options.
        """
        old = self._rows.get(HOST_ENDPOINT)
        new = np.zeros(1, self._table.value_dtype) if old is None else old.copy()
        new["id"], new["identity"], new["ifindex"], new["mtu"] = HOST_ENDPOINT, HOST_IDENTITY, ifindex, mtu
        new["options"] |= self._host
        new["policy"] = self._policies.setdefault(HOST_ENDPOINT, (NO_POLICY, NO_POLICY))
        if old is not None and old.tobytes() == new.tobytes():
            return False
        self._table.update(new["ifindex"].copy(), new)
        if old is not None:
            self._drop_leftovers(old, new)
        self._rows[HOST_ENDPOINT] = new
        self._epoch.bump()
        return True

    @_locked
    def set_audit(self, endpoint: EndpointId, audit: bool) -> bool:
        """Enforce an endpoint's policies, or only report them (``audit``); return whether that changed.

        Holds for established connections too. A later ``upsert`` of a pod says it anew. Error: KeyError (no row).
        """
        new = self._rows[endpoint].copy()
        options = int(new["options"][0])
        new["options"] = options | self._audit if audit else options & ~self._audit
        if int(new["options"][0]) == options:
            return False
        self._table.update(new["ifindex"].copy(), new)
        self._rows[endpoint] = new
        self._epoch.bump()
        return True

    def _drop_leftovers(self, old: Array, new: Array) -> None:
        if old["ifindex"][0] != new["ifindex"][0]:
            self._table.delete_many(old["ifindex"].copy())
        keep = {new["v4"].tobytes(), new["v6"].tobytes()}
        gone = [raw for raw in (old["v4"].tobytes(), old["v6"].tobytes()) if any(raw) and raw not in keep]
        self._delete_addresses(gone, int(old["ifindex"][0]))

    def _delete_addresses(self, raws: Iterable[bytes], ifindex: int) -> None:
        """Delete address rows that still point to ``ifindex``: an address may have a new owner by now."""
        for raw in raws:
            value = self._addresses.get(raw)
            if value is not None and int(value["ifindex"]) == ifindex:
                self._addresses.delete(raw)

    @_locked
    def remove(self, endpoint: EndpointId) -> tuple[str, ...]:
        """Delete an endpoint's rows; return the addresses it had (their conntrack rows are the caller's to purge)."""
        old = self._rows.pop(endpoint, None)
        self._policies.pop(endpoint, None)
        if old is None:
            return ()
        raws = [raw for raw in (old["v4"].tobytes(), old["v6"].tobytes()) if any(raw)]
        self._delete_addresses(raws, int(old["ifindex"][0]))
        current = self._table.get(int(old["ifindex"][0]))
        if current is not None and int(current["id"]) == endpoint:
            self._table.delete_many(old["ifindex"].copy())
        self._epoch.bump()
        return tuple(addr_text(raw) for raw in raws)

    @_locked
    def sync(self, desired: Iterable[EndpointRow], *, prune: bool) -> tuple[str, ...]:
        """Make the pods' rows those of ``desired``; return addresses freed. Others are removed only with ``prune``."""
        wanted = {row.id: row for row in desired}
        freed: list[str] = []
        for gone in [e for e in self._rows if e not in wanted and e != HOST_ENDPOINT] if prune else []:
            freed += self.remove(gone)
        for row in wanted.values():
            self.upsert(row)
        return tuple(freed)

    @_locked
    def set_policy(self, endpoint: EndpointId, egress: int, ingress: int) -> bool:
        """Repoint an endpoint: one atomic write, both directions. Does not bump the epoch. Kept for an endpoint yet
        to come.
        """
        self._policies[endpoint] = (egress, ingress)
        row = self._rows.get(endpoint)
        if row is None or tuple(row["policy"][0].tolist()) == (egress, ingress):
            return False
        new = row.copy()
        new["policy"] = (egress, ingress)
        self._table.update(new["ifindex"].copy(), new)
        self._rows[endpoint] = new
        return True

    @_locked
    def forget_policy(self, endpoint: EndpointId) -> None:
        """Drop the policy ids kept for an endpoint that has no row."""
        if endpoint not in self._rows:
            self._policies.pop(endpoint, None)

    @_locked
    def set_node_addresses(self, addresses: Iterable[IPv4Address | IPv6Address]) -> bool:
        """Make ``addresses`` the node's own (``LOCAL_HOST``); return whether anything changed."""
        wanted = {addr_bytes(a) for a in addresses}
        keys, values = self._addresses.dump()
        mine = {k.tobytes() for k, v in zip(keys, values, strict=True) if int(v["flags"]) & self._local_host}
        for raw in wanted - mine:
            self._addresses.set(raw, {"flags": self._local_host})
        for raw in mine - wanted:
            self._addresses.delete(raw)
        changed = wanted != mine
        if changed:
            self._epoch.bump()
        return changed

    def list(self) -> list[dict[str, Any]]:
        """Return the rows for display."""
        return [
            {
                "id": int(r["id"][0]),
                "identity": int(r["identity"][0]),
                "ifindex": int(r["ifindex"][0]),
                "policy": {"egress": int(r["policy"][0][0]), "ingress": int(r["policy"][0][1])},
                "ipv4": addr_text(r["v4"].tobytes()),
                "ipv6": addr_text(r["v6"].tobytes()),
                "mac": r["mac"].tobytes().hex(":"),
                "mtu": int(r["mtu"][0]),
                "since": int(r["since"][0]),
                "audit": bool(int(r["options"][0]) & self._audit),
                "host": bool(int(r["options"][0]) & self._host),
            }
            for _, r in sorted(self._rows.items())
        ]


def btf_constant(btf: Btf, enum: str, name: str, otherwise: int) -> int:
    """Return an enum's constant; ``otherwise`` where the compiler left the enum out of the BTF (nothing refers to
    it).
    """
    return btf.enum(enum)[name] if btf.has_enum(enum) else otherwise


def addr_keys(table: Table, addresses: Iterable[IPv4Address | IPv6Address]) -> Array:
    """Return a key array of addresses."""
    return np.frombuffer(b"".join(addr_bytes(a) for a in addresses), table.key_dtype).copy()
