"""A real container runtime: Debian's containerd and ``ctr run --cni``, with the files that the agent installs.

Both are unpacked below build/runtime (``make vm``), not installed. containerd runs in a mount namespace of its own,
where /etc/cni/net.d and /opt/cni/bin, which ``ctr`` insists on, are the folders that the agent wrote.
"""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, Final

import pytest

from ciliate.cni.conflist import CONFLIST
from tests.cni.node import Netns, Node, difference, pod_object, until, wait_for

pytestmark = pytest.mark.root
FOLDER: Final = Path(__file__).resolve().parents[2] / "build/runtime"
USR: Final = "type=bind,src=/usr,dst=/usr,options=rbind:ro"
NAMESPACE: Final = f"cni-{os.getpid()}"
ENV: Final = {
    "PATH": f"{FOLDER}/usr/bin:{FOLDER}/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LD_LIBRARY_PATH": f"{FOLDER}/usr/lib/x86_64-linux-gnu",
}
SCRIPT: Final = """
set -e
mount -t tmpfs runtime /run
mount -t tmpfs runtime /etc
mount -t tmpfs runtime /opt
mkdir -p /etc/cni/net.d /opt/cni/bin
mount --bind "$2" /etc/cni/net.d
mount --bind "$3" /opt/cni/bin
exec containerd --config "$1/config.toml"
"""


class Runtime:
    """A containerd in a node's network namespace."""

    def __init__(self, stack: ExitStack, node: Node) -> None:
        self._stack = stack
        self._node = node
        self._folder = node.folder / "containerd"
        self._socket = self._folder / "containerd.sock"
        self._folder.mkdir()
        self._make_rootfs()
        lines = [
            "version = 2",
            f'root = "{self._folder}/root"',
            f'state = "{self._folder}/state"',
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]',
            f'[grpc]\naddress = "{self._socket}"',
        ]
        (self._folder / "config.toml").write_text("\n".join(lines))
        enter = ["nsenter", f"--net={node.netns.path}", "unshare", "--mount", "--propagation", "private"]
        shell = ["sh", "-c", SCRIPT, "sh", str(self._folder), str(node.conf_dir), str(node.bin_dir)]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen([*enter, *shell], env=ENV, stdout=log, stderr=log)
        stack.callback(self._end)
        until(self._answers, "containerd answers", 60)

    def _make_rootfs(self) -> None:
        """What a container sees: this host's /usr, nothing else."""
        rootfs = self._folder / "rootfs"
        for name in ("usr", "proc", "sys", "dev", "etc"):
            (rootfs / name).mkdir(parents=True)
        for name in ("bin", "lib", "lib64"):
            (rootfs / name).symlink_to(f"usr/{name}")

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            pytest.skip(f"containerd cannot run here: {(self._folder / 'log').read_text()[-500:]}")
        return self.ctr("version").returncode == 0

    def _end(self) -> None:
        for name in self.ctr("task", "ls", "-q").stdout.split():
            self.ctr("task", "rm", "--force", name)
        until(lambda: not self.ctr("task", "ls", "-q").stdout.split(), "no task is left")
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)
        for group in Path("/sys/fs/cgroup").glob(f"**/{NAMESPACE}"):
            with suppress(OSError):
                group.rmdir()

    def _command(self, *arguments: str) -> list[str]:
        enter = ["nsenter", "-t", str(self._process.pid), "-m", "-n"]
        return [*enter, f"{FOLDER}/usr/bin/ctr", "-a", str(self._socket), "-n", NAMESPACE, *arguments]

    def ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``ctr``."""
        return subprocess.run(
            self._command(*arguments), env=ENV, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    def run(self, *options: str, name: str, command: list[str]) -> list[str]:
        """Return the command line that runs a container and removes it when it has ended."""
        rootfs = str(self._folder / "rootfs")
        return self._command(
            "run", "--rm", "--mount", USR, *options, "--rootfs", rootfs, name, f"/usr/bin/{command[0]}", *command[1:]
        )

    def start(self, name: str) -> subprocess.Popen[str]:
        """Run a container that sleeps, wired by the plugin; do not wait for it."""
        process = subprocess.Popen(
            self.run("--cni", name=name, command=["sleep", "1000"]),
            env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._stack.callback(self._give_up, name, process)
        return process

    def _give_up(self, name: str, process: subprocess.Popen[str]) -> None:
        """After a test that failed: nothing may be left that keeps the runtime."""
        if process.poll() is None:
            self.ctr("task", "kill", "-s", "SIGKILL", name)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        process.communicate()

    def inside(self, name: str, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a container."""
        return self.ctr("task", "exec", "--exec-id", f"x{os.urandom(4).hex()}", name, f"/usr/bin/{program}", *arguments)

    def stop(self, name: str, process: subprocess.Popen[str]) -> str:
        """Kill a container; return what its runtime said when it had cleaned up."""
        self.ctr("task", "kill", "-s", "SIGKILL", name)
        output, _ = process.communicate(timeout=60)
        return output


def pod_name(container: str) -> str:
    """What the plugin is told: ``ctr`` gives no Kubernetes names, and its id has the namespace in front."""
    return f"{NAMESPACE}-{container}"


@pytest.fixture
def runtime(stack: ExitStack, node: Node) -> Runtime:
    """containerd; a test is skipped, with the reason, where it cannot run."""
    if not (FOLDER / "usr/bin/containerd").exists():
        pytest.skip(f"no container runtime: {FOLDER} is missing; `make vm` unpacks Debian's containerd and runc there")
    one = Runtime(stack, node)
    done = subprocess.run(
        one.run(name="probe", command=["echo", "works"]), env=ENV, capture_output=True, text=True, check=False
    )
    if done.stdout.strip() != "works":
        pytest.skip(f"containerd cannot run a container here: {done.stdout}{done.stderr}"[-800:])
    return one


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = str(self.client_address[0]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(pod: Netns) -> Iterator[None]:
    """A web server in a pod that answers with its client's address."""

    class Server(ThreadingTCPServer):
        address_family = socket.AF_INET6
        allow_reuse_address = True
        daemon_threads = True

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            super().server_bind()

    server = pod.do(lambda: Server(("::", 8080), _Handler))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(runtime: Runtime, container: str, address: str) -> str:
    """Return what a container's request is answered, "": not at all."""
    where = f"[{address}]" if ":" in address else address
    done = runtime.inside(container, "curl", "-s", "-S", "-m", "2", f"http://{where}:8080/")
    return done.stdout.strip().removeprefix("::ffff:") if done.returncode == 0 else ""


def endpoint(node: Node, container: str) -> dict[str, Any]:
    """Return the agent's document of a container's endpoint once it is ready."""
    found: list[dict[str, Any]] = until(
        lambda: [one for one in node.get("/v1/endpoints") if one["name"] == pod_name(container) and one["ifindex"]],
        f"container {container} is wired",
    )
    return found[0]


def running(runtime: Runtime, container: str) -> bool:
    return f"{container} " in runtime.ctr("task", "ls").stdout and runtime.inside(container, "true").returncode == 0


def test_a_container_is_wired_judged_and_forgotten(node: Node, runtime: Runtime, stack: ExitStack) -> None:
    server = Netns(stack, "server")
    rule = {
        "fromEndpoints": [{"matchLabels": {"app": "allowed"}}],
        "toPorts": [{"ports": [{"port": "8080", "protocol": "TCP"}]}],
    }
    policy = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "server", "namespace": "default"},
        "spec": {"endpointSelector": {"matchLabels": {"app": "server"}}, "ingress": [rule]},
    }
    pods = [pod_object("server", app="server"), pod_object(pod_name("good"), app="allowed")]
    node.apply("all", policy, *pods, pod_object(pod_name("bad"), app="other"))
    addresses = node.add("server", server.path)
    before = node.snapshot()
    with serving(server):
        good, bad = runtime.start("good"), runtime.start("bad")
        mine = endpoint(node, "good")["addresses"]
        endpoint(node, "bad")
        until(lambda: running(runtime, "good") and running(runtime, "bad"), "both run")
        inside = runtime.inside("good", "ip", "-o", "address", "show", "dev", "eth0").stdout
        assert all(f"{address}/" in inside for address in mine), inside
        assert [ask(runtime, "good", address) for address in addresses] == mine
        assert [ask(runtime, "bad", address) for address in addresses] == ["", ""]
        drops = {row["reason"] for row in node.get("/v1/bpf/counters")}
        assert any("POLICY" in reason for reason in drops), drops
    for name, process in (("good", good), ("bad", bad)):
        output = runtime.stop(name, process)
        assert "cni" not in output.lower() and "failed" not in output.lower(), output
    wait_for(node, before)


def test_a_container_that_starts_while_the_agent_restarts(node: Node, runtime: Runtime) -> None:
    before = node.snapshot()
    node.end(signal.SIGKILL)
    process = runtime.start("waits")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    node.start()
    endpoint(node, "waits")
    until(lambda: running(runtime, "waits"), "the container runs")
    node.end(signal.SIGKILL)
    runtime.ctr("task", "kill", "-s", "SIGKILL", "waits")
    node.start()
    process.communicate(timeout=60)
    wait_for(node, before)


def test_the_runtime_tells_the_plugins_error(node: Node, runtime: Runtime, stack: ExitStack) -> None:
    """Somebody has written into the list what the plugin does not do."""
    before = node.snapshot()
    conf = node.conf_dir / CONFLIST
    conf.write_text(conf.read_text().replace('"agentSocket"', '"ipam": {"type": "host-local"}, "agentSocket"'))
    process = runtime.start("broken")
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "ipam is not supported" in output
    assert "host-local" in output
    assert not difference(before, node.snapshot())
