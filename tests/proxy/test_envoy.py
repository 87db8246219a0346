"""What the compiled configuration does in a real Envoy: what the rules forbid never reaches the server."""

import pytest

from ciliate.proxy.api import HttpRuleSpec, RulesetSpec
from tests.proxy.conftest import Backend, Proxy, connect, eventually, once, request

API = HttpRuleSpec(method="GET", path="/api/v1/.*", rule="api")


async def statuses(port: int, *raws: bytes) -> list[int]:
    return [await once(port, raw) for raw in raws]


async def test_denied_is_answered_with_403_and_the_body_of_cilium(proxy: Proxy, backend: Backend) -> None:
    connection = await connect(await proxy.allow(API))
    connection.send(request("POST", "/api/v1/x", "Content-Length: 0"))
    assert await connection.response() == (403, b"Access denied\r\n")
    assert backend.seen == []


@pytest.mark.parametrize(
    ("rule", "allowed", "denied"),
    [
        (HttpRuleSpec(path="/a"), ["/a"], ["/", "/ab", "/b/a", "/A", "/a/"]),
        (HttpRuleSpec(path="/a|/b"), ["/a", "/b"], ["/ab", "/a|/b"]),
        (HttpRuleSpec(path="/a.*"), ["/a", "/a/b?c=d"], ["/b/a"]),
        (HttpRuleSpec(path="/a"), [], ["/a?b=c"]),  # the query string is part of the path, as under Cilium
        (HttpRuleSpec(path=r"/id/[0-9]{1,3}"), ["/id/7", "/id/123"], ["/id/1234", "/id/x", "/id/"]),
        (HttpRuleSpec(path="(?i)/Caf%C3%A9"), ["/caf%C3%A9"], ["/cafe"]),
    ],
)
async def test_a_path_matches_as_a_whole(
    proxy: Proxy, backend: Backend, rule: HttpRuleSpec, allowed: list[str], denied: list[str]
) -> None:
    port = await proxy.allow(rule)
    assert await statuses(port, *(request("GET", path) for path in allowed)) == [200] * len(allowed)
    assert await statuses(port, *(request("GET", path) for path in denied)) == [403] * len(denied)
    assert len(backend.requests) == len(allowed)


async def test_methods_are_patterns_too(proxy: Proxy) -> None:
    port = await proxy.allow(HttpRuleSpec(method="GET|PURGE"))
    methods = {"GET": 200, "PURGE": 200, "POST": 403, "GETT": 403, "get": 403, "XGET": 403}
    assert {method: await once(port, request(method, "/")) for method in methods} == methods


async def test_hosts_match_as_a_whole_with_their_port(proxy: Proxy) -> None:
    port = await proxy.allow(HttpRuleSpec(host=r"api\.test(:8080)?"))
    hosts = ("api.test", "api.test:8080", "api.test:80", "x.api.test", "apixtest", "api.test.evil")
    assert await statuses(port, *(request("GET", "/", host=host) for host in hosts)) == [200, 200, 403, 403, 403, 403]


async def test_headers_are_exact_or_must_be_there(proxy: Proxy) -> None:
    port = await proxy.allow(HttpRuleSpec(headers=(("X-Token", "Secret"), ("x-any", None))))
    cases = {
        ("X-Token: Secret", "X-Any: 1"): 200,
        ("x-token: Secret", "x-any:"): 200,
        ("X-Token: secret", "X-Any: 1"): 403,
        ("X-Token: Secret2", "X-Any: 1"): 403,
        ("X-Token: Secret",): 403,
        ("X-Any: 1",): 403,
        ("X-Token: Secret", "X-Token: other", "X-Any: 1"): 403,
    }
    assert {headers: await once(port, request("GET", "/", *headers)) for headers in cases} == cases


async def test_rules_are_alternatives_and_fields_of_one_are_not(proxy: Proxy) -> None:
    port = await proxy.allow(HttpRuleSpec(method="GET", path="/a"), HttpRuleSpec(method="PUT", path="/b"))
    asked = [("GET", "/a"), ("PUT", "/b"), ("PUT", "/a"), ("GET", "/b")]
    assert await statuses(port, *(request(m, p, "Content-Length: 0") for m, p in asked)) == [200, 200, 403, 403]


async def test_allow_all_allows_what_no_rule_matches(proxy: Proxy) -> None:
    port = await proxy.allow(API, allow_all=True)
    assert await once(port, request("DELETE", "/x")) == 200


async def test_no_rules_allow_nothing(proxy: Proxy, backend: Backend) -> None:
    port = await proxy.allow()
    assert await once(port, request("GET", "/api/v1/x")) == 403
    assert backend.connections == 0


# ---- tricks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/api/v1/../admin",
        "/api/v1/./../admin",
        "/api/v1/%2e%2e/admin",
        "/api/v1/.%2E/admin",
        "/api/v1/..%2fadmin",
        "/api/v1/%2e%2e%2fadmin",
        "/api/v1/..%5cadmin",
        "/api/v1//../../admin",
        "//admin",
        "/admin#/api/v1/",
        "/admin;/api/v1/",
        "/admin%00/api/v1/",
        "http://web.test/admin",
        "http://web.test/api/v1/../admin",
        "/%61dmin",
        "\\admin",
        "*",
    ],
)
async def test_nothing_but_the_api_reaches_the_server_however_it_is_spelled(
    proxy: Proxy, backend: Backend, target: str
) -> None:
    port = await proxy.allow(API)
    status = await once(port, request("GET", target))
    assert status in (307, 400, 403, 404, 0), status
    assert all(one.startswith("GET /api/v1/") and ".." not in one.split("?")[0].lower() for one in backend.seen)
    assert not [one for one in backend.seen if "admin" in one]


async def test_the_server_gets_the_path_that_was_judged(proxy: Proxy, backend: Backend) -> None:
    port = await proxy.allow(API)
    for target in ("/api//v1/x", "/x/../api/v1/y", "http://web.test/api/v1/z", "/api/v1/%7eq"):
        assert await once(port, request("GET", target)) == 200, target
    assert backend.seen == ["GET /api/v1/x", "GET /api/v1/y", "GET /api/v1/z", "GET /api/v1/~q"]


SMUGGLED = b"GET /admin HTTP/1.1\r\nHost: web.test\r\n\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        request("GET", "/api/v1/x", "Host: other.test"),
        request("GET", "/api/v1/x", host=None),
        request(
            "GET", "/api/v1/x", f"Content-Length: {len(SMUGGLED)}", "Transfer-Encoding: chunked",
            body=b"0\r\n\r\n" + SMUGGLED,
        ),
        request("GET", "/api/v1/x", "Transfer-Encoding: chunked", "Content-Length: 3", body=b"0\r\n\r\n" + SMUGGLED),
        request("GET", "/api/v1/x", "Content-Length: 0", f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED),
        request("GET", "/api/v1/x", "Content-Length: 0, 40", body=SMUGGLED),
        request("GET", "/api/v1/x", "Content-Length: -1", body=SMUGGLED),
        request("GET", "/api/v1/x", "Transfer-Encoding: xchunked", body=b"0\r\n\r\n" + SMUGGLED),
        request("GET", "/api/v1/x", "Transfer-Encoding : chunked", body=b"0\r\n\r\n" + SMUGGLED),
        request("GET", "/api/v1/x", "X: a\rGET /admin HTTP/1.1"),
        request("GET", "/api/v1/x", " folded: header"),
        request("GET", "/api/v1/x", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk"),
        request("CONNECT", "web.test:80"),
        request("GET", "/api/v1/x HTTP/1.1\r\nX: y"),
        b"GET /api/v1/x\r\n\r\n" + SMUGGLED,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED,
    ],
)  # fmt: skip
async def test_two_ways_to_read_a_request_do_not_reach_the_server_as_a_denied_one(
    proxy: Proxy, backend: Backend, raw: bytes
) -> None:
    connection = await connect(await proxy.allow(API))
    connection.send(raw)
    if connection.writer.can_write_eof():
        connection.writer.write_eof()
    while (await connection.response())[0]:
        pass
    connection.writer.close()
    assert all(one == "GET /api/v1/x" for one in backend.seen), backend.seen
    assert all(len([n for n, _ in headers if n == "host"]) == 1 for _, _, headers in backend.requests)
    assert not [h for _, _, headers in backend.requests for h in headers if h[0] in ("upgrade", "http2-settings")]


async def test_pipelined_requests_are_judged_one_by_one(proxy: Proxy, backend: Backend) -> None:
    connection = await connect(await proxy.allow(API))
    allowed, denied = request("GET", "/api/v1/x"), request("GET", "/admin")
    connection.send(denied + allowed + allowed + denied)
    assert [(await connection.response())[0] for _ in range(4)] == [403, 200, 200, 403]
    assert backend.seen == ["GET /api/v1/x"] * 2


# ---- changes ---------------------------------------------------------------------------------------------------


async def test_a_change_holds_for_the_next_request_of_a_live_connection(proxy: Proxy) -> None:
    port = await proxy.allow(API)
    connection = await connect(port)
    for _ in range(20):
        assert await connection.ask(request("GET", "/api/v1/x")) == 200
        assert await proxy.allow(HttpRuleSpec(path="/v2")) == port
        assert await connection.ask(request("GET", "/api/v1/x")) == 403
        assert await connection.ask(request("GET", "/v2")) == 200
        assert await proxy.allow(API) == port
        assert await connection.ask(request("GET", "/v2")) == 403


async def test_a_request_under_way_ends_as_it_began_when_the_rules_change(proxy: Proxy, backend: Backend) -> None:
    connection = await connect(await proxy.allow(API))
    backend.gate.clear()
    connection.send(request("GET", "/api/v1/slow"))
    await eventually(lambda: backend.seen, "the server has it")
    await proxy.allow()
    backend.gate.set()
    assert (await connection.response())[0] == 200
    assert await connection.ask(request("GET", "/api/v1/x")) == 403


async def test_other_rule_sets_are_left_alone_by_a_change(proxy: Proxy) -> None:
    first, second = RulesetSpec(id=1, http=(API,)), RulesetSpec(id=2, http=(API,))
    one, two = await proxy.serve(first, second)
    connection = await connect(two.port)
    assert await connection.ask(request("GET", "/api/v1/x")) == 200
    await proxy.serve(RulesetSpec(id=1), second, RulesetSpec(id=3))
    assert await connection.ask(request("GET", "/api/v1/x")) == 200
    assert await once(one.port, request("GET", "/api/v1/x")) == 403


async def test_each_client_connection_has_one_of_its_own_to_the_server(proxy: Proxy, backend: Backend) -> None:
    """The source address is the client's, so connections to servers are not shared between clients."""
    port = await proxy.allow(API)
    first, second = await connect(port), await connect(port)
    for _ in range(3):
        assert await first.ask(request("GET", "/api/v1/x")) == 200
        assert await second.ask(request("GET", "/api/v1/x")) == 200
    assert backend.connections == 2


async def test_the_server_sees_the_request_as_it_was_sent(proxy: Proxy, backend: Backend) -> None:
    port = await proxy.allow(API)
    sent = ("User-Agent: t", "X-Forwarded-For: 192.0.2.1", "X-Request-Id: 7", "Via: 1.1 a", "X-CaSe: yes")
    assert await once(port, request("GET", "/api/v1/x", *sent)) == 200
    (_, _, headers) = backend.requests[0]
    names = {name for name, _ in headers}
    assert {("x-forwarded-for", "192.0.2.1"), ("x-request-id", "7"), ("via", "1.1 a")} <= set(headers)
    assert not [name for name in names if name.startswith("x-envoy")]
