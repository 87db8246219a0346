"""A node with a real agent, wired by the real plugin; all in namespaces of the test's own."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from ciliate.cni.conflist import CONFLIST
from ciliate.datapath.maps import Map
from ciliate.datapath.netlink import in_netns
from ciliate.kvstore.identities import VALUES

T = TypeVar("T")
RELAY: Final = Path(__file__).resolve().parents[2] / "cni-relay/ciliate-cni"
NODE_IPS: Final = {4: "192.0.2.1", 6: "2001:db8::1"}
OUTSIDE_IPS: Final = {4: "192.0.2.254", 6: "2001:db8::fe"}
METRICS: Final = 9962
LOCKS: Final = {".locks", "locks"}


def until(condition: Callable[[], T], what: str, seconds: float = 60) -> T:
    """Return a condition's first true value. Error: AssertionError."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not after {seconds:g} s: {what}"
        time.sleep(0.02)
    return value


def namespaces(*lines: str) -> None:
    """Run ``ip netns`` commands."""
    script = "".join(f"netns {line}\n" for line in lines)
    subprocess.run(["ip", "-batch", "-"], input=script, text=True, check=True, capture_output=True)


class Netns:
    """A network namespace."""

    def __init__(self, stack: ExitStack, name: str) -> None:
        self.name = f"cni-{os.getpid()}-{name}"
        self.path = Path("/run/netns") / self.name
        namespaces(f"add {self.name}")
        stack.callback(self.remove)

    def remove(self) -> None:
        if self.path.exists():
            namespaces(f"del {self.name}")

    def run(self, *command: str) -> str:
        """Return the output of a command here."""
        whole = ["ip", "netns", "exec", self.name, *command]
        return subprocess.run(whole, check=True, text=True, stdout=subprocess.PIPE).stdout

    def do(self, work: Callable[[], T]) -> T:
        """Call ``work`` here."""
        return in_netns(self.path, work)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class CniFailure(Exception):
    """The plugin's error."""

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__(str(document))
        self.code = document["code"]


class Node:
    """A node. Its agent can be started, stopped and killed; the node's state stays."""

    def __init__(self, stack: ExitStack, name: str, cidrs: Iterable[str] = ("10.1.0.0/20", "fd00:10:1::/112")) -> None:
        self.netns = Netns(stack, name)
        self.outside = Netns(stack, f"{name}-outside")
        self._underlay()
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ciliate-cni-")))
        self.bpffs = self.folder / "bpf"
        self.bpffs.mkdir()
        subprocess.run(["mount", "-t", "bpf", "cni-test", self.bpffs], check=True)
        stack.callback(subprocess.run, ["umount", "-l", self.bpffs], check=True)
        (self.folder / "manifests").mkdir()
        self.socket = self.folder / "run/ciliate.sock"
        self.conf_dir, self.bin_dir = self.folder / "net.d", self.folder / "bin"
        self._config = self.folder / "agent.yaml"
        self._config.write_text(yaml.safe_dump(self._options(list(cidrs))))
        self._process: subprocess.Popen[bytes] | None = None
        stack.callback(self.stop)

    def _underlay(self) -> None:
        pair = ["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.outside.name]
        subprocess.run(["ip", "-n", self.netns.name, *pair], check=True)
        for one, addresses in ((self.netns, NODE_IPS), (self.outside, OUTSIDE_IPS)):
            lines = ["link set lo up", "link set eth0 up", f"address add {addresses[4]}/24 dev eth0"]
            lines += [f"address add {addresses[6]}/64 dev eth0 nodad"]
            script = "\n".join(lines)
            subprocess.run(["ip", "-n", one.name, "-batch", "-"], input=script, text=True, check=True)

    def _options(self, cidrs: list[str]) -> dict[str, Any]:
        return {
            "node-name": "n1",
            "device": "eth0",
            "bpffs": str(self.bpffs),
            "manifests-dir": str(self.folder / "manifests"),
            "kvstore-dir": str(self.folder / "kvstore"),
            "state-dir": str(self.folder / "state"),
            "run-dir": str(self.folder / "run"),
            "node-ips": list(NODE_IPS.values()),
            "pod-cidrs": cidrs,
            "socket-lb": "off",
            "prometheus-serve-addr": f":{METRICS}",
            "cni-conf-dir": str(self.conf_dir),
            "cni-bin-dir": str(self.bin_dir),
            "cni-plugin": str(RELAY),
        }

    # ---- the agent ------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the agent; do not wait for it."""
        executable = str(Path(sys.executable).parent / "ciliated")
        with (self.folder / "agent.log").open("ab") as log:
            command = ["ip", "netns", "exec", self.netns.name, executable, "--config", str(self._config)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def start(self) -> None:
        """Start the agent; return when pods can be wired."""
        self.launch()
        self.ready()

    def ready(self) -> None:
        """Return when pods can be wired, and a runtime can know it."""

        def asked() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self.log()
            try:
                return bool(self.get("/v1/healthz")["ready"])
            except (OSError, http.client.HTTPException):
                return False

        until(asked, "the agent is ready", 120)
        until((self.conf_dir / CONFLIST).exists, "the configuration is installed")

    def end(self, number: signal.Signals) -> None:
        """End the agent by a signal; return when it has ended."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(30)
        self._process = None

    def stop(self) -> None:
        """End the agent if it runs."""
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGTERM)
        self._process = None

    def log(self) -> str:
        """Return the end of the agent's log."""
        return (self.folder / "agent.log").read_text()[-4000:]

    def _request(self, method: str, path: str) -> Any:
        connection = _Connection(self.socket)
        try:
            connection.request(method, path)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """Return what the agent's API answers. Errors: OSError, HTTPException."""
        return self._request("GET", path)

    def apply(self, name: str, *objects: dict[str, Any]) -> None:
        """Write a manifest in one step; return when it is enforced."""
        new = self.folder / "new"
        new.write_text(yaml.safe_dump_all(objects))
        new.replace(self.folder / f"manifests/{name}.yaml")
        states = self._request("POST", "/v1/sync")
        assert not states["problems"], states

    # ---- the plugin -----------------------------------------------------------------------------------------------

    def cni(self, command: str, container: str, netns: Path | str = "", **more: Any) -> dict[str, Any]:
        """Call the plugin as a runtime does; return its result. Error: CniFailure."""
        conf = {"cniVersion": "1.1.0", "name": "ciliate", "type": "ciliate-cni", "agentSocket": str(self.socket)} | more
        env = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": str(netns),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(RELAY.parent),
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={container}",
        }
        done = subprocess.run([RELAY], input=json.dumps(conf).encode(), env=env, capture_output=True, check=False)
        document: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
        if done.returncode:
            raise CniFailure(document)
        return document

    def add(self, container: str, netns: Path | str, **more: Any) -> list[str]:
        """Return the addresses that ADD gives."""
        return [one["address"].split("/")[0] for one in self.cni("ADD", container, netns, **more)["ips"]]

    def parallel(self, work: Callable[[T], Any], items: Iterable[T], at_once: int = 16) -> list[Any]:
        """Call ``work`` for all items, some at once, as a runtime does; return the results or CniFailures."""

        def one(item: T) -> Any:
            try:
                return work(item)
            except CniFailure as failure:
                return failure

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, items))

    # ---- what is there --------------------------------------------------------------------------------------------

    def rows(self, table: str) -> dict[bytes, bytes]:
        """Return a map's rows as octets."""
        with Map.open_pinned(self.bpffs / "ciliate/v1/maps" / table) as one:
            return one.rows()

    def links(self) -> set[str]:
        """Return the pins of links."""
        return {one.name for one in (self.bpffs / "ciliate/v1/links").iterdir()}

    def devices(self) -> set[str]:
        """Return the node's devices."""
        return {one["ifname"] for one in json.loads(self.netns.run("ip", "-j", "link"))}

    def store(self) -> dict[str, bytes | None]:
        """Return the kvstore's files, and the folders of label sets, without locks."""
        root = self.folder / "kvstore"
        return {
            str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
            for path in root.rglob("*")
            if not set(path.relative_to(root).parts) & LOCKS and (path.is_file() or path.parent == root / VALUES)
        }

    def snapshot(self) -> dict[str, Any]:
        """Return all that pods leave traces in: by name, so that a comparison says what is different.

        Policy ids and epochs may change; how many rows there are may not.
        """
        endpoints = [
            {name: value for name, value in row.items() if name != "policy"} for row in self.get("/v1/bpf/endpoints")
        ]
        return {
            "endpoints": endpoints,
            **{name: self.rows(name) for name in ("local_addrs", "ipcache", "identities", "listeners")},
            **{name: len(self.rows(name)) for name in ("policies", "policy_classes", "policy_rows")},
            "ipam": self.get("/v1/status")["ipam"],
            "store": self.store(),
            "links": self.links(),
            "devices": self.devices(),
            "agent": [one["container_id"] for one in self.get("/v1/endpoints")],
        }


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what is not as before, by name: (before, after)."""
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def wait_for(node: Node, before: dict[str, Any]) -> None:
    """Return when all is as it was. Error: AssertionError that says what is not."""
    deadline = time.monotonic() + 60
    while changed := difference(before, node.snapshot()):
        assert time.monotonic() < deadline, changed
        time.sleep(0.02)


def pod_object(name: str, **labels: str) -> dict[str, Any]:
    """Return a pod's manifest."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "spec": {"nodeName": "n1", "containers": [{"name": "main", "image": "none"}]},
    }
