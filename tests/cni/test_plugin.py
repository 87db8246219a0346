"""The plugin's logic against the CNI specification 1.1.0, with a stand-in for the agent."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciliate.cni.namespaces import Kind
from ciliate.cni.plugin import KeyedLocks, Plugin
from ciliate.cni.protocol import VERSIONS, Reply
from tests.cni.fake import ATTACHMENT, PODS, FakeWiring

NETNS = "/run/netns/pod"
ARGS = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u1"


class Call:
    """A plugin, and how it is called."""

    def __init__(self) -> None:
        self.wiring = FakeWiring()
        self.kinds = {NETNS: Kind.POD}
        self.plugin = Plugin(self.wiring, kind=lambda path: self.kinds.get(path, Kind.MISSING))

    async def raw(self, stdin: str, **env: str) -> Reply:
        whole = {"CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_NETNS": NETNS, "CNI_ARGS": ARGS} | env
        return await self.plugin.handle(whole, stdin)

    async def __call__(self, command: str, conf: dict[str, Any] | None = None, **env: str) -> dict[str, Any]:
        """Return the document that was printed, {}: nothing."""
        whole = {"cniVersion": "1.1.0", "name": "ciliate", "type": "ciliate-cni"} | (conf or {})
        reply = await self.raw(json.dumps(whole), CNI_COMMAND=command, **env)
        document: dict[str, Any] = json.loads(reply.stdout) if reply.stdout else {}
        assert bool(reply.exit_code) == ("code" in document)
        if "code" in document:
            assert document["msg"]
            assert document.keys() <= {"cniVersion", "code", "msg", "details"}
        return document


@pytest.fixture
def call() -> Call:
    return Call()


async def check_conf(call: Call, **changes: Any) -> dict[str, Any]:
    return {"prevResult": await call("ADD") | changes}


# ---- ADD -----------------------------------------------------------------------------------------------------------


async def test_add_passes_on_what_the_runtime_says(call: Call) -> None:
    await call("ADD")
    one = call.wiring.wired["c1", "eth0"]
    assert (one.network, one.netns, one.pod_namespace, one.pod_name, one.pod_uid) == (
        "ciliate", NETNS, "shop", "web-0", "u1",
    )  # fmt: skip


async def test_a_container_that_is_no_pod_has_its_id_as_name(call: Call) -> None:
    await call("ADD", CNI_ARGS="")
    one = call.wiring.wired["c1", "eth0"]
    assert (one.pod_namespace, one.pod_name) == ("default", "c1")


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_result_has_the_format_of_its_version(call: Call, version: str) -> None:
    found = await call("ADD", {"cniVersion": version})
    assert found["cniVersion"] == version
    host, inside = found["interfaces"]
    assert (host["name"], host["mac"], "sandbox" in host) == (ATTACHMENT.host_device, ATTACHMENT.host_mac, False)
    assert (inside["name"], inside["mac"], inside["sandbox"]) == ("eth0", ATTACHMENT.mac, NETNS)
    new = version == "1.1.0"
    assert [one.get("mtu") for one in (host, inside)] == ([1450, 1450] if new else [None, None])
    assert [(one["address"], one["gateway"], one["interface"]) for one in found["ips"]] == [
        (f"{PODS[4]}/32", "169.254.0.1", 1),
        (f"{PODS[6]}/128", "fe80::c111", 1),
    ]
    old = version in ("0.3.0", "0.3.1", "0.4.0")
    assert [one.get("version") for one in found["ips"]] == (["4", "6"] if old else [None, None])
    on_link = {"dst": "169.254.0.1/32"} | ({"scope": 253} if new else {})
    assert found["routes"] == [
        on_link,
        {"dst": "0.0.0.0/0", "gw": "169.254.0.1"},
        {"dst": "::/0", "gw": "fe80::c111"},
    ]
    assert found["dns"] == {}


async def test_dns_of_the_configuration_is_in_the_result(call: Call) -> None:
    dns = {"nameservers": ["10.96.0.10"], "search": ["svc.cluster.local"]}
    assert (await call("ADD", {"dns": dns}))["dns"] == dns


async def test_the_result_follows_what_earlier_plugins_of_the_list_gave(call: Call) -> None:
    before = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": NETNS, "mtu": 65536}],
        "ips": [{"address": "127.0.0.1/8", "interface": 0}],
        "routes": [{"dst": "192.0.2.0/24", "gw": "127.0.0.1", "priority": 7}],
        "dns": {"nameservers": ["192.0.2.53"]},
    }
    found = await call("ADD", {"prevResult": before})
    assert found["interfaces"][0] == before["interfaces"][0]
    assert [one["interface"] for one in found["ips"]] == [0, 2, 2]
    assert found["interfaces"][2]["name"] == "eth0"
    assert found["routes"][0] == before["routes"][0]
    assert found["dns"] == before["dns"]


async def test_add_is_refused_when_another_plugin_made_the_interface(call: Call) -> None:
    before = {"interfaces": [{"name": "eth0", "sandbox": NETNS}]}
    found = await call("ADD", {"prevResult": before})
    assert found["code"] == 7
    assert "eth0" in found["msg"]
    assert not call.wiring.wired


@pytest.mark.parametrize(
    ("kind", "code", "word"),
    [(Kind.MISSING, 3, NETNS), (Kind.OWN, 8, "node's own"), (Kind.OTHER, 4, "CNI_NETNS")],
)
async def test_add_is_refused_when_the_namespace_is_no_pods(call: Call, kind: Kind, code: int, word: str) -> None:
    call.kinds[NETNS] = kind
    found = await call("ADD", CNI_NETNS_OVERRIDE="1")
    assert found["code"] == code
    assert word in found["msg"]
    assert not call.wiring.wired


async def test_nothing_is_left_for_del_when_the_namespace_has_gone(call: Call) -> None:
    await call("ADD")
    call.kinds[NETNS] = Kind.MISSING
    assert (await call("ADD"))["code"] == 3
    assert not call.wiring.wired


async def test_add_says_try_again_when_the_agent_is_not_ready(call: Call) -> None:
    call.wiring.reasons = ["waiting for identities"]
    found = await call("ADD")
    assert found["code"] == 11
    assert found["details"] == "waiting for identities"


async def test_what_the_agent_could_not_do_is_told(call: Call) -> None:
    call.wiring.broken.add(("c1", "eth0"))
    found = await call("ADD")
    assert found["code"] >= 100
    assert "shop/web-0" in found["details"]


@pytest.mark.parametrize(
    ("conf", "code", "words"),
    [
        ({"cniVersion": "0.2.0"}, 1, ("0.2.0",)),
        ({"cniVersion": "2.0.0"}, 1, ("2.0.0",)),
        ({"cniVersion": 1}, 7, ("configuration",)),
        ({"name": "a/b"}, 7, ("name",)),
        ({"name": ""}, 7, ("name",)),
        ({"ipam": {"type": "host-local"}}, 2, ("ipam", "host-local")),
        ({"ipam": []}, 7, ("configuration",)),
        ({"runtimeConfig": {"portMappings": [{"hostPort": 80}]}}, 2, ("runtimeConfig.portMappings", "80")),
        ({"runtimeConfig": {"mac": "0a:00:00:00:00:09"}}, 2, ("runtimeConfig.mac", "0a:00")),
        ({"runtimeConfig": {"ips": ["10.0.0.9"]}}, 2, ("runtimeConfig.ips", "10.0.0.9")),
        ({"runtimeConfig": {"bandwidth": {"ingressRate": 1}}}, 2, ("runtimeConfig.bandwidth",)),
        ({"prevResult": {"interfaces": [{"mac": 1}]}}, 7, ("prevResult",)),
        ({"prevResult": {"ips": None}}, 7, ("prevResult",)),
    ],
)
async def test_a_bad_configuration_is_named(call: Call, conf: dict[str, Any], code: int, words: tuple[str]) -> None:
    found = await call("ADD", conf)
    assert found["code"] == code
    assert all(word in found["msg"] for word in words)
    assert not call.wiring.wired


async def test_what_only_informs_is_ignored(call: Call) -> None:
    conf = {
        "runtimeConfig": {"cgroupPath": "/kubelet", "dns": {"servers": ["192.0.2.1"]}, "portMappings": []},
        "args": {"cni": {"labels": []}},
        "capabilities": {"portMappings": True},
        "cni.dev/future": 1,
        "somebody": "else",
    }
    assert "ips" in await call("ADD", conf)


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"CNI_CONTAINERID": ""}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "-a"}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "a b"}, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "../etc"}, "CNI_CONTAINERID"),
        ({"CNI_IFNAME": ""}, "CNI_IFNAME"),
        ({"CNI_IFNAME": ".."}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a" * 16}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "é" * 8}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a/b"}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a:b"}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a b"}, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a\x00"}, "CNI_IFNAME"),
        ({"CNI_NETNS": ""}, "CNI_NETNS"),
        ({"CNI_NETNS": "relative"}, "CNI_NETNS"),
        ({"CNI_NETNS": "/a\x00b"}, "CNI_NETNS"),
        ({"CNI_ARGS": "nonsense"}, "CNI_ARGS"),
        ({"CNI_ARGS": "=x"}, "CNI_ARGS"),
        ({"CNI_COMMAND": "UPDATE"}, "CNI_COMMAND"),
        ({"CNI_COMMAND": ""}, "CNI_COMMAND"),
    ],
)
async def test_a_bad_environment_is_named(call: Call, env: dict[str, str], name: str) -> None:
    reply = await call.raw('{"cniVersion":"1.1.0","name":"ciliate"}', **({"CNI_COMMAND": "ADD"} | env))
    document = json.loads(reply.stdout)
    assert (reply.exit_code, document["code"]) == (1, 4)
    assert name in document["msg"]


# ---- errors in general ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stdin", ["", "{", "nonsense", "\ud800", '{"a":' + "[" * 100_000])
async def test_what_is_no_json_is_told(call: Call, stdin: str) -> None:
    document = json.loads((await call.raw(stdin, CNI_COMMAND="ADD")).stdout)
    assert document["code"] == 6


@pytest.mark.parametrize("stdin", ["[]", "1", '"x"', "null"])
async def test_json_that_is_no_configuration_is_told(call: Call, stdin: str) -> None:
    document = json.loads((await call.raw(stdin, CNI_COMMAND="ADD")).stdout)
    assert document["code"] == 7


async def test_an_error_is_in_the_configurations_version(call: Call) -> None:
    assert (await call("ADD", {"cniVersion": "0.4.0", "name": ""}))["cniVersion"] == "0.4.0"
    assert (await call("ADD", {"cniVersion": "9"}))["cniVersion"] == "1.1.0"


words = st.sampled_from(["", "eth0", "name", "address", "dst", "portMappings", "10.0.0.1/32", "\u20ac\x00"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
KEYS = ["name", "ipam", "dns", "runtimeConfig", "prevResult", "cni.dev/valid-attachments", "interfaces"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    command=st.sampled_from(["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "X"]),
    version=st.sampled_from(VERSIONS),
    conf=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4),
    prev=st.dictionaries(st.sampled_from(["interfaces", "ips", "routes", "dns"]), json_values),
)
def test_hostile_configurations_are_answered(
    command: str, version: str, conf: dict[str, Any], prev: dict[str, Any]
) -> None:
    """Whatever comes in, a document comes out: an error that has a code, or a success."""

    async def run() -> None:
        await Call()(command, {"prevResult": prev} | conf | {"cniVersion": version})

    asyncio.run(run())


# ---- DEL -----------------------------------------------------------------------------------------------------------


async def test_del_is_idempotent_and_says_nothing(call: Call) -> None:
    await call("ADD")
    assert await call("DEL") == {}
    assert not call.wiring.wired
    assert await call("DEL") == {}


@pytest.mark.parametrize(
    "conf",
    [
        {},
        {"prevResult": {"interfaces": "nonsense"}},
        {"ipam": {"type": "host-local"}},
        {"runtimeConfig": {"portMappings": [1]}},
        {"name": "a/b"},
        {"dns": 1},
    ],
)
async def test_del_needs_neither_namespace_nor_a_good_configuration(call: Call, conf: dict[str, Any]) -> None:
    await call("ADD")
    assert await call("DEL", conf, CNI_NETNS="", CNI_ARGS="nonsense") == {}
    assert not call.wiring.wired


async def test_del_leaves_other_interfaces_of_the_container(call: Call) -> None:
    await call("ADD")
    await call("ADD", CNI_IFNAME="net1")
    await call("DEL", CNI_IFNAME="net1")
    assert list(call.wiring.wired) == [("c1", "eth0")]


async def test_del_works_when_the_agent_is_not_ready_for_more(call: Call) -> None:
    await call("ADD")
    call.wiring.reasons = ["the first policies are being written"]
    assert await call("DEL") == {}


# ---- CHECK ---------------------------------------------------------------------------------------------------------


async def test_check_says_nothing_when_all_is_well(call: Call) -> None:
    assert await call("CHECK", await check_conf(call)) == {}
    assert set(call.wiring.checked[0]) == set(ATTACHMENT.routes)


async def test_check_needs_a_former_result(call: Call) -> None:
    await call("ADD")
    found = await call("CHECK")
    assert (found["code"], "prevResult" in found["msg"]) == (7, True)


async def test_check_names_what_is_wrong(call: Call) -> None:
    conf = await check_conf(call)
    call.wiring.problems = ["eth0 is down"]
    found = await call("CHECK", conf)
    assert found["code"] >= 100
    assert "eth0 is down" in found["details"]


async def test_check_fails_when_the_former_result_has_another_address(call: Call) -> None:
    conf = await check_conf(call, ips=[{"address": "10.0.0.6/32", "interface": 1}])
    found = await call("CHECK", conf)
    assert found["code"] >= 100
    assert "10.0.0.6" in found["details"]


async def test_check_allows_what_a_later_plugin_added_and_took_away(call: Call) -> None:
    conf = await check_conf(call)
    result = conf["prevResult"]
    result["ips"].append({"address": "192.0.2.9/24", "interface": 1})
    result["interfaces"].append({"name": "br0"})
    result["routes"] = [one for one in result["routes"] if one["dst"] != "::/0"] + [{"dst": "192.0.2.0/24"}]
    assert await call("CHECK", conf) == {}
    assert {str(one.destination) for one in call.wiring.checked[0]} == {"169.254.0.1/32", "0.0.0.0/0"}


async def test_check_fails_when_the_agent_knows_no_such_interface(call: Call) -> None:
    conf = await check_conf(call)
    await call("DEL")
    found = await call("CHECK", conf)
    assert found["code"] >= 100


async def test_check_tells_the_runtime_to_clean_up_when_only_the_namespace_is_gone(call: Call) -> None:
    """Code 3 would tell it that there is nothing to clean up."""
    conf = await check_conf(call)
    call.kinds[NETNS] = Kind.MISSING
    assert (await call("CHECK", conf))["code"] >= 100
    await call("DEL")
    assert (await call("CHECK", conf))["code"] == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"interfaces": []},
        {"interfaces": [{"name": "eth0", "sandbox": "/other"}]},
        {"ips": []},
        {"ips": [{"address": "nonsense", "interface": 1}]},
        {"routes": [{"dst": "nonsense"}]},
        {"ips": [{"interface": 1}]},
    ],
)
async def test_check_refuses_a_former_result_that_is_none(call: Call, changes: dict[str, Any]) -> None:
    assert (await call("CHECK", await check_conf(call, **changes)))["code"] == 7


async def test_check_does_not_exist_before_0_4_0(call: Call) -> None:
    assert (await call("CHECK", {"cniVersion": "0.3.1"}))["code"] == 1


# ---- GC, STATUS, VERSION -------------------------------------------------------------------------------------------


def valid(*names: str) -> dict[str, Any]:
    return {"cni.dev/valid-attachments": [{"containerID": name, "ifname": "eth0"} for name in names]}


async def test_gc_takes_away_what_the_runtime_does_not_name(call: Call) -> None:
    for name in ("c1", "c2", "c3"):
        await call("ADD", CNI_CONTAINERID=name)
    assert await call("GC", valid("c2", "unknown")) == {}
    assert list(call.wiring.wired) == [("c2", "eth0")]


async def test_gc_leaves_other_networks_alone(call: Call) -> None:
    await call("ADD", {"name": "other"})
    await call("ADD", CNI_CONTAINERID="c2")
    await call("GC", valid())
    assert list(call.wiring.wired) == [("c1", "eth0")]


async def test_gc_goes_on_when_one_fails_and_tells(call: Call) -> None:
    for name in ("c1", "c2", "c3"):
        await call("ADD", CNI_CONTAINERID=name)
    call.wiring.broken.add(("c2", "eth0"))
    found = await call("GC", valid())
    assert list(call.wiring.wired) == [("c2", "eth0")]
    assert found["code"] >= 100
    assert "c2/eth0" in found["details"]


async def test_gc_without_a_list_takes_nothing_away(call: Call) -> None:
    await call("ADD")
    assert (await call("GC"))["code"] == 7
    assert call.wiring.wired


async def test_status_tells_whether_a_pod_can_be_wired(call: Call) -> None:
    assert await call("STATUS") == {}
    call.wiring.short = ["pod CIDR 10.0.0.0/24 has no free address"]
    found = await call("STATUS")
    assert (found["code"], found["details"]) == (50, "pod CIDR 10.0.0.0/24 has no free address")
    call.wiring.reasons = ["waiting for nodes"]
    assert "waiting for nodes" in (await call("STATUS"))["details"]


@pytest.mark.parametrize("command", ["GC", "STATUS"])
async def test_gc_and_status_do_not_exist_before_1_1_0(call: Call, command: str) -> None:
    assert (await call(command, {"cniVersion": "1.0.0"} | valid()))["code"] == 1


async def test_version_lists_all(call: Call) -> None:
    assert (await call("VERSION"))["supportedVersions"] == list(VERSIONS)


# ---- order ---------------------------------------------------------------------------------------------------------


async def test_calls_for_one_container_do_not_interleave() -> None:
    locks, seen = KeyedLocks(), []

    async def work(key: str, name: str) -> None:
        async with locks.hold(key):
            seen.append(f"{name} begins")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            seen.append(f"{name} ends")

    async with asyncio.TaskGroup() as group:
        group.create_task(work("a", "first"))
        group.create_task(work("a", "second"))
        group.create_task(work("b", "third"))
    assert seen.index("first ends") < seen.index("second begins")
    assert seen.index("third begins") < seen.index("first ends")
    assert len(locks) == 0


async def test_a_lock_is_given_back_when_its_holder_fails() -> None:
    locks = KeyedLocks()
    with pytest.raises(ValueError, match="x"):
        async with locks.hold("a"):
            raise ValueError("x")
    async with asyncio.timeout(5), locks.hold("a"):
        pass
    assert len(locks) == 0
