"""Results and errors as text, in the format of the version that the configuration names."""

from typing import Any

import msgspec

from ciliate.cni.protocol import VERSIONS, Attachment, AttachRequest, CniError, Reply

_DEFAULT = {4: "0.0.0.0/0", 6: "::/0"}


def at_least(version: str, other: str) -> bool:
    """Whether a supported version is ``other`` or later."""
    return VERSIONS.index(version) >= VERSIONS.index(other)


def text(document: Any) -> str:
    """Return a document as a line of JSON."""
    return msgspec.json.encode(document).decode() + "\n"


def error(version: str, failure: CniError) -> Reply:
    """Return an error as the specification wants it."""
    document: dict[str, Any] = {"cniVersion": version, "code": int(failure.code), "msg": failure.message}
    if failure.details:
        document["details"] = failure.details
    return Reply(exit_code=1, stdout=text(document))


def success(version: str, request: AttachRequest, attachment: Attachment) -> Reply:
    """Return ADD's result.

    Before 1.0.0 an address had to name its family (``version``); since 1.1.0 an interface may have an ``mtu``.
    """
    inside: dict[str, Any] = {"name": request.ifname, "mac": attachment.mac, "sandbox": request.netns}
    if at_least(version, "1.1.0"):
        inside["mtu"] = attachment.mtu
    ips, routes = [], []
    for address, gateway in zip(attachment.addresses, attachment.gateways, strict=True):
        family = {} if at_least(version, "1.0.0") else {"version": str(address.version)}
        whole = f"{address}/{address.max_prefixlen}"
        ips.append({**family, "address": whole, "gateway": str(gateway), "interface": 1})
        routes.append({"dst": _DEFAULT[address.version], "gw": str(gateway)})
    document = {
        "cniVersion": version,
        "interfaces": [{"name": attachment.host_device, "mac": attachment.host_mac}, inside],
        "ips": ips,
        "routes": routes,
        "dns": {},
    }
    return Reply(exit_code=0, stdout=text(document))
