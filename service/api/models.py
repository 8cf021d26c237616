"""Models: `GET /v1/models` and `GET /v1/models/{name}`."""

from typing import Any

from fastapi import APIRouter

from service.api.backend import Served
from service.api.responses import model_object
from service.api.schemas import find_model

router = APIRouter(prefix="/models")


@router.get("")
async def list_models(backend: Served) -> dict[str, Any]:
    states = backend.states()
    return {"object": "list", "data": [model_object(m, states.get(name)) for name, m in backend.models().items()]}


@router.get("/{name:path}")  # names may contain slashes
async def retrieve_model(name: str, backend: Served) -> dict[str, Any]:
    model = find_model(backend.models(), name)
    return model_object(model, backend.states().get(model.name))
