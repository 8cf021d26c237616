"""`helm test`: one picture by gRPC. Server, model, fields and key come from the environment; an error ends it."""

import json
import os

import grpc

from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services

fields = {"model": os.environ["SPRAY_MODEL"], "prompt": "a cup of coffee", "seed": 7}
fields |= json.loads(os.environ["SPRAY_FIELDS"])
key = os.environ.get("SPRAY_API_KEY")
metadata = (("authorization", f"Bearer {key}"),) if key else ()
unlimited = [("grpc.max_receive_message_length", -1)]
with grpc.insecure_channel(os.environ["SPRAY_GRPC"], options=unlimited) as channel:
    answer = services.MediaGenerationServiceStub(channel).GenerateImage(
        pb.GenerateImageRequest(params=pb.GenerationParams(**fields)),
        metadata=metadata,
        timeout=float(os.environ["SPRAY_TIMEOUT"]),
        wait_for_ready=True,
    )
picture = answer.outputs[0].data
assert picture.startswith(b"\x89PNG"), picture[:16]
print(f"a PNG of {len(picture)} bytes by gRPC")
