"""Collects the components of a classic pipeline, which must be built from all of them at once.

A model folder comes in, a pipeline goes out. `workers.model.loader` and `workers.model.components` use it like a
modular pipeline, which takes its components one by one.
"""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline

from deploy.model_folder import component_classes, is_component, is_transformer, read_index

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
"""Libraries whose classes an index may name. Any other would have to be imported, and so its code run."""


class ClassicParts:
    """The components of a pipeline that this rank has.

    Args:
        folder: of the model.

    Attributes:
        kind: the class of the pipeline.

    Raises:
        ValueError: a component is of a class that is neither of diffusers nor of transformers.
    """

    def __init__(self, folder: Path) -> None:
        self._index = read_index(folder)
        self.kind: type[DiffusionPipeline] = getattr(diffusers, self._index["_class_name"])
        self._takes = list(inspect.signature(self.kind.__init__).parameters)[1:]
        self._parts: dict[str, Any] = {}
        self.pretrained_component_names = [name for name in component_classes(folder) if name in self._takes]
        for name in self.pretrained_component_names:
            library, kind = self._index[name]
            if not is_transformer(name) and _class(library, kind) is None:
                raise ValueError(
                    f"{folder / name} is a {kind} of {library}; components must be classes of diffusers or transformers"
                )

    def get_component_spec(self, name: str) -> Any:
        """Its `type_hint` is the component's class."""
        library, kind = self._index[name]
        return SimpleNamespace(type_hint=_class(library, kind))

    def register_components(self, **parts: Any) -> None:
        """Keep these."""
        self._parts |= parts

    def assembled(self, absent_vae: Any) -> DiffusionPipeline:
        """The pipeline. Components that this rank lacks are None.

        Args:
            absent_vae: has the VAE's geometry on a rank without the VAE; None on other ranks.
        """
        told = {name: self._index[name] for name in self._takes if name in self._index}
        settings = {name: value for name, value in told.items() if not is_component(value)}
        parts = {name: None for name, value in told.items() if is_component(value)} | self._parts
        return self.kind(**settings, **parts | ({"vae": absent_vae} if absent_vae else {}))


def _class(library: str, kind: str) -> Any:
    """A class that an index names; None: it is of neither library.

    Where a model of transformers has the name of one of diffusers' pipelines, diffusers writes that for its library.
    """
    found = LIBRARIES.get(library) or (transformers if hasattr(diffusers.pipelines, library) else None)
    return getattr(found, kind, None)
