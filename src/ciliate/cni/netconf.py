"""The plugin's input, validated: the network configuration on standard input and the CNI_* environment."""

import re
from collections.abc import Mapping
from functools import cached_property
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any, Final

import msgspec

from ciliate.cni.protocol import VERSIONS, Address, AttachRequest, CniError, Code, Route

_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_IFNAME_MAX: Final = 15  # octets; IFNAMSIZ of <linux/if.h> less the final zero
_NO_SUCH_CAPABILITY: Final = (
    "portMappings", "bandwidth", "ips", "ipRanges", "mac", "infinibandGUID", "deviceID",
)  # fmt: skip
"""Capabilities (the specification's CONVENTIONS) that ask for something the plugin does not do. Others only inform."""


class PrevInterface(msgspec.Struct, kw_only=True):
    """An interface of a former result."""

    name: str
    sandbox: str = ""


class PrevIp(msgspec.Struct, kw_only=True):
    """An address of a former result; ``interface`` is an index into its interfaces."""

    address: str
    interface: int | None = None


class PrevRoute(msgspec.Struct, kw_only=True):
    """A route of a former result."""

    dst: str
    gw: str | None = None


class PrevResult(msgspec.Struct, kw_only=True):
    """A former result, as far as the plugin looks at it."""

    interfaces: list[PrevInterface] = []
    ips: list[PrevIp] = []
    routes: list[PrevRoute] = []


class ValidAttachment(msgspec.Struct, kw_only=True, frozen=True):
    """An attachment that GC must spare."""

    container_id: str = msgspec.field(name="containerID")
    ifname: str


class NetConf(msgspec.Struct, kw_only=True, dict=True):
    """The network configuration. Keys that are not named here are ignored, as the specification wants."""

    version: str = msgspec.field(name="cniVersion")
    name: str = ""
    type: str = ""
    ipam: dict[str, Any] | None = None
    dns: dict[str, Any] | None = None
    runtime_config: dict[str, Any] | None = msgspec.field(name="runtimeConfig", default=None)
    prev: dict[str, Any] | None = msgspec.field(name="prevResult", default=None)
    valid: list[ValidAttachment] | None = msgspec.field(name="cni.dev/valid-attachments", default=None)

    @cached_property
    def prev_result(self) -> PrevResult:
        """The former result; empty: there is none. Error: CniError 7."""
        try:
            return msgspec.convert(self.prev or {}, PrevResult)
        except msgspec.ValidationError as error:
            raise CniError(Code.INVALID_CONFIG, "prevResult is not valid", str(error)) from error


class _Version(msgspec.Struct):
    version: str = msgspec.field(name="cniVersion", default="0.1.0")


def spoken(stdin: str) -> str:
    """Return the configuration's version. Errors: CniError 1 (not supported), 6 (no JSON), 7 (no version in it)."""
    version: str = _decode(stdin, _Version).version
    if version not in VERSIONS:
        known = ", ".join(VERSIONS)
        raise CniError(Code.INCOMPATIBLE_VERSION, f"cniVersion {version} is not supported", f"supported are {known}")
    return version


def _decode(stdin: str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(stdin, type=kind)
    except msgspec.ValidationError as error:
        raise CniError(Code.INVALID_CONFIG, "the network configuration is not valid", str(error)) from error
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise CniError(Code.DECODE_FAILURE, "the network configuration is not JSON", str(error)) from error


def decode(stdin: str) -> NetConf:
    """Return the configuration. Errors: CniError 1 (version), 2 (a field we do not support), 6 (no JSON), 7 (bad)."""
    spoken(stdin)
    conf: NetConf = _decode(stdin, NetConf)
    if not _IDENTIFIER.fullmatch(conf.name):
        raise CniError(Code.INVALID_CONFIG, f"the network's name is not valid: {conf.name!r}")
    if conf.ipam:
        raise _unsupported("ipam", conf.ipam, "the agent allocates the addresses itself")
    for key in _NO_SUCH_CAPABILITY:
        if value := (conf.runtime_config or {}).get(key):
            raise _unsupported(f"runtimeConfig.{key}", value, "remove it from the plugin's capabilities")
    return conf


def _unsupported(key: str, value: Any, what_to_do: str) -> CniError:
    """The specification wants key and value in the message."""
    return CniError(
        Code.UNSUPPORTED_FIELD, f"{key} is not supported: {msgspec.json.encode(value).decode()}", what_to_do
    )


def arguments(text: str) -> dict[str, str]:
    """Return CNI_ARGS (``KEY=value;KEY=value``) as a dict. Error: CniError 4."""
    found = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise CniError(Code.INVALID_ENVIRONMENT, "CNI_ARGS is not valid", f"{pair!r} is not KEY=value")
        found[key] = value
    return found


def _valid_ifname(name: str) -> bool:
    fits = 0 < len(name.encode()) <= _IFNAME_MAX and name not in (".", "..")
    return fits and not any(c in "/:" or c.isspace() or not c.isprintable() for c in name)


def attachment_key(env: Mapping[str, str]) -> tuple[str, str]:
    """Return (container id, interface): all that DEL needs. Error: CniError 4."""
    container_id, ifname = env.get("CNI_CONTAINERID", ""), env.get("CNI_IFNAME", "")
    if not _IDENTIFIER.fullmatch(container_id):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_CONTAINERID is not valid: {container_id!r}")
    if not _valid_ifname(ifname):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_IFNAME is not valid: {ifname!r}")
    return container_id, ifname


def request(env: Mapping[str, str], network: str) -> AttachRequest:
    """Return what the environment asks for. A container that is no pod has its id as name. Error: CniError 4."""
    container_id, ifname = attachment_key(env)
    netns = env.get("CNI_NETNS", "")
    if not netns.startswith("/") or not netns.isprintable():
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS is not an absolute path: {netns!r}")
    args = arguments(env.get("CNI_ARGS", ""))
    return AttachRequest(
        network=network,
        container_id=container_id,
        netns=netns,
        ifname=ifname,
        pod_namespace=args.get("K8S_POD_NAMESPACE") or "default",
        pod_name=args.get("K8S_POD_NAME") or container_id,
        pod_uid=args.get("K8S_POD_UID", ""),
    )


def expected(conf: NetConf, ifname: str, netns: str) -> tuple[tuple[Address, ...], tuple[Route, ...]]:
    """Return the addresses that the former result gives the interface, and all its routes. Error: CniError 7."""
    if conf.prev is None:
        raise CniError(Code.INVALID_CONFIG, "CHECK needs prevResult")
    result = conf.prev_result
    ours = [i for i, one in enumerate(result.interfaces) if (one.name, one.sandbox) == (ifname, netns)]
    if not ours:
        raise CniError(Code.INVALID_CONFIG, f"prevResult has no interface {ifname} in {netns}")
    try:
        found = tuple(ip_interface(ip.address).ip for ip in result.ips if ip.interface in ours)
        routes = tuple(
            Route(destination=ip_network(one.dst, strict=False), gateway=ip_address(one.gw) if one.gw else None)
            for one in result.routes
        )
    except ValueError as error:
        raise CniError(Code.INVALID_CONFIG, "prevResult has an address that is none", str(error)) from error
    if not found:
        raise CniError(Code.INVALID_CONFIG, f"prevResult has no address for {ifname}")
    return found, routes
