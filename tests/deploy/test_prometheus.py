"""The rules and alerts that ship with spray: they parse, fire where they should, name paragraphs that exist."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from tests.support.prometheus import promtool
from workers import metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FOLDER = DEPLOY / "prometheus"
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
TESTS = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
ALERTS = [rule for group in RULES for rule in group["rules"] if "alert" in rule]
RECORDS = {rule["record"] for group in RULES for rule in group["rules"] if "record" in rule}

NAME = re.compile(r"\bspray[_:][a-z0-9_:]+")


def exported() -> Iterator[str]:
    """All names of series that spray exports."""
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
            yield from (metric._name + suffix for suffix in suffixes[metric._type])


def paragraphs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_promtool_finds_nothing_wrong() -> None:
    assert "SUCCESS" in promtool("check", "rules", str(FOLDER / "rules.yml"), said=True)
    assert "SUCCESS" in promtool("check", "config", str(FOLDER / "prometheus.yml"), said=True)


def test_alerts_fire_on_what_deserves_it_and_on_nothing_else() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(FOLDER / "rules_test.yml"), said=True)


def test_each_alert_is_tried() -> None:
    tried = [case["alertname"] for test in TESTS for case in test.get("alert_rule_test", ()) if case["exp_alerts"]]
    assert set(tried) == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_each_alert_names_a_paragraph_that_exists(alert: dict[str, Any]) -> None:
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert DEPLOY.parent / page == DEPLOY / "README.md"
    assert anchor in paragraphs(DEPLOY / "README.md")
    assert alert["labels"]["severity"] in ("info", "warning", "critical")


def divisors(expression: str) -> Iterator[str]:
    """What is divided by: the text in parentheses, or one letter where there are none."""
    for division in re.finditer(r" / (?:ignoring \([^)]*\) )?", expression):
        rest, depth = expression[division.end() :], 0
        for end, sign in enumerate(rest, start=1):
            depth += {"(": 1, ")": -1}.get(sign, 0)
            if depth <= 0:
                yield rest[:end]
                break


def test_nothing_is_divided_by_zero() -> None:
    """A count that does not rise has the rate 0, and NaN of one series is NaN of all that it is added to."""
    expressions = [rule["expr"] for group in RULES for rule in group["rules"]]
    assert len([*divisors(" ".join(expressions))]) > 5
    for expression in expressions:
        for divisor in divisors(expression):
            assert divisor.startswith("(") and divisor.endswith("> 0)"), (expression, divisor)


def test_rules_use_what_there_is() -> None:
    known = {*exported(), *RECORDS}
    for group in RULES:
        for rule in group["rules"]:
            used = set(NAME.findall(rule["expr"]))
            assert used and used <= known, used - known
