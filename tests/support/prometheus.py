"""Prometheus and its promtool, from Debian's package `prometheus`. Tests that need them are skipped where they lack."""

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.rollout.local_cluster import METRICS_PORTS
from service.rollout.ports import bind_error


def free_port() -> int:
    """One that the system gives to nobody while it is free."""
    return next(port for port in random.sample(METRICS_PORTS, 20) if not bind_error("127.0.0.1", port))


def program(name: str) -> str:
    """Where a program of Prometheus is."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: apt-get install prometheus")
    return found


def promtool(*arguments: str, given: str = "", said: bool = False) -> str:
    """Run promtool.

    Returns:
        All that it says against what it was given, or an empty text; with `said` all that it says.
    """
    command = [program("promtool"), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300)
    text = f"{done.stdout}{done.stderr}".strip()
    if said:
        return text
    return "" if done.returncode == 0 and not done.stderr else text or "it failed"


@contextlib.contextmanager
def scraping(folder: Path, port: int, rules: Path) -> Iterator[str]:
    """A Prometheus that looks at a port of this machine every second, with these rules.

    Args:
        folder: for its files, and its log.
        port: where the metrics are.
        rules: a file of rules.

    Yields:
        Its URL. It may not answer yet.
    """
    command, own = program("prometheus"), free_port()
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "spray", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    options = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data"}
    options |= {"web.listen-address": f"127.0.0.1:{own}", "log.level": "warn"}
    with (folder / "log").open("w") as log:
        flags = [f"--{name}={value}" for name, value in options.items()]
        process = subprocess.Popen([command, *flags], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{own}"
    finally:
        process.kill()
        process.wait()


def answers(url: str, question: str) -> list[dict[str, Any]]:
    """The series that a Prometheus answers, each with `metric` and `value`; none while it starts."""
    try:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": question}, timeout=30, trust_env=False)
    except httpx.TransportError:
        return []
    assert answer.status_code in (200, 503), answer.text
    return list(answer.json()["data"]["result"]) if answer.status_code == 200 else []
