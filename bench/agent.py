"""An agent of the benchmark's own, in a node's namespace, with pods that its CNI plugin wires."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import yaml

from bench.sites import underlay
from bench.space import Netns, bpffs, scratch

ROOT: Final = Path(__file__).resolve().parent.parent
RELAY: Final = ROOT / "cni-relay/ciliate-cni"
READY_SECONDS: Final = 60.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Agent:
    """A node with an agent. The agent can be started and stopped again and again; the node's state stays."""

    def __init__(self, stack: ExitStack, name: str) -> None:
        self.node = underlay(stack, name)
        self.folder = scratch(stack)
        self.manifests = self.folder / "manifests"
        self.manifests.mkdir()
        self._socket = self.folder / "run/ciliate.sock"
        self._log = self.folder / "agent.log"
        self._process: subprocess.Popen[bytes] | None = None
        config = {
            "node-name": "bench",
            "device": "eth0",
            "bpffs": str(bpffs(stack)),
            "manifests-dir": str(self.manifests),
            "kvstore-dir": str(self.folder / "kvstore"),
            "state-dir": str(self.folder / "state"),
            "run-dir": str(self.folder / "run"),
            "node-ips": "192.0.2.1",
            "pod-cidrs": "10.1.0.0/20",
            "socket-lb": "off",
            "ipv6": False,
        }
        self._config = self.folder / "agent.yaml"
        self._config.write_text(yaml.safe_dump(config))
        stack.callback(self.stop)

    def start(self) -> float:
        """Start the agent; return the seconds until it is ready. Error: RuntimeError with its log."""
        began = time.perf_counter()
        executable = str(Path(sys.executable).parent / "ciliated")
        with self._log.open("ab") as log:
            command = ["ip", "netns", "exec", self.node.name, executable, "--config", str(self._config)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        while time.perf_counter() - began < READY_SECONDS:
            if self._process.poll() is not None:
                break
            try:
                if self.get("/v1/healthz")["ready"]:
                    return time.perf_counter() - began
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.005)
        raise RuntimeError(f"the agent did not become ready:\n{self._log.read_text()[-4000:]}")

    def stop(self) -> None:
        """Stop the agent; the datapath stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection to the agent's API, not open yet."""
        return _UnixConnection(self._socket)

    def _request(self, method: str, path: str) -> Any:
        connection = self.connect()
        try:
            connection.request(method, path)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """Return a document of the agent's API. Errors: OSError, HTTPException."""
        return self._request("GET", path)

    def sync(self) -> Any:
        """Return when the manifests are enforced. Errors: OSError, HTTPException."""
        return self._request("POST", "/v1/sync")

    @property
    def pid(self) -> int:
        """The agent's process: ``ip netns exec`` became it."""
        assert self._process is not None
        return self._process.pid

    def resident(self) -> float:
        """Return the resident memory of the agent, MiB."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("no VmRSS")

    def map_memory(self) -> float:
        """Return the kernel's memory of the BPF maps that the agent holds, MiB; each map once."""
        found: dict[str, int] = {}
        for entry in Path(f"/proc/{self.pid}/fdinfo").iterdir():
            try:
                text = entry.read_text()
            except FileNotFoundError:
                continue
            fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            if "map_id" in fields:
                found[fields["map_id"]] = int(fields["memlock"])
        return sum(found.values()) / (1 << 20)

    def write(self, name: str, *objects: dict[str, Any]) -> None:
        """Write a manifest in one step."""
        new = self.folder / "new"
        new.write_text(yaml.safe_dump_all(objects))
        new.replace(self.manifests / f"{name}.yaml")

    def call(self, command: str, netns: Path, container: str, pod: str) -> dict[str, Any]:
        """Call the CNI plugin as a runtime does; return its result."""
        stdin = json.dumps(
            {"cniVersion": "1.0.0", "name": "ciliate", "type": "ciliate-cni", "agentSocket": str(self._socket)}
        )
        environment = cni_environment(command, netns, container, pod)
        return cni_call([str(RELAY)], stdin, environment, self.node)


def cni_environment(command: str, netns: Path, container: str, pod: str) -> dict[str, str]:
    """Return what a runtime puts into a plugin's environment."""
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": str(netns),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/usr/lib/cni",
        "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME={pod}",
        "PATH": os.environ["PATH"],
    }


def cni_call(command: list[str], stdin: str, environment: dict[str, str], node: Netns) -> dict[str, Any]:
    """Run a CNI plugin in a node's namespace; return its result. Error: RuntimeError with what it said."""

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, check=False)

    done = node.do(run)
    if done.returncode:
        raise RuntimeError(f"{command[0]} {environment['CNI_COMMAND']}: {done.stdout} {done.stderr}")
    return dict(json.loads(done.stdout)) if done.stdout.strip() else {}


def pod_object(name: str, app: str) -> dict[str, Any]:
    """Return a pod's manifest."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "bench", "labels": {"app": app}},
        "spec": {"nodeName": "bench", "containers": [{"name": "main", "image": "none"}]},
    }
