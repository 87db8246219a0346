"""The agent's configuration: a YAML file whose keys are also flags; a flag wins."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from ciliate.datapath.cgroupfs import find_mount
from ciliate.loadbalancer.model import Algorithm, Forwarding

_CLUSTER: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?")
Network = IPv4Network | IPv6Network


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What a node's agent is told. Paths are absolute; ``node_ips`` has at most one address of each family."""

    node_name: str
    device: str
    bpffs: Path
    manifests_dir: Path
    kvstore_dir: Path
    node_ips: tuple[IPv4Address | IPv6Address, ...]
    pod_cidrs: tuple[Network, ...]
    cluster_name: str = "default"
    cluster_id: int = 0
    state_dir: Path = Path("/var/lib/ciliate")
    run_dir: Path = Path("/run/ciliate")
    ipv4: bool = True
    ipv6: bool = True
    routing_mode: Literal["tunnel", "native"] = "tunnel"
    masquerade: bool = True
    tunnel_port: int = 8472
    kube_proxy_replacement: bool = True
    node_port_range: tuple[int, int] = (30000, 32767)
    lb_algorithm: Algorithm = Algorithm.RANDOM
    lb_mode: Forwarding = Forwarding.SNAT
    maglev_table_size: int = 16381
    api_servers: tuple[tuple[IPv4Address | IPv6Address, int], ...] = ()
    socket_lb: Literal["all", "host", "off"] = "all"
    cgroup_root: Path | None = None
    xdp: Literal["off", "auto", "native", "generic"] = "off"
    prometheus_serve_addr: tuple[str, int] | None = None
    cni_conf_dir: Path | None = None
    cni_bin_dir: Path | None = None
    cni_plugin: Path | None = None
    map_sizes: Mapping[str, int]

    @property
    def socket(self) -> Path:
        """Where the agent's API listens."""
        return self.run_dir / "ciliate.sock"

    @property
    def proxy_socket(self) -> Path:
        """Where ``ciliate-proxyd`` listens."""
        return self.run_dir / "proxyd.sock"

    def socket_cgroup(self) -> Path | None:
        """Return the cgroup whose sockets are given backends; None: no socket is. Errors: ConfigError, OSError."""
        if self.socket_lb == "off":
            return None
        found = self.cgroup_root or find_mount()
        if found is None:
            raise ConfigError(
                "cgroup-root: no cgroup v2 hierarchy is mounted, and sockets get their backends by their cgroup: "
                "mount one (mount -t cgroup2 none /sys/fs/cgroup/unified), or set socket-lb: off"
            )
        if not (found / "cgroup.procs").is_file():
            raise ConfigError(f"cgroup-root: {found} is no cgroup v2 directory")
        return found

    def node_ip(self, version: int) -> Any:
        """Return the node's address of a family, or None."""
        return next((a for a in self.node_ips if a.version == version), None)

    def cidrs(self) -> tuple[Network, ...]:
        """Return the pod CIDRs of the families that are on."""
        return tuple(c for c in self.pod_cidrs if (self.ipv4 if c.version == 4 else self.ipv6))


MAGLEV_SIZES: Final = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
"""Primes; about a hundred positions a backend keep shares even. Source: Cilium's `loadBalancer.maglev.tableSize`."""
_HELP: Final[Mapping[str, str]] = {
    "node_name": "name of this node, as in `spec.nodeName` of its pods",
    "device": "underlay interface, for example eth0",
    "bpffs": "mounted bpffs of this node alone: the datapath is pinned there",
    "manifests_dir": "directory of Kubernetes objects (*.yaml, *.json): pods, namespaces, policies",
    "kvstore_dir": "directory that all nodes of the cluster share: identities, addresses, nodes",
    "node_ips": "addresses of this node, one of each family, comma-separated",
    "pod_cidrs": "ranges this node's pods get their addresses from, one of each family, comma-separated",
    "cluster_name": "name of the cluster (default: default)",
    "cluster_id": "number of the cluster, 0 to 255 (default: 0)",
    "state_dir": "what must survive a restart (default: /var/lib/ciliate)",
    "run_dir": "where ciliate.sock and proxyd.sock are (default: /run/ciliate)",
    "ipv4": "pods have IPv4 addresses (default: true)",
    "ipv6": "pods have IPv6 addresses (default: true)",
    "routing_mode": "tunnel (VXLAN) or native (default: tunnel)",
    "masquerade": "pods leave the cluster with the node's address (default: true)",
    "tunnel_port": "UDP port of the overlay (default: 8472)",
    "kube_proxy_replacement": "serve Services; false: kube-proxy does (default: true)",
    "node_port_range": "ports of services of type NodePort and LoadBalancer, as the API server has them "
    "(default: 30000-32767)",
    "lb_algorithm": "how a connection is given its backend where a service does not say: random or maglev "
    "(default: random)",
    "lb_mode": "how connections from outside reach backends on other nodes where a service does not say: snat, or dsr "
    "(the backend's node answers the client itself) (default: snat)",
    "maglev_table_size": f"positions of a Maglev table, the same on all nodes: {', '.join(map(str, MAGLEV_SIZES))} "
    "(default: 16381)",
    "api_servers": "Kubernetes API servers, ADDRESS:PORT, comma-separated: no node policy keeps this node from them, "
    "and one that cuts them off all the same is taken back",
    "socket_lb": "whose sockets are given their backend when they connect to a service: all, host (not those of pods: "
    "their packets are translated), or off (the node's own processes reach no service) (default: all)",
    "cgroup_root": "cgroup v2 directory that all processes of the node and its pods are below "
    "(default: where the hierarchy is mounted)",
    "xdp": "where known connections from outside are sent on to backends of other nodes, with routing-mode native: off "
    "(in tc), native (in the driver), generic, or auto (native where the driver can) (default: off)",
    "prometheus_serve_addr": "ADDRESS:PORT on which /metrics answers; no ADDRESS: all (:9962 is usual) "
    "(default: only on the agent's socket)",
    "cni_conf_dir": "install the CNI configuration here once the agent is ready",
    "cni_bin_dir": "install the CNI plugin here, from --cni-plugin",
    "cni_plugin": "the plugin's executable, ciliate-cni",
    "map_sizes": "rows of BPF maps by name, for example ct=65536,nat=65536",
}
_TYPES: Final = {field.name: field.type for field in fields(AgentConfig)}


def arguments(argv: Sequence[str] | None = None) -> AgentConfig:
    """Return the configuration of a command line. Error: ConfigError; ``--help`` exits."""
    parser = argparse.ArgumentParser(
        prog="ciliated",
        description="The Ciliate agent of one node: wires pods, enforces policies, keeps the node's datapath.",
        epilog="Every option may stand in the --config file (YAML) under its name without dashes in front. "
        "State is reconciled with what runs: a restart breaks no connection.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any of the options below")
    for name, text in _HELP.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=text)
    given = vars(parser.parse_args(argv))
    path = given.pop("config")
    values = _file(path) if path else {}
    values |= {name: value for name, value in given.items() if value is not None}
    return build(values)


def _file(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path}: a mapping of options is expected")
    return {str(key).replace("-", "_"): value for key, value in document.items()}


def build(values: Mapping[str, Any]) -> AgentConfig:
    """Return the configuration of plain values (strings, or what YAML has). Error: ConfigError."""
    if unknown := sorted(values.keys() - _HELP.keys()):
        raise ConfigError(f"unknown option: {', '.join(unknown).replace('_', '-')}")
    read = {name: _read(name, value) for name, value in values.items() if value is not None}
    required = ("node_name", "device", "bpffs", "manifests_dir", "kvstore_dir", "node_ips", "pod_cidrs")
    if missing := [name.replace("_", "-") for name in required if name not in read]:
        raise ConfigError(f"not set: {', '.join(missing)}")
    config = AgentConfig(**({"map_sizes": {}} | read))
    _check(config)
    return config


def _read(name: str, value: Any) -> Any:
    option = name.replace("_", "-")
    try:
        match name:
            case "ipv4" | "ipv6" | "masquerade" | "kube_proxy_replacement":
                return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
            case "cluster_id" | "tunnel_port" | "maglev_table_size":
                return int(value)
            case "node_port_range":
                low, _, high = str(value).partition("-")
                return int(low), int(high)
            case "prometheus_serve_addr":
                return _listener(str(value))
            case "lb_algorithm":
                return Algorithm(str(value))
            case "lb_mode":
                return Forwarding(str(value))
            case "node_ips":
                return tuple(ip_address(one) for one in _listed(value))
            case "api_servers":
                return tuple(_endpoint(one) for one in _listed(value))
            case "pod_cidrs":
                return tuple(ip_network(one) for one in _listed(value))
            case "map_sizes":
                if isinstance(value, Mapping):
                    return {str(key): int(size) for key, size in value.items()}
                return {key: int(size) for key, _, size in (one.partition("=") for one in _listed(value))}
            case "socket_lb" | "xdp":
                return {True: "all", False: "off"}.get(value, str(value))  # YAML 1.1 reads `off` as false
            case "node_name" | "device" | "cluster_name" | "routing_mode":
                return str(value)
            case _:
                return Path(str(value)).absolute()
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{option}: {value!r} is not valid ({error})") from error


def _endpoint(text: str) -> tuple[IPv4Address | IPv6Address, int]:
    address, _, port = text.rpartition(":")
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"{port} is not in 1..65535")
    return ip_address(address.strip("[]")), int(port)


def _listener(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"{port} is not in 1..65535")
    return str(ip_address(address.strip("[]"))) if address else "", int(port)


def _listed(value: Any) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else list(value)
    return [str(part).strip() for part in parts if str(part).strip()]


def _check(config: AgentConfig) -> None:
    if not config.ipv4 and not config.ipv6:
        raise ConfigError("ipv4, ipv6: one of them must be on")
    if config.routing_mode not in ("tunnel", "native"):
        raise ConfigError(f"routing-mode: {config.routing_mode!r} is neither tunnel nor native")
    if config.socket_lb not in ("all", "host", "off"):
        raise ConfigError(f"socket-lb: {config.socket_lb!r} is neither all, host nor off")
    if config.xdp not in ("off", "auto", "native", "generic"):
        raise ConfigError(f"xdp: {config.xdp!r} is neither off, auto, native nor generic")
    if not 0 <= config.cluster_id <= 255:
        raise ConfigError(f"cluster-id: {config.cluster_id} is not in 0..255")
    if not _CLUSTER.fullmatch(config.cluster_name):
        raise ConfigError(f"cluster-name: {config.cluster_name!r} must be up to 32 lower case letters, digits and -")
    if config.cni_bin_dir is not None and (config.cni_plugin is None or not config.cni_plugin.is_file()):
        raise ConfigError("cni-plugin: must be the path of ciliate-cni, because cni-bin-dir is set")
    if not 1 <= config.tunnel_port <= 65535:
        raise ConfigError(f"tunnel-port: {config.tunnel_port} is not in 1..65535")
    _check_services(config)
    for what, versions in (
        ("node-ips", [a.version for a in config.node_ips]),
        ("pod-cidrs", [c.version for c in config.pod_cidrs]),
    ):
        if len(versions) != len(set(versions)):
            raise ConfigError(f"{what}: more than one of a family")
    for version, on in ((4, config.ipv4), (6, config.ipv6)):
        if on and not any(c.version == version for c in config.pod_cidrs):
            raise ConfigError(f"pod-cidrs: no IPv{version} range, though ipv{version} is on")


def _check_services(config: AgentConfig) -> None:
    low, high = config.node_port_range
    if not 1 <= low <= high <= 65535:
        raise ConfigError(f"node-port-range: {low}-{high} is no range in 1..65535")
    if config.maglev_table_size not in MAGLEV_SIZES:
        sizes = ", ".join(map(str, MAGLEV_SIZES))
        raise ConfigError(f"maglev-table-size: {config.maglev_table_size} is none of {sizes}")
