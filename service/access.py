"""Access: who calls, and what his API key allows. For `service.gateway`.

An `Authorization` header comes in once per call; afterwards every task of that call knows the key. Keys themselves are
`service.state.keyring`'s.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from deploy.api_keys import ApiKey
from service.api.observed import key_name
from service.state.key_use import SharedUse
from service.state.keyring import Keyring
from service.state.shared_turns import start_keeper
from workers.errors import AdminOnly, ModelNotAllowed, Unauthorized
from workers.messages import GenerationRequest

_key: ContextVar[ApiKey | None] = ContextVar("key", default=None)
"""The API key of the call that this task answers; None where none is needed."""


class Access:
    """The API keys of one gateway.

    Args:
        gateway: its name, by which others tell its use of keys from theirs.

    Attributes:
        configured: see `Keyring`.
    """

    def __init__(self, gateway: str) -> None:
        self._keyring = ring = Keyring()
        self._use = SharedUse(gateway, lambda: ring.limited, ring.used, ring.hear, start_keeper)

    @property
    def configured(self) -> bool:
        return self._keyring.configured

    def configure(self, env: str | None, file: str | None) -> None:
        """See `Keyring.configure`."""
        self._keyring.configure(env, file)

    def share(self, several: bool) -> None:
        """Say whether other gateways let the same keys in, so that limits hold over all of them together."""
        self._use.follow(several)

    def admit(self, authorization: str | None, admin: bool = False) -> None:
        """Reject callers without a valid API key, if the deployment has keys.

        Args:
            authorization: the `Authorization` header; None if there is none.
            admin: the call concerns what others have asked for.

        Raises:
            Unauthorized: the header has no valid key.
            AdminOnly: the key has not the scope.
        """
        _key.set(None)
        key_name.set("")
        if self._keyring.open:
            return
        scheme, _, given = (authorization or "").partition(" ")
        key = self._keyring.find(given.strip(" \t"))  # not all that Unicode calls a space: those are bytes of letters
        if scheme.lower() != "bearer" or key is None:
            raise Unauthorized("a valid API key is required, as 'Authorization: Bearer KEY'")
        if admin and not key.admin:
            raise AdminOnly(f"the key {key.name!r} has the scope {key.scope!r}; this needs 'admin'")
        _key.set(key)
        key_name.set(key.name)

    def act_for(self, owner: str) -> None:
        """Go on in the name of a key, without its limits: they were settled when its job was submitted."""
        _key.set(ApiKey(name=owner, sha256="0" * 64) if owner else None)

    def caller(self) -> str:
        """The name of the call's API key; empty: none is needed."""
        key = _key.get()
        return key.name if key else ""

    def sees(self) -> str | None:
        """The name of the API key whose requests and jobs this call may see and end; None: all."""
        key = _key.get()
        return None if key is None or key.admin else key.name

    def check_model(self, model: str) -> None:
        """Raise `ModelNotAllowed` if the call's key is for other models."""
        key = _key.get()
        if key is not None and key.models is not None and model not in key.models:
            raise ModelNotAllowed(f"the key {key.name!r} may not ask {model!r}; it may: {', '.join(key.models)}")

    @contextlib.contextmanager
    def taking(self, request: GenerationRequest, begun: Callable[[], bool] | None = lambda: True) -> Iterator[None]:
        """Count a request for the call's key, as long as it waits or runs. See `Allowance.take`.

        Raises:
            ModelNotAllowed: the key is for other models.
            RateLimited: it has used what it may.
        """
        self.check_model(request.model)
        if (key := _key.get()) is None:
            yield
            return
        with self._keyring.allowance(key).take(key, request.work, begun):
            yield
