"""The CNI plugin's logic (CNI specification 1.1.0), run in the agent for the relay."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from ciliate.cni import netconf, results
from ciliate.cni.netconf import NetConf
from ciliate.cni.protocol import VERSIONS, CniError, Code, Reply, Wiring, WiringError

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


class _Version(msgspec.Struct):
    version: str = msgspec.field(name="cniVersion", default=VERSIONS[-1])


def _spoken(stdin: str) -> str:
    """Return the version to answer in: an error in the configuration is told in the configuration's version."""
    try:
        spoken = msgspec.json.decode(stdin, type=_Version).version
    except msgspec.MsgspecError:
        return VERSIONS[-1]
    return spoken if spoken in VERSIONS else VERSIONS[-1]


class Plugin:
    """The plugin for one agent. ADD, DEL and CHECK of one container do not interleave."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
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
            version = _spoken(stdin)
            conf = netconf.decode(stdin)
            if not results.at_least(version, _SINCE[command]):
                raise CniError(
                    Code.INCOMPATIBLE_VERSION, f"{command} needs cniVersion {_SINCE[command]}, not {conf.version}"
                )
            return await self._run(command, env, conf)
        except CniError as error:
            return results.error(version, error)
        except WiringError as error:
            return results.error(version, CniError(Code.WIRING_FAILED, f"{command} failed", str(error)))

    async def _run(self, command: str, env: Mapping[str, str], conf: NetConf) -> Reply:
        match command:
            case "ADD":
                return await self._add(env, conf)
            case "DEL":
                return await self._delete(env)
            case "CHECK":
                return await self._check(env, conf)
            case "GC":
                return await self._gc(conf)
            case _:
                return self._status()

    async def _add(self, env: Mapping[str, str], conf: NetConf) -> Reply:
        if conf.prev_result is not None:
            raise CniError(
                Code.INVALID_CONFIG,
                "ciliate-cni must be the first plugin of its list",
                "ADD came with a prevResult: another plugin made an interface already; remove it from the list",
            )
        request = netconf.request(env, need_netns=True)
        if reasons := self._wiring.readiness():
            raise CniError(Code.TRY_AGAIN, "the Ciliate agent is not ready", "; ".join(reasons))
        if not Path(request.netns).exists():
            raise CniError(Code.CONTAINER_UNKNOWN, f"network namespace {request.netns} does not exist")
        async with self._containers.hold(request.container_id):
            attachment = await self._wiring.add(request)
        return results.success(conf.version, request, attachment)

    async def _delete(self, env: Mapping[str, str]) -> Reply:
        """The namespace may be gone, and the interface with it: what the agent holds is released all the same."""
        request = netconf.request(env, need_netns=False)
        async with self._containers.hold(request.container_id):
            await self._wiring.delete(request.container_id, request.ifname)
        return _DONE

    async def _check(self, env: Mapping[str, str], conf: NetConf) -> Reply:
        request = netconf.request(env, need_netns=True)
        expected = netconf.expected_addresses(conf, request.ifname, request.netns)
        if not Path(request.netns).exists():
            raise CniError(Code.CONTAINER_UNKNOWN, f"network namespace {request.netns} does not exist")
        async with self._containers.hold(request.container_id):
            problems = await self._wiring.check(request)
            attachment = await self._wiring.attachment(request.container_id, request.ifname)
        if attachment is not None and set(expected) != set(attachment.addresses):
            told, has = (", ".join(sorted(map(str, some))) for some in (expected, attachment.addresses))
            problems.append(f"prevResult has {told}, the interface has {has}")
        if problems:
            raise CniError(Code.CHECK_FAILED, f"{request.ifname} is not as it should be", "; ".join(problems))
        return _DONE

    async def _gc(self, conf: NetConf) -> Reply:
        """Without a list GC would take everything away, so that a missing one is an error and an empty one is not."""
        valid = conf.valid if conf.valid is not None else conf.attachments
        if valid is None:
            raise CniError(Code.INVALID_CONFIG, "GC needs cni.dev/valid-attachments")
        await self._wiring.gc({(one.container_id, one.ifname) for one in valid})
        return _DONE

    def _status(self) -> Reply:
        if reasons := self._wiring.readiness():
            raise CniError(Code.NOT_AVAILABLE, "the Ciliate agent is not ready", "; ".join(reasons))
        return _DONE
