"""The agent's configuration: file and flags, and what is refused."""

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from ciliate.daemon.config import ConfigError, arguments, build

VALID = {
    "node_name": "n1",
    "device": "eth0",
    "bpffs": "/b",
    "manifests_dir": "/m",
    "kvstore_dir": "/k",
    "node_ips": "172.30.0.1,fd00:30::1",
    "pod_cidrs": ["10.1.0.0/24", "fd00:10::/64"],
}


def test_values_are_read() -> None:
    config = build(VALID | {"cluster_id": "7", "masquerade": "false", "map_sizes": "ct=1024,nat=2048"})
    assert config.node_ips == (ip_address("172.30.0.1"), ip_address("fd00:30::1"))
    assert config.pod_cidrs == (ip_network("10.1.0.0/24"), ip_network("fd00:10::/64"))
    assert (config.cluster_id, config.masquerade, config.map_sizes) == (7, False, {"ct": 1024, "nat": 2048})
    assert config.socket == Path("/run/ciliate/ciliate.sock")


def test_options_of_services_are_read() -> None:
    config = build(VALID | {"node_port_range": "20000-20100", "lb_mode": "dsr", "maglev_table_size": "251"})
    assert (config.node_port_range, config.lb_mode, config.maglev_table_size) == ((20000, 20100), "dsr", 251)
    assert (config.kube_proxy_replacement, config.lb_algorithm) == (True, "random")
    assert build(VALID | {"kube_proxy_replacement": "false"}).kube_proxy_replacement is False


def test_a_family_that_is_off_has_no_range() -> None:
    assert build(VALID | {"ipv6": False}).cidrs() == (ip_network("10.1.0.0/24"),)


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    lines = [f"{key.replace('_', '-')}: {value!r}" for key, value in VALID.items()]
    file.write_text("\n".join([*lines, "cluster-name: blue", "tunnel-port: 1000"]))
    config = arguments(["--config", str(file), "--tunnel-port", "2000"])
    assert (config.cluster_name, config.tunnel_port) == ("blue", 2000)


def test_sockets_are_given_backends_by_the_cgroup_that_is_found_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    (mounted / "cgroup.procs").touch()
    monkeypatch.setattr("ciliate.daemon.config.find_mount", lambda: mounted)
    assert build(VALID).socket_lb == "all"
    assert build(VALID).socket_cgroup() == mounted
    assert build(VALID | {"socket_lb": "host"}).socket_cgroup() == mounted
    for off in ("off", False):
        assert build(VALID | {"socket_lb": off}).socket_cgroup() is None
    with pytest.raises(ConfigError, match="no cgroup v2 directory"):
        build(VALID | {"cgroup_root": str(tmp_path)}).socket_cgroup()
    monkeypatch.setattr("ciliate.daemon.config.find_mount", lambda: None)
    assert build(VALID | {"cgroup_root": str(mounted)}).socket_cgroup() == mounted
    with pytest.raises(ConfigError, match="cgroup-root: no cgroup v2 hierarchy is mounted"):
        build(VALID).socket_cgroup()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodename": "x"}, "unknown option: nodename"),
        ({"node_name": None}, "not set: node-name"),
        ({"cluster_id": "256"}, "cluster-id: 256 is not in 0..255"),
        ({"cluster_name": "Blue"}, "cluster-name"),
        ({"routing_mode": "bgp"}, "routing-mode: 'bgp' is neither tunnel nor native"),
        ({"pod_cidrs": "10.1.0.0/24"}, "pod-cidrs: no IPv6 range"),
        ({"pod_cidrs": "10.1.0.0/33"}, "pod-cidrs: '10.1.0.0/33' is not valid"),
        ({"node_ips": "10.0.0.1,10.0.0.2"}, "node-ips: more than one of a family"),
        ({"ipv4": False, "ipv6": False}, "ipv4, ipv6: one of them must be on"),
        ({"ipv4": "maybe"}, "ipv4: 'maybe' is not valid"),
        ({"socket_lb": "pods"}, "socket-lb: 'pods' is neither all, host nor off"),
        ({"tunnel_port": 0}, "tunnel-port: 0 is not in 1..65535"),
        ({"node_port_range": "30000"}, "node-port-range: '30000' is not valid"),
        ({"node_port_range": "40000-30000"}, "node-port-range: 40000-30000 is no range"),
        ({"lb_algorithm": "leastconn"}, "lb-algorithm: 'leastconn' is not valid"),
        ({"lb_mode": "hybrid"}, "lb-mode: 'hybrid' is not valid"),
        ({"maglev_table_size": "1000"}, "maglev-table-size: 1000 is none of 251, "),
        ({"kube_proxy_replacement": "partial"}, "kube-proxy-replacement: 'partial' is not valid"),
    ],
)
def test_bad_values_name_the_option(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build(VALID | change)


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("a: [")
    with pytest.raises(ConfigError, match=str(file)):
        arguments(["--config", str(file)])
    with pytest.raises(ConfigError, match="No such file"):
        arguments(["--config", str(tmp_path / "none.yaml")])
