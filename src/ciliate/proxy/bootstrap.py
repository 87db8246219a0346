"""Envoy's start-up configuration. Pure: paths in, JSON out."""

import json
from pathlib import Path
from typing import Any

from ciliate.proxy.compile import XDS_CLUSTER

_STATS = ("listener.ruleset-", "listener_manager.", "server.", "http.l7.", "cluster.original-destination.")


def bootstrap(*, node: str, xds_socket: Path, admin_socket: Path) -> bytes:
    """The bootstrap as JSON: admin and xDS on unix sockets, everything else comes by ADS (incremental xDS)."""
    xds_cluster: dict[str, Any] = {
        "name": XDS_CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": XDS_CLUSTER,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": str(xds_socket)}}}}]}],
        },
    }
    ads = {
        "api_type": "DELTA_GRPC",
        "transport_api_version": "V3",
        "grpc_services": [
            {
                "envoy_grpc": {
                    "cluster_name": XDS_CLUSTER,
                    "retry_policy": {"retry_back_off": {"base_interval": "0.05s", "max_interval": "0.5s"}},
                }
            }
        ],
    }
    source = {"ads": {}, "resource_api_version": "V3"}
    runtime = {
        # A pattern's size is the policy author's business: the default of 100 refuses ordinary ones.
        "re2.max_program_size.error_level": 1_000_000,
        "re2.max_program_size.warn_level": 1_000_000,
        # A header that is there twice matches as "a,b": the server may heed the value that no rule has seen.
        "envoy.reloadable_features.match_headers_individually": False,
        "envoy.reloadable_features.rbac_match_headers_individually": False,
    }
    document = {
        "node": {"id": node, "cluster": "ciliate"},
        "admin": {"address": {"pipe": {"path": str(admin_socket), "mode": 0o600}}},
        "dynamic_resources": {"ads_config": ads, "lds_config": source, "cds_config": source},
        "static_resources": {"clusters": [xds_cluster]},
        "layered_runtime": {"layers": [{"name": "static", "static_layer": runtime}]},
        "stats_config": {"stats_matcher": {"inclusion_list": {"patterns": [{"prefix": each} for each in _STATS]}}},
    }
    return json.dumps(document, indent=1).encode()
