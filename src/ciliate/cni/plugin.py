"""The CNI plugin's logic (CNI specification 1.1.0), run in the agent for the relay."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from ciliate.cni import netconf, results
from ciliate.cni.namespaces import Kind, kind_of
from ciliate.cni.netconf import NetConf
from ciliate.cni.protocol import VERSIONS, AttachRequest, CniError, Code, Reply, Wiring, WiringError

_SINCE = {"ADD": "0.3.0", "DEL": "0.3.0", "CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}
_DONE = Reply(exit_code=0, stdout="")


class KeyedLocks:
    """A lock for each key, which lives as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Keep others with the same key out."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._users[key] += 1
        try:
            async with lock:
                yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]


class Plugin:
    """The plugin for one agent. ADD, DEL and CHECK of one container do not interleave."""

    def __init__(self, wiring: Wiring, kind: Callable[[str], Kind] = kind_of) -> None:
        self._wiring = wiring
        self._kind = kind
        self._containers = KeyedLocks()

    async def handle(self, env: Mapping[str, str], stdin: str) -> Reply:
        """Answer one call of the plugin. What goes wrong is in the reply, as an error of the specification."""
        command = env.get("CNI_COMMAND", "")
        version = VERSIONS[-1]
        try:
            if command == "VERSION":
                document = {"cniVersion": version, "supportedVersions": VERSIONS}
                return Reply(exit_code=0, stdout=results.text(document))
            if command not in _SINCE:
                raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_COMMAND is not known: {command!r}")
            version = netconf.spoken(stdin)
            if not results.at_least(version, _SINCE[command]):
                raise CniError(
                    Code.INCOMPATIBLE_VERSION, f"{command} needs cniVersion {_SINCE[command]}, not {version}"
                )
            # What DEL takes back does not depend on the configuration: a bad one must not keep a pod from its end.
            return await (self._delete(env) if command == "DEL" else self._run(command, env, netconf.decode(stdin)))
        except CniError as error:
            return results.error(version, error)
        except WiringError as error:
            return results.error(version, CniError(Code.WIRING_FAILED, f"{command} failed", str(error)))

    async def _run(self, command: str, env: Mapping[str, str], conf: NetConf) -> Reply:
        match command:
            case "ADD":
                return await self._add(env, conf)
            case "CHECK":
                return await self._check(env, conf)
            case "GC":
                return await self._gc(conf)
            case _:
                return self._status()

    async def _add(self, env: Mapping[str, str], conf: NetConf) -> Reply:
        request = netconf.request(env, conf.name)
        if any((one.name, one.sandbox) == (request.ifname, request.netns) for one in conf.prev_result.interfaces):
            raise CniError(
                Code.INVALID_CONFIG,
                f"another plugin of the list made {request.ifname} already",
                "ciliate-cni makes the pod's interface: remove the other plugin from the list, or give it another name",
            )
        if reasons := self._wiring.readiness():
            raise CniError(Code.TRY_AGAIN, "the Ciliate agent is not ready", "; ".join(reasons))
        async with self._containers.hold(request.container_id):
            await self._refuse_namespace(request)
            attachment = await self._wiring.add(request)
        return results.success(conf, request, attachment)

    async def _refuse_namespace(self, request: AttachRequest) -> None:
        """Raise unless the namespace is a pod's.

        CNI_NETNS_OVERRIDE does not help: a pod's routes in the node's namespace would cut the node off.
        """
        match self._kind(request.netns):
            case Kind.MISSING:
                await self._wiring.delete(*request.key)  # the code says that nothing is left for a DEL to do
                raise CniError(Code.CONTAINER_UNKNOWN, f"network namespace {request.netns} does not exist")
            case Kind.OWN:
                raise CniError(Code.INVALID_NETNS, f"CNI_NETNS is the node's own network namespace: {request.netns}")
            case Kind.OTHER:
                raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS is not a network namespace: {request.netns}")
            case Kind.POD:
                pass

    async def _delete(self, env: Mapping[str, str]) -> Reply:
        """The namespace may be gone, and the interface with it: what the agent holds is released all the same."""
        container_id, ifname = netconf.attachment_key(env)
        async with self._containers.hold(container_id):
            await self._wiring.delete(container_id, ifname)
        return _DONE

    async def _check(self, env: Mapping[str, str], conf: NetConf) -> Reply:
        request = netconf.request(env, conf.name)
        expected, routes = netconf.expected(conf, request.ifname, request.netns)
        async with self._containers.hold(request.container_id):
            attachment = await self._wiring.attachment(*request.key)
            missing = self._kind(request.netns) is Kind.MISSING
            if missing and attachment is None:
                raise CniError(Code.CONTAINER_UNKNOWN, f"network namespace {request.netns} does not exist")
            if missing:
                problems = [f"network namespace {request.netns} does not exist"]
            elif attachment is None:
                problems = [f"container {request.container_id} has no interface {request.ifname} here"]
            else:
                # A later plugin of the list may have added or taken away some; of ours, those that it left must be.
                ours = tuple(route for route in attachment.routes if route in routes)
                problems = await self._wiring.check(request, ours)
        if attachment is not None and not set(attachment.addresses) <= set(expected):
            told, has = (", ".join(sorted(map(str, some))) for some in (expected, attachment.addresses))
            problems.append(f"prevResult has {told}, the interface has {has}")
        if problems:
            raise CniError(Code.CHECK_FAILED, f"{request.ifname} is not as it should be", "; ".join(problems))
        return _DONE

    async def _gc(self, conf: NetConf) -> Reply:
        """Take away the network's interfaces that the runtime does not name; what fails does not stop the rest.

        Without a list GC would take everything away, so that a missing one is an error and an empty one is not.
        """
        if conf.valid is None:
            raise CniError(Code.INVALID_CONFIG, "GC needs cni.dev/valid-attachments")
        valid = {(one.container_id, one.ifname) for one in conf.valid}
        failures = []
        for container_id, ifname in self._wiring.attachments(conf.name):
            if (container_id, ifname) in valid:
                continue
            try:
                async with self._containers.hold(container_id):
                    await self._wiring.delete(container_id, ifname)
            except WiringError as error:
                failures.append(f"{container_id}/{ifname}: {error}")
        if failures:
            raise WiringError("; ".join(failures))
        return _DONE

    def _status(self) -> Reply:
        if reasons := [*self._wiring.readiness(), *self._wiring.shortages()]:
            raise CniError(Code.NOT_AVAILABLE, "no pod can be wired", "; ".join(reasons))
        return _DONE
