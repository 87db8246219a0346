"""Who has which address, with Cilium's keys and JSON (pkg/ipcache/kvstore)."""

from collections.abc import AsyncIterator, Mapping
from ipaddress import ip_address
from typing import Final

import msgspec
import structlog

from ciliate.kvstore.store import FileStore

log = structlog.get_logger()
PREFIX: Final = "cilium/state/ip/v1/default"
_PROTOCOLS: Final[Mapping[str, int]] = {"TCP": 6, "UDP": 17, "SCTP": 132}
_NAMES: Final[Mapping[int, str]] = {number: name for name, number in _PROTOCOLS.items()}


class _NamedPort(msgspec.Struct, kw_only=True, rename={"name": "Name", "port": "Port", "protocol": "Protocol"}):
    name: str
    port: int
    protocol: str = "TCP"


class _Pair(msgspec.Struct, kw_only=True, omit_defaults=True):
    IP: str
    HostIP: str = ""
    ID: int = 0
    Key: int = 0
    Metadata: str = ""
    K8sNamespace: str = ""
    K8sPodName: str = ""
    K8sServiceAccount: str = ""
    NamedPorts: list[_NamedPort] = []


class NamedPort(msgspec.Struct, frozen=True, kw_only=True):
    """A container's named port; the protocol is its IP number."""

    name: str
    protocol: int
    port: int


class IpEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An address. ``host_ip``: underlay address of its node."""

    ip: str
    host_ip: str
    identity: int
    key: int = 0
    namespace: str = ""
    pod: str = ""
    service_account: str = ""
    named_ports: tuple[NamedPort, ...] = ()


class Addresses:
    """The addresses in the store."""

    def __init__(self, store: FileStore) -> None:
        self._store = store

    def publish(self, entry: IpEntry) -> None:
        """Write an address. Error: OSError."""
        pair = _Pair(
            IP=entry.ip,
            HostIP=entry.host_ip,
            ID=entry.identity,
            Key=entry.key,
            K8sNamespace=entry.namespace,
            K8sPodName=entry.pod,
            K8sServiceAccount=entry.service_account,
            NamedPorts=[_NamedPort(name=p.name, port=p.port, protocol=_NAMES[p.protocol]) for p in entry.named_ports],
        )
        self._store.put(f"{PREFIX}/{entry.ip}", msgspec.json.encode(pair))

    def withdraw(self, ip: str, host_ip: str) -> bool:
        """Delete an address if it is that node's; return whether it was."""
        value = self._store.get(f"{PREFIX}/{ip}")
        entry = _read(ip, value) if value is not None else None
        return entry is not None and entry.host_ip == host_ip and self._store.delete(f"{PREFIX}/{ip}")

    def own(self, host_ip: str) -> list[IpEntry]:
        """Return the addresses of a node."""
        entries = (_read(key, value) for key, value in self._store.list(PREFIX).items())
        return [entry for entry in entries if entry is not None and entry.host_ip == host_ip]

    async def watch(self) -> AsyncIterator[Mapping[str, IpEntry | None]]:
        """Yield all addresses, then batches of changes (None: gone). A value that cannot be read changes nothing."""
        async for batch in self._store.watch(PREFIX):
            found: dict[str, IpEntry | None] = {}
            for key, value in batch.items():
                entry = _read(key, value) if value is not None else None
                if value is None or entry is not None:
                    found[key.rpartition("/")[2]] = entry
            yield found


def _read(key: str, value: bytes) -> IpEntry | None:
    try:
        pair = msgspec.json.decode(value, type=_Pair)
        ports = tuple(
            NamedPort(name=p.name, protocol=_PROTOCOLS[p.protocol.upper()], port=p.port) for p in pair.NamedPorts
        )
        _check(key, pair)
    except (msgspec.MsgspecError, KeyError, ValueError) as error:
        log.warning("address-malformed", key=key, problem=str(error))
        return None
    return IpEntry(
        ip=pair.IP,
        host_ip=pair.HostIP,
        identity=pair.ID,
        key=pair.Key,
        namespace=pair.K8sNamespace,
        pod=pair.K8sPodName,
        service_account=pair.K8sServiceAccount,
        named_ports=ports,
    )


def _check(key: str, pair: _Pair) -> None:
    """Refuse what the datapath cannot hold, whoever wrote it. Error: ValueError."""
    if key.rpartition("/")[2] != str(ip_address(pair.IP)):
        raise ValueError(f"it is about {pair.IP}")
    if pair.HostIP:
        ip_address(pair.HostIP)
    if not 0 <= pair.ID < 1 << 32:
        raise ValueError(f"identity {pair.ID} is not in 0..{(1 << 32) - 1}")
    if bad := [port.port for port in pair.NamedPorts if not 1 <= port.port <= 65535]:
        raise ValueError(f"port {bad[0]} is not in 1..65535")
