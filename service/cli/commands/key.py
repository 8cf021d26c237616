"""`spray key`: a new API key, and its entry for the file that `auth.api_keys_file` names."""

import secrets
from typing import Annotated

import typer
from pydantic import ValidationError

from deploy.api_keys import ApiKey, digest
from deploy.yaml_text import to_yaml
from service.cli.options import UsageError
from service.cli.output import say


def key(
    name: Annotated[str, typer.Argument(help="Who will use it, in logs and metrics.")],
    admin: Annotated[
        bool, typer.Option("--admin", help="For ps, top and profile; sees and cancels the requests of all keys.")
    ] = False,
) -> None:
    """Make an API key. Prints its entry for `auth.api_keys_file`; the key itself is shown once, beside it."""
    made = f"spray-{secrets.token_urlsafe(32)}"
    try:
        entry = ApiKey(name=name, sha256=digest(made), scope="admin" if admin else "generate")
    except ValidationError:
        raise UsageError(
            f"NAME: {name!r} must be letters, digits, '.', '_' and '-', at most 64, and begin with one of the first two"
        ) from None
    print(to_yaml([entry.model_dump(exclude_defaults=True)]), end="")
    say(f"the key, which is kept nowhere: {made}")
