"""Where the nodes of a deployment keep files: models, compiled blocks, outputs, answers, jobs.

`deploy.spec` reads it as a deployment's `storage`; `service.state`, `service.jobs` and `workers` open these places.
"""

from typing import Self

from pydantic import Field, model_validator

from deploy.section import Section

ABSOLUTE = r"^/[^\x00]*$"
"""Of folders on nodes. A relative one would start where the process that opens it does, and `~` at its user's home."""


class Outputs(Section):
    """Finished pictures and videos, for answers that hold their URL."""

    folder: str | None = Field(
        None,
        pattern=ABSOLUTE,
        description="absolute; shared by all nodes that a gateway may run on; absent: one of each node and cluster",
    )
    url: str | None = Field(
        None,
        pattern=r"^s3://[a-z0-9][a-z0-9.-]+(/[A-Za-z0-9._-]+)*$",
        description="s3://BUCKET/PREFIX, instead of a folder; variables of the gateway, AWS_..., have the credentials",
    )
    ttl_s: float = Field(3600.0, gt=0, le=31_536_000, description="seconds for which a URL is valid and its file kept")
    max_bytes: int | None = Field(
        None, ge=1 << 20, description="bytes of all files, above which nothing more is begun; absent: as the disk has"
    )

    @model_validator(mode="after")
    def _are_in_one_place(self) -> Self:
        if self.folder is not None and self.url is not None:
            raise ValueError(f"folder is {self.folder} and url is {self.url}; leave one of them out")
        return self


class Idempotency(Section):
    """Answers of requests with an idempotency key, for callers that ask again with the same key."""

    folder: str | None = Field(
        None,
        pattern=ABSOLUTE,
        description="absolute, on a local disk of the head's node; absent: one that ends with the cluster",
    )
    ttl_s: float = Field(86_400.0, gt=0, le=31_536_000, description="seconds for which a key is known")
    max_bytes: int = Field(
        4 << 30,
        ge=1 << 20,
        description="bytes of all answers; beyond, the oldest is drawn again with its seed when its key comes again",
    )


class Storage(Section):
    """Where each node keeps files."""

    models: str | None = Field(
        None,
        pattern=ABSOLUTE,
        description="absolute folder for models from the hub, on every node; absent: Hugging Face's own cache",
    )
    compiled: str | None = Field(
        None,
        pattern=ABSOLUTE,
        description="absolute folder for compiled blocks, on every node; absent: a private one among temporary files",
    )
    outputs: Outputs = Field(Outputs(), description="finished pictures and videos, for answers that hold their URL")
    idempotency: Idempotency = Field(Idempotency(), description="answers of requests with an idempotency key")
    jobs: str | None = Field(
        None,
        pattern=ABSOLUTE,
        description="absolute folder of jobs on a local disk of the head's node; absent: jobs end with the cluster",
    )
    jobs_url_env: str | None = Field(
        None,
        description="environment variable of the gateway with the URL of a PostgreSQL database that keeps jobs",
    )

    @model_validator(mode="after")
    def _jobs_are_in_one_place(self) -> Self:
        if self.jobs is not None and self.jobs_url_env is not None:
            raise ValueError(f"jobs is {self.jobs} and jobs_url_env is {self.jobs_url_env}; leave one of them out")
        return self
