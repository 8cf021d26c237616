"""What a request may say, in JSON and in forms: other names, fields that contradict, fields of other servers."""

import json
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.support.backend import FakeBackend
from workers.model.embedded_parameters import parameters_text

IMAGES, VIDEOS = "/v1/images/generations", "/v1/videos/sync"


def as_json(client: TestClient, path: str, **fields: Any) -> Any:
    return client.post(path, json={"prompt": "a"} | fields)


def as_form(client: TestClient, path: str, *fields: tuple[str, str], **more: str) -> Any:
    """A multipart form without a file. httpx makes one only for files."""
    parts = [("prompt", "a"), *more.items(), *fields]
    text = "".join(f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in parts)
    headers = {"content-type": "multipart/form-data; boundary=x"}
    return client.post(path, content=f"{text}--x--\r\n".encode(), headers=headers)


ACCEPTED = [
    (IMAGES, {"width": 64, "height": 96}, {"width": 64, "height": 96}),
    (IMAGES, {"width": 64, "height": 96, "size": "64x96"}, {"width": 64, "height": 96}),
    (IMAGES, {"width": 64, "height": 96, "size": "auto"}, {"width": 64, "height": 96}),
    (IMAGES, {"num_outputs_per_prompt": 3}, {"n": 3}),
    (IMAGES, {"num_outputs_per_prompt": 3, "n": 3}, {"n": 3}),
    (IMAGES, {"seeds": [9, 4], "n": 2}, {"seed": 9, "seeds": (9, 4), "seed_drawn": False}),
    (IMAGES, {"seeds": [9]}, {"seed": 9, "all_seeds": (9,), "seed_drawn": False}),
    (IMAGES, {"seed": 3.0}, {"seed": 3}),
    (IMAGES, {"true_cfg_scale": 2.5}, {"guidance_scale": 2.5, "true_cfg": True}),
    (IMAGES, {"guidance_scale": 2.5}, {"guidance_scale": 2.5, "true_cfg": False}),
    (IMAGES, {"flow_shift": 3.0}, {"flow_shift": 3.0}),
    (IMAGES, {"lora": {"name": "ink", "scale": 0.5}}, {"loras": (("ink", 0.5),)}),
    (IMAGES, {"lora": [{"name": "ink"}]}, {"loras": (("ink", 1.0),)}),
    (IMAGES, {"extra_params": {}}, {}),
    (IMAGES, {"extra_params": {"tea": 1}}, {"extra_params": {"tea": 1}}),  # which its ranks know or refuse
    (IMAGES, {"extra_body": {"seed": 5, "n": 2}, "n": 2}, {"seed": 5, "n": 2}),
    (IMAGES, {"extra_body": '{"seed": 5}'}, {"seed": 5}),
    (VIDEOS, {"seconds": 0.5, "fps": 10}, {"num_frames": 5, "fps": 10}),
    (VIDEOS, {"seconds": "0.5", "fps": 10}, {"num_frames": 5}),
    (VIDEOS, {"seconds": 0.6, "fps": 10}, {"num_frames": 5}),
    (VIDEOS, {"seconds": 0.8, "fps": 10}, {"num_frames": 9}),
    (VIDEOS, {"seconds": 0.01, "fps": 10}, {"num_frames": 1}),
    (VIDEOS, {"seconds": 4, "num_frames": 9}, {"num_frames": 9, "frames_chosen": False}),
    (VIDEOS, {"seconds": 0.5, "fps": 10}, {"num_frames": 5, "frames_chosen": True}),
    (VIDEOS, {}, {"num_frames": 5, "frames_chosen": True}),
    (VIDEOS, {"n": 1, "num_outputs_per_prompt": 1}, {"n": 1}),
    (VIDEOS, {"guidance_scale_2": 2.0}, {"guidance_scale_2": 2.0}),
]


@pytest.mark.parametrize("send", [as_json, as_form])
@pytest.mark.parametrize(("path", "fields", "meant"), ACCEPTED, ids=str)
def test_other_names_and_other_ways(
    client: TestClient, backend: FakeBackend, path: str, fields: dict[str, Any], meant: dict[str, Any], send: Any
) -> None:
    fields = {"model": "film" if path == VIDEOS else "one"} | fields
    if send is as_form:
        fields = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
    answer = send(client, path, **fields)
    assert answer.status_code == 200, answer.text
    (request,) = backend.requests
    assert {name: getattr(request, name) for name in meant} == meant


SENT = [
    *ACCEPTED,
    (IMAGES, {"output_format": "webp", "output_compression": 70, "negative_prompt": "fog"}, {}),
    (VIDEOS, {"negative_prompt": "fog", "extra_params": {"tea": 1.5}}, {}),
]


@pytest.mark.parametrize(("path", "fields", "meant"), SENT, ids=str)
def test_the_parameters_in_a_file_draw_it_again(
    client: TestClient, backend: FakeBackend, path: str, fields: dict[str, Any], meant: dict[str, Any]
) -> None:
    assert as_json(client, path, **{"model": "film" if path == VIDEOS else "one"} | fields).status_code == 200
    (first,) = backend.requests
    last = first.n - 1
    answer = client.post(path, json=json.loads(parameters_text(first, last)))
    assert answer.status_code == 200, answer.text
    chosen = {"seed_drawn": first.seed_drawn, "frames_chosen": first.frames_chosen}
    again = replace(backend.requests[-1], request_id=first.request_id, **chosen)
    assert again == replace(first, n=1, seeds=(), seed=first.all_seeds[last])


def test_files_may_be_without_parameters(client: TestClient, backend: FakeBackend) -> None:
    assert as_json(client, IMAGES, model="one", embed_metadata=False).status_code == 200
    assert as_form(client, IMAGES, model="one", embed_metadata="false").status_code == 200
    assert as_json(client, IMAGES, model="one").status_code == 200
    assert [each.embed_metadata for each in backend.requests] == [False, False, True]


REFUSED = [
    (IMAGES, {"size": "64x64", "width": 64, "height": 96}, "size", "invalid_size"),
    (IMAGES, {"width": 64}, "height", "invalid_size"),
    (IMAGES, {"height": 64}, "width", "invalid_size"),
    (IMAGES, {"width": 63, "height": 64}, "width", "invalid_size"),
    (IMAGES, {"n": 2, "num_outputs_per_prompt": 3}, "num_outputs_per_prompt", "invalid_value"),
    (IMAGES, {"seeds": [1, 2]}, "seeds", "invalid_value"),
    (IMAGES, {"seeds": [1], "n": 2}, "seeds", "invalid_value"),
    (IMAGES, {"seeds": [1], "seed": 2}, "seeds", "invalid_value"),
    (IMAGES, {"seeds": []}, "seeds", "invalid_value"),
    (IMAGES, {"seeds": [-1]}, "seeds.0", "invalid_value"),
    (IMAGES, {"guidance_scale": 1, "true_cfg_scale": 2}, "true_cfg_scale", "invalid_value"),
    (IMAGES, {"guidance_scale_2": 2}, "guidance_scale_2", "invalid_value"),
    (IMAGES, {"flow_shift": 0}, "flow_shift", "invalid_value"),
    (IMAGES, {"flow_shift": 5e-324}, "flow_shift", "invalid_value"),  # no latents are finite then
    (IMAGES, {"lora": {"name": "ink", "path": "/etc/passwd"}}, "lora.0.path", "unknown_parameter"),
    (IMAGES, {"lora": {"name": "ink"}, "loras": [{"name": "ink", "scale": 2}]}, "lora", "invalid_value"),
    (IMAGES, {"extra_body": "["}, "extra_body", "invalid_body"),
    (IMAGES, {"extra_body": "[]"}, "extra_body", "invalid_value"),
    (IMAGES, {"extra_body": {"n": 2}, "n": 3}, "extra_body", "invalid_value"),
    (IMAGES, {"extra_body": {"sed": 2}}, "sed", "unknown_parameter"),
    (IMAGES, {"extra_body": {"extra_body": {}}}, "extra_body", "invalid_value"),
    (IMAGES, {"mask_image": "data:,"}, "mask_image", "unknown_parameter"),
    (VIDEOS, {"video_reference": "data:,"}, "video_reference", "unknown_parameter"),
    (VIDEOS, {"seconds": "four"}, "seconds", "invalid_value"),
    (VIDEOS, {"seconds": 100}, "seconds", "invalid_value"),
    (VIDEOS, {"num_outputs_per_prompt": 2}, "num_outputs_per_prompt", "invalid_value"),
    (VIDEOS, {"stream": True, "response_format": "file"}, "response_format", "invalid_value"),
]


@pytest.mark.parametrize("send", [as_json, as_form])
@pytest.mark.parametrize(("path", "fields", "param", "code"), REFUSED, ids=str)
def test_what_contradicts_or_is_not_there_is_refused(
    client: TestClient, backend: FakeBackend, path: str, fields: dict[str, Any], param: str, code: str, send: Any
) -> None:
    fields = {"model": "film" if path == VIDEOS else "one"} | fields
    if send is as_form:
        fields = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
    answer = send(client, path, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
    assert backend.requests == []


FOREIGN = ("bot_task enable_teacache enhance_prompt generator_device output_path perf_dump_path return_stage_metrics "
           "vae_use_slicing vae_use_tiling").split()  # fmt: skip


@pytest.mark.parametrize("send", [as_json, as_form])
def test_fields_of_other_servers_are_reported(client: TestClient, send: Any) -> None:
    answer = send(client, IMAGES, model="one", **dict.fromkeys(FOREIGN, "x"), quality="high")
    assert (answer.status_code, answer.headers["x-ignored-params"]) == (200, ", ".join(sorted([*FOREIGN, "quality"])))


def test_forms_as_openais_clients_nest_them(client: TestClient, backend: FakeBackend) -> None:
    fields = [("lora[name]", "ink"), ("lora[scale]", "0.8"), ("seeds[]", "7"), ("seeds[]", "3"), ("n", "2"),
              ("stream", "true"), ("stream_options[include_progress]", "true")]  # fmt: skip
    answer = as_form(client, IMAGES, *fields, model="one")
    assert "event: image_generation.progress" in answer.text, answer.text
    (request,) = backend.requests
    assert (request.loras, request.all_seeds, request.report_steps) == ((("ink", 0.8),), (7, 3), True)
    as_form(client, IMAGES, ("loras[][name]", "ink"), ("loras[][scale]", "2"), model="one")
    assert backend.requests[1].loras == (("ink", 2.0),)
    as_form(client, IMAGES, ("seeds", "7"), ("seeds", "3"), ("n", "2"), ("loras", '{"name": "ink"}'), model="one")
    assert (backend.requests[2].all_seeds, backend.requests[2].loras) == ((7, 3), (("ink", 1.0),))


def test_a_form_has_numbers_and_switches_of_a_pipeline_too(client: TestClient, backend: FakeBackend) -> None:
    """OpenAI's clients send these in forms, as text."""
    given = [("a", "0.7"), ("b", "3"), ("c", "true"), ("d", "fast"), ("e", '"3"'), ("f", "1e-3"), ("g", "")]
    as_form(client, IMAGES, *((f"extra_params[{name}]", text) for name, text in given), model="one")
    expected = {"a": 0.7, "b": 3, "c": True, "d": "fast", "e": "3", "f": 0.001, "g": ""}
    assert backend.requests[0].extra_params == expected
    assert [type(value) for value in backend.requests[0].extra_params.values()] == [*map(type, expected.values())]


FORMS = [
    ([("n", "1"), ("n", "2")], "n"),
    ([("n", "1"), ("n[]", "2")], "n[]"),
    ([("stream_options[include_progress]", "true"), ("stream_options", "{}")], "stream_options"),
    ([("lora[", "x")], "lora["),
    ([("[n]", "x")], "[n]"),
    ([("a[b][c][d][e]", "x")], "a[b][c][d][e]"),
    ([("a[][b]", "x"), ("a[]", "y"), ("a[][b]", "z")], "a"),
    ([("n", "one")], "n"),
    ([("stream", "perhaps")], "stream"),
    ([("guidance_scale", "nan")], "guidance_scale"),
    ([("n", "")], "n"),
    ([("extra_params", "{")], "extra_params"),
    ([("extra_params[a]", "9" * 30)], "extra_params.a"),
]


@pytest.mark.parametrize(("fields", "param"), FORMS, ids=str)
def test_forms_that_are_refused(client: TestClient, fields: list[tuple[str, str]], param: str) -> None:
    answer = as_form(client, IMAGES, *fields, model="one")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize("name", ["mask", "mask_image", "image", "image[]", "prompt", "tea"])
def test_files_are_refused_by_name(client: TestClient, name: str) -> None:
    answer = client.post(IMAGES, data={"prompt": "a", "model": "one"}, files={name: ("upload", b"\x89PNG")})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name)
    assert ("are taken as `image` and `mask` at /v1/images/edits" in error["message"]) == (
        name not in ("prompt", "tea")
    )


PART = b'--x\r\nContent-Disposition: form-data; name="'
WHOLE = PART + b'model"\r\n\r\none\r\n' + PART + b'prompt"\r\n\r\na cup\r\n'
END = b"--x--\r\n"
FORM = "multipart/form-data; boundary=x"

BROKEN = [
    (b"", "multipart/form-data", "the form cannot be read: Missing boundary"),
    (b"--x", FORM, "the form ends before its last boundary"),
    (b"--x\r\n\r\nabc", FORM, "the form cannot be read: The Content-Disposition header field"),
    (WHOLE, FORM, "the form ends before its last boundary"),
    (WHOLE + PART + b'seed"\r\n\r\n1', FORM, "the form ends before its last boundary"),
    (WHOLE + END[:-4], FORM, "the form ends before its last boundary"),
    (WHOLE + PART + b'user"\r\n\r\n\xff\r\n' + END, FORM, "the form's text is not UTF-8"),
    (
        WHOLE + b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n" + END,
        FORM,
        "the form cannot be read: The Content-D",
    ),
    (WHOLE + END, f"{FORM}; charset=latin-1", "a form's charset must be UTF-8, got 'latin-1'"),
    (WHOLE + END, f'{FORM}; charset="utf-16"', "a form's charset must be UTF-8, got 'utf-16'"),
]


@pytest.mark.parametrize(("content", "kind", "said"), BROKEN)
def test_broken_forms_are_told_what_is_wrong(
    client: TestClient, backend: FakeBackend, content: bytes, kind: str, said: str
) -> None:
    answer = client.post(IMAGES, content=content, headers={"content-type": kind})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, None, "invalid_body")
    assert error["message"].startswith(said)
    assert backend.requests == []


@pytest.mark.parametrize(
    "kind", [FORM, f"{FORM}; charset=utf-8", f'{FORM}; charset="UTF8"', FORM.upper().replace("=X", "=x")]
)
def test_the_same_form_unbroken_is_taken(client: TestClient, backend: FakeBackend, kind: str) -> None:
    """The control."""
    assert client.post(IMAGES, content=WHOLE + END, headers={"content-type": kind}).status_code == 200
    assert backend.requests[-1].prompt == "a cup"


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"model=one&prompt=a", "application/x-www-form-urlencoded"), (b'{"model": "one", "prompt": "a"}', "text/json")],
)
def test_other_kinds_of_bodies_are_named(client: TestClient, backend: FakeBackend, content: bytes, kind: str) -> None:
    answer = client.post(IMAGES, content=content, headers={"content-type": kind})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (415, "unsupported_media_type")
    assert error["message"] == f"content-type must be application/json or multipart/form-data, not {kind!r}"
    assert backend.requests == []


def test_a_form_has_limits(client: TestClient, backend: FakeBackend) -> None:
    backend.max_body_bytes = 20_000
    assert as_form(client, IMAGES, model="one", negative_prompt="a" * 10_000).status_code == 200
    answer = as_form(client, IMAGES, model="one", negative_prompt="a" * 20_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    answer = as_form(client, IMAGES, *((f"a{i}", "b") for i in range(101)), model="one")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_body")
    files = [("image[]", (str(i), b"")) for i in range(17)]
    assert client.post(IMAGES, data={"prompt": "a"}, files=files).json()["error"]["code"] == "invalid_body"


def test_a_form_of_a_foreign_page_is_refused(client: TestClient, backend: FakeBackend) -> None:
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}):
        answer = client.post(IMAGES, files={"prompt": (None, "a")}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    assert backend.requests == []
