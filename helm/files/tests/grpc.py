"""`helm test`: one picture or video by gRPC. The environment has server, model, fields and key; an
error ends it."""

import json
import os

import grpc

from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services

fields = {"model": os.environ["SPRAY_MODEL"], "prompt": "a cup of coffee", "seed": 7}
fields |= json.loads(os.environ["SPRAY_FIELDS"])
key = os.environ.get("SPRAY_API_KEY")
metadata = (("authorization", f"Bearer {key}"),) if key else ()
timeout = float(os.environ["SPRAY_TIMEOUT"])
unlimited = [("grpc.max_receive_message_length", -1)]
with grpc.insecure_channel(os.environ["SPRAY_GRPC"], options=unlimited) as channel:
    stub = services.MediaGenerationServiceStub(channel)
    if os.environ["SPRAY_MAKES"] == "video":
        params = pb.GenerationParams(task=pb.TASK_TEXT_TO_VIDEO, **fields)
        events = stub.GenerateStream(
            pb.GenerateStreamRequest(params=params), metadata=metadata, timeout=timeout, wait_for_ready=True
        )
        video = b"".join(event.output_chunk.data for event in events)
        assert video[4:8] == b"ftyp", video[:16]
        print(f"an MP4 of {len(video)} bytes by gRPC")
    else:
        answer = stub.GenerateImage(
            pb.GenerateImageRequest(params=pb.GenerationParams(**fields)),
            metadata=metadata,
            timeout=timeout,
            wait_for_ready=True,
        )
        picture = answer.outputs[0].data
        assert picture.startswith(b"\x89PNG"), picture[:16]
        print(f"a PNG of {len(picture)} bytes by gRPC")
