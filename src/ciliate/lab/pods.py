"""Pods: a network namespace each, wired by the CNI plugin as a container runtime would, and the commands inside."""

import http.client
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

import ciliate
from ciliate.k8s.manifests import ObjectKey, Raw
from ciliate.lab import cgroups, netns, state
from ciliate.lab.agents import log_tail, spawn
from ciliate.lab.objects import Container, EnvVar, Probe, containers_of, grace_of, text_of
from ciliate.lab.state import PodFile, Process
from ciliate.lab.topology import NETNS, LabError, LabNode, Topology

_READY: Final = 60.0
"""Seconds for a pod to become ready."""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class _Ip(msgspec.Struct):
    address: str


class _Result(msgspec.Struct):
    ips: list[_Ip] = []


class _Failure(msgspec.Struct):
    code: int = 0
    msg: str = ""
    details: str = ""


def relay() -> Path:
    """Return the CNI plugin: ``$CILIATE_CNI``, else the packaged one, else the source tree's. Error: LabError."""
    if given := os.environ.get("CILIATE_CNI"):
        return Path(given)
    package = Path(ciliate.__file__).parent
    for path in (package / "cni" / "ciliate-cni", package.parents[1] / "cni-relay" / "ciliate-cni"):
        if path.exists():
            return path
    raise LabError("ciliate-cni: the CNI plugin is not built; run `make -C cni-relay`")


def _cni(topology: Topology, command: str, pod: PodFile) -> _Result:
    """Run the plugin in the pod's node. Error: LabError with what it said."""
    arguments = {"K8S_POD_NAMESPACE": pod.namespace, "K8S_POD_NAME": pod.name, "K8S_POD_UID": pod.container_id}
    env = {
        "PATH": _PATH,
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": pod.container_id,
        "CNI_NETNS": str(NETNS / pod.netns),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(relay().parent),
        "CNI_ARGS": ";".join(["IgnoreUnknown=1", *(f"{name}={value}" for name, value in arguments.items())]),
    }
    conf = {
        "cniVersion": "1.1.0",
        "name": "ciliate",
        "type": "ciliate-cni",
        "agentSocket": str(topology.socket(pod.node)),
        "agentTimeout": 20,
    }
    program = ["ip", "netns", "exec", topology.node(pod.node).netns, str(relay())]
    done = subprocess.run(program, input=msgspec.json.encode(conf), capture_output=True, env=env, check=False)
    title = f"pod {pod.namespace}/{pod.name}: CNI {command}"
    if done.returncode:
        try:
            failure = msgspec.json.decode(done.stdout, type=_Failure)
            text = f"{failure.msg} {failure.details}".strip() + f" (code {failure.code})"
        except msgspec.MsgspecError:
            text = (done.stdout + done.stderr).decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise LabError(f"{title}: {text}")
    if not done.stdout.strip():
        return _Result()
    try:
        return msgspec.json.decode(done.stdout, type=_Result)
    except msgspec.MsgspecError as error:
        raise LabError(f"{title}: its result is not valid: {error}") from error


def log_path(topology: Topology, namespace: str, name: str, container: str) -> Path:
    """Return where a container writes."""
    return topology.directory / "pods" / f"{namespace}.{name}.{container}.log"


def start(topology: Topology, key: ObjectKey, raw: Raw) -> PodFile:
    """Wire a pod and start its commands; nothing of it is left after an error. Errors: LabError, OSError."""
    node = topology.node(raw["spec"]["nodeName"])
    host = bool(raw["spec"].get("hostNetwork"))
    pod = PodFile(
        namespace=key.namespace,
        name=key.name,
        node=node.name,
        netns=node.netns if host else topology.pod_netns(key.namespace, key.name),
        container_id=uuid.uuid4().hex,
        host_network=host,
        grace=grace_of(raw),
    )
    path = state.pod_path(topology, key.namespace, key.name)
    former = state.read_file(path, PodFile)
    if former is not None and former.ended:
        remove(topology, former)
    if not host:
        netns.remove(pod.netns)
    state.write_file(path, pod)
    try:
        pod = msgspec.structs.replace(pod, addresses=_addresses(topology, node, pod))
        if not pod.addresses:
            raise LabError(f"{text_of(key)}: the CNI plugin gave it no address")
        processes = [_start_container(topology, node, pod, raw, one) for one in containers_of(raw) if one.command]
        pod = msgspec.structs.replace(pod, processes=processes)
        state.write_file(path, pod)
    except LabError:
        stop(topology, pod)
        raise
    return pod


def _addresses(topology: Topology, node: LabNode, pod: PodFile) -> list[str]:
    """Make a pod's network and return its addresses: the node's own if it is in the node's namespace."""
    if pod.host_network:
        return [str(one.ip) for one in node.addresses]
    netns.create(pod.netns)
    return [one.address.partition("/")[0] for one in _cni(topology, "ADD", pod).ips]


def _start_container(topology: Topology, node: LabNode, pod: PodFile, raw: Raw, one: Container) -> Process:
    env = {"PATH": os.environ.get("PATH", _PATH), "HOSTNAME": pod.name, "HOME": "/root"}
    env |= {variable.name: _value(variable, node, pod) for variable in one.env}
    log = log_path(topology, pod.namespace, pod.name, one.name)
    log.unlink(missing_ok=True)
    command = [*one.command, *one.args]
    if one.working_dir:
        command = ["env", "-C", one.working_dir, *command]
    return spawn(one.name, cgroups.inside(topology, node.name, pod.netns, command), log, env)


def _value(variable: EnvVar, node: LabNode, pod: PodFile) -> str:
    fields: Mapping[str, str] = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "metadata.uid": pod.container_id,
        "spec.nodeName": pod.node,
        "status.podIP": pod.addresses[0],
        "status.podIPs": ",".join(pod.addresses),
        "status.hostIP": str(node.addresses[0].ip),
    }
    return fields[variable.field_path] if variable.field_path else variable.value


def stop(topology: Topology, pod: PodFile) -> None:
    """End a pod's processes and take it away. Idempotent. Error: LabError."""
    terminate(topology, pod)
    remove(topology, pod)


def terminate(topology: Topology, pod: PodFile) -> None:
    """End a pod's processes: SIGTERM, and after its grace period SIGKILL. Error: LabError."""
    if (NETNS / pod.netns).exists():
        netns.end(lambda: _pids(pod), grace=pod.grace)
    ended = msgspec.structs.replace(pod, ended=True, ready=False)
    state.write_file(state.pod_path(topology, pod.namespace, pod.name), ended)


def _pids(pod: PodFile) -> list[int]:
    if not pod.host_network:
        return netns.pids(pod.netns)
    return [pid for one in pod.processes if one.alive for pid in netns.session(one.pid)]


def remove(topology: Topology, pod: PodFile) -> None:
    """Give a pod's interface back and take its namespace away. Idempotent. Error: LabError."""
    if not pod.host_network:
        _cni(topology, "DEL", pod)
        netns.remove(pod.netns)
    for path in (topology.directory / "pods").glob(f"{pod.namespace}.{pod.name}.*log"):
        path.unlink(missing_ok=True)
    state.pod_path(topology, pod.namespace, pod.name).unlink(missing_ok=True)


# ---- readiness -----------------------------------------------------------------------------------------------------


def wait_ready(topology: Topology, key: ObjectKey, raw: Raw, pod: PodFile, seconds: float = _READY) -> None:
    """Return once all containers run and answer their probes, asked from the node. Error: LabError."""
    deadline = time.monotonic() + seconds
    containers = {one.name: one for one in containers_of(raw)}
    for process in pod.processes:
        one = containers[process.name]
        reason = _not_ready(topology, pod, process, one)
        while reason:
            if not process.alive:
                raise LabError(_sad(topology, key, one, "it has ended"))
            if time.monotonic() > deadline:
                raise LabError(_sad(topology, key, one, f"not ready after {seconds:g} s: {reason}"))
            time.sleep(0.03)
            reason = _not_ready(topology, pod, process, one)
    ready = msgspec.structs.replace(pod, ready=True)
    state.write_file(state.pod_path(topology, pod.namespace, pod.name), ready)


def _sad(topology: Topology, key: ObjectKey, one: Container, what: str) -> str:
    tail = log_tail(log_path(topology, key.namespace, key.name, one.name))
    return f"{text_of(key)}: container {one.name}: {what}; its log ends so:\n{tail or '    (it is empty)'}"


def _not_ready(topology: Topology, pod: PodFile, process: Process, one: Container) -> str:
    if not process.alive:
        return "it has ended"
    if one.readiness_probe is None or not one.readiness_probe.port:
        return ""
    return probe(topology, pod, one, one.readiness_probe)


def probe(topology: Topology, pod: PodFile, one: Container, wanted: Probe) -> str:
    """Ask a pod from its node; return "" when it takes the connection, and the answer, if any, is 200 to 399; else what
    is wrong.
    """
    port = one.port(wanted.port)

    def connect() -> str:
        try:
            socket.create_connection((pod.addresses[0], port), wanted.timeout_seconds).close()
        except OSError as error:
            return f"port {port}: {error}"
        return ""

    def ask() -> str:
        assert wanted.http_get is not None
        path = wanted.http_get.path
        connection = http.client.HTTPConnection(pod.addresses[0], port, timeout=wanted.timeout_seconds)
        try:
            connection.request("GET", path, headers={"User-Agent": "kube-probe/1.33", "Connection": "close"})
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return f"GET {path} on port {port}: {error}"
        finally:
            connection.close()
        return "" if 200 <= status < 400 else f"GET {path} on port {port}: HTTP {status}"

    return netns.inside(topology.node(pod.node).netns, ask if wanted.http_get else connect)


def probe_again(topology: Topology, raw: Raw, pod: PodFile) -> PodFile:
    """Return a pod with its readiness as it is now, and remember it; three failures in a row make it not ready."""
    containers = {one.name: one for one in containers_of(raw)}
    ready = all(_answers(topology, pod, one, containers[one.name]) for one in pod.processes if one.name in containers)
    if ready != pod.ready:
        pod = msgspec.structs.replace(pod, ready=ready)
        state.write_file(state.pod_path(topology, pod.namespace, pod.name), pod)
    return pod


def _answers(topology: Topology, pod: PodFile, process: Process, one: Container) -> bool:
    for pause in (0.05, 0.1, 0):
        if not _not_ready(topology, pod, process, one):
            return True
        if not process.alive:
            return False
        time.sleep(pause)
    return False


def status_of(pod: PodFile | None) -> dict[str, Any]:
    """Return a pod's ``status`` as Kubernetes has it."""
    if pod is None:
        return {"phase": "Pending", "conditions": [{"type": "Ready", "status": "False"}]}
    alive = not pod.ended and all(one.alive for one in pod.processes)
    phase = "Running" if alive else "Failed"
    return {
        "phase": phase,
        "podIP": pod.addresses[0] if pod.addresses else "",
        "podIPs": [{"ip": address} for address in pod.addresses],
        "conditions": [{"type": "Ready", "status": "True" if pod.ready and alive else "False"}],
        "containerStatuses": [{"name": one.name, "ready": one.alive, "pid": one.pid} for one in pod.processes],
    }


def stored_status(pod: PodFile | None) -> dict[str, Any]:
    """Return the part of a pod's status that agents read."""
    return {key: value for key, value in status_of(pod).items() if key != "containerStatuses"}


def signal_number(text: str) -> signal.Signals:
    """Return a signal by name or number. Error: LabError."""
    try:
        if text.isdigit():
            return signal.Signals(int(text))
        return signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
    except (ValueError, KeyError) as error:
        raise LabError(f"signal {text}: there is none; try TERM or KILL") from error
