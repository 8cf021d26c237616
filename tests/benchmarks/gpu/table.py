"""Tables in Markdown. Each line is in the file, and on the screen, before the next one is measured."""

from collections.abc import Sequence
from pathlib import Path


class Table:
    """Appends to one file.

    Args:
        file: where the lines go; its folder is made.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._columns = 0

    def say(self, text: str) -> None:
        """Write lines as they are."""
        with self._file.open("a") as out:  # opened for each: a run that is killed keeps what it has written
            out.write(text + "\n")
        print(text, flush=True)

    def begin(self, title: str, said: str, columns: Sequence[str]) -> None:
        """Begin a table.

        Args:
            title: above it.
            said: what its numbers are.
            columns: their names.
        """
        self._columns = len(columns)
        self.say(f"\n### {title}\n\n{said}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, *cells: object) -> None:
        """Write a row. Cells that are missing at its end are filled."""
        filled = [*cells, *["-"] * (self._columns - len(cells))]
        self.say(f"| {' | '.join(_cell(cell) for cell in filled)} |")


def _cell(value: object) -> str:
    if isinstance(value, float):
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
        return f"{value:,.{digits}f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/").replace("\n", " ")
