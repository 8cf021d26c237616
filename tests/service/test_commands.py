"""The operator's commands without a cluster: what they print, and that a mistake is one line and exit code 1."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.gateway_spec import GatewaySpec
from deploy.load import load_spec
from deploy.spec import Auth, Metrics
from service.app import serve_config
from service.cli.commands import doctor as doctor_command
from service.cli.commands import files, serve
from service.cli.doctor import Finding
from service.cli.main import _texts_last, main
from tests.support.command_line import run

SHIPPED = Path(__file__).resolve().parents[2] / "deploy"

TWO = """
models:
  - {name: a, source: org/a, parallel: {ulysses_degree: 4}}
  - {name: b.c, source: org/b, device: cpu, max_queued: 7}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    written = tmp_path / "two.yaml"
    written.write_text(TWO)
    return written


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of its own for every test, whatever this one has and is told."""
    for module in (files, serve):
        monkeypatch.setattr(module, "local_devices", lambda: {"cpu": 16.0, "cuda": 4.0})
    for variable in ("SPRAY_SERVER", "SPRAY_ADDRESS", "SPRAY_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


def test_build_prints_what_serve_takes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "build", str(file))
    assert code == 0 and "gateway.host is 127.0.0.1" in err
    config = yaml.safe_load(out)
    assert config == serve_config(load_spec(file))
    assert [application["name"] for application in config["applications"]] == ["model-a", "model-b.c", "gateway"]
    assert "&id" not in out  # four equal bundles are written four times; not all readers of YAML know shorthands
    ServeDeploySchema.model_validate(config)


@pytest.mark.parametrize("shipped", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.name)
def test_build_takes_every_shipped_file(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "build", str(shipped))
    assert code == 0
    assert len(ServeDeploySchema.model_validate(yaml.safe_load(out)).applications) > 1


def test_schema_is_a_schema_that_knows_the_files(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schema")
    assert code == 0
    schema = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(file.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"models": [{"nam": "a"}]}, schema)


def test_each_value_with_where_it_comes_from(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRAY_GATEWAY__PORT", "9001")
    monkeypatch.setenv("SPRAY_MODELS__A__MAX_QUEUED", "5")
    arguments = [
        "check",
        str(file),
        "--print-config",
        "--set",
        "models.a.max_queued=6",
        "--set=models.b.c.dtype=float16",
    ]
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    lines = dict(line.rsplit("  # ", 1) for line in out.splitlines())
    origins = {value.strip(): origin for value, origin in lines.items()}
    assert origins["models.a.max_queued = 6"] == "--set"
    assert origins['models.b.c.dtype = "float16"'] == "--set"
    assert origins["gateway.port = 9001"] == "SPRAY_GATEWAY__PORT"
    assert origins["models.b.c.max_queued = 7"] == f"file {file}:4"
    assert origins["models.a.grace_period_s = 900.0"] == "default"


@pytest.mark.parametrize("command", ["check", "build"])
def test_set_overrules_the_file(file: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, str(file), "--set", "models.a.parallel.ulysses_degree=3")
    assert code == 0
    if command == "check":
        assert out.startswith("a: ulysses_degree=3, each replica takes 3 GPUs")
    else:
        assert yaml.safe_load(out)["applications"][0]["args"]["parallel"]["ulysses_degree"] == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpus", "3"], "4 GPUs are needed (a 4), 3 are available"),
        (["--gpus", "4"], None),
        (["--gpus", "7", "--set", "models.a.parallel.ring_degree=2"], "8 GPUs are needed (a 8), 7 are available"),
        (["--cpus", "4"], "5 CPU cores are needed (a 4, b.c 1), 4 are available"),
        (["--set", "models.nobody.max_queued=3"], "nobody"),
        (["--set", "models.a.max_queud=3"], "did you mean"),
        (["--set", "models.a.max_queued=0"], "--set"),
        (["--set", "max_queued"], "max_queued"),
    ],
)
def test_check_against_other_devices_and_values(
    file: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str | None
) -> None:
    code, out, err = run(capsys, "check", str(file), *flags)
    assert code == (0 if says is None else 1)
    if says is None:
        assert "ulysses_degree=4" in out
    else:
        assert says in err
        assert err.startswith("error: ")
        assert "Traceback" not in out + err


@pytest.mark.parametrize("size", ["plenty", "0", "-3G"])
def test_a_memory_that_is_no_size_is_wrong_usage(file: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    code, out, err = run(capsys, "check", str(file), f"--memory={size}")
    assert (code, out) == (2, "")
    assert err.startswith("error: --memory: expected a size")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--guidance-scale", "nan"], "--guidance-scale: nan is no number that a request may have"),
        (["--guidance-scale", "inf"], "--guidance-scale: inf"),
        (["--lora", "ink=nan"], "--lora ink: nan"),
        (["--negative-prompt", "a\udcff"], "--negative-prompt: the text is not encoded in UTF-8"),
        (["--model", "a\udcff"], "--model: the text"),
        (["--output", "nowhere/x.png"], "--output: there is no folder 'nowhere'; make it first"),
        (["--output", "x.gif"], "--output must end in "),
        (["--num-frames", "3"], "--num-frames is not for pictures"),
    ],
)
def test_what_no_server_could_be_asked_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "generate", "a", *flags)
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "/nowhere.yaml"],
        ["check", "/nowhere.yaml"],
        ["check", "/nowhere.yaml", "--print-config"],
        ["serve", "/nowhere.yaml"],
        ["deploy", "/nowhere.yaml"],
        ["doctor", "/nowhere.yaml"],
    ],
    ids=" ".join,
)
def test_a_file_that_is_not_there(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err == "error: /nowhere.yaml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("arguments", [["ps", "--address", "x"], ["deploy"], ["build"], ["no_such_command"], []])
def test_wrong_usage_has_its_own_exit_code(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(("seen", "code"), [((), 0), (("warn",), 0), (("ok", "fail"), 1)])
def test_the_doctor_fails_only_for_what_keeps_gangs_from_running(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seen: tuple[Any, ...], code: int
) -> None:
    findings = [Finding(f"thing {i}", level, "found", "do this") for i, level in enumerate(seen)]
    monkeypatch.setattr(doctor_command, "diagnose", lambda spec: [Finding("room", "ok", "plenty", ""), *findings])
    found, out, err = run(capsys, "doctor")
    assert found == code
    assert out.splitlines()[0].split() == ["ok", "room", "plenty"]
    assert out.count("-> do this") == len(seen)
    assert err == ("error: not in order: thing 1\n" if code else "")


def test_what_a_person_sees_when_a_server_starts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(file)
    cluster = SimpleNamespace(
        address="10.0.0.1:6379",
        metrics_url="http://127.0.0.1:9464/metrics",
        grpc_target="127.0.0.1:9000",
        token_file=None,
    )
    assert serve._banner(spec, cluster) == [  # type: ignore[arg-type]
        "spray on 16 CPU cores and 4 GPUs",
        "  a: ulysses_degree=4 on cuda",
        "  b.c: 1 rank on cpu",
        "gRPC: 127.0.0.1:9000; metrics for Prometheus: http://127.0.0.1:9464/metrics",
        "change it while it runs: spray deploy FILE --address 10.0.0.1:6379",
    ]
    cluster.token_file = "/tmp/spray-x/auth_token"
    (_, command) = serve._banner(spec, cluster)[-1].split(": ")  # type: ignore[arg-type]
    assert command == "RAY_AUTH_TOKEN_PATH=/tmp/spray-x/auth_token spray deploy FILE --address 10.0.0.1:6379"
    several = spec.model_copy(update={"gateway": GatewaySpec(replicas=2)})
    assert serve._banner(several, cluster)[0] == "spray on 16 CPU cores and 4 GPUs, 2 gateways"  # type: ignore[arg-type]
    many = spec.model_copy(update={"models": spec.models * 25})
    assert len(serve._banner(many, cluster)) <= 6  # type: ignore[arg-type]
    assert "  and 48 more models" in serve._banner(many, cluster)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tasks", "path", "end"),
    [
        (None, "/v1/images/generations", "'"),
        (("text-to-image",), "/v1/images/generations", "'"),
        (("text-to-video",), "/v1/videos/sync", " -o video.mp4"),
    ],
)
def test_the_ready_line_can_be_pasted(file: Path, tasks: Any, path: str, end: str) -> None:
    spec = load_spec(file)
    spec = spec.model_copy(update={"models": (spec.models[0].model_copy(update={"tasks": tasks}),)})
    words = shlex.split(serve._curl("http://127.0.0.1:8000", spec))
    assert words[:2] == ["curl", f"http://127.0.0.1:8000{path}"]
    assert json.loads(words[words.index("-d") + 1]) == {"model": "a", "prompt": "a cup of coffee"}
    assert serve._curl("http://127.0.0.1:8000", spec).endswith(end)
    for auth in (Auth(api_keys_env="KEYS"), Auth(api_keys_file="/keys.yaml")):
        with_keys = spec.model_copy(update={"auth": auth})
        assert "authorization: Bearer KEY" in shlex.split(serve._curl("http://127.0.0.1:8000", with_keys))


def test_port_0_leaves_no_port_to_a_second_server(file: Path) -> None:
    spec = load_spec(file)
    assert (spec.gateway.port, spec.gateway.grpc_port, spec.metrics.port) == (8000, 9000, 9464)
    free = serve._at(spec, 0)
    assert (free.gateway.port, free.gateway.grpc_port, free.metrics.port) == (0, 0, 0)
    other = serve._at(spec, 8001)
    assert (other.gateway.port, other.gateway.grpc_port, other.metrics.port) == (8001, 9000, 9464)
    none = spec.model_copy(
        update={"gateway": spec.gateway.model_copy(update={"grpc_port": None}), "metrics": Metrics(port=None)}
    )
    assert (serve._at(none, 0).gateway.grpc_port, serve._at(none, 0).metrics.port) == (None, None)


@pytest.mark.parametrize("flag", ["--gpus-per-node", "--gpus_per_node"])
def test_flags_are_written_with_either_line(file: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    code, out, err = run(capsys, "check", str(file), "--gpus=8", f"{flag}=2")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert run(capsys, "check", str(file), "--gpus=8", f"{flag}=4")[0] == 0


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (["generate", "-a cup of tea", "--seed", "7"], ["generate", "--seed", "7", "--", "-a cup of tea"]),
        (["generate", "tea", "--negative-prompt", "-no cup"], ["generate", "tea", "--negative-prompt", "-no cup"]),
        (["check", "a.yaml", "--set=models.a.source=/x y"], ["check", "a.yaml", "--set=models.a.source=/x y"]),
        (["generate", "--seed", "7", "--", "-a cup"], ["generate", "--seed", "7", "--", "-a cup"]),
    ],
)
def test_a_prompt_may_begin_with_a_dash(given: list[str], parsed: list[str]) -> None:
    assert _texts_last(given) == parsed


def test_usage_errors_name_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "a.yaml", "--gpus", "x"]) == 2
    assert "--gpus" in capsys.readouterr().err


def test_the_shell_completes_commands_and_flags() -> None:
    def completed(words: str) -> list[str]:
        variables = {"_SPRAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-m", "service.cli.main"]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True).stdout.split()

    assert completed("spray che") == ["check"]
    assert completed("spray deploy --allow") == ["--allow-downtime", "--allow-pending"]


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt, 130), (TimeoutError("late"), 1), (OSError("disk"), 1)]
)
def test_exit_codes(
    raised: Any, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr(files, "json_schema", fail)
    found, out, err = run(capsys, "schema")
    assert (found, out) == (code, "")
    assert err == ("stopped\n" if code == 130 else f"error: {raised}\n")
