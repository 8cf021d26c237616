"""Fills the cache with models from the hub. Models and folder come from the environment; an error ends it, at last."""

import json
import os
import sys

from deploy.model_spec import ModelSpec
from workers.model.files import fetch

failed = []
for model in json.loads(os.environ["SPRAY_MODELS"]):
    try:
        print(model["source"], "is at", fetch(ModelSpec(**model), os.environ["SPRAY_FOLDER"]), flush=True)
    except (ValueError, OSError) as error:
        failed.append(str(error))
if failed:
    sys.exit("\n".join(failed))
