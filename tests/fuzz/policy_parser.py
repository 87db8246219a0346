"""An atheris harness of the policy parser: ``python tests/fuzz/policy_parser.py -max_total_time=60 CORPUS``.

Anything but PolicyError (for a text that is no YAML: ManifestError) that comes out of the parser is a finding. One half
of the inputs are texts as files have them, the other are documents that follow the declared form wherever the input
says so.
"""

import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["ciliate.policy", "ciliate.k8s.manifests"]):
    from ciliate.k8s.manifests import ManifestError, parse_documents
    from ciliate.policy.parse import API_VERSIONS, CIDR_GROUP_KIND, parse_cidr_group, parse_object
    from ciliate.policy.rules import PolicyError
    from ciliate.policy.schema.cilium import CIDR_GROUP, NETWORK_POLICY
    from ciliate.policy.schema.kinds import Anything, Fields, Flag, Kind, Many, Number, NumberOrText, Pairs, Text
    from ciliate.policy.schema.kubernetes import NATIVE, TIERED

DECLARED = {
    "NetworkPolicy": NATIVE,
    "CiliumNetworkPolicy": NETWORK_POLICY,
    "CiliumClusterwideNetworkPolicy": NETWORK_POLICY,
    "ClusterNetworkPolicy": TIERED,
    CIDR_GROUP_KIND: CIDR_GROUP,
}


def main() -> None:
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


def one_input(data: bytes) -> None:
    source = atheris.FuzzedDataProvider(data)
    if source.ConsumeBool():
        text = source.ConsumeUnicodeNoSurrogates(source.remaining_bytes())
        try:
            documents = [raw for _, raw in parse_documents(text, "input.yaml")]
        except ManifestError:
            return
        for one in documents:
            parse(one, strict=True)
        return
    kind = source.PickValueInList(sorted(DECLARED))
    document = value(DECLARED[kind], source)
    if not isinstance(document, dict):
        return
    version = API_VERSIONS.get(kind, "cilium.io/v2")
    parse(document | {"apiVersion": version, "kind": kind, "metadata": {"name": "p"}}, strict=source.ConsumeBool())


def parse(document: Any, *, strict: bool) -> None:
    try:
        if document.get("kind") == CIDR_GROUP_KIND:
            parse_cidr_group(document, strict=strict)
        else:
            parse_object(document, strict=strict)
    except PolicyError:
        return


def value(of: Kind, source: Any) -> Any:
    """Return a value of the declared form, and once in a while one of another form."""
    if source.ConsumeIntInRange(0, 31) == 31:
        return source.PickValueInList(
            [None, True, -1, 2**70, 0.5, "", [], {}, [None], {"x": []}, {1: 2}, "\ud800", b"x"]
        )
    match of:
        case Fields():
            chosen = source.PickValueInList(list(of.one_of or of.any_of or [""]))
            names = {chosen} | {
                name
                for name, field in of.fields.items()
                if name not in of.one_of and (field.required or source.ConsumeIntInRange(0, 3) == 0)
            }
            return {name: value(of.fields[name].of, source) for name in of.fields if name in names}
        case Many():
            return [value(of.of, source) for _ in range(source.ConsumeIntInRange(0, 2))]
        case Text():
            return (
                source.PickValueInList(list(of.enum))
                if of.enum
                else source.ConsumeUnicode(source.ConsumeIntInRange(0, 24))
            )
        case Number():
            return source.ConsumeIntInRange(of.low - 1, of.high + 1)
        case NumberOrText():
            return source.ConsumeIntInRange(-1, 300) if source.ConsumeBool() else source.ConsumeUnicode(8)
        case Flag():
            return source.ConsumeBool()
        case Pairs():
            return {source.ConsumeUnicode(12): source.ConsumeUnicode(6) for _ in range(source.ConsumeIntInRange(0, 2))}
        case Anything():
            return {}
    raise AssertionError(of)


if __name__ == "__main__":
    main()
