"""Rule sets in, xDS resources out. Pure: no clock, no socket, no process.

A rule set becomes two resources. Its *listener* (LDS) never changes while the rule set lives, because a change of
a listener drains connections. Its *rules* (ECDS) change at will and are enforced at once on live connections.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from ciliate.proxy import _pb as pb
from ciliate.proxy.api import HttpRuleSpec, RulesetSpec

LISTENER_TYPE: Final = "type.googleapis.com/envoy.config.listener.v3.Listener"
CLUSTER_TYPE: Final = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
RULES_TYPE: Final = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"

XDS_CLUSTER: Final = "ciliate-proxyd"
"""Name of the static cluster in the bootstrap that leads to this daemon (xDS and access log)."""
SERVER_CLUSTER: Final = "original-destination"
RULESET_STATE: Final = "ciliate.ruleset"
"""Name of the connection's filter state that holds the rule set's id, for the access log."""

MARK_FROM_PROXY: Final = 0xA00
"""MARK_FROM_PROXY in bpf/lib/mark.h."""
DENIED_BODY: Final = "Access denied\r\n"
"""What Cilium's proxy answers, octet for octet."""

# (level, option, value): SOL_SOCKET SO_KEEPALIVE; IPPROTO_TCP TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT
_KEEPALIVE: Final = (
    (1, 9, 1),
    (6, 4, 300),
    (6, 5, 60),
    (6, 6, 5),
)
_UNLIMITED: Final = 1 << 30
_HEADERS_KB: Final = 96
_HEADERS_COUNT: Final = 256
_BUFFER: Final = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyOptions:
    """What all listeners share. ``reuse_port``: one socket a worker; before Linux 6.6 BPF cannot assign to such."""

    ipv6: bool = True
    reuse_port: bool = True
    mark: int = MARK_FROM_PROXY


@dataclass(frozen=True, slots=True, kw_only=True)
class XdsResource:
    """A resource as it goes over the wire. ``version`` is the hash of its contents: equal contents, equal version."""

    type_url: str
    name: str
    version: str
    body: Any


def listener_name(ruleset: int) -> str:
    """Name of a rule set's listener."""
    return f"ruleset-{ruleset}"


def rules_name(ruleset: int) -> str:
    """Name of a rule set's rules."""
    return f"rules-{ruleset}"


def compile_listener(ruleset: int, port: int, options: ProxyOptions) -> XdsResource:
    """The rule set's listener: transparent, keeps both addresses, asks the rules by name."""
    hosts = ["127.0.0.1", "::1"] if options.ipv6 else ["127.0.0.1"]
    addresses = [{"socket_address": {"address": host, "port_value": port}} for host in hosts]
    listener = pb.Listener(
        name=listener_name(ruleset),
        stat_prefix=listener_name(ruleset),
        address=addresses[0],
        additional_addresses=[{"address": each} for each in addresses[1:]],
        transparent={"value": True},
        enable_reuse_port={"value": options.reuse_port},
        per_connection_buffer_limit_bytes={"value": _BUFFER},
        socket_options=[
            {"level": level, "name": name, "int_value": value, "state": "STATE_PREBIND"}
            for level, name, value in _KEEPALIVE
        ],
        listener_filters=[
            {"name": "envoy.filters.listener.original_dst", "typed_config": pb.pack(pb.OriginalDst())},
            {"name": "envoy.filters.listener.original_src", "typed_config": pb.pack(pb.OriginalSrc(mark=options.mark))},
        ],
        filter_chains=[
            {
                "filters": [
                    {"name": "envoy.filters.network.rbac", "typed_config": pb.pack(_no_loopback())},
                    {
                        "name": "envoy.filters.network.set_filter_state",
                        "typed_config": pb.pack(_ruleset_state(ruleset)),
                    },
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": pb.pack(_connection_manager(ruleset)),
                    },
                ]
            }
        ],
    )
    if not options.reuse_port:
        listener.connection_balance_config.exact_balance.SetInParent()
    return _resource(LISTENER_TYPE, listener.name, listener)


def compile_rules(ruleset: RulesetSpec) -> XdsResource:
    """The rule set's rules, as an RBAC filter that allows what some rule matches."""
    rules = pb.RBACRules(action="ALLOW")
    for index, rule in enumerate(ruleset.http):
        _add_policy(rules, index, rule)
    if ruleset.allow_all:
        _add_policy(rules, len(ruleset.http), HttpRuleSpec())
    return _rules_resource(ruleset.id, pb.RBAC(rules=rules))


def compile_denial(ruleset: int) -> XdsResource:
    """Rules that allow nothing: what a rule set has that never had acceptable rules."""
    return _rules_resource(ruleset, _deny_all())


def compile_cluster() -> XdsResource:
    """The cluster of all servers: wherever the client wanted to go, one connection there per connection here."""
    breaker = {
        name: {"value": _UNLIMITED}
        for name in ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    }
    options = pb.UpstreamHttpProtocolOptions(
        common_http_protocol_options={
            "idle_timeout": {"seconds": 3600},
            "max_headers_count": {"value": _HEADERS_COUNT},
            "max_response_headers_kb": {"value": _HEADERS_KB},
        },
        use_downstream_protocol_config={
            "http_protocol_options": _http1(),
            "http2_protocol_options": {"allow_connect": True, **_http2_windows()},
        },
    )
    cluster = pb.Cluster(
        name=SERVER_CLUSTER,
        type="ORIGINAL_DST",
        lb_policy="CLUSTER_PROVIDED",
        connect_timeout={"seconds": 10},
        connection_pool_per_downstream_connection=True,
        per_connection_buffer_limit_bytes={"value": _BUFFER},
        circuit_breakers=pb.CircuitBreakers(
            thresholds=[{"priority": priority, **breaker} for priority in ("DEFAULT", "HIGH")]
        ),
        upstream_connection_options={
            "tcp_keepalive": {
                "keepalive_time": {"value": 300},
                "keepalive_interval": {"value": 60},
                "keepalive_probes": {"value": 5},
            }
        },
        typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": pb.pack(options)},
    )
    return _resource(CLUSTER_TYPE, cluster.name, cluster)


def policy_name(index: int, rule: str) -> str:
    """Name of a rule's RBAC policy: sorts by index, carries the rule's text into the access log."""
    return f"{index:05d}|{rule}"


def rule_of_policy(name: str) -> str:
    """The rule's text in a policy's name."""
    return name.partition("|")[2]


def _resource(type_url: str, name: str, message: pb.Message) -> XdsResource:
    body = pb.AnyMessage(type_url=type_url, value=message.SerializeToString(deterministic=True))
    return XdsResource(type_url=type_url, name=name, version=hashlib.sha256(body.value).hexdigest()[:16], body=body)


def _rules_resource(ruleset: int, rbac: pb.Message) -> XdsResource:
    name = rules_name(ruleset)
    return _resource(RULES_TYPE, name, pb.TypedExtensionConfig(name=name, typed_config=pb.pack(rbac)))


def _deny_all() -> pb.Message:
    return pb.RBAC(rules=pb.RBACRules(action="ALLOW"))


def _add_policy(rules: pb.Message, index: int, rule: HttpRuleSpec) -> None:
    patterns = ((":method", rule.method), (":path", rule.path), (":authority", rule.host))
    permissions: list[dict[str, Any]] = [
        {"header": {"name": name, "string_match": {"safe_regex": {"regex": pattern}}}}
        for name, pattern in patterns
        if pattern is not None
    ]
    for name, value in rule.headers:
        match = {"present_match": True} if value is None else {"string_match": {"exact": value}}
        permissions.append({"header": {"name": name.lower(), **match}})
    policy = rules.policies[policy_name(index, rule.rule)]
    policy.principals.add(any=True)
    if permissions:
        policy.permissions.add(and_rules={"rules": permissions})
    else:
        policy.permissions.add(any=True)


def _no_loopback() -> pb.Message:
    """Refuses what was not redirected: a process of the node that connects to the port itself.

    Its destination is the listener, so Envoy would connect to itself without end.
    """
    rules = pb.RBACRules(action="DENY")
    policy = rules.policies["loopback"]
    policy.principals.add(any=True)
    for prefix, length in (("127.0.0.0", 8), ("::1", 128)):
        policy.permissions.add(destination_ip={"address_prefix": prefix, "prefix_len": {"value": length}})
    return pb.NetworkRBAC(rules=rules, stat_prefix="loopback.")


def _ruleset_state(ruleset: int) -> pb.Message:
    value = {
        "object_key": RULESET_STATE,
        "factory_key": "envoy.string",
        "read_only": True,
        "format_string": {"text_format_source": {"inline_string": str(ruleset)}},
    }
    return pb.SetFilterState(on_new_connection=[value])


def _connection_manager(ruleset: int) -> pb.Message:
    manager = pb.HttpConnectionManager(
        codec_type="AUTO",
        stat_prefix="l7",
        route_config=_routes(),
        http_filters=[
            _rules_filter(ruleset),
            {"name": "envoy.filters.http.router", "typed_config": pb.pack(_router())},
        ],
        common_http_protocol_options={
            "idle_timeout": {"seconds": 3600},
            "max_headers_count": {"value": _HEADERS_COUNT},
        },
        http_protocol_options={
            "accept_http_10": True,
            "default_host_for_http_10": "http10.invalid",
            **_http1(),
        },
        http2_protocol_options={
            "allow_connect": True,
            "max_concurrent_streams": {"value": 1024},
            **_http2_windows(),
        },
        server_header_transformation="PASS_THROUGH",
        max_request_headers_kb={"value": _HEADERS_KB},
        stream_idle_timeout={},  # zero: none
        request_timeout={},
        request_headers_timeout={"seconds": 60},
        use_remote_address={"value": True},
        skip_xff_append=True,
        xff_num_trusted_hops=1,
        generate_request_id={"value": False},
        preserve_external_request_id=True,
        proxy_100_continue=True,
        normalize_path={"value": True},
        merge_slashes=True,
        path_with_escaped_slashes_action="UNESCAPE_AND_REDIRECT",
        upgrade_configs=[{"upgrade_type": "websocket"}],
        access_log=[{"name": "envoy.access_loggers.http_grpc", "typed_config": pb.pack(_access_log())}],
    )
    mapper = manager.local_reply_config.mappers.add(body={"inline_string": DENIED_BODY})
    mapper.filter.status_code_filter.comparison.value.default_value = 403
    mapper.filter.status_code_filter.comparison.value.runtime_key = "ciliate.denied_status"
    return manager


def _rules_filter(ruleset: int) -> dict[str, Any]:
    discovery = {
        "config_source": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": {"seconds": 15}},
        "default_config": pb.pack(_deny_all()),
        "type_urls": [f"type.googleapis.com/{pb.RBAC.DESCRIPTOR.full_name}"],
    }
    return {"name": rules_name(ruleset), "config_discovery": discovery}


def _routes() -> dict[str, Any]:
    route = {
        "match": {"prefix": "/"},
        "route": {
            "cluster": SERVER_CLUSTER,
            "timeout": {},  # zero: none
            "retry_policy": {
                # Nothing that the server may have begun.
                "retry_on": "connect-failure,refused-stream,reset-before-request",
                "num_retries": {"value": 2},
            },
        },
    }
    return {
        "name": "l7",
        "virtual_hosts": [{"name": "l7", "domains": ["*"], "routes": [route]}],
        "request_headers_to_remove": ["x-envoy-internal", "x-envoy-external-address"],
    }


def _router() -> pb.Message:
    return pb.Router(suppress_envoy_headers=True)


def _access_log() -> pb.Message:
    return pb.HttpGrpcAccessLogConfig(
        common_config={
            "log_name": "l7",
            "transport_api_version": "V3",
            "grpc_service": {"envoy_grpc": {"cluster_name": XDS_CLUSTER}},
            "buffer_flush_interval": {"nanos": 200_000_000},
            "buffer_size_bytes": {"value": 1 << 16},
            "filter_state_objects_to_log": [RULESET_STATE],
        }
    )


def _http1() -> dict[str, Any]:
    formatter = {"name": "preserve_case", "typed_config": pb.pack(pb.PreserveCaseFormatterConfig())}
    return {
        "enable_trailers": True,
        "allow_custom_methods": True,
        "header_key_format": {"stateful_formatter": formatter},
    }


def _http2_windows() -> dict[str, Any]:
    return {"initial_stream_window_size": {"value": 1 << 20}, "initial_connection_window_size": {"value": 1 << 22}}
