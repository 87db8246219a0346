"""CNI ADD and DEL against Debian's bridge plugin with host-local addresses."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench.agent import Agent, cni_call, cni_environment, pod_object
from bench.report import Row, compare
from bench.space import Netns, scratch

NAME: Final = "CNI ADD + DEL"
_SPACES: Final = 8
"""Namespaces of pods, used in turn: a runtime gives each pod a new one."""
BRIDGE: Final = "/usr/lib/cni/bridge"


def names() -> list[str]:
    """Return the names of the rows."""
    return [NAME]


def _bridge(node: Netns, data: Path) -> Callable[[Path, int], float]:
    ranges = [[{"subnet": "10.88.0.0/20"}]]
    ipam = {"type": "host-local", "dataDir": str(data), "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
    conf = {"cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": ipam}

    def once(netns: Path, number: int) -> float:
        container = f"peer-{number}"
        began = time.perf_counter()
        result = cni_call([BRIDGE], json.dumps(conf), cni_environment("ADD", netns, container, "peer"), node)
        delete = json.dumps(conf | {"prevResult": result})
        cni_call([BRIDGE], delete, cni_environment("DEL", netns, container, "peer"), node)
        return (time.perf_counter() - began) * 1000

    return once


def run(wanted: set[str], rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """Measure: in each round one ADD and one DEL of each plugin, as processes, as a runtime calls them."""
    del wanted
    with ExitStack() as stack:
        agent = Agent(stack, "cni-node")
        agent.write("pod", pod_object("ours", "web"))
        agent.start()
        spaces = [Netns(stack, f"cni-pod-{number}").path for number in range(_SPACES)]
        peer = _bridge(Netns(stack, "cni-peer"), scratch(stack))

        def ours(number: int) -> float:
            netns, container = spaces[number % _SPACES], f"ours-{number}"
            began = time.perf_counter()
            agent.call("ADD", netns, container, "ours")
            agent.call("DEL", netns, container, "ours")
            return (time.perf_counter() - began) * 1000

        def pair(number: int) -> tuple[float, float]:
            """Each first in every other round; each with its own namespaces, so that no round waits for another's."""
            if number % 2:
                return ours(number), peer(spaces[(number + _SPACES // 2) % _SPACES], number)
            theirs = peer(spaces[(number + _SPACES // 2) % _SPACES], number)
            return ours(number), theirs

        pair(0), pair(1)
        pairs = [pair(number) for number in range(2, 2 + 2 * rounds)]
        progress(f"cni: {len(pairs)} rounds")
    mine, theirs = zip(*pairs, strict=True)
    return [
        compare(
            NAME,
            mine,
            theirs,
            peer_name="Debian's bridge plugin, host-local",
            unit="ms",
            lower_is_better=True,
            at_least=1.0,
            note="IPv4 only for both; ours returns when the pod's policy is enforced",
        )
    ]
