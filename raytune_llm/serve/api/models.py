"""The endpoints of models and adapters: list them, and load, replace, unload and pin adapters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastapi import APIRouter, Depends, Response

from raytune_llm.engines.engine import AdapterState
from raytune_llm.serve.adapters import MissingFolder, checked_folder, checked_name
from raytune_llm.serve.api.errors import APIError, invalid, unknown_model
from raytune_llm.serve.api.schema import LoadAdapter, PinAdapter, UnloadAdapter
from raytune_llm.serve.api.server import Server, json_response


@dataclass(frozen=True)
class Models:
    server: Server

    def routes(self) -> APIRouter:
        router = APIRouter()
        user, admin = [Depends(self.server.user)], [Depends(self.server.admin)]
        router.get("/v1/models", dependencies=user)(self.list_models)
        router.get("/v1/models/{model:path}", dependencies=user)(self.retrieve_model)
        router.post("/v1/load_lora_adapter", dependencies=admin, response_model=None)(self.load_adapter)
        router.post("/v1/unload_lora_adapter", dependencies=admin, response_model=None)(self.unload_adapter)
        router.get("/admin/adapters", dependencies=admin)(self.list_adapters)
        router.post("/admin/adapters/{name}/pin", dependencies=admin)(self.pin_adapter)
        return router

    async def list_models(self) -> dict[str, Any]:
        adapters = await self.server.backend.adapters()
        return {"object": "list", "data": [self._served(), *map(self._adapter, adapters)]}

    async def retrieve_model(self, model: str) -> dict[str, Any]:
        if model == self._base:
            return self._served()
        for one in await self.server.backend.adapters():
            if one.name == model:
                return self._adapter(one)
        raise unknown_model(model)

    async def load_adapter(self, body: LoadAdapter) -> Response:
        """As in vLLM: 200, 400 for a name that is in use, 404 for a folder that does not exist. Clients search the texts."""
        backend, name = self.server.backend, checked_name(body.lora_name, self._base)
        if await backend.serves(name) and not body.load_inplace:
            raise invalid(f"The adapter '{name}' has already been loaded. Set load_inplace to replace it", "lora_name")
        try:
            folder = checked_folder(body.lora_path, self.server.access.roots)
        except MissingFolder as error:
            raise APIError(404, str(error), param="lora_path", code="not_found") from None
        version = await backend.add_adapter(name, str(folder), pinned=body.pinned)
        message = f"Success: LoRA adapter '{name}' added successfully."
        return json_response({"message": message, "name": name, "version": version}, body.ignored)

    async def unload_adapter(self, body: UnloadAdapter) -> Response:
        if not await self.server.backend.serves(body.lora_name):
            raise unknown_model(body.lora_name)
        await self.server.backend.remove_adapter(body.lora_name)
        message = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
        return json_response({"message": message, "name": body.lora_name}, body.ignored)

    async def list_adapters(self) -> dict[str, Any]:
        return {"adapters": [asdict(one) for one in await self.server.backend.adapters()]}

    async def pin_adapter(self, name: str, body: PinAdapter) -> dict[str, Any]:
        if not await self.server.backend.serves(name):
            raise unknown_model(name)
        await self.server.backend.pin(name, body.pinned)
        return {"name": name, "pinned": body.pinned}

    @property
    def _base(self) -> str:
        return self.server.backend.facts.name

    def _served(self) -> dict[str, Any]:
        """The base, or an adapter that is one with it."""
        facts = self.server.backend.facts
        return {**self._model(facts.name), "parent": facts.adapter_of}

    def _model(self, name: str) -> dict[str, Any]:
        facts = {"id": name, "object": "model", "created": self.server.created, "owned_by": "raytune_llm"}
        return {**facts, "root": self._base, "max_model_len": self.server.backend.facts.max_length}

    def _adapter(self, one: AdapterState) -> dict[str, Any]:
        return {**self._model(one.name), "parent": self._base, "version": one.version}
