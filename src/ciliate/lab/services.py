"""What the API server does to a Service: checks it, fills in defaults, gives it addresses and node ports. Pure.

What was given to a Service stays with it when it is applied again. Sources: the Service API reference, KEP-1880 and
KEP-3070 (the lower part of a range is for addresses that users choose).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Final, NoReturn

from ciliate.k8s.manifests import ObjectKey, Raw
from ciliate.lab.topology import SERVICES_V4, SERVICES_V6, Address, LabError

NODE_PORTS: Final = range(30000, 32768)
_STATIC: Final = 256
"""Addresses, and of node ports a third, at the start of a range: chosen by users, not given out."""
_STATIC_PORTS: Final = 86
_PROTOCOLS: Final = ("TCP", "UDP", "SCTP")
_TYPES: Final = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_DEFAULT_TIMEOUT: Final = 10800
_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN: Final = re.compile(r"(?=.{1,253}\.?$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\.?")
_PORT_NAME: Final = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")
_SERVICE_NAME: Final = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(slots=True)
class Allocations:
    """Addresses and node ports that Services have, each with who has it."""

    families: tuple[str, ...]
    """Of the cluster, its first one first: ``IPv4``, ``IPv6``."""
    addresses: dict[Address, str] = field(default_factory=dict)
    ports: dict[int, str] = field(default_factory=dict)

    def note(self, key: ObjectKey, raw: Raw) -> None:
        """Remember what a stored Service has."""
        spec = raw.get("spec") or {}
        for text in spec.get("clusterIPs") or ():
            if text != "None":
                self.addresses[ip_address(text)] = _title(key)
        for number in _node_ports(spec):
            self.ports[number] = _title(key)

    def address(self, family: str, owner: str) -> str:
        """Return a free address. Error: LabError."""
        network = network_of(family)
        for offset in range(_STATIC + 1, network.num_addresses - 1):
            address = network[offset]
            if address not in self.addresses:
                self.addresses[address] = owner
                return str(address)
        raise LabError(f"{owner}: spec.clusterIPs: no address of {network} is free")

    def port(self, owner: str) -> int:
        """Return a free node port. Error: LabError."""
        for number in (*NODE_PORTS[_STATIC_PORTS:], *NODE_PORTS[:_STATIC_PORTS]):
            if number not in self.ports:
                self.ports[number] = owner
                return int(number)
        raise LabError(f"{owner}: spec.ports: no node port is free")


def network_of(family: str) -> IPv4Network | IPv6Network:
    """Return the range of a family's cluster addresses."""
    return SERVICES_V4 if family == "IPv4" else SERVICES_V6


def _title(key: ObjectKey) -> str:
    return f"service {key.namespace}/{key.name}"


def _node_ports(spec: Raw) -> Iterator[int]:
    for one in spec.get("ports") or ():
        if one.get("nodePort"):
            yield int(one["nodePort"])
    if spec.get("healthCheckNodePort"):
        yield int(spec["healthCheckNodePort"])


def admit_all(wanted: Mapping[ObjectKey, Raw], present: Mapping[ObjectKey, Raw], families: tuple[str, ...]) -> dict[
    ObjectKey, Raw
]:  # fmt: skip
    """Return Services as they are stored. ``present``: all others and the former ones. Error: LabError.

    Addresses and ports that are asked for are taken before any are given out, so that the order does not matter.
    """
    allocations = Allocations(families)
    for key, raw in present.items():
        if key not in wanted:
            allocations.note(key, raw)
    admissions = [Admission(key, wanted[key], present.get(key), allocations) for key in sorted(wanted)]
    for one in admissions:
        one.check()
    for one in admissions:
        one.take()
    return {one.key: one.give() for one in admissions}


class Admission:
    """One Service on its way into the store."""

    def __init__(self, key: ObjectKey, raw: Raw, former: Raw | None, allocations: Allocations) -> None:
        self.key = key
        self._raw = raw
        self._title = _title(key)
        self._former: Mapping[str, Any] = (former or {}).get("spec") or {}
        self._all = allocations
        self._spec: dict[str, Any] = {}
        self._families: list[str] = []

    def _fail(self, where: str, problem: str) -> NoReturn:
        raise LabError(f"{self._title}: {where}: {problem}")

    # ---- form and defaults -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Fill in defaults. Error: LabError, which names the field."""
        given = self._raw.get("spec")
        if not isinstance(given, Mapping):
            self._fail("spec", "must be set")
        if not _SERVICE_NAME.fullmatch(self.key.name):
            self._fail("metadata.name", f"{self.key.name!r} is not a DNS label that starts with a letter")
        spec = self._spec = {name: value for name, value in given.items() if value is not None}
        for name, kind in _KINDS.items():
            if name in spec and (not isinstance(spec[name], kind) or (kind is int and isinstance(spec[name], bool))):
                self._fail(f"spec.{name}", f"{spec[name]!r} is not {_WORDS[kind]}")
        spec.setdefault("type", "ClusterIP")
        self._one_of("type", _TYPES)
        self._pairs("selector")
        if spec["type"] == "ExternalName":
            self._check_external_name()
        if "ipFamilyPolicy" in spec:
            self._one_of("ipFamilyPolicy", ("SingleStack", "PreferDualStack", "RequireDualStack"))
        self._merge_cluster_ips()
        self._check_ports()
        self._check_affinity()
        self._check_policies()
        self._check_addresses()

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if self._spec[name] not in known:
            self._fail(f"spec.{name}", f"{self._spec[name]!r} is none of {', '.join(known)}")

    def _pairs(self, name: str) -> None:
        for key, value in self._spec.get(name, {}).items():
            if not isinstance(key, str) or not isinstance(value, str):
                self._fail(f"spec.{name}", f"{key!r}: {value!r}: strings are expected")

    @property
    def _headless(self) -> bool:
        return bool(self._spec.get("clusterIPs") == ["None"])

    @property
    def _has_ips(self) -> bool:
        return str(self._spec["type"]) != "ExternalName"

    def _check_external_name(self) -> None:
        name = self._spec.get("externalName", "")
        if not _SUBDOMAIN.fullmatch(name):
            self._fail("spec.externalName", f"{name!r} is not a DNS name")
        for field_name in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
            if self._spec.get(field_name):
                self._fail(f"spec.{field_name}", "may not be set for ExternalName services")

    def _merge_cluster_ips(self) -> None:
        """``clusterIP`` is the first of ``clusterIPs``."""
        spec = self._spec
        one, several = spec.pop("clusterIP", "") or "", [str(ip) for ip in spec.get("clusterIPs") or []]
        if one and several and several[0] != one:
            self._fail("spec.clusterIPs", f"the first one, {several[0]}, is not clusterIP, {one}")
        several = several or ([one] if one else [])
        if several:
            spec["clusterIPs"] = several
        else:
            spec.pop("clusterIPs", None)
        if "None" in several and (len(several) > 1 or spec["type"] != "ClusterIP"):
            self._fail("spec.clusterIPs", "None may only stand alone, in a service of type ClusterIP")

    # ---- ports -------------------------------------------------------------------------------------------------

    def _check_ports(self) -> None:
        spec = self._spec
        ports = spec.get("ports") or []
        if not ports and self._has_ips and not self._headless:
            self._fail("spec.ports", "must be set")
        filled: list[dict[str, Any]] = []
        for index, one in enumerate(ports):
            where = f"spec.ports[{index}]"
            if not isinstance(one, Mapping):
                self._fail(where, "a mapping is expected")
            filled.append(self._port(where, dict(one), several=len(ports) > 1))
            self._check_unique(where, filled)
        if filled:
            spec["ports"] = filled

    def _port(self, where: str, one: dict[str, Any], *, several: bool) -> dict[str, Any]:
        one.setdefault("protocol", "TCP")
        if one["protocol"] not in _PROTOCOLS:
            self._fail(f"{where}.protocol", f"{one['protocol']!r} is none of {', '.join(_PROTOCOLS)}")
        name = one.get("name") or ""
        if (several or name) and not (isinstance(name, str) and _LABEL.fullmatch(name)):
            self._fail(f"{where}.name", f"{name!r} is not a DNS label" if name else "must be set: there are several")
        if "port" not in one:
            self._fail(f"{where}.port", "must be set")
        self._number(f"{where}.port", one["port"])
        target = one.get("targetPort") or one["port"]
        if isinstance(target, str):
            if not _PORT_NAME.fullmatch(target):
                self._fail(f"{where}.targetPort", f"{target!r} is not a port's name (a-z, 0-9, -; 15 at most)")
        else:
            self._number(f"{where}.targetPort", target)
        one["targetPort"] = target
        if node_port := one.get("nodePort"):
            self._number(f"{where}.nodePort", node_port)
            if self._spec["type"] not in ("NodePort", "LoadBalancer"):
                self._fail(f"{where}.nodePort", f"may not be used when type is {self._spec['type']}")
        else:
            one.pop("nodePort", None)
        return one

    def _number(self, where: str, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
            self._fail(where, f"{value!r} is not in 1..65535")

    def _check_unique(self, where: str, ports: list[dict[str, Any]]) -> None:
        *others, last = ports
        for one in others:
            if last.get("name") and one.get("name") == last["name"]:
                self._fail(f"{where}.name", f"{last['name']!r} is there twice")
            if one["protocol"] == last["protocol"]:
                if one["port"] == last["port"]:
                    self._fail(where, f"{last['protocol']} port {last['port']} is there twice")
                if last.get("nodePort") and one.get("nodePort") == last["nodePort"]:
                    self._fail(f"{where}.nodePort", f"{last['nodePort']} is there twice")

    # ---- the rest ----------------------------------------------------------------------------------------------

    def _check_affinity(self) -> None:
        spec = self._spec
        spec.setdefault("sessionAffinity", "None")
        self._one_of("sessionAffinity", ("None", "ClientIP"))
        config = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
        if spec["sessionAffinity"] == "None":
            if spec.get("sessionAffinityConfig"):
                self._fail("spec.sessionAffinityConfig", "may not be set when sessionAffinity is None")
            return
        seconds = config.get("timeoutSeconds", _DEFAULT_TIMEOUT)
        if not isinstance(seconds, int) or isinstance(seconds, bool) or not 1 <= seconds <= 86400:
            self._fail("spec.sessionAffinityConfig.clientIP.timeoutSeconds", f"{seconds!r} is not in 1..86400")
        spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": seconds}}

    def _check_policies(self) -> None:
        spec = self._spec
        if self._has_ips:
            spec.setdefault("internalTrafficPolicy", "Cluster")
            self._one_of("internalTrafficPolicy", ("Cluster", "Local"))
        outward = spec["type"] in ("NodePort", "LoadBalancer")
        if outward or spec.get("externalIPs"):
            spec.setdefault("externalTrafficPolicy", "Cluster")
        if "externalTrafficPolicy" in spec:
            self._one_of("externalTrafficPolicy", ("Cluster", "Local"))
            if not outward and not spec.get("externalIPs"):
                self._fail("spec.externalTrafficPolicy", "may only be set for services that are reached from outside")
        if "trafficDistribution" in spec:
            self._one_of("trafficDistribution", ("PreferClose", "PreferSameZone", "PreferSameNode"))
        if spec["type"] == "LoadBalancer":
            spec.setdefault("allocateLoadBalancerNodePorts", True)
            return
        for name in ("loadBalancerClass", "loadBalancerIP", "loadBalancerSourceRanges"):
            if spec.get(name):
                self._fail(f"spec.{name}", "may only be used when type is LoadBalancer")
        if "allocateLoadBalancerNodePorts" in spec:
            self._fail("spec.allocateLoadBalancerNodePorts", "may only be used when type is LoadBalancer")

    def _check_addresses(self) -> None:
        for index, text in enumerate(self._spec.get("externalIPs") or ()):
            where = f"spec.externalIPs[{index}]"
            address = self._address(where, text)
            if address.is_unspecified or address.is_loopback or address.is_link_local or address.is_multicast:
                self._fail(where, f"{text} may not be unspecified, loopback, link-local or multicast")
        for index, text in enumerate(self._spec.get("loadBalancerSourceRanges") or ()):
            try:
                ip_network(str(text).strip(), strict=False)
            except ValueError:
                self._fail(f"spec.loadBalancerSourceRanges[{index}]", f"{text!r} is not a prefix such as 10.0.0.0/8")

    def _address(self, where: str, text: object) -> Address:
        try:
            return ip_address(str(text))
        except ValueError:
            self._fail(where, f"{text!r} is not an address")

    # ---- what is given out -------------------------------------------------------------------------------------

    def take(self) -> None:
        """Take the addresses and ports that are asked for, or were given before. Error: LabError."""
        if self._has_ips:
            self._keep_former_ips()
            self._choose_families()
            self._take_ips()
        self._keep_former_ports()
        self._take_ports()

    def _keep_former_ips(self) -> None:
        """Addresses stay as long as the Service is; a headless one stays headless."""
        former = list(self._former.get("clusterIPs") or ())
        if not former:
            return
        given = list(self._spec.get("clusterIPs") or ())
        for index, (one, before) in enumerate(zip(given, former, strict=False)):
            if one != before:
                self._fail(f"spec.clusterIPs[{index}]", f"it is {before} and may not change; delete the service first")
        families = self._spec.get("ipFamilies") or []
        if families and families[0] != self._former["ipFamilies"][0]:
            self._fail("spec.ipFamilies[0]", f"it is {self._former['ipFamilies'][0]} and may not change")
        both = self._spec.get("ipFamilyPolicy", "SingleStack") != "SingleStack" or len(families) > 1
        self._spec["clusterIPs"] = given if len(given) > 1 else former[: 2 if both else 1]

    def _choose_families(self) -> None:
        spec, known = self._spec, self._all.families
        asked = list(spec.get("ipFamilies") or ())
        if len(asked) > 2 or len(set(asked)) != len(asked) or not set(asked) <= {"IPv4", "IPv6"}:
            self._fail("spec.ipFamilies", f"{asked} is not one or both of IPv4, IPv6")
        ips = [] if self._headless else [self._address(f"spec.clusterIPs[{index}]", one)
                                         for index, one in enumerate(spec.get("clusterIPs") or ())]  # fmt: skip
        if len(ips) > 2 or len({one.version for one in ips}) != len(ips):
            self._fail("spec.clusterIPs", "there may be one address of each family")
        for index, one in enumerate(ips):
            if len(asked) > index and asked[index] != f"IPv{one.version}":
                self._fail(f"spec.clusterIPs[{index}]", f"{one} is not of the family {asked[index]}")
        families = asked + [f"IPv{one.version}" for one in ips[len(asked) :]]
        elsewhere = self._headless and not spec.get("selector")
        if elsewhere:
            spec.setdefault("ipFamilyPolicy", "RequireDualStack")
        policy = spec.setdefault("ipFamilyPolicy", "RequireDualStack" if len(families) > 1 else "SingleStack")
        if policy == "SingleStack" and len(families) > 1:
            self._fail("spec.ipFamilyPolicy", f"SingleStack does not go with {' and '.join(families)}")
        if policy == "RequireDualStack" and len(known) < 2 and not elsewhere:
            self._fail("spec.ipFamilyPolicy", f"this cluster has {known[0]} only")
        for family in families:
            if family not in known and not elsewhere:
                self._fail("spec.ipFamilies", f"this cluster has no {family}")
        families = families or [known[0]]
        if policy != "SingleStack" and (len(known) > 1 or elsewhere):
            families += [one for one in ("IPv4", "IPv6") if one not in families]
        spec["ipFamilies"] = self._families = families

    def _take_ips(self) -> None:
        if self._headless:
            return
        for index, text in enumerate(self._spec.get("clusterIPs") or ()):
            where, address = f"spec.clusterIPs[{index}]", ip_address(text)
            network = network_of(f"IPv{address.version}")
            if address not in network or address in (network[0], network[-1]):
                self._fail(where, f"{text} is not in the range of cluster addresses, {network}")
            if holder := self._all.addresses.get(address):
                self._fail(where, f"{text} is taken by {holder}")
            self._all.addresses[address] = self._title

    @property
    def _wants_node_ports(self) -> bool:
        kind = str(self._spec["type"])
        return kind == "NodePort" or (kind == "LoadBalancer" and bool(self._spec["allocateLoadBalancerNodePorts"]))

    @property
    def _wants_health_port(self) -> bool:
        return bool(self._spec["type"] == "LoadBalancer" and self._spec["externalTrafficPolicy"] == "Local")

    def _keep_former_ports(self) -> None:
        if self._wants_node_ports:
            had = {(one["protocol"], one["port"]): one.get("nodePort") for one in self._former.get("ports") or ()}
            for one in self._spec["ports"]:
                number = one.get("nodePort") or had.get((one["protocol"], one["port"]))
                if number:
                    one["nodePort"] = number
        port, former = self._spec.get("healthCheckNodePort"), self._former.get("healthCheckNodePort")
        if port and not self._wants_health_port:
            self._fail("spec.healthCheckNodePort",
                       "may only be set when type is LoadBalancer and externalTrafficPolicy is Local")  # fmt: skip
        if port and former and port != former and self._former.get("externalTrafficPolicy") == "Local":
            self._fail("spec.healthCheckNodePort", f"it is {former} and may not change")
        if self._wants_health_port and (port or former):
            self._spec["healthCheckNodePort"] = port or former

    def _take_ports(self) -> None:
        """A number may be of two ports of one Service, if their protocols differ."""
        mine: set[int] = set()
        asked = [(f"spec.ports[{index}].nodePort", one.get("nodePort"))
                 for index, one in enumerate(self._spec.get("ports") or ())]  # fmt: skip
        asked.append(("spec.healthCheckNodePort", self._spec.get("healthCheckNodePort")))
        for where, number in asked:
            if not number or number in mine:
                continue
            if number not in NODE_PORTS:
                self._fail(where, f"{number} is not in the range of node ports, {NODE_PORTS[0]}-{NODE_PORTS[-1]}")
            if holder := self._all.ports.get(number):
                self._fail(where, f"{number} is taken by {holder}")
            self._all.ports[number] = self._title
            mine.add(number)

    def give(self) -> Raw:
        """Return the Service as it is stored: what it still lacks is given to it. Error: LabError."""
        spec = self._spec
        if self._has_ips:
            ips = list(spec.get("clusterIPs") or ())
            if not self._headless:
                ips += [self._all.address(family, self._title) for family in self._families[len(ips) :]]
            spec["clusterIP"], spec["clusterIPs"] = ips[0], ips
        if self._wants_node_ports:
            for one in spec["ports"]:
                one.setdefault("nodePort", 0)
                one["nodePort"] = one["nodePort"] or self._all.port(self._title)
        if self._wants_health_port and not spec.get("healthCheckNodePort"):
            spec["healthCheckNodePort"] = self._all.port(self._title)
        return {**self._raw, "spec": spec}


_KINDS: Final[Mapping[str, type]] = {
    "type": str, "clusterIP": str, "clusterIPs": list, "ports": list, "selector": dict, "externalIPs": list,
    "sessionAffinity": str, "sessionAffinityConfig": dict, "externalName": str, "externalTrafficPolicy": str,
    "internalTrafficPolicy": str, "healthCheckNodePort": int, "publishNotReadyAddresses": bool, "ipFamilies": list,
    "ipFamilyPolicy": str, "allocateLoadBalancerNodePorts": bool, "loadBalancerClass": str, "loadBalancerIP": str,
    "loadBalancerSourceRanges": list, "trafficDistribution": str,
}  # fmt: skip
_WORDS: Final[Mapping[type, str]] = {
    str: "a string", int: "a number", bool: "true or false", list: "a list", dict: "a mapping",
}  # fmt: skip
