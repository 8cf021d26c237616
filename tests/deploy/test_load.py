"""Where a deployment's values come from: file, environment, flags; who goes first, and what a mistake says."""

import math
from pathlib import Path
from typing import Any

import pytest

from deploy.load import LoadedSpec, load_spec, load_with_origins, print_config
from deploy.spec import DeploymentSpec, SpecError
from deploy.yaml_text import parse_yaml

FILE = """\
models:
  - name: qwen-image
    source: Qwen/Qwen-Image
    parallel: {ulysses_degree: 2}
  - name: wan2.2
    source: wan
    device: cpu
    loras:
      - {name: ink, source: ink.safetensors}
gateway:
  port: 8001
"""
PORT = "SPRAY_GATEWAY__PORT"
QWEN = "SPRAY_MODELS__QWEN_IMAGE__"

NINE_TIMES_NINE = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
OLD_NUMBERS = ["010", "1_000", "1:30", "0b11", "-017", "1_0.5", "1:30.5"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "d.yaml").write_text(FILE)
    return tmp_path / "d.yaml"


def refusal(file: Path, environ: dict[str, str] | None = None, *flags: str) -> str:
    with pytest.raises(SpecError) as refused:
        load_spec(file, environ or {}, flags)
    return str(refused.value).replace(str(file), "d.yaml")


def value(spec: DeploymentSpec, path: str) -> Any:
    """The value at a path of attributes and indices."""
    at: Any = spec
    for part in path.split("."):
        at = at[int(part)] if part.isdecimal() else at[part] if isinstance(at, dict) else getattr(at, part)
    return at


def test_the_command_line_goes_before_the_environment_before_the_file_before_the_default(file: Path) -> None:
    ports = [
        load_with_origins(file, environ, flags)
        for environ, flags in [({}, []), ({PORT: "8002"}, []), ({PORT: "8002"}, ["gateway.port=8003"])]
    ]
    assert [loaded.spec.gateway.port for loaded in ports] == [8001, 8002, 8003]
    assert [loaded.origins["gateway.port"] for loaded in ports] == [f"file {file}:11", PORT, "--set"]
    assert ports[0].origins["gateway.host"] == "default"
    assert load_spec(file, {}, ["gateway.port=1", "gateway.port=2"]).gateway.port == 2


@pytest.mark.parametrize(
    ("variable", "text", "at", "expected"),
    [
        (f"{QWEN}PARALLEL__ULYSSES_DEGREE", "4", "models.0.parallel.ulysses_degree", 4),
        (f"{QWEN}PARALLEL__RING_DEGREE", "3", "models.0.parallel.ring_degree", 3),
        ("SPRAY_MODELS__qwen_Image__DTYPE", "float16", "models.0.dtype", "float16"),
        ("SPRAY_MODELS__WAN2_2__MAX_QUEUED", "7", "models.1.max_queued", 7),
        ("SPRAY_MODELS__1__MAX_QUEUED", "7", "models.1.max_queued", 7),
        (f"{QWEN}ALIASES", "[a, b]", "models.0.aliases", ("a", "b")),
        (f"{QWEN}REVISION", "1234567", "models.0.revision", "1234567"),
        (f"{QWEN}REVISION", "'12'", "models.0.revision", "12"),
        (f"{QWEN}REVISION", "", "models.0.revision", None),
        (f"{QWEN}REVISION", "null", "models.0.revision", None),
        (f"{QWEN}ENV__NCCL_Debug", "1", "models.0.env.NCCL_Debug", "1"),
        (f"{QWEN}ENV__PEER_SERVICE_HOST", "x", "models.0.env.PEER_SERVICE_HOST", "x"),
        (f"{QWEN}ENV", "{A: b}", "models.0.env", {"A": "b"}),
        (f"{QWEN}TASKS", "[text-to-image]", "models.0.tasks", ("text-to-image",)),
        (f"{QWEN}WARMUP_SHAPES", "[{width: 512, height: 512}]", "models.0.warmup_shapes.0.width", 512),
        (f"{QWEN}GRACE_PERIOD_S", "1e3", "models.0.grace_period_s", 1000.0),
        ("SPRAY_MODELS__WAN2_2__LORAS__0__NAME", "b", "models.1.loras.0.name", "b"),
        ("SPRAY_GATEWAY__HOST", "::1", "gateway.host", "::1"),
        ("SPRAY_GATEWAY", "{port: 5}", "gateway.port", 5),
        ("SPRAY_GATEWAY__WEBHOOK_KEY_ENV", "@x", "gateway.webhook_key_env", "@x"),
        ("SPRAY_MODELS", "[{name: a, source: b/c}]", "models.0.name", "a"),
    ],
)
def test_variables(file: Path, variable: str, text: str, at: str, expected: Any) -> None:
    assert value(load_spec(file, {variable: text}), at) == expected


@pytest.mark.parametrize("text", ["true", "True", "on", "yes"])
def test_variables_that_switch(file: Path, text: str) -> None:
    shapes = {f"{QWEN}WARMUP_SHAPES": "[{width: 512, height: 512}]"}
    assert load_spec(file, shapes | {f"{QWEN}COMPILE": text}).models[0].compile is True
    assert load_spec(file, shapes | {f"{QWEN}COMPILE": "false"}).models[0].compile is False


@pytest.mark.parametrize(
    ("flag", "at", "expected"),
    [
        ("models.qwen-image.parallel.ulysses_degree=4", "models.0.parallel.ulysses_degree", 4),
        ("models.wan2.2.source=Wan-AI/Wan=2", "models.1.source", "/Wan-AI/Wan=2"),
        ("models.0.revision=0123", "models.0.revision", "0123"),
        ("models.qwen-image.parallel={ring_degree: 3}", "models.0.parallel.ulysses_degree", 1),
        ("models.wan2.2.placement.node_labels.ray.io/zone=a", "models.1.placement.node_labels", {"ray.io/zone": "a"}),
        ("models.wan2.2.loras=[]", "models.1.loras", ()),
        ("auth.api_keys_env=null", "auth.api_keys_env", None),
    ],
)
def test_flags(file: Path, flag: str, at: str, expected: Any) -> None:
    found = value(load_spec(file, {}, [flag]), at)
    assert found.endswith(expected) if at == "models.1.source" else found == expected


def test_a_section_and_a_key_in_it_in_either_order(file: Path) -> None:
    environ = {f"{QWEN}PARALLEL__RING_DEGREE": "3", f"{QWEN}PARALLEL": "{cfg_parallel_size: 2}", f"{QWEN}NAME": "q"}
    loaded = load_with_origins(file, dict(reversed(environ.items())))
    assert str(loaded.spec.models[0].parallel) == "ring_degree=3 x cfg_parallel_size=2"
    assert loaded.origins["models.q.parallel.ring_degree"] == f"{QWEN}PARALLEL__RING_DEGREE"
    assert loaded.origins["models.q.parallel.cfg_parallel_size"] == f"{QWEN}PARALLEL"
    assert loaded.origins["models.q.parallel.ulysses_degree"] == "default"


def test_a_model_whose_own_name_has_the_separator(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("models: [{name: a, source: b}, {name: a--b, source: b}, {name: '0', source: b}]")
    spec = load_spec(file, {"SPRAY_MODELS__A__B__MAX_QUEUED": "2", "SPRAY_MODELS__0__MAX_QUEUED": "3"})
    assert [model.max_queued for model in spec.models] == [64, 2, 3]


def test_models_with_the_same_variables(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("models: [{name: a.b, source: b}, {name: A-B, source: b}]")
    assert load_spec(file, {}, ["models.A-B.max_queued=5"]).models[1].max_queued == 5
    assert (
        refusal(file, {"SPRAY_MODELS__A_B__MAX_QUEUED": "5"})
        == "SPRAY_MODELS__A_B__MAX_QUEUED: can mean models.0.max_queued and models.1.max_queued; "
        "set it in the file, or by --set"
    )


NUMBERS: dict[str, Any] = {
    "0": 0,
    "8000": 8000,
    "-3": -3,
    "+4": 4,
    "0x1F": 31,
    ".5": 0.5,
    "2.": 2.0,
    "01.5": 1.5,
    "1.0e+3": 1000.0,
}
NUMBERS |= {".inf": math.inf, "'010'": "010"}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_numbers_of_yaml_1_2(text: str, number: Any) -> None:
    assert parse_yaml(f"a: {text}")[0] == {"a": number}


def test_anchors_share_text_but_no_overrides(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text(
        "models:\n"
        "  - &first\n    name: a\n    source: b\n    parallel: &degrees {ulysses_degree: 2}\n"
        "  - <<: *first\n    name: c\n"
        "  - {name: d, source: b, parallel: *degrees}\n"
    )
    loaded = load_with_origins(file, {}, ["models.a.parallel.ulysses_degree=3"])
    assert [model.parallel.ulysses_degree for model in loaded.spec.models] == [3, 2, 2]
    assert loaded.origins["models.c.name"] == f"file {file}:7"
    assert loaded.origins["models.c.parallel.ulysses_degree"] == f"file {file}:5"


OTHERS = {
    "SPRAY_ADDRESS": "auto",
    "SPRAY_SERVER": "http://x",
    "SPRAY_API_KEYS": "a,b",
    "SPRAY_METRICS_DIR": "/tmp/here",
    "SPRAY_API_KEY": "a",
    "SPRAY_SERVICE_HOST": "10.0.0.1",
    "SPRAY_SERVICE_PORT_HTTP": "8000",
    "SPRAY_PORT": "tcp://10.0.0.1:8000",
    "SPRAY_GATEWAY_PORT_8000_TCP_ADDR": "10.0.0.1",
    "HOME": "/",
    "spray_gateway__port": "1",
}


def test_variables_of_other_purposes(file: Path) -> None:
    assert load_spec(file, OTHERS) == load_spec(file)
    assert "SPRAY_PORT: unknown key" in refusal(file, {"SPRAY_PORT": "9000"})


@pytest.mark.parametrize(
    ("key", "variable"),
    [
        ("auth.api_keys_env", "SPRAY_TEAM_KEYS"),
        ("gateway.webhook_key_env", "SPRAY_WEBHOOK_KEY"),
        ("storage.jobs_url_env", "SPRAY_JOBS_URL"),
    ],
)
def test_a_variable_that_a_key_names_is_no_configuration(file: Path, key: str, variable: str) -> None:
    secret = {variable: "a"}
    assert f"{variable}: unknown key" in refusal(file, secret)
    assert value(load_spec(file, secret, [f"{key}={variable}"]), key) == variable


def test_every_key_that_names_a_variable_ends_alike() -> None:
    """By its end `deploy.overrides` knows it."""
    described = {
        f"{name}.{key}": key
        for name, section in DeploymentSpec.model_fields.items()
        for key, field in getattr(section.annotation, "model_fields", {}).items()
        if "environment variable" in (field.description or "")
    }
    assert len(described) == 3 and all(key.endswith("_env") for key in described.values()), described


@pytest.mark.parametrize(
    ("environ", "flags", "says"),
    [
        ({"SPRAY_GATEWAY__PROT": "1"}, [], "SPRAY_GATEWAY__PROT: unknown key; did you mean 'SPRAY_GATEWAY__PORT'?"),
        (
            {"SPRAY_MODELS__QWEN_IMGE__DEVICE": "cpu"},
            [],
            "SPRAY_MODELS__QWEN_IMGE__DEVICE: unknown key; did you mean 'SPRAY_MODELS__QWEN_IMAGE__DEVICE'?",
        ),
        ({"SPRAY_XYZ": "1"}, [], "SPRAY_XYZ: unknown key; `spray schema` lists them"),
        ({f"{QWEN}ENV__": "1"}, [], f"{QWEN}ENV__: unknown key"),
        ({}, ["gateway.prot=1"], "--set gateway.prot: unknown key; did you mean 'gateway.port'?"),
        ({}, ["models.wan2.3.device=cpu"], "unknown key; did you mean 'models.wan2.2.device'?"),
        ({}, ["models.2.device=cpu"], "--set models.2.device: unknown key"),
        ({}, ["gateway.port"], "--set gateway.port: expected PATH=VALUE, such as gateway.port=8001"),
        ({PORT: "x"}, [], f"{PORT}: gateway.port: Input should be a valid integer, unable to parse string"),
        ({PORT: ""}, [], f"{PORT}: gateway.port: Input should be a valid integer, got nothing"),
        ({PORT: "["}, [], f"{PORT}: is not YAML: "),
        ({PORT: "{a: 1, a: 2}"}, [], f"{PORT}: 'a' is repeated; it is first in line 1; keep one"),
        ({f"{QWEN}COMPILE": "maybe"}, [], f"{QWEN}COMPILE: models.0.compile: Input should be a valid boolean"),
        ({f"{QWEN}ALIASES": "[a b]"}, [], f"{QWEN}ALIASES: models.0.aliases.0: String should match"),
        (
            {f"{QWEN}MAX_QUEUED": "1", "SPRAY_MODELS__0__MAX_QUEUED": "2"},
            [],
            "sets the same key as SPRAY_MODELS__0__MA",
        ),
        ({}, ["gateway={prot: 1}"], "--set: gateway.prot: unknown key; did you mean 'port'?"),
        (
            {f"{QWEN}PARALLEL__ULYSSES_DEGREE": "0"},
            [],
            "d.yaml:4: models.0.parallel: ulysses_degree must be a whole number of at least 1, got 0 "
            f"(models.0.parallel.ulysses_degree is from {QWEN}PARALLEL__ULYSSES_DEGREE)",
        ),
        (
            {f"{QWEN}LIMITS__MAX_WIDTH": "512", f"{QWEN}MAX_QUEUED": "1"},
            ["models.qwen-image.defaults.width=640"],
            "d.yaml:2: models.0: defaults.width is 640, above limits.max_width, 512; change one "
            f"(models.0.limits.max_width is from {QWEN}LIMITS__MAX_WIDTH, models.0.defaults.width is from --set)",
        ),
        (
            {f"{QWEN}LIMITS__MAX_WORK": "50000000"},
            [],
            "d.yaml:2: models.0: a request that leaves all to defaults has width x height x num_frames x "
            "num_inference_steps 52428800, above limits.max_work, 50000000; change one "
            f"(models.0.limits.max_work is from {QWEN}LIMITS__MAX_WORK)",
        ),
        (
            {"SPRAY_STORAGE__MODELS": "~/hub"},
            [],
            "SPRAY_STORAGE__MODELS: storage.models: must be an absolute path, got '~/hub'",
        ),
        ({}, ["storage.compiled=c"], "--set: storage.compiled: must be an absolute path, got 'c'"),
        ({}, ["storage.outputs.folder=o"], "--set: storage.outputs.folder: must be an absolute path, got 'o'"),
    ],
)
def test_mistakes_name_where_they_are(file: Path, environ: dict[str, str], flags: list[str], says: str) -> None:
    message = refusal(file, environ, *flags)
    assert says in message
    assert len(message.splitlines()) == 1


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    said = refusal(file, {"SPRAY_GATEWAY__PROT": "1", f"{QWEN}DEVICE": "tpu"}, "x", "gateway.port=-1")
    assert [line.split(": ")[0] for line in said.splitlines()] == [
        "SPRAY_GATEWAY__PROT", "--set x", f"{QWEN}DEVICE", "--set",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "models:\n  - name: a\n    source: b\n    name: c\n",
            "d.yaml:4: 'name' is repeated; it is first in line 2; keep one",
        ),
        ("models: []\nmodels: []\n", "d.yaml:2: 'models' is repeated; it is first in line 1; keep one"),
        (
            "models:\n\t- name: a\n",
            "found character '\\t' that cannot start any token; indent with spaces, not with tabs",
        ),
        (
            "models:\n  - {name: a\n    source: b\n",
            "d.yaml:3: is not YAML: while parsing a flow mapping that begins in line 2, expected ',' or '}', but",
        ),
        ("models: [\n\n\n", "d.yaml:4: is not YAML: while parsing a flow node, expected the node content"),
        ("a: 1\nb: \x07\n", "d.yaml:2: is not YAML: the character '\\x07' is not allowed"),
        ("a: *b\n", "d.yaml:1: is not YAML: found undefined alias 'b'"),
        ("a: 1\n---\nb: 1\n", "d.yaml:2: is not YAML: expected a single document in the stream, but found another"),
        ("a: !!python/name:os.system\n", "d.yaml:1: is not YAML: could not determine a constructor"),
        ("a: &b [*b]\n", "d.yaml:1: an anchor must not contain itself"),
        (NINE_TIMES_NINE, ": aliases make this more than 100000 values; write out what is meant"),
        (NINE_TIMES_NINE.replace("[", "{<<: [").replace("]", "]}"), ": aliases make this more than 100000 values"),
        ("a: " + "[" * 5000, "d.yaml:1: is nested too deeply"),
        *((f"a:\n  b: {old}\n", f"d.yaml:2: {old} is another value in YAML 1.1 than in 1.2") for old in OLD_NUMBERS),
        ("? [a]\n: b\n", "d.yaml:1: is not YAML: while constructing a mapping, found unhashable key"),
        ("", "d.yaml: expected a mapping with the key 'models', got nothing"),
        (
            "models:\n  - name: a\n    source: b\n    gateway: 1\n",
            "d.yaml:4: models.0.gateway: unknown key; allowed: name, ",
        ),
        ("models:\n  - name: a\n", "d.yaml:2: models.0.source: Field required"),
        ("gateway: {}\n", "d.yaml: models: Field required"),
        ("models:\n  - {name: a, source: b, revision: 12}", "Input should be a valid string, got 12; put it in quotes"),
        (
            "models:\n  - {name: a, source: b, loras: [{nmae: c}]}",
            "models.0.loras.0.nmae: unknown key; did you mean 'name'?",
        ),
        ("models: [{name: a, source: b, 1: 2}]", "d.yaml:1: models.0.1: Keys should be strings"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "d.yaml").write_text(content)
    assert says in refusal(tmp_path / "d.yaml")


def test_overrides_leave_a_broken_section_to_the_schema(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("models: [{name: a, source: b}, 3]\ngateway: 3\n")
    environ = {PORT: "1", "SPRAY_MODELS__A__MAX_QUEUED": "1"}
    assert refusal(file, environ).splitlines() == [
        "d.yaml:1: models.1: Input should be a valid dictionary or instance of ModelSpec, got 3",
        "d.yaml:2: gateway: Input should be a valid dictionary or instance of GatewaySpec, got 3",
    ]


def test_print_config_shows_each_value_and_its_origin(file: Path) -> None:
    token = {f"{QWEN}ENV__HF_TOKEN": "hf_x", f"{QWEN}ENV__NCCL_DEBUG": "INFO"}
    loaded = load_with_origins(file, {PORT: "9001"} | token, ["models.wan2.2.aliases=[w]"])
    lines = print_config(loaded)
    shown = dict(line.split("  # ") for line in lines)
    assert {key.rstrip(): origin for key, origin in shown.items() if origin != "default"} == {
        'models.qwen-image.name = "qwen-image"': f"file {file}:2",
        'models.qwen-image.source = "Qwen/Qwen-Image"': f"file {file}:3",
        "models.qwen-image.parallel.ulysses_degree = 2": f"file {file}:4",
        'models.qwen-image.env.HF_TOKEN = "***"': f"{QWEN}ENV__HF_TOKEN",
        'models.qwen-image.env.NCCL_DEBUG = "INFO"': f"{QWEN}ENV__NCCL_DEBUG",
        'models.wan2.2.name = "wan2.2"': f"file {file}:5",
        f'models.wan2.2.source = "{file.parent}/wan"': f"file {file}:6",
        'models.wan2.2.aliases = ["w"]': "--set",
        'models.wan2.2.device = "cpu"': f"file {file}:7",
        'models.wan2.2.loras.0.name = "ink"': f"file {file}:9",
        f'models.wan2.2.loras.0.source = "{file.parent}/ink.safetensors"': f"file {file}:9",
        "gateway.port = 9001": PORT,
    }
    assert "models.qwen-image.warmup_shapes = []" in {key.rstrip() for key in shown}
    assert len({line.index("  # ") for line in lines if len(line.split("  # ")[0].rstrip()) <= 88}) == 1
    assert len(lines) == len(loaded.origins)


def test_what_is_printed_can_be_given_back(file: Path) -> None:
    loaded = load_with_origins(file)
    flags = [line.split("  # ")[0].rstrip().replace(" = ", "=", 1) for line in print_config(loaded)]
    again: LoadedSpec = load_with_origins(file, {}, flags)
    assert again.spec == loaded.spec
    assert set(again.origins.values()) == {"--set"}
