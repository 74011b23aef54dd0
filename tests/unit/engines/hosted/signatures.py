"""What packages' engines take, read from their sources: so that calls are checked where the packages can't be installed.

    python tests/unit/engines/hosted/signatures.py vllm FOLDER > tests/unit/engines/hosted/vllm.json

FOLDER is an unpacked wheel (`pip download --no-deps vllm`, then unzip).
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WANTED: dict[str, dict[str, str]] = {
    "vllm": {
        # a name that is used -> where it stands
        "AsyncEngineArgs": "vllm/engine/arg_utils.py:EngineArgs AsyncEngineArgs",
        "SamplingParams": "vllm/sampling_params.py:SamplingParams",
        "StructuredOutputsParams": "vllm/sampling_params.py:StructuredOutputsParams",
        "LoRARequest": "vllm/lora/request.py:LoRARequest",
        "TokensPrompt": "vllm/inputs/llm.py:TokensPrompt",
        "AsyncLLM.from_engine_args": "vllm/v1/engine/async_llm.py:AsyncLLM.from_engine_args",
        "AsyncLLM.generate": "vllm/v1/engine/async_llm.py:AsyncLLM.generate",
        "AsyncLLM.add_lora": "vllm/v1/engine/async_llm.py:AsyncLLM.add_lora",
        "AsyncLLM.remove_lora": "vllm/v1/engine/async_llm.py:AsyncLLM.remove_lora",
        "AsyncLLM.pin_lora": "vllm/v1/engine/async_llm.py:AsyncLLM.pin_lora",
        "AsyncLLM.shutdown": "vllm/v1/engine/async_llm.py:AsyncLLM.shutdown",
        "AsyncLLM.errored": "vllm/v1/engine/async_llm.py:AsyncLLM.errored",
        "AsyncLLM.dead_error": "vllm/v1/engine/async_llm.py:AsyncLLM.dead_error",
        "RequestOutputKind": "vllm/sampling_params.py:RequestOutputKind",
        "VLLMValidationError": "vllm/exceptions.py:VLLMValidationError",
        "RequestOutput": "vllm/outputs.py:RequestOutput.__init__",
        "CompletionOutput": "vllm/outputs.py:CompletionOutput",
        "Logprob": "vllm/logprobs.py:Logprob",
    },
    "sglang": {
        "Engine": "sglang/srt/arg_groups/fields:*",
        "Engine.async_generate": "sglang/srt/entrypoints/engine.py:Engine.async_generate",
        "Engine.async_load_lora_adapter": "sglang/srt/entrypoints/engine.py:Engine.async_load_lora_adapter",
        "Engine.async_unload_lora_adapter": "sglang/srt/entrypoints/engine.py:Engine.async_unload_lora_adapter",
        "Engine.shutdown": "sglang/srt/entrypoints/engine.py:Engine.shutdown",
        "TokenizerManager.abort_request": "sglang/srt/managers/tokenizer_manager.py:TokenizerManager.abort_request",
        "SamplingParams": "sglang/srt/sampling/sampling_params.py:SamplingParams",
    },
}  # fmt: skip


def record(package: str, folder: Path) -> dict[str, Any]:
    (metadata,) = folder.glob(f"{package}-*.dist-info")
    found = {name: list(_parameters(folder, place)) for name, place in WANTED[package].items()}
    return {"package": package, "version": metadata.name.split("-")[1].removesuffix(".dist"), "takes": found}


def signature(parameters: list[list[Any]]) -> inspect.Signature:
    """Of what was recorded: [name, kind, has a default], ..."""
    kinds = {kind.name: kind for kind in inspect._ParameterKind}
    return inspect.Signature(
        [
            inspect.Parameter(name, kinds[kind], default=None if has_default else inspect.Parameter.empty)
            for name, kind, has_default in parameters
        ]
    )


def _parameters(folder: Path, place: str) -> Iterator[list[Any]]:
    file, _, names = place.partition(":")
    if names == "*":
        for path in sorted((folder / file).glob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    yield from _fields(node)
        return
    tree = ast.parse((folder / file).read_text())
    for name in names.split():
        outer, _, inner = name.partition(".")
        (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == outer)
        yield from _of_function(found, inner) if inner else _fields(found)


def _fields(node: ast.ClassDef) -> Iterator[list[Any]]:
    """Of a dataclass, a msgspec.Struct, a TypedDict or an Enum."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not line.target.id.startswith("_"):
            optional = line.value is not None or "NotRequired" in ast.unparse(line.annotation)
            yield [line.target.id, "KEYWORD_ONLY", optional]
        elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name) and line.targets[0].id[0].isupper():
            yield [line.targets[0].id, "KEYWORD_ONLY", True]


def _of_function(node: ast.ClassDef, name: str) -> Iterator[list[Any]]:
    found = next(line for line in node.body if isinstance(line, ast.FunctionDef | ast.AsyncFunctionDef) and line.name == name)
    arguments = found.args
    places = [*arguments.posonlyargs, *arguments.args]
    first_default = len(places) - len(arguments.defaults)
    for at, one in enumerate(places):
        if at or one.arg not in ("self", "cls"):
            yield [one.arg, "POSITIONAL_OR_KEYWORD", at >= first_default]
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield [one.arg, "KEYWORD_ONLY", default is not None]


if __name__ == "__main__":
    print(json.dumps(record(sys.argv[1], Path(sys.argv[2]))))
