"""The names of spray's applications and deployments in Serve."""

GANG = "Gang"
"""The deployment inside each model's application."""

GATEWAY = "Gateway"
"""The deployment inside the gateway's application."""

GATEWAY_APP = "gateway"

MODEL_APP_PREFIX = "model-"


def app_name(model: str) -> str:
    """The Serve application of a model."""
    return f"{MODEL_APP_PREFIX}{model}"
