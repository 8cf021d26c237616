"""A whole deployment file: DeploymentSpec > models, gateway, limits, metrics, tracing, storage, auth.

YAML comes in through `deploy.load`; the frozen object goes to `service.app` and `service.rollout`, which deploy what it
says. Unknown keys are errors. Every field says what it is, and its unit.
"""

import itertools
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from deploy.gateway_spec import GatewaySpec, is_loopback
from deploy.model_spec import ModelSpec
from deploy.section import Section
from deploy.storage_spec import Storage


class SpecError(ValueError):
    """A deployment file cannot be used. The message has one line per mistake."""


class GatewayLimits(Section):
    """Limits of any request to the gateway."""

    max_body_bytes: int = Field(
        32 << 20, ge=1024, description="bytes of a request's body; one without pictures has 1 MiB at most"
    )


class Metrics(Section):
    """What Prometheus reads, from each node separately."""

    host: str | None = Field(None, description="address to bind on each node; absent: the gateway's")
    port: int | None = Field(
        9464,
        ge=0,
        le=65535,
        description="port of each node for GET /metrics; 0 takes a free one, on a local cluster only; null: no metrics",
    )


class Auth(Section):
    """Who may call."""

    api_keys_env: str | None = Field(
        None, description="environment variable of the gateway with comma-separated API keys, which may do everything"
    )
    api_keys_file: str | None = Field(
        None, description="file of API keys on the gateway's nodes, each with its limits; read again when it changes"
    )
    insecure: bool = Field(
        False, description="let anybody call who reaches gateway.host, though it is not this machine alone"
    )

    @property
    def needs_key(self) -> bool:
        """Whether callers need an API key."""
        return self.api_keys_env is not None or self.api_keys_file is not None


class Tracing(Section):
    """Traces of requests, for an OpenTelemetry collector."""

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        description="URL of the collector for OTLP over HTTP, such as http://127.0.0.1:4318, without /v1/traces; "
        "absent: no traces",
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of requests that are traced, where the caller has not decided it"
    )


class DeploymentSpec(Section):
    """A whole deployment file."""

    models: tuple[ModelSpec, ...] = Field(
        description="what is served; each model can be added, changed and removed alone"
    )
    gateway: GatewaySpec = Field(GatewaySpec(), description="where clients reach the deployment")
    limits: GatewayLimits = Field(GatewayLimits(), description="limits of any request to the gateway")
    metrics: Metrics = Field(Metrics(), description="what Prometheus reads, from each node separately")
    tracing: Tracing = Field(Tracing(), description="traces of requests, for an OpenTelemetry collector")
    storage: Storage = Field(Storage(), description="where each node keeps files")
    auth: Auth = Field(Auth(), description="who may call")

    @property
    def metrics_at(self) -> dict[str, Any]:
        """Where each node answers Prometheus: `{"host": ..., "port": ... or None}`."""
        return {"host": self.metrics.host or self.gateway.host, "port": self.metrics.port}

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = {
            "metrics.port": self.metrics.port,
            "gateway.port": self.gateway.port,
            "gateway.grpc_port": self.gateway.grpc_port,
        }
        for (one, port), (other, same) in itertools.combinations(ports.items(), 2):
            if port and port == same:
                raise ValueError(f"{one} and {other} are both {port}; change one")
        return self

    @model_validator(mode="after")
    def _is_closed(self) -> Self:
        if not (self.auth.needs_key or self.auth.insecure or is_loopback(self.gateway.host)):
            raise ValueError(
                f"gateway.host is {self.gateway.host}, where other machines may call, and nobody needs a key; set "
                "auth.api_keys_env or auth.api_keys_file, or allow it with auth.insecure: true"
            )
        return self

    @model_validator(mode="after")
    def _pages_need_a_key(self) -> Self:
        if "*" in self.gateway.cors_origins and not self.auth.needs_key:
            raise ValueError(
                "gateway.cors_origins is *, so that every page in a browser may call, and nobody needs a key; name the "
                "sites, or set auth.api_keys_env or auth.api_keys_file"
            )
        return self

    @field_validator("models")
    @classmethod
    def _names_are_unique(cls, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
        if not models:
            raise ValueError("at least one model is needed")
        taken: set[str] = set()
        for name in (name for model in models for name in (model.name, *model.aliases)):
            if name in taken:
                raise ValueError(f"two models are called {name!r}; give each its own names")
            taken.add(name)
        return models
