"""The base of every section of a deployment file, in `deploy.spec` and the modules of its parts."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section. Unknown keys are errors, and so are numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
