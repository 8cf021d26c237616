"""The file of API keys: what it may say, and that no message shows what should stay secret."""

from pathlib import Path

import pytest

from deploy.api_keys import ApiKey, digest, find_key, read_api_keys
from deploy.load import load_spec
from deploy.spec import SpecError

ONE, TWO = digest("one"), digest("two")


def test_what_a_file_may_say(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(
        f"keys:\n- {{name: web, sha256: {ONE}, models: [a], max_concurrent: 2, max_work_per_minute: 1.0e+9}}\n"
        f"- {{name: ops, sha256: {TWO}, scope: admin}}\n"
    )
    web, ops = read_api_keys(file)
    assert web == ApiKey(name="web", sha256=ONE, models=("a",), max_concurrent=2, max_work_per_minute=1e9)
    assert (web.admin, ops.admin) == (False, True)
    assert find_key([web, ops], [b"two"]) == ops
    assert find_key([web, ops], [b"voil\xe0", b"one"]) == web
    assert find_key([web, ops], [b"three", ONE.encode(), b""]) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Input should be a valid dictionary"),
        ("keys: []", "keys: Tuple should have at least 1 item"),
        ("keys: [{name: a}]", "keys.0.sha256: Field required"),
        ("keys: [{name: a, sha256: secret}]", "keys.0.sha256: Value error, must be 64 hexadecimal digits"),
        (f"keys: [{{name: a b, sha256: {ONE}}}]", "keys.0.name"),
        (f"keys: [{{name: a, sha256: {ONE}, key: secret}}]", "keys.0.key: Extra inputs"),
        (f"keys: [{{name: a, sha256: {ONE}, scope: root}}]", "keys.0.scope: Input should be 'generate' or 'admin'"),
        (f"keys: [{{name: a, sha256: {ONE}}}, {{name: a, sha256: {TWO}}}]", "a: the same name twice"),
        (f"keys: [{{name: a, sha256: {ONE}}}, {{name: b, sha256: {ONE}}}]", "a, b: the same sha256 twice"),
        ("keys: [", "is not YAML"),
        ("keys: [{name: 2025-02-30}]", "has a value that cannot be"),
    ],
)
def test_what_it_may_not(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as found:
        read_api_keys(file)
    assert says in str(found.value)
    assert str(found.value).startswith(f"{file}:")
    assert "secret" not in str(found.value)


def test_it_lies_beside_the_deployment_file(tmp_path: Path) -> None:
    (file := tmp_path / "deployment.yaml").write_text(
        "models: [{name: a, source: b}]\nauth: {api_keys_file: keys.yaml}\n"
    )
    assert load_spec(file).auth.api_keys_file == str(tmp_path / "keys.yaml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_api_keys(tmp_path / "none.yaml")
