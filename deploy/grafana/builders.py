"""Turns our panels into Grafana's JSON by its own typed builders. For `python -m deploy.grafana` and tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import DataSourceRef
from grafana_foundation_sdk.models.dashboard import GridPos, Threshold, ThresholdsMode, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

WIDTH, HEIGHT = 24, 8
"""Sizes of the grid and of each panel, in Grafana's units."""

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

Kind = Literal["lines", "number", "heat"]


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: the title.
        unit: Grafana's id of the unit.
        queries: an expression in PromQL for each series, with its legend.
        says: the description, how to read the panel.
        kind: Grafana's kind of the panel.
        width: in columns, of 24.
        warn: the value from which on it is orange; None: no threshold.
        alarm: the value from which on it is red; None: no threshold.
    """

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    says: str
    kind: Kind = "lines"
    width: int = 8
    warn: float | None = None
    alarm: float | None = None


@dataclass(frozen=True)
class Board:
    """One dashboard: rows of panels by title."""

    uid: str
    title: str
    says: str
    rows: dict[str, Sequence[Panel]]


def board_json(board: Board) -> str:
    """The dashboard as Grafana imports it."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.says)
        .tags(["spray"])
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("model")
            .label("Model")
            .datasource(SOURCE)
            .query("label_values(spray_requests_total, model)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    number, top = 1, 0
    for title, panels in board.rows.items():
        made = made.with_row(dashboard.Row(title).id(number).grid_pos(_place(0, top, WIDTH, 1)))
        number, top, left = number + 1, top + 1, 0
        for panel in panels:
            if left + panel.width > WIDTH:
                top, left = top + HEIGHT, 0
            made = made.with_panel(_panel(panel).id(number).grid_pos(_place(left, top, panel.width, HEIGHT)))
            number, left = number + 1, left + panel.width
        top += HEIGHT
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _panel(panel: Panel) -> Any:
    builders: dict[Kind, Any] = {"lines": timeseries.Panel, "number": stat.Panel, "heat": heatmap.Panel}
    made = builders[panel.kind]().title(panel.title).description(panel.says).unit(panel.unit).datasource(SOURCE)
    for letter, (expression, legend) in zip("ABCDEFGH", panel.queries, strict=False):
        query = prometheus.Dataquery().ref_id(letter).expr(expression).legend_format(legend).datasource(SOURCE)
        made = made.with_target(query.format(PromQueryFormat.HEATMAP) if panel.kind == "heat" else query)
    if panel.kind == "lines":
        made = made.fill_opacity(10).min(0)
    limits = [Threshold(value=None, color="green")]
    for value, color in ((panel.warn, "orange"), (panel.alarm, "red")):
        limits += [Threshold(value=value, color=color)] if value is not None else []
    return made.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(limits))


def _place(x: int, y: int, width: int, height: int) -> GridPos:
    return GridPos(x=x, y=y, w=width, h=height)
