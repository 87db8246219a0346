"""What the status of each policy says: is it valid, what is in force for it, on which nodes, how many rows it takes."""

from collections.abc import Collection, Mapping
from typing import Any

from ciliate.daemon.objects import POLICY_KINDS, ClusterObjects
from ciliate.kvstore.reports import Report
from ciliate.policy.rules import PolicyObject

Key = tuple[str, str, str]


def report_name(key: Key) -> str:
    """Return a policy's name in a node's report."""
    return "/".join(key)


def own_report(objects: ClusterObjects, enforced: Mapping[Key, PolicyObject]) -> Report:
    """Return what this node enforces as it is written: neither what it has not come to, nor a stand-in."""
    return {
        report_name(key): objects.digests[key]
        for key, policy in sorted(enforced.items())
        if key not in objects.rejected and objects.policies.get(key) is policy and key in objects.digests
    }


def status_documents(
    objects: ClusterObjects,
    reports: Mapping[str, Report],
    nodes: Collection[str],
    rows: Mapping[Key, int],
    problems: Collection[str],
) -> list[dict[str, Any]]:
    """Return the status of every policy, in order. ``reports``: by node, this one's among them."""
    return [
        _status(objects, key, _missing(objects, key, reports, nodes), len(nodes), rows.get(key, 0), problems)
        for key in sorted(objects.policies.keys() | objects.rejected.keys())
        if key[0] in POLICY_KINDS
    ]


def _missing(objects: ClusterObjects, key: Key, reports: Mapping[str, Report], nodes: Collection[str]) -> list[str]:
    wanted, name = objects.digests.get(key), report_name(key)
    return sorted(node for node in nodes if wanted is None or reports.get(node, {}).get(name) != wanted)


def _status(
    objects: ClusterObjects, key: Key, missing: list[str], nodes: int, rows: int, problems: Collection[str]
) -> dict[str, Any]:
    rejected, policy = objects.rejected.get(key), objects.policies.get(key)
    enforced = nodes - len(missing)
    where = f"enforced on {enforced} of {nodes} nodes" + (f"; not on {', '.join(missing)}" if missing else "")
    state = "rejected" if rejected else "pending" if missing else "enforced"
    warnings = list(policy.warnings) if policy is not None and not rejected else []
    message = str(rejected) if rejected else "; ".join([*(problems if missing else []), *([where] if missing else [])])
    return {
        "kind": key[0],
        "namespace": key[1],
        "name": key[2],
        "state": state,
        "message": message or "; ".join(warnings),
        "in_force": rejected.instead if rejected else "as written",
        "nodes": {"enforced": enforced, "total": nodes, "missing": missing},
        "rows": rows,
        "warnings": warnings,
        "conditions": [
            {
                "type": "Valid",
                "status": "False" if rejected else "True",
                "reason": "Rejected" if rejected else "Accepted",
                "message": str(rejected) if rejected else "; ".join(warnings),
            },
            {
                "type": "Enforced",
                "status": "False" if missing else "True",
                "reason": "Pending" if missing else "OnEveryNode",
                "message": where,
            },
        ],
    }
