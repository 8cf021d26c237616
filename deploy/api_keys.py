"""The file of API keys that `auth.api_keys_file` names: who may call, for what, and how much.

    keys:
      - name: web                # in logs and metrics; never the key itself
        sha256: 9f86d081...      # of the key; `spray key web` makes both
        models: [qwen-image]     # absent: all
        max_concurrent: 8        # requests that wait or run at once; absent: any number
        max_work_per_minute: 2.0e+9   # pixels x frames x steps x pictures; absent: any amount
      - name: operator
        sha256: ...
        scope: admin             # sees and cancels the requests of all keys, reads /v1/cluster; absent: generate

The file comes in as text; `ApiKey` objects go out to `service.state.keyring`, which reads the file again when it
changes.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deploy.spec import SpecError
from deploy.yaml_text import YamlMistake, parse_yaml

SHA256 = re.compile(r"[0-9a-f]{64}")


class ApiKey(BaseModel):
    """One key, of which only the digest is known.

    Attributes:
        name: unique; stands for the caller in logs and metrics.
        sha256: the digest of the key's UTF-8 bytes, in hexadecimal.
        scope: `admin` sees and cancels the requests of all keys, and reads `/v1/cluster`.
        models: the models that it may use; None: all.
        max_concurrent: requests that may wait or run at once; None: any number.
        max_work_per_minute: pixels x frames x steps x pictures; None: any amount.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str
    scope: Literal["generate", "admin"] = "generate"
    models: tuple[str, ...] | None = None
    max_concurrent: int | None = Field(None, ge=1)
    max_work_per_minute: float | None = Field(None, gt=0)

    @field_validator("sha256")
    @classmethod
    def _is_digest(cls, value: str) -> str:
        value = value.lower()
        if not SHA256.fullmatch(value):
            raise ValueError("must be 64 hexadecimal digits, the SHA-256 of the key; `spray key NAME` prints one")
        return value

    @property
    def admin(self) -> bool:
        """Whether it may see and cancel the requests of others."""
        return self.scope == "admin"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: tuple[ApiKey, ...] = Field(min_length=1)


def digest(key: str) -> str:
    """The SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_api_keys(file: Path) -> tuple[ApiKey, ...]:
    """The keys of a file.

    Raises:
        SpecError: the file cannot be read or is not valid; the message names the file and the place, never a key.
    """
    try:
        raw, _ = parse_yaml(file.read_text(encoding="utf-8"))
        keys = _File.model_validate(raw).keys
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: cannot be read: {error}") from None
    except YamlMistake as error:
        raise SpecError(f"{file}:{error.line}: {error}") from None
    except ValidationError as error:
        mistakes = error.errors(include_input=False)
        lines = [f"{file}: {'.'.join(map(str, mistake['loc']))}: {mistake['msg']}" for mistake in mistakes]
        raise SpecError("\n".join(lines)) from None
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if twice := {key.name for key in keys if values.count(getattr(key, field)) > 1}:
            raise SpecError(f"{file}: {', '.join(sorted(twice))}: the same {field} twice; each key has its own")
    return keys


def find_key(keys: Iterable[ApiKey], given: Iterable[bytes]) -> ApiKey | None:
    """The key that was given. Only digests are compared, so the time that it takes reveals nothing of the keys.

    Args:
        keys: the known keys.
        given: the key as it was sent, in each encoding that it may have.
    """
    digests = [hashlib.sha256(each).hexdigest() for each in given]
    found = None
    for key in keys:
        if any(hmac.compare_digest(each, key.sha256) for each in digests):
            found = key
    return found
