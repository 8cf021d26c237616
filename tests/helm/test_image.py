"""The image, as far as can be known without an engine: what its Dockerfile says, and whether that is all nodes need."""

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions, each with its arguments on one line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


STEPS = instructions(TEXT)


def of(word: str) -> list[str]:
    return [rest for found, rest in STEPS if found == word]


def is_in_context(path: str) -> bool:
    """Whether .dockerignore lets a path through; the last pattern that matches decides."""
    kept = True
    for pattern in IGNORED:
        plain = pattern.removeprefix("!")
        anywhere = plain.startswith("**/") and any(fnmatch.fnmatch(part, plain[3:]) for part in path.split("/"))
        if anywhere or fnmatch.fnmatch(path, plain) or path.startswith(plain + "/"):
            kept = pattern.startswith("!")
    return kept


def test_every_base_is_given_by_digest() -> None:
    """The argument has no default, and `make image` refuses one without a digest."""
    assert of("ARG")[0] == "PYTHON_IMAGE"
    assert [base.split()[0] for base in of("FROM")] == ["${PYTHON_IMAGE}"] * 2
    assert "latest" not in TEXT
    for arguments in ([], ["PYTHON_IMAGE=python:3.11"], ["PYTHON_IMAGE=python@sha256:0"], ["IMAGE=a:latest"]):
        given = ["PYTHON_IMAGE=a@sha256:0", *arguments] if arguments == ["IMAGE=a:latest"] else arguments
        refused = subprocess.run(["make", "image", "DOCKER=true", *given], cwd=ROOT, capture_output=True, text=True)
        assert refused.returncode and ("PYTHON_IMAGE=" in refused.stdout or "IMAGE=" in refused.stdout)
    given = ["IMAGE=registry.example/spray:1", "PYTHON_IMAGE=python:3.11-slim@sha256:0", "DOCKER=true"]
    assert subprocess.run(["make", "image", *given], cwd=ROOT, capture_output=True).returncode == 0


def test_it_runs_as_the_user_of_the_chart() -> None:
    assert of("USER") == ["1000:1000"]
    last = STEPS[[word for word, _ in STEPS].index("USER") :]
    assert not {"RUN", "COPY"} & {word for word, _ in last}


def test_nothing_is_installed_but_what_is_pinned() -> None:
    installs = [step for step in of("RUN") if "pip install" in step]
    assert len(installs) == 2
    for step in installs:
        assert "-c constraints.txt -r requirements.txt" in step or "--no-deps ." in step
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[\[>=<]", name)[0].lower().replace("_", "-") for name in project["dependencies"]}
    assert wanted <= pinned


def test_the_list_of_dependencies_is_that_of_the_project(tmp_path: Path) -> None:
    """The line runs as it stands."""
    (line,) = [step for step in of("RUN") if "tomllib" in step]
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    subprocess.run(["sh", "-c", line.replace("python ", "python3 ", 1)], cwd=tmp_path, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (tmp_path / "requirements.txt").read_text().splitlines() == project["dependencies"]


def test_every_copied_path_exists_and_is_in_the_context() -> None:
    sources = [path for step in of("COPY") if "--from" not in step for path in step.split()[:-1]]
    assert set(sources) >= {"sp_core", "deploy", "workers", "service", "pyproject.toml", "constraints.txt"}
    for path in sources:
        assert (ROOT / path).exists() and is_in_context(path), path
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.rstrip("*") for pattern in include} <= set(sources)


@pytest.mark.parametrize("path", [".git", ".venv", ".demo", "tests", "helm", "service/__pycache__", "Makefile"])
def test_what_an_image_does_not_need_stays_out(path: str) -> None:
    assert not is_in_context(path)


def test_no_secret_and_no_download_without_a_pin() -> None:
    assert not re.search(r"(?i)token|secret|password|curl|\bADD\b|--mount=type=secret", "\n".join(map(" ".join, STEPS)))


def test_what_kuberay_and_compilers_call_is_there() -> None:
    (installed,) = [step for step in of("RUN") if "apt-get install" in step]
    assert {"g++", "wget"} <= set(installed.split())
    assert "--no-install-recommends" in installed and "rm -rf /var/lib/apt/lists" in installed
    targets = [step.split()[-1] for step in of("COPY") if "--from=build" in step]
    assert targets == ["/usr/local"] * 2  # on the PATH of a login shell


def test_a_variant_that_there_is_not_is_refused(tmp_path: Path) -> None:
    (step,) = [step for step in of("RUN") if "$VARIANT" in step]
    done = subprocess.run(["sh", "-ec", step], cwd=tmp_path, env={"VARIANT": "cup"}, capture_output=True, text=True)
    assert done.returncode == 2 and "VARIANT is cup" in done.stderr
