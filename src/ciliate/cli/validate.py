"""``ciliate policy validate``: policies checked without a cluster."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ciliate.client import UserError
from ciliate.k8s.manifests import ManifestError, parse_documents
from ciliate.policy.parse import API_VERSIONS, CIDR_GROUP_KIND, CLUSTER_WIDE, parse_cidr_group, parse_object
from ciliate.policy.rules import PolicyError

_SUFFIXES = (".yaml", ".yml", ".json")


def validate(sources: Sequence[Path], stdin: str) -> list[dict[str, Any]]:
    """Return a row for each policy and CiliumCIDRGroup: ``{"file", "object", "rules", "error", "warnings"}``.

    Error: UserError (none there).
    """
    rows: list[dict[str, Any]] = []
    for path, text in _texts(sources, stdin):
        try:
            for _, raw in parse_documents(text, path):
                if str(raw.get("kind")) in (*API_VERSIONS, CIDR_GROUP_KIND):
                    rows.append(_checked(path, raw))
        except ManifestError as error:
            rows.append({"file": path, "object": path, "rules": 0, "error": str(error), "warnings": []})
    if not rows:
        raise UserError(f"{', '.join(map(str, sources))}: there is no policy in there")
    return rows


def _checked(path: str, raw: Any) -> dict[str, Any]:
    kind, metadata = raw["kind"], raw["metadata"]
    where = "" if kind in CLUSTER_WIDE else f"{metadata.get('namespace') or 'default'}/"
    row = {"file": path, "object": f"{kind} {where}{metadata['name']}", "rules": 0, "error": "", "warnings": []}
    try:
        if kind == CIDR_GROUP_KIND:
            parse_cidr_group(raw, source=path)
            return row
        found = parse_object(raw, source=path)
    except PolicyError as error:
        return row | {"error": f"{path}: {error}"}
    rules = sum(len(subject.rules) for subject in found.subjects)
    return row | {"rules": rules, "warnings": [f"{path}: {one}" for one in found.warnings]}


def _texts(sources: Sequence[Path], stdin: str) -> list[tuple[str, str]]:
    texts = []
    for source in sources:
        if str(source) == "-":
            texts.append(("standard input", stdin))
            continue
        paths = sorted(p for p in source.iterdir() if p.suffix in _SUFFIXES) if source.is_dir() else [source]
        try:
            texts += [(str(path), path.read_text()) for path in paths]
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: not a text file ({error.reason})") from error
    return texts
