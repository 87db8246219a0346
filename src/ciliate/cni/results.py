"""Results and errors as text, in the format of the version that the configuration names."""

from typing import Any, Final

import msgspec

from ciliate.cni.netconf import NetConf
from ciliate.cni.protocol import VERSIONS, Attachment, AttachRequest, CniError, Reply

_SCOPE_LINK: Final = 253
"""Scope of a route to something on the link, as the specification and rtnetlink number it."""


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


def success(conf: NetConf, request: AttachRequest, attachment: Attachment) -> Reply:
    """Return ADD's result: what earlier plugins of the list gave, and the attachment after it.

    Before 1.0.0 an address had to name its family (``version``); since 1.1.0 an interface has an ``mtu`` and a route a
    ``scope``.
    """
    newest = at_least(conf.version, "1.1.0")
    before = conf.prev or {}
    host: dict[str, Any] = {"name": attachment.host_device, "mac": attachment.host_mac}
    inside: dict[str, Any] = {"name": request.ifname, "mac": attachment.mac, "sandbox": request.netns}
    if newest:
        host["mtu"] = inside["mtu"] = attachment.mtu
    interfaces = [*before.get("interfaces", ()), host, inside]
    ips, routes = list(before.get("ips", ())), list(before.get("routes", ()))
    for address, gateway in zip(attachment.addresses, attachment.gateways, strict=True):
        family = {} if at_least(conf.version, "1.0.0") else {"version": str(address.version)}
        whole = f"{address}/{address.max_prefixlen}"
        ips.append({**family, "address": whole, "gateway": str(gateway), "interface": len(interfaces) - 1})
    for route in attachment.routes:
        one: dict[str, Any] = {"dst": str(route.destination)}
        if route.gateway is not None:
            one["gw"] = str(route.gateway)
        elif newest:
            one["scope"] = _SCOPE_LINK
        routes.append(one)
    document = {
        **before,
        "cniVersion": conf.version,
        "interfaces": interfaces,
        "ips": ips,
        "routes": routes,
        "dns": conf.dns or before.get("dns") or {},
    }
    return Reply(exit_code=0, stdout=text(document))
