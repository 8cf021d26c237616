"""Models: `GET /v1/models` and `GET /v1/models/{name}`."""

from typing import Any

from fastapi import APIRouter

from service.api.answers import ModelList, ModelObject
from service.api.backend import Served
from service.api.openapi import READING_ERRORS
from service.api.responses import model_object
from service.api.schemas import find_model

router = APIRouter(prefix="/models")


@router.get("", response_model=ModelList, responses=READING_ERRORS)
async def list_models(backend: Served) -> dict[str, Any]:
    """All models, with their states."""
    states = backend.states()
    return {"object": "list", "data": [model_object(m, states.get(name)) for name, m in backend.models().items()]}


@router.get("/{name:path}", response_model=ModelObject, responses=READING_ERRORS)  # names may contain slashes
async def retrieve_model(name: str, backend: Served) -> dict[str, Any]:
    """One model, by its name or an alias."""
    model = find_model(backend.models(), name)
    return model_object(model, backend.states().get(model.name))
