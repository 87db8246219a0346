"""How events are shown."""

import json

import pytest

from ciliate.cli.monitor import Verdict, text_line, verdict_class, wanted

RULE = {"kind": "CiliumNetworkPolicy", "namespace": "default", "name": "api", "section": "ingress", "index": 0}
EVENT = {
    "time": "2026-11-24T14:03:22.123456Z",
    "node": "n1",
    "type": "verdict",
    "verdict": "ALLOWED",
    "reason": "",
    "direction": "ingress",
    "protocol": "TCP",
    "tcp_flags": ["SYN"],
    "icmp_type": None,
    "source": {"address": "10.1.0.5", "port": 40312, "identity": 258, "pod": "default/client-1", "labels": []},
    "destination": {"address": "fd00::7", "port": 8080, "identity": 260, "pod": "default/api-1", "labels": []},
    "rules": [RULE],
    "http": None,
}
DENIED = EVENT | {"verdict": "DENIED", "reason": "POLICY_DENIED", "rules": [RULE | {"section": "default", "index": -1}]}
END = EVENT | {"type": "end", "verdict": "ENDED"}
WORLD = {"address": "1.1.1.1", "port": 0, "identity": 2, "pod": "", "labels": ["reserved:world"]}


def test_a_line_has_ends_verdict_and_rule():
    line = text_line(EVENT, colour=False)
    assert line.partition(" ")[2] == (
        "n1 default/client-1 (id 258) 10.1.0.5:40312 -> default/api-1 (id 260) [fd00::7]:8080 TCP SYN  "
        "ALLOWED ingress  CiliumNetworkPolicy default/api ingress[0]"
    )


ASKED = {"name": "default/web", "address": "10.96.0.10", "port": 80}
SOCKET = EVENT | {
    "type": "socket",
    "verdict": "TRANSLATED",
    "direction": "egress",
    "tcp_flags": [],
    "source": EVENT["source"] | {"port": 0},
    "service": ASKED,
    "rules": [],
}


def test_a_socket_that_was_given_a_backend_shows_service_and_backend():
    assert text_line(SOCKET, colour=False).partition(" ")[2] == (
        "n1 default/client-1 (id 258) 10.1.0.5 -> svc default/web 10.96.0.10:80 -> "
        "default/api-1 (id 260) [fd00::7]:8080 TCP  TRANSLATED egress"
    )
    assert wanted(SOCKET, None, "client-1", False)
    assert not wanted(SOCKET, Verdict.allowed, None, False)


def test_a_service_without_a_backend_is_not_shown_twice():
    there = EVENT["destination"] | {"address": "10.96.0.10", "port": 80, "pod": "", "identity": 0}
    event = SOCKET | {"verdict": "DROPPED", "reason": "NO_SERVICE", "destination": there}
    line = text_line(event, colour=False).partition(" ")[2]
    assert line.startswith("n1 default/client-1 (id 258) 10.1.0.5 -> svc default/web 10.96.0.10:80 TCP  DROPPED egress")
    assert line.endswith("NO_SERVICE")


def test_a_service_that_nobody_can_name_is_shown_by_its_address():
    line = text_line(SOCKET | {"service": {"name": "", "address": "fd00::a", "port": 53}}, colour=False)
    assert " -> svc [fd00::a]:53 -> " in line


def test_a_drop_names_who_imposed_default_deny():
    line = text_line(DENIED, colour=False)
    assert line.endswith("DENIED ingress  POLICY_DENIED: default deny by CiliumNetworkPolicy default/api")
    assert "\033[31m" in text_line(DENIED, colour=True)


def test_a_policys_log_text_is_shown():
    allowed = text_line(EVENT | {"rules": [RULE | {"log": "audit"}]}, colour=False)
    assert allowed.endswith('CiliumNetworkPolicy default/api ingress[0] "audit"')
    denied = text_line(DENIED | {"rules": [RULE | {"section": "default", "index": -1, "log": "a"}]}, colour=False)
    assert denied.endswith('default deny by CiliumNetworkPolicy default/api "a"')


def test_an_explicit_deny_names_the_rule():
    event = DENIED | {"reason": "POLICY_DENY", "rules": [RULE | {"section": "ingressDeny", "index": 2}]}
    assert text_line(event, colour=False).endswith("POLICY_DENY: CiliumNetworkPolicy default/api ingressDeny[2]")


def test_a_request_shows_method_path_and_code():
    event = EVENT | {
        "type": "http",
        "verdict": "HTTP_DENIED",
        "rules": [],
        "http": {"method": "POST", "path": "/x", "code": 403},
    }
    assert "HTTP POST /x -> 403  DENIED ingress" in text_line(event, colour=False)


def test_a_reserved_identity_is_named_when_there_is_no_pod():
    assert "world (id 2) 1.1.1.1 ->" in text_line(EVENT | {"source": WORLD}, colour=False)


@pytest.mark.parametrize("missing", [*EVENT, "all"])
def test_missing_keys_do_no_harm(missing):
    event = {} if missing == "all" else {key: value for key, value in EVENT.items() if key != missing}
    assert text_line(event, colour=True)
    assert isinstance(wanted(event, Verdict.allowed, "x", False), bool)


def test_lost_events_are_told():
    assert "17 events lost" in text_line({"type": "lost", "count": 17}, colour=False)


@pytest.mark.parametrize(
    ("event", "verdict", "pod", "everything", "passes"),
    [
        (EVENT, None, None, False, True),
        (EVENT, Verdict.allowed, None, False, True),
        (EVENT, Verdict.denied, None, False, False),
        (DENIED, Verdict.denied, None, False, True),
        (EVENT, None, "api-1", False, True),
        (EVENT, None, "default/client-1", False, True),
        (EVENT, None, "other/client-1", False, False),
        (EVENT, None, "api", False, False),
        (END, None, None, False, False),
        (END, None, None, True, True),
        ({"type": "start"}, None, None, True, False),
    ],
)
def test_filters(event, verdict, pod, everything, passes):
    assert wanted(event, verdict, pod, everything) is passes


def test_http_verdicts_count_as_verdicts():
    assert verdict_class({"verdict": "HTTP_DENIED"}) == "denied"
    assert verdict_class({"verdict": "HTTP_ALLOWED"}) == "allowed"
    assert verdict_class({}) == ""


def test_json_passes_lines_through_and_count_ends_it(agent, ciliate):
    lines = [{"type": "start"}, END, EVENT, DENIED, EVENT]
    agent.answers["monitor"] = (200, b"".join(json.dumps(one).encode() + b"\n" for one in lines))
    done = ciliate("monitor", "-o", "json", "--count", "2")
    assert done.returncode == 0
    assert [json.loads(line) for line in done.stdout.splitlines()] == [EVENT, DENIED]
    assert agent.asked == ["/v1/monitor?since=now"]


def test_monitor_ends_when_the_agent_ends_the_stream(agent, ciliate):
    agent.answers["monitor"] = (200, json.dumps(EVENT).encode() + b"\n")
    done = ciliate("monitor")
    assert done.returncode == 0
    assert done.stdout.startswith("14:03:22.123 n1 ")


def test_monitor_fails_when_no_agent_runs(ciliate):
    done = ciliate("monitor")
    assert done.returncode == 1
    assert "not running" in done.stderr
