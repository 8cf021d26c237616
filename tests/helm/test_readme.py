"""The commands of the chart's README: what they name exists, and what they do without a cluster is done."""

import contextlib
import itertools
import json
import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deploy.api_keys import read_api_keys
from service.cli.main import app
from tests.helm.chart import CHART, IMAGE, Values, pod_templates, profile, render, with_values

TEXT = (CHART / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line.partition("  #")[0] for language, block in BLOCKS if not language for line in block.splitlines()]


def named(*start: str) -> list[list[str]]:
    """The words of commands that begin so, within lines as well."""
    parts = [shlex.split(part) for line in COMMANDS for part in re.split(r"&&|\$\(", line)]
    return [words for words in parts if words[: len(start)] == list(start)]


def options(words: list[str], name: str) -> list[str]:
    """The values that an option has."""
    return [after for word, after in itertools.pairwise(words) if word == name]


def test_from_nothing_takes_five_commands() -> None:
    _, first = BLOCKS[0]
    assert len(first.splitlines()) == 5


def test_values_that_are_shown_can_be_rendered() -> None:
    (shown,) = (yaml.safe_load(block) for language, block in BLOCKS if language == "yaml")
    wide = {"parallel": {"ulysses_degree": 16}, "placement": {"strategy": "PACK", "accelerator_type": None}}
    values = profile("multi-node")
    values["models"][0] |= wide
    pods = pod_templates(render(with_values(values, shown)))
    limits = pods[shown["groups"][0]["name"]]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["rdma/hca"] == shown["groups"][0]["extraResources"]["rdma/hca"]


@pytest.mark.parametrize("words", [each for each in named("helm", "install") if each[3] == "./helm"], ids=" ".join)
def test_what_is_installed_can_be_rendered(words: list[str]) -> None:
    values: Values = {}
    for file in options(words, "-f"):
        values = with_values(values, yaml.safe_load((CHART.parent / file).read_text()))
    for pair in options(words, "--set"):
        path, _, value = pair.partition("=")
        for key in reversed(path.split(".")):
            value = {key: value}  # type: ignore[assignment]
        values = with_values(values, value)  # type: ignore[arg-type]
    assert render(with_values(values, {"image": {"repository": IMAGE["image"]["repository"]}}))
    assert options(words, "--set") == ["image.repository=REGISTRY/spray"]


def test_all_commands_speak_of_one_release() -> None:
    ours = [each for each in named("helm") if each[1] in ("test", "upgrade", "rollback") or "./helm" in each]
    assert {words[2] for words in ours} == {"pictures"}
    assert set(re.findall(r"`helm (?:upgrade|rollback|test) (\w+)", TEXT)) <= {"pictures"}


def test_the_operator_is_the_one_that_the_chart_is_written_for() -> None:
    (operator,) = (each for each in named("helm", "install") if "kuberay-operator" in each)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["annotations"]["spray/kuberay"] == f">={options(operator, '--version')[0]}"


def test_the_image_is_made_by_the_command() -> None:
    (words,) = named("make", "image")
    given = [word.replace("DIGEST", "0").replace("REGISTRY", "registry.example") for word in words[2:]]
    subprocess.run(["make", "image", "DOCKER=true", *given], cwd=CHART.parent, check=True, capture_output=True)


def secrets(part: Any) -> set[tuple[str, str]]:
    """Name and key of each Secret that pods ask for."""
    if isinstance(part, list):
        return {found for each in part for found in secrets(each)}
    if not isinstance(part, dict):
        return set()
    reference = part.get("secretKeyRef")
    own = {(reference["name"], reference["key"])} if reference else set()
    if "secretName" in part:
        own |= {(part["secretName"], "keys.yaml")}
    return own | secrets([*part.values()])


def test_every_secret_of_production_is_made_by_a_command() -> None:
    made = set()
    for words in named("kubectl", "create", "secret", "generic"):
        (given,) = (word for word in words if word.startswith("--from-"))
        made.add((words[4], given.split("=")[1]))
    objects = render(profile("production"))
    asked = secrets([each for each in objects if each["kind"] in ("RayService", "Pod")])
    assert made == asked


def test_keys_are_entries_of_the_file_and_one_is_the_operators(tmp_path: Path) -> None:
    asked = [itertools.takewhile(lambda word: ">" not in word, words[1:]) for words in named("spray", "key")]
    made = [CliRunner().invoke(app, [*words]).stdout for words in asked]
    (tmp_path / "keys.yaml").write_text("".join(["keys:\n", *made]))
    assert [key.admin for key in read_api_keys(tmp_path / "keys.yaml")] == [False, True]


def run_at(head: Path, word: str) -> None:
    """Run the block with this word here, with a folder in the place of the head's disk and of the restoring pod's."""
    (script,) = (block for language, block in BLOCKS if not language and word in block)
    commands = script[script.index("kubectl exec") :].partition("kubectl delete pod")[0]
    for old, new in {
        r"kubectl exec .* -- ": "",
        "kubectl cp": "cp",
        "restore:": "",
        "python": sys.executable,
        "/tmp/jobs.db": f"{head}/copy.db",
        "/var/lib/spray": str(head),
    }.items():
        commands = re.sub(old, new, commands)
    subprocess.run(["sh", "-ec", commands], cwd=head.parent, check=True)


def jobs_in(file: Path) -> int:
    with contextlib.closing(sqlite3.connect(file)) as database:
        (count,) = database.execute("SELECT count(*) FROM jobs").fetchone()
    return int(count)


def test_jobs_are_copied_while_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "head/jobs.db", isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE jobs (id)")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO jobs VALUES (1)")
        run_at(tmp_path / "head", "VACUUM")
        assert jobs_in(tmp_path / "jobs.db") == 0
        writer.execute("COMMIT")
        run_at(tmp_path / "head", "VACUUM")
    assert jobs_in(tmp_path / "jobs.db") == 1, "the second copy is the older one"


def test_jobs_are_restored_over_those_of_a_killed_head(tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    for file, rows, end in (("jobs.db", 1, "c.close()"), ("head/jobs.db", 3, "os._exit(0)")):
        script = "PRAGMA journal_mode = WAL; CREATE TABLE jobs (id);" + "INSERT INTO jobs VALUES (1);" * rows
        code = f"import os, sqlite3; c = sqlite3.connect({file!r}); c.executescript({script!r}); {end}"
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "head/jobs.db-wal").stat().st_size
    run_at(tmp_path / "head", "kubectl cp")
    assert jobs_in(tmp_path / "head/jobs.db") == 1


def test_jobs_are_copied_from_and_to_what_the_chart_makes() -> None:
    objects = render(with_values(profile("trial"), {"state": {"size": "1Gi"}}))
    names = {container["name"] for container in pod_templates(objects)["head"]["spec"]["containers"]}
    copying = [words for words in named("kubectl", "exec") if words[2] == "$HEAD"]
    assert {options(words, "--container")[0] for words in copying} <= names
    (pod,) = (json.loads(options(words, "--overrides")[0])["spec"] for words in named("kubectl", "run"))
    made = {each["metadata"]["name"].replace("rel-", "pictures-") for each in objects}
    assert {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]} <= made
    assert {words[3] for words in named("kubectl", "delete", "rayservice")} <= made


def test_selectors_name_labels_of_pods() -> None:
    labels = {
        key for template in pod_templates(render(profile("trial"))).values() for key in template["metadata"]["labels"]
    }
    asked = {
        pair.split("=")[0]
        for words in named("kubectl")
        for each in options(words, "--selector")
        for pair in each.split(",")
    }
    assert asked and {key for key in asked if not key.startswith("ray.io/")} <= labels
