"""Writes the dashboards into this folder: `python -m deploy.grafana`. A test compares the files."""

from pathlib import Path

from deploy.grafana.api import API
from deploy.grafana.builders import board_json
from deploy.grafana.gangs import GANGS
from deploy.grafana.overview import OVERVIEW
from deploy.grafana.steps import STEPS

FOLDER = Path(__file__).parent
BOARDS = (OVERVIEW, STEPS, GANGS, API)


def main() -> None:
    """Write a file per dashboard."""
    for board in BOARDS:
        (FOLDER / f"{board.uid}.json").write_text(board_json(board))


if __name__ == "__main__":
    main()
