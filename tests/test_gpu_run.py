"""`make gpu`, tried on the CPU: every part writes its rows, and what goes wrong is a row too."""

import io
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from sp_core.degrees import ParallelDegrees
from tests.benchmarks.gpu import __main__ as command
from tests.benchmarks.gpu import checks, machine, pack, rank_work, serve
from tests.benchmarks.gpu.part import LeftOut, Part
from tests.benchmarks.gpu.table import Table
from workers.messages import GenerationResult

ROOT = Path(__file__).resolve().parent.parent

Row = dict[str, str]


def rows(text: str) -> list[Row]:
    """All rows of all tables, by column."""
    found: list[Row] = []
    columns: list[str] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            columns = None
        elif columns is None:
            columns = cells
        elif not line.startswith("|---"):
            found.append(dict(zip(columns, cells, strict=True)))
    return found


def a_part(file: Path, deadline: float = 60.0) -> Part:
    part = Part(Table(file), fake=True, deadline=time.monotonic() + deadline)
    part.table.begin("title", "said", ("what", "seconds", "note"))
    return part


def run(part: str, folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [part, "--fake", "--without-ray", "--results", str(folder)]
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def written(part: str, folder: Path) -> list[Row]:
    """The rows of a part."""
    process = run(part, folder)
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    (file,) = folder.glob(f"*-{part}-fake.md")
    text = file.read_text()
    assert text in process.stdout
    assert "On the CPU, with small sizes" in text
    assert f"`make gpu PART={part} FAKE=1`" in text
    assert "failed" not in text
    return rows(text)


@pytest.mark.processes
def test_checks_prove_the_same_answer_on_each_layout(tmp_path: Path) -> None:
    found = written("checks", tmp_path)
    answers = [row for row in found if "attention kept local" in row]
    assert {row["layout"] for row in answers} == {"1 rank", "ulysses_degree=2", "ring_degree=2"}
    assert all(float(row["differs by"]) <= 1e-5 for row in answers)
    assert all(float(row["attention kept local"]) > 1e-3 for row in answers if row["layout"] != "1 rank")
    probed = [row["outcome"] for row in found if row.get("layout") == "ulysses_degree=2" and "outcome" in row]
    assert probed == ["sums agree; the probe passed"]
    tests = [row["outcome"] for row in found if "file" in row]
    assert all("collected" in outcome or outcome == "no test has the mark" for outcome in tests)


@pytest.mark.soak
def test_pipelines_draw_the_same_compiled_and_on_two_ranks(tmp_path: Path) -> None:
    one, compiled, two = written("pipelines", tmp_path)
    assert one["pipeline"] == two["pipeline"] == "ZImagePipeline"
    assert float(one["latents"]) == 0.0  # the device is the CPU, too
    assert float(one["bfloat16 latents"]) > 0.0
    assert float(two["latents"]) <= 1e-5 < 1e-3 < float(two["attention kept local"])
    assert float(compiled["differs by"]) <= 1e-4
    assert compiled["again"] == "the same"


@pytest.mark.soak
def test_kernels_have_a_rate_and_an_error(tmp_path: Path) -> None:
    found = [row for row in written("kernels", tmp_path) if "error" in row]
    assert {row["mask"] for row in found} == {"none", "text"}
    assert all(float(row["TFLOP/s"]) > 0 and float(row["error"]) < 1e-5 for row in found)


@pytest.mark.soak
def test_steps_stand_beside_plain_diffusers(tmp_path: Path) -> None:
    found = written("steps", tmp_path)
    for model in ("tiny z-image", "tiny qwen-image"):
        by = {(row["by"], row["mode"]): row for row in found if row["model"] == model}
        for mode in ("eager", "compiled"):
            for who in ("diffusers", "spray"):
                row = by[who, mode]
                assert float(row["ms"].replace(",", "")) > 0
                assert int(row["launches"].replace(",", "")) > 100
                assert float(row["x diffusers"]) > 0
        if model == "tiny qwen-image":
            two, one = (int(by[who, "eager"]["launches"].replace(",", "")) for who in ("spray", "spray, one forward"))
            assert one < 0.6 * two
        whole = float(by["diffusers", "eager"]["TFLOP"])
        share = float(by["a rank of ulysses_degree=2", "eager, nothing exchanged"]["TFLOP"])
        assert 0.4 < share / whole < 0.6


@pytest.mark.processes
def test_a_rank_starts_draws_cancels_and_outlives_a_lack_of_memory(tmp_path: Path) -> None:
    found = written("serve", tmp_path)
    phases = {row["phase"]: row["note"] for row in found if "phase" in row}
    assert {"process, imports", "transformer, from its files", "first request", "second request"} <= set(phases)
    assert phases["second picture"] == "the same, to the byte"
    assert [row["ended with"] for row in found if "ended with" in row] == ["RequestCancelled"] * 5
    memory = [row["outcome"] for row in found if "outcome" in row]
    assert memory[0].startswith("OutOfMemory: 'z-image' has too little memory for 64x64")
    assert memory[1:] == ["the same, to the byte"] * 2
    assert "start of the ranks and one picture" in [row.get("what") for row in found]


def test_rows_are_in_the_file_before_the_next_is_measured(tmp_path: Path) -> None:
    part = a_part(tmp_path / "new" / "t.md")
    part.row(("a",), lambda: (1.5, "x | y"))

    def second() -> Sequence[object]:
        assert rows((tmp_path / "new" / "t.md").read_text()) == [{"what": "a", "seconds": "1.500", "note": "x / y"}]
        return (12345,)

    assert part.row(("b",), second)
    assert rows((tmp_path / "new" / "t.md").read_text())[1] == {"what": "b", "seconds": "12,345", "note": "-"}


def test_what_fails_and_what_is_left_out_are_rows(tmp_path: Path) -> None:
    part = a_part(tmp_path / "t.md")

    def fail() -> Sequence[object]:
        raise ValueError("a bad shape\nand more")

    def leave_out() -> Sequence[object]:
        raise LeftOut("no second GPU")

    assert not part.row(("a",), fail)
    assert not part.row(("b",), leave_out)
    assert not part.row(("c",), lambda: (1.0,), needs_s=61)
    assert part.failures == 1
    assert [row["seconds"] for row in rows((tmp_path / "t.md").read_text())] == [
        "failed: ValueError: a bad shape",
        "left out: no second GPU",
        "left out: the time of this part is over",
    ]


@pytest.mark.parametrize(
    ("source", "raises", "says"),
    [
        ("import nowhere_to_be_found", LeftOut, "imports nowhere_to_be_found, which is not installed"),
        ("raise ValueError('broken')", AssertionError, "ERROR"),
    ],
    ids=["lacks a package", "is broken"],
)
def test_a_file_of_tests_that_cannot_be_imported(
    tmp_path: Path, source: str, raises: type[Exception], says: str
) -> None:
    (tmp_path / "test_it.py").write_text(source)
    with pytest.raises(raises, match=says):
        checks._pytest(tmp_path / "test_it.py", fake=True)


@pytest.mark.parametrize(
    ("program", "limit_s", "says"),
    [
        ("import time; time.sleep(600)", 1.0, "ended after 1 s"),
        ("import os; os.kill(os.getpid(), 11)", 60.0, "exit code -11"),
    ],
    ids=["hangs", "crashes"],
)
def test_a_part_that_hangs_or_crashes_has_failed(tmp_path: Path, program: str, limit_s: float, says: str) -> None:
    table = Table(tmp_path / "t.md")
    assert command._run_part("steps", [sys.executable, "-c", program], dict(os.environ), table, limit_s)
    assert says in (tmp_path / "t.md").read_text()


def test_another_picture_is_told_from_the_same() -> None:
    def drawn(shade: int) -> GenerationResult:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (100, shade, 100)).save(file, "PNG")
        return GenerationResult((file.getvalue(),), (7,), ParallelDegrees(), 0.1, (0.1,), 0.1)

    found = [rank_work._beside(drawn(shade), drawn(100)) for shade in (100, 101, 102)]
    said = ["the same, to the byte", "differs by 1 of 255", "differs by 2 of 255"]
    assert found == list(zip(said, (False, False, True), strict=True))


def test_a_rank_that_dies_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = a_part(tmp_path / "t.md")
    monkeypatch.setattr(serve.rank_work, "work", os._exit)  # its arguments are wrong, too
    serve._on_a_rank(part, serve._spec(part, tmp_path), serve._request(part))
    assert part.failures == 1
    assert "failed: the rank's process ended with exit code 1" in (tmp_path / "t.md").read_text()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "cards", list)
    monkeypatch.setattr(sys, "argv", ["gpu", "kernels"])
    assert command.main() == 2
    assert "FAKE=1 tries the script on the CPU" in capsys.readouterr().err


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        file = machine.free_file(tmp_path, "gpu")
        file.touch()
        names.append(file.name)
    assert names == ["gpu.md", "gpu-2.md", "gpu-3.md"]


def test_wheels_are_put_on_the_path_of_the_parts(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "lent-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lent.py", "ANSWER = 42\n")
        wheel.writestr("lent-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lent\nVersion: 1.0\n")
        wheel.writestr("lent-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("lent-1.0.dist-info/RECORD", "")
    with command._installed(tmp_path) as path:
        assert (Path(path[0]) / "lent.py").exists()
    assert not Path(path[0]).exists()
    with command._installed(None) as path:
        assert path == []


def test_what_is_packed_is_all_that_spray_asks_for_and_nothing_of_what_is_there() -> None:
    whole = pack.needed("spray", set(), "3.12")
    assert {"torch", "ray", "uvicorn", "watchfiles", "pydantic-core", "av"} <= whole  # those of ray[serve], too
    assert {"pytest", "nvidia-ml-py"}.isdisjoint(whole)
    without = pack.needed("spray", {"torch", "transformers"}, "3.12")
    assert {"torch", "transformers", "sympy"}.isdisjoint(without)
    assert "regex" in without  # of diffusers, which asks for it itself


def test_peaks_are_found_by_the_name_of_the_card() -> None:
    assert machine.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert machine.peak("NVIDIA H100 PCIe") == 756e12
    assert machine.peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert machine.peak("a card of tomorrow") is None


@pytest.mark.parametrize(("venv", "python"), [(False, "/x/python"), (True, "ROOT/.venv/bin/python")])
def test_make_takes_the_given_python_only_without_a_venv(tmp_path: Path, venv: bool, python: str) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    if venv:
        (tmp_path / ".venv").mkdir()
        for name in ("pyproject.toml", "constraints.txt", ".venv/ready"):
            (tmp_path / name).touch()
    asked = ["make", "-n", "gpu", "PART=steps", "FAKE=1", "PYTHON=/x/python"]
    said = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert f"{python.replace('ROOT', str(tmp_path))} -m tests.benchmarks.gpu steps --fake" in said
