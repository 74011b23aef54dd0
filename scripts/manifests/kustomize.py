"""Render a kustomization without the kustomize program.

Knows what cluster/kuberay uses: resources, components, namespace, images, JSON patches, replacements and configMapGenerator, in
kustomize's order, and drops what config.kubernetes.io/local-config marks. Anything else is an error, so that nothing is silently
rendered otherwise than kubectl does; where kubectl is installed, the two are compared (`scripts/manifests`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Object = dict[str, Any]
LOCAL = "config.kubernetes.io/local-config"


class KustomizeError(Exception):
    """A kustomization that this renderer doesn't know how to render, or that kustomize would refuse."""


def render(folder: Path) -> list[Object]:
    """The objects that `kubectl apply -k folder` would apply."""
    kustomization = _kustomization(folder, "Kustomization")
    return [found for found in _accumulate(folder, kustomization, []) if not _is_local(found)]


def _accumulate(folder: Path, kustomization: Object, objects: list[Object]) -> list[Object]:
    """Resources first, then components, which change what is there by then, then the folder's own changes."""
    objects = [*objects]
    for name in kustomization.get("resources", []):
        there = folder / name
        objects += _accumulate(there, _kustomization(there, "Kustomization"), []) if there.is_dir() else _documents(there)
    for name in kustomization.get("components", []):
        there = folder / name
        objects = _accumulate(there, _kustomization(there, "Component"), objects)
    for generator in kustomization.get("configMapGenerator", []):
        objects.append(_config_map(folder, generator))
    for change, transform in TRANSFORMERS.items():
        if change in kustomization:
            objects = transform(objects, kustomization[change])
    return objects


def _kustomization(folder: Path, kind: str) -> Object:
    (content,) = _documents(folder / "kustomization.yaml")
    if content.get("kind") != kind:
        raise KustomizeError(f"{folder}: the kind must be {kind}, got {content.get('kind')}")
    unknown = content.keys() - {"apiVersion", "kind", "resources", "components", "configMapGenerator", *TRANSFORMERS}
    if unknown:
        raise KustomizeError(f"{folder}: {', '.join(sorted(unknown))} is not known to scripts/manifests/kustomize.py")
    return content


def _documents(file: Path) -> list[Object]:
    try:
        return [found for found in yaml.load_all(file.read_text(), yaml.CSafeLoader) if found]
    except OSError as error:
        raise KustomizeError(f"{file}: {error.strerror}") from None


def _config_map(folder: Path, generator: Object) -> Object:
    if generator.keys() != {"name", "files", "options"} or generator["options"].get("disableNameSuffixHash") is not True:
        raise KustomizeError(f"{folder}: a configMapGenerator has name, files and options.disableNameSuffixHash")
    data = {}
    for entry in generator["files"]:
        key, _, name = entry.partition("=")
        data[key] = (folder / name).read_text()
    metadata = {"name": generator["name"], "annotations": generator["options"].get("annotations", {})}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _patches(objects: list[Object], patches: Sequence[Object]) -> list[Object]:
    for patch in patches:
        operations = yaml.load(patch["patch"], yaml.CSafeLoader)
        if patch.keys() != {"target", "patch"} or not isinstance(operations, list):
            raise KustomizeError(f"a patch needs a target and a list of JSON patch operations, got {patch}")
        chosen = [number for number, found in enumerate(objects) if _selected(found, patch["target"])]
        if not chosen:
            raise KustomizeError(f"no object for the patch's target {patch['target']}")
        for number in chosen:
            try:
                objects[number] = jsonpatch.apply_patch(objects[number], operations)
            except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as error:
                raise KustomizeError(f"the patch for {patch['target']} doesn't apply: {error}") from None
    return objects


def _namespace(objects: list[Object], namespace: str) -> list[Object]:
    for found in objects:
        if found["kind"] == "Namespace":
            found["metadata"]["name"] = namespace
        else:  # kinds that belong to no namespace can't be told from others here: kustomize itself gives them one
            found["metadata"]["namespace"] = namespace
    return objects


def _images(objects: list[Object], images: Sequence[Object]) -> list[Object]:
    for image in images:
        for found in objects:
            for container in _containers(found):
                name, _, tag = container["image"].partition(":")
                if name == image["name"]:
                    container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}".rstrip(":")
    return objects


def _containers(node: Any) -> list[Object]:
    """Of every pod template within an object, wherever it stands."""
    if isinstance(node, list):
        return [found for item in node for found in _containers(item)]
    if not isinstance(node, dict):
        return []
    here = [found for key in ("containers", "initContainers") for found in node.get(key, []) if "image" in found]
    return here + [found for value in node.values() for found in _containers(value)]


def _replacements(objects: list[Object], replacements: Sequence[Object]) -> list[Object]:
    for replacement in replacements:
        source = dict(replacement["source"])
        path = source.pop("fieldPath")
        found = [item for item in objects if _selected(item, source)]
        if len(found) != 1:
            raise KustomizeError(f"the replacement's source {source} must be one object, got {len(found)}")
        value: Any = found[0]
        for key in path.split("."):
            value = value[key]
        for target in replacement["targets"]:
            create = target.get("options", {}).get("create", False)
            for item in objects:
                if _selected(item, target["select"]) and not any(_selected(item, no) for no in target.get("reject", [])):
                    for field in target["fieldPaths"]:
                        _put(item, field.split("."), copy.deepcopy(value), create=create)
    return objects


def _put(node: Object, path: Sequence[str], value: Any, *, create: bool) -> None:
    *parents, last = path
    for key in parents:
        node = node.setdefault(key, {}) if create else node[key]
    if not create and last not in node:
        raise KustomizeError(f"there is no {'.'.join(path)} to replace")
    node[last] = value


def _selected(found: Object, target: Object) -> bool:
    """kustomize's selectors are anchored regular expressions."""
    if unknown := target.keys() - {"kind", "name"}:
        raise KustomizeError(f"a target by {', '.join(unknown)} is not known to scripts/manifests/kustomize.py")
    there = {"kind": found["kind"], "name": found["metadata"]["name"]}
    return all(re.fullmatch(pattern, there[key]) for key, pattern in target.items())


def _is_local(found: Object) -> bool:
    return found["metadata"].get("annotations", {}).get(LOCAL) == "true"


TRANSFORMERS: dict[str, Callable[[list[Object], Any], list[Object]]] = {
    "patches": _patches,
    "namespace": _namespace,
    "images": _images,
    "replacements": _replacements,
}
"""In the order in which kustomize applies them."""
