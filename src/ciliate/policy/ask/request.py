"""What L7 rules say to one request, as the proxy judges it: RE2, full match, the path with its query string."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import re2

from ciliate.policy.ask.world import AskError
from ciliate.policy.image import RuleRef, RuleSet
from ciliate.policy.l7 import DnsRule, HttpRule, L7Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """A request. ``headers``: names in lower case."""

    method: str = "GET"
    path: str = "/"
    host: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """``GET /path``."""
        return f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """``rules``: those that let the request pass; ``misses``: of each other rule, what did not fit."""

    allowed: bool
    rules: tuple[RuleRef, ...] = ()
    misses: tuple[tuple[RuleRef, str], ...] = ()


def parse_request(text: str) -> HttpRequest:
    """Return the request of ``GET /path`` (``GET http://host/path`` names the host too). Error: AskError."""
    method, _, target = text.strip().partition(" ")
    target = target.strip()
    if not method or not target:
        raise AskError(f"{text!r}: a request is written METHOD PATH, for example 'GET /api/v1/items'")
    host = ""
    if "://" in target:
        rest = target.partition("://")[2]
        host, slash, path = rest.partition("/")
        target = slash + path or "/"
    if not target.startswith("/") and target != "*":
        raise AskError(f"{text!r}: the path must begin with /")
    return HttpRequest(method=method, path=target, host=host)


def judge_request(ruleset: RuleSet, request: HttpRequest) -> Judged:
    """Return whether a redirect lets a request pass. Error: AskError (the rules are not about HTTP)."""
    if ruleset.protocol is not L7Protocol.HTTP:
        raise AskError(f"the rules there are about {ruleset.protocol}, not about HTTP")
    fits, misses = [], []
    for rule, ref in ruleset.rules:
        problem = http_problem(rule, request) if isinstance(rule, HttpRule) else "is not about HTTP"
        if problem:
            misses.append((ref, problem))
        else:
            fits.append(ref)
    allowed = bool(fits) or ruleset.allow_all
    return Judged(allowed=allowed, rules=tuple(dict.fromkeys(fits)), misses=tuple(misses))


def http_problem(rule: HttpRule, request: HttpRequest) -> str:
    """Return what of a request a rule does not accept, "" if it accepts it."""
    for name, pattern, value in (
        ("method", rule.method, request.method),
        ("path", rule.path, request.path),
        ("host", rule.host, request.host),
    ):
        if pattern is not None and _compiled(pattern).fullmatch(value) is None:
            return f"{name} {value!r} does not match {pattern!r}"
    for header, wanted in rule.headers:
        have = request.headers.get(header.lower())
        if have is None:
            return f"header {header} is missing"
        if wanted is not None and have != wanted:
            return f"header {header} is {have!r}, not {wanted!r}"
    for match in rule.header_matches:
        have = request.headers.get(match.name.lower())
        if match.mismatch or match.secret is not None:  # the request passes whatever it has, or nobody here can know
            continue
        if have is None or (match.value is not None and have != match.value):
            return f"header {match.name} is {'missing' if have is None else repr(have)}, not {match.value!r}"
    return ""


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    return re2.compile(pattern)


def describe_rule(rule: object) -> str:
    """Return an L7 rule in a few words."""
    if isinstance(rule, HttpRule):
        parts = [f"{name} {value}" for name, value in (("host", rule.host), *rule.headers) if value]
        return " ".join([rule.method or "any method", rule.path or "any path", *parts])
    if isinstance(rule, DnsRule):
        return f"DNS {rule.name or rule.pattern}"
    return repr(rule)
