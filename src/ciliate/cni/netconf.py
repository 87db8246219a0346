"""The plugin's input, validated: the network configuration on standard input and the CNI_* environment."""

import re
from collections.abc import Mapping
from ipaddress import ip_interface
from typing import Any

import msgspec

from ciliate.cni.protocol import VERSIONS, Address, AttachRequest, CniError, Code

_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_IFNAME_MAX = 15  # octets; IFNAMSIZ of <linux/if.h> less the final zero


class PrevInterface(msgspec.Struct, kw_only=True):
    """An interface of a former result."""

    name: str
    sandbox: str = ""


class PrevIp(msgspec.Struct, kw_only=True):
    """An address of a former result; ``interface`` is an index into its interfaces."""

    address: str
    interface: int | None = None


class PrevResult(msgspec.Struct, kw_only=True):
    """A former result, as far as CHECK looks at it."""

    interfaces: list[PrevInterface] = []
    ips: list[PrevIp] = []


class ValidAttachment(msgspec.Struct, kw_only=True, frozen=True):
    """An attachment that GC must spare."""

    container_id: str = msgspec.field(name="containerID")
    ifname: str


class NetConf(msgspec.Struct, kw_only=True):
    """The network configuration. Keys that are not named here are ignored, as the specification wants."""

    version: str = msgspec.field(name="cniVersion", default="0.1.0")
    name: str = ""
    type: str = ""
    ipam: dict[str, Any] = {}
    runtime_config: dict[str, Any] = msgspec.field(name="runtimeConfig", default_factory=dict)
    prev_result: PrevResult | None = msgspec.field(name="prevResult", default=None)
    valid: list[ValidAttachment] | None = msgspec.field(name="cni.dev/valid-attachments", default=None)
    attachments: list[ValidAttachment] | None = msgspec.field(name="cni.dev/attachments", default=None)


def decode(stdin: str) -> NetConf:
    """Return the configuration. Errors: CniError 1 (version), 2 (a field we do not support), 6 (no JSON), 7 (bad)."""
    try:
        conf = msgspec.json.decode(stdin, type=NetConf)
    except msgspec.ValidationError as error:
        raise CniError(Code.INVALID_CONFIG, "the network configuration is not valid", str(error)) from error
    except msgspec.DecodeError as error:
        raise CniError(Code.DECODE_FAILURE, "the network configuration is not JSON", str(error)) from error
    if conf.version not in VERSIONS:
        known = ", ".join(VERSIONS)
        raise CniError(
            Code.INCOMPATIBLE_VERSION, f"cniVersion {conf.version} is not supported", f"supported are {known}"
        )
    if not _IDENTIFIER.fullmatch(conf.name):
        raise CniError(Code.INVALID_CONFIG, f"the network's name is not valid: {conf.name!r}")
    if conf.ipam:
        raise CniError(Code.UNSUPPORTED_FIELD, "ipam is not supported", "the agent allocates the addresses itself")
    for key in ("ips", "mac"):
        if conf.runtime_config.get(key):
            raise CniError(Code.UNSUPPORTED_FIELD, f"runtimeConfig.{key} is not supported")
    return conf


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


def request(env: Mapping[str, str], *, need_netns: bool) -> AttachRequest:
    """Return what the environment asks for. A container that is no pod has its id as name. Error: CniError 4."""
    container_id, ifname, netns = (env.get(f"CNI_{key}", "") for key in ("CONTAINERID", "IFNAME", "NETNS"))
    if not _IDENTIFIER.fullmatch(container_id):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_CONTAINERID is not valid: {container_id!r}")
    if not _valid_ifname(ifname):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_IFNAME is not valid: {ifname!r}")
    if need_netns and not netns.startswith("/"):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS is not an absolute path: {netns!r}")
    args = arguments(env.get("CNI_ARGS", ""))
    return AttachRequest(
        container_id=container_id,
        netns=netns,
        ifname=ifname,
        pod_namespace=args.get("K8S_POD_NAMESPACE") or "default",
        pod_name=args.get("K8S_POD_NAME") or container_id,
        pod_uid=args.get("K8S_POD_UID", ""),
    )


def expected_addresses(conf: NetConf, ifname: str, netns: str) -> tuple[Address, ...]:
    """Return the addresses that the former result gives the interface. Error: CniError 7."""
    result = conf.prev_result
    if result is None:
        raise CniError(Code.INVALID_CONFIG, "CHECK needs prevResult")
    ours = [i for i, one in enumerate(result.interfaces) if (one.name, one.sandbox) == (ifname, netns)]
    if not ours:
        raise CniError(Code.INVALID_CONFIG, f"prevResult has no interface {ifname} in {netns}")
    try:
        found = tuple(ip_interface(ip.address).ip for ip in result.ips if ip.interface in ours)
    except ValueError as error:
        raise CniError(Code.INVALID_CONFIG, "prevResult has an address that is none", str(error)) from error
    if not found:
        raise CniError(Code.INVALID_CONFIG, f"prevResult has no address for {ifname}")
    return found
