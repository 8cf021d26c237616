"""Models that begin with pictures, served by gangs: edits, control and videos, over REST, gRPC and as a job.

What they make is what the classic pipeline makes on one process.
"""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import diffusers
import grpc
import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from deploy.model_sections import Defaults
from deploy.model_spec import ModelSpec
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1.generation_service_pb2_grpc import MediaGenerationServiceStub
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import deployment, model, ready
from tests.workers.test_picture_inputs import PHOTO, png
from workers.demo_models.writer import write_demo_model

pytestmark = pytest.mark.soak

OTHER = PHOTO.rotate(180)
STEPS = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    of = {"several": "flux-2", "control": "flux", "film": "wan"}
    pipelines = {"several": "Flux2KleinPipeline", "control": "FluxControlPipeline", "film": "WanImageToVideoPipeline"}
    for name, family in of.items():
        write_demo_model(place / name, family, pipelines[name])
    return {name: place / name for name in of}


@pytest.fixture(scope="module")
def cluster(folders: dict[str, Path]) -> Iterator[LocalCluster]:
    def spec(name: str, **degrees: int) -> ModelSpec:
        defaults = Defaults(width=64, height=64, num_inference_steps=2, guidance_scale=2.0, num_frames=5)
        return model(folders[name], name, **degrees).model_copy(update={"defaults": defaults})

    models = spec("several", ulysses_degree=2), spec("control", ring_degree=2), spec("film", ulysses_degree=2)
    with LocalCluster(deployment(*models)) as cluster:
        ready(cluster)
        yield cluster


def expected(folder: Path, **told: Any) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    size = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pil"}
    return pipeline(prompt="a cup", generator=generator, **size, **told)[0][0]


def apart(data: bytes, picture: Image.Image) -> int:
    found = np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16)
    return int(np.abs(found - np.asarray(picture, dtype=np.int16)).max())


def test_the_tasks_are_told(cluster: LocalCluster) -> None:
    found = {
        each["id"]: each["tasks"] for each in httpx.get(f"{cluster.url}/v1/models", trust_env=False).json()["data"]
    }
    assert found == {
        "several": ["text-to-image", "edit"],
        "control": ["control"],
        "film": ["image-to-video", "first-last-frame-to-video"],
    }


def test_several_pictures_are_edited_by_openais_client(cluster: LocalCluster, folders: dict[str, Path]) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    files = [png(PHOTO), png(OTHER)]
    made = client.images.edit(model="several", image=files, prompt="a cup", size="64x64", extra_body=STEPS)  # type: ignore[arg-type]
    drawn = base64.b64decode((made.data or [])[0].b64_json or "")
    assert apart(drawn, expected(folders["several"], image=[PHOTO, OTHER])) <= 1
    with pytest.raises(openai.BadRequestError, match="'several' always does all steps; leave strength out"):
        client.images.edit(
            model="several", image=files, prompt="a cup", size="64x64", extra_body=STEPS | {"strength": 0.5}
        )


def test_a_control_picture_is_followed_over_rest_and_grpc(cluster: LocalCluster, folders: dict[str, Path]) -> None:
    body = {"model": "control", "prompt": "a cup", "size": "64x64", "image": None}
    files = {"control_image": ("edges.png", png(OTHER), "image/png")}
    fields = {key: str(value) for key, value in (body | STEPS).items() if value is not None}
    answer = httpx.post(f"{cluster.url}/v1/images/edits", data=fields, files=files, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    drawn = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert apart(drawn, expected(folders["control"], control_image=OTHER)) <= 1
    with grpc.insecure_channel(cluster.grpc_target) as channel:
        params = pb.GenerationParams(model="control", prompt="a cup", width=64, height=64, **STEPS)
        params.inputs.append(pb.MediaInput(role="control_image", data=png(OTHER)))
        stub = MediaGenerationServiceStub(channel)
        unary = stub.GenerateImage(pb.GenerateImageRequest(params=params), timeout=300)
    assert [output.data for output in unary.outputs] == [drawn]


def test_a_video_begins_and_ends_with_pictures(cluster: LocalCluster, folders: dict[str, Path]) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    data = f"data:image/png;base64,{base64.b64encode(png(OTHER)).decode()}"
    extra = {**STEPS, "num_frames": 5, "last_image": data}
    video = client.videos.create_and_poll(
        model="film",
        prompt="a cup",
        size="64x64",
        input_reference=("a.png", png(PHOTO)),
        extra_body=extra,  # type: ignore[arg-type]
    )
    assert video.status == "completed", video.error
    content = client.videos.download_content(video.id).read()
    with av.open(io.BytesIO(content)) as container:
        frames = [np.asarray(frame.to_image(), dtype=np.int16) for frame in container.decode(video=0)]  # type: ignore[no-untyped-call]
    reference = expected(folders["film"], image=PHOTO, last_image=OTHER, num_frames=5)
    assert len(frames) == len(reference) == 5
    differences = [np.abs(a - np.asarray(b, dtype=np.int16)).mean() for a, b in zip(frames, reference, strict=True)]
    assert max(differences) < 12  # H.264 is not exact
    same = {
        "model": "film",
        "prompt": "a cup",
        "size": "64x64",
        "num_frames": 5,
        "image": data,
        "last_image": data,
    } | STEPS
    other = httpx.post(f"{cluster.url}/v1/videos/sync", json=same, timeout=300, trust_env=False)
    assert other.status_code == 200 and other.content != content


def test_what_a_model_needs_is_said(cluster: LocalCluster) -> None:
    body = {"model": "control", "prompt": "a cup", "size": "64x64"}
    answer = httpx.post(f"{cluster.url}/v1/images/generations", json=body, timeout=300, trust_env=False)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "wrong_task")
    assert "it is for control (ask at /v1/images/edits)" in error["message"]
