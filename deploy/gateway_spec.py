"""The gateway of a deployment file: where clients reach it, and which hosts it may call.

`deploy.spec` reads it as a deployment's `gateway`; `service.app` and `service.rollout` start gateways by it.
"""

import ipaddress
import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from deploy.section import Section

ORIGIN = re.compile(r"https?://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
HOST = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z][a-z0-9-]*(:[0-9]{1,5})?")
"""A host name with an optional port; no address."""
WEBHOOK_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:]+")
STANDARD_PORT = {"http:": ":80", "https": ":443"}
"""The port that browsers leave out, by the first letters of the origin."""


def is_loopback(host: str) -> bool:
    """True for a name or an address of the machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class GatewaySpec(Section):
    """Where clients reach the deployment."""

    host: str = Field("127.0.0.1", description="address to bind")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    grpc_port: int | None = Field(
        9000, ge=0, le=65535, description="gRPC port; 0 takes a free one, on a local cluster only; null: no gRPC"
    )
    replicas: int = Field(1, ge=1, description="gateway processes; two or more survive the loss of one")
    node_labels: dict[str, str] = Field({}, description="gateways run only on nodes with these Ray labels; absent: any")
    cors_origins: tuple[str, ...] = Field(
        (),
        description="sites whose pages may call the API from a browser, such as https://app.example.com; "
        "*: all, only where callers need a key",
    )
    public_url: str | None = Field(
        None,
        description="where callers reach the gateway if not at the address that their requests name, such as "
        "https://media.example.com behind an ingress that ends TLS; URLs of answers begin with it",
        json_schema_extra={"pattern": "^https?://[^/?#]+$"},  # for helm, which does not run the check below
    )
    media_hosts: tuple[str, ...] = Field(
        (),
        description="hosts from which pictures are fetched, over https, where a request names them by URL, such as "
        "images.example.com; absent: none",
    )
    webhook_hosts: tuple[str, ...] = Field(
        (),
        description="hosts that jobs may name in webhook_url to tell of their end, as hooks.example.com; empty: none",
    )
    webhook_key_env: str | None = Field(
        None,
        description="environment variable of the gateway with the key that signs webhooks, whsec_ and base64; several, "
        "with spaces between them, all sign",
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="of the line that is logged for each request: key=value, or an object of JSON"
    )
    log_prompts: bool = Field(False, description="log prompts too")

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not (ORIGIN.fullmatch(origin) and not origin.endswith(STANDARD_PORT[origin[:5]])):
                raise ValueError(
                    f"{origin!r} is not what a browser sends as an origin: http:// or https://, a host in lower case, "
                    "its port unless that is 80 or 443, and no path; such as https://app.example.com"
                )
        return origins

    @field_validator("public_url")
    @classmethod
    def _is_an_origin(cls, url: str | None) -> str | None:
        if url is not None and not ORIGIN.fullmatch(url):
            raise ValueError(
                f"{url!r} is not http:// or https://, a host in lower case, an optional port, and no path; such as "
                "https://media.example.com"
            )
        return url

    @field_validator("media_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not HOST.fullmatch(host) or host.endswith(":443"):
                raise ValueError(
                    f"{host!r} is no name of a host in lower case, with its port unless that is 443, such as "
                    "images.example.com"
                )
        return hosts

    @field_validator("webhook_hosts")
    @classmethod
    def _are_hosts_to_call(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not WEBHOOK_HOST.fullmatch(host):
                raise ValueError(f"{host!r} is no host; name it in lower case, without a scheme, port, path or *")
        return hosts

    @model_validator(mode="after")
    def _webhooks_are_signed(self) -> Self:
        if self.webhook_hosts and self.webhook_key_env is None:
            raise ValueError("webhook_hosts needs webhook_key_env, the variable with the key that signs webhooks")
        return self
