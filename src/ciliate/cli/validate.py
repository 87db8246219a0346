"""``ciliate policy validate``: policies checked without a cluster."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ciliate.client import UserError
from ciliate.k8s.manifests import ManifestError, parse_documents
from ciliate.policy.parse import API_VERSIONS, parse_object
from ciliate.policy.rules import PolicyError

_SUFFIXES = (".yaml", ".yml", ".json")


def validate(sources: Sequence[Path], stdin: str) -> list[dict[str, Any]]:
    """Return a row for each policy: ``{"file", "object", "rules", "error"}``. Error: UserError (none there)."""
    rows: list[dict[str, Any]] = []
    for path, text in _texts(sources, stdin):
        try:
            for _, raw in parse_documents(text, path):
                if str(raw.get("kind")) in API_VERSIONS:
                    rows.append(_checked(path, raw))
        except ManifestError as error:
            rows.append({"file": path, "object": path, "rules": 0, "error": str(error)})
    if not rows:
        raise UserError(f"{', '.join(map(str, sources))}: there is no policy in there")
    return rows


def _checked(path: str, raw: Any) -> dict[str, Any]:
    metadata = raw["metadata"]
    title = f"{raw['kind']} {metadata.get('namespace', 'default')}/{metadata['name']}"
    try:
        found = parse_object(raw, source=path)
    except PolicyError as error:
        return {"file": path, "object": title, "rules": 0, "error": f"{path}: {error}"}
    rules = sum(len(subject.rules) for subject in found.subjects)
    return {"file": path, "object": title, "rules": rules, "error": ""}


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
