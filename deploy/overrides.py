"""A deployment before validation: the file, overridden by the environment, overridden by the command line.

Raw values, `SPRAY_*` variables and `PATH=VALUE` flags come in; one mapping to validate goes out to `deploy.load`, with
the origin of each value.

A variable separates the parts of a key by two underscores and spells a model's name with `_` for every character that
is neither letter nor digit: `SPRAY_MODELS__QWEN_IMAGE__PARALLEL__ULYSSES_DEGREE=4`. A flag takes the dotted path:
`models.qwen-image.parallel.ulysses_degree=4`. Values are YAML, except that a key which takes text takes it as written.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.keys import children, has_free_keys, takes_text
from deploy.spec import DeploymentSpec
from deploy.yaml_text import KeyPath, YamlMistake, parse_yaml

PREFIX = "SPRAY_"

NOT_CONFIGURATION = frozenset(
    {"SPRAY_ADDRESS", "SPRAY_SERVER", "SPRAY_API_KEYS", "SPRAY_API_KEY", "SPRAY_METRICS_DIR", "SPRAY_OUTPUTS_DIR"}
)
"""Variables with other purposes: the cluster and the server to talk to, the keys that a gateway accepts, a caller's
key. The variables that keys like `auth.api_keys_env` name are not configuration either."""


@dataclass(frozen=True)
class _Spelling:
    """How a key path is written: the separator, and a test of whether a text stands for a key."""

    separator: str
    is_key: Callable[[str, str], bool]


_VARIABLE = _Spelling("__", lambda text, key: text.upper() == _as_variable(key))
_FLAG = _Spelling(".", lambda text, key: text == key)


class Overrides:
    """The values of a deployment; later ones override earlier ones.

    Args:
        raw: what the file says.
        origins: where each of its keys stands.

    Attributes:
        raw: all values so far, not validated.
        origins: where each value came from, by key path.
    """

    def __init__(self, raw: dict[str, Any], origins: dict[KeyPath, str]) -> None:
        self.raw = raw
        self.origins = origins
        self._mistakes: dict[str, str] = {}

    @property
    def mistakes(self) -> list[str]:
        """One line for each variable or flag that cannot be used."""
        sections = [section for section in self.raw.values() if isinstance(section, dict)]
        named = [name for section in sections for key, name in section.items() if str(key).endswith("_env")]
        return [f"{said}: {why}" for said, why in self._mistakes.items() if said not in named]

    def add_environment(self, environ: Mapping[str, str]) -> None:
        """Apply the `SPRAY_*` variables: whole sections first, then single keys."""
        mine = [name for name, value in environ.items() if name.startswith(PREFIX) and not _is_other(name, value)]
        takers: dict[KeyPath, str] = {}
        # A model is found by its name, so a new name for it is put last.
        for name in sorted(mine, key=lambda name: (name.upper().endswith("__NAME"), name.count("__"), name)):
            path = self._put(name.removeprefix(PREFIX), environ[name], _VARIABLE, origin=name, said=name)
            if path in takers:
                self._mistakes[name] = f"sets the same key as {takers[path]}; unset one"
            elif path:
                takers[path] = name

    def add_flags(self, flags: Sequence[str]) -> None:
        """Apply `PATH=VALUE` flags in their order."""
        for flag in flags:
            path, equals, text = flag.partition("=")
            if equals:
                self._put(path.strip(), text, _FLAG, origin="--set", said=f"--set {path.strip()}")
            else:
                self._mistakes[f"--set {flag}"] = "expected PATH=VALUE, such as gateway.port=8001"

    def _put(self, name: str, text: str, spelling: _Spelling, origin: str, said: str) -> KeyPath:
        """Set one value; returns its path, or an empty one if the name cannot be used."""
        ways = dict(_ways(name, DeploymentSpec, self.raw, spelling))
        if len(ways) != 1:
            self._mistakes[said] = _ambiguous(ways) if ways else self._unknown(name, spelling)
            return ()
        ((path, kind),) = ways.items()
        try:
            value = _value(text, kind)
        except YamlMistake as error:
            self._mistakes[said] = str(error)
            return ()
        self._insert(path, value, origin)
        return path

    def _insert(self, path: KeyPath, value: Any, origin: str) -> None:
        at: Any = self.raw
        for part in path[:-1]:
            if isinstance(at, dict) and part not in at:
                at[part] = {}
            at = at[part]
            if not isinstance(at, dict | list):
                return  # not a section; the schema rejects it
        at[path[-1]] = value
        self.origins = {key: was for key, was in self.origins.items() if key[: len(path)] != path}
        self.origins.update((key, origin) for key in _paths(value, path))

    def _unknown(self, name: str, spelling: _Spelling) -> str:
        known = list(_names(DeploymentSpec, self.raw, spelling))
        close = difflib.get_close_matches(name.upper() if spelling is _VARIABLE else name, known, n=1)
        prefix = PREFIX if spelling is _VARIABLE else ""
        return "unknown key; " + (f"did you mean {prefix + close[0]!r}?" if close else "`spray schema` lists them")


def dotted(path: KeyPath) -> str:
    """A key path as errors and flags write it."""
    return ".".join(str(part) for part in path)


def _ways(name: str, kind: Any, raw: Any, spelling: _Spelling) -> Iterator[tuple[KeyPath, Any]]:
    """Every key path that a name can mean, with its type. A model's own name may contain the separator."""
    if has_free_keys(kind) and name:
        yield (name,), str
    for spelled, key, inner, value in children(kind, raw):
        head, rest = name[: len(spelled)], name[len(spelled) :]
        if not spelling.is_key(head, spelled):
            continue
        if not rest:
            yield (key,), inner
        elif rest.startswith(spelling.separator):
            for path, found in _ways(rest.removeprefix(spelling.separator), inner, value, spelling):
                yield (key, *path), found


def _names(kind: Any, raw: Any, spelling: _Spelling) -> Iterator[str]:
    """Every name that would be understood, except for free keys."""
    for spelled, _, inner, value in children(kind, raw):
        name = _as_variable(spelled) if spelling is _VARIABLE else spelled
        yield name
        yield from (name + spelling.separator + deeper for deeper in _names(inner, value, spelling))


def _as_variable(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", key).upper()


def _value(text: str, kind: Any) -> Any:
    if takes_text(kind) and text and text not in ("null", "~") and text[0] not in "'\"":
        return text  # as YAML, a revision made of digits would become a number
    return parse_yaml(text)[0]


def _paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The paths of a value and of everything in it."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _paths(item, (*path, key))


def _ambiguous(ways: Mapping[KeyPath, Any]) -> str:
    return f"can mean {' and '.join(dotted(path) for path in ways)}; set it in the file, or by --set"


def _is_other(name: str, value: str) -> bool:
    """True for a variable with another purpose, or one that Kubernetes sets for a Service called spray-something."""
    if name in NOT_CONFIGURATION:
        return True
    of_service = r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$"
    is_link = re.search(of_service, name) or (name.endswith("_PORT") and re.match(r"(tcp|udp|sctp)://", value))
    return "__" not in name and bool(is_link)
