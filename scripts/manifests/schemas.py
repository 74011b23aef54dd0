"""Objects against their schemas: KubeRay's custom resource definitions with their CEL rules, and Kubernetes' own kinds."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cel
import jsonschema
import kubernetes_validate
import yaml

Object = dict[str, Any]
KUBERNETES = "1.33"
"""The oldest version that the manifests are for: pod affinity by matchLabelKeys."""


def check_definition(found: Object, crds: Path) -> list[str]:
    """What a KubeRay object breaks of its definition: unknown and missing fields, types, CEL rules."""
    schema = definition(crds, found["kind"])
    validator = jsonschema.Draft202012Validator(_closed(schema))
    broken = [f"{_dotted(error.absolute_path)}: {error.message[:300]}" for error in validator.iter_errors(found)]
    return [*broken, *_rules(schema, found, "")]


def check_builtin(found: Object) -> list[str]:
    """What an object of one of Kubernetes' own kinds breaks of its schema; unknown fields are errors."""
    try:
        kubernetes_validate.validate(found, KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:
        return [f"{_dotted(error.absolute_path)}: {error.message[:300]}"]
    return []


def check_pod(template: Object) -> list[str]:
    return check_builtin({"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]})


@cache
def definition(crds: Path, kind: str) -> Object:
    """The schema of `ray.io/v1`'s kind, from `<crds>/ray.io_<plural>.yaml`, compressed or not."""
    file = crds / f"ray.io_{kind.lower()}s.yaml"
    compressed = file.with_name(file.name + ".gz")
    text = gzip.decompress(compressed.read_bytes()).decode() if compressed.exists() else file.read_text()
    versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    return next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")


def _closed(schema: Any) -> Any:
    """The API server drops unknown fields; a manifest that has one is wrong."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and "additionalProperties" not in closed:
        closed["additionalProperties"] = closed.get("x-kubernetes-preserve-unknown-fields", False)
    return closed


def _rules(schema: Object, value: Any, path: str) -> Iterator[str]:
    """CEL rules of what is there. Rules about changes (oldSelf) have nothing to say of a new object."""
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{path}: {rule.get('message', rule['rule'])}"
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _rules(schema.get("items", {}), item, f"{path}[{number}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _rules(schema.get("properties", {}).get(key, {}), item, f"{path}.{key}".lstrip("."))


def _dotted(path: Any) -> str:
    return ".".join(str(part) for part in path) or "object"
