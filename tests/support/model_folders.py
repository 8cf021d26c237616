"""Model folders by their settings alone, without weights: for tests of what is checked before anything is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.families.lookup import families

CLASSES = {"scheduler": "FlowMatchEulerDiscreteScheduler", "tokenizer": "ATokenizer"}


def stub_model(folder: Path, pipeline: str = "QwenImagePipeline", **transformer: Any) -> Path:
    """Write a folder in which `verify_components` finds nothing wrong.

    Args:
        folder: is made.
        pipeline: the class in its index.
        transformer: the config of the transformer.
    """
    family = next((family for family in families().values() if family.pipeline == pipeline), None)
    index: dict[str, Any] = {"_class_name": pipeline}
    for name in family.components if family else ("transformer",):
        part = name.split("_")[0]
        (folder / name).mkdir(parents=True)
        index[name] = ["a_library", CLASSES.get(part, "AModel")]
        if part == "scheduler":
            write(folder / name / "scheduler_config.json", {})
        elif part == "tokenizer":
            write(folder / name / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}})
            write(folder / name / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
        else:
            write(folder / name / "config.json", {"_class_name": "AModel", "vocab_size": 2})
    write(folder / "transformer" / "config.json", {"_class_name": "AModel"} | transformer)
    write(folder / "model_index.json", index)
    return folder


def write(file: Path, content: object) -> None:
    """Write JSON."""
    file.write_text(json.dumps(content))


def edit(file: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of a JSON object; None removes one."""
    content = json.loads(file.read_text()) | changes
    write(file, {key: value for key, value in content.items() if value is not None})
