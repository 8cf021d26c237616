"""The RPCs. Serve's gRPC proxies call the gateway's method of the RPC's bare name, so the gateway inherits these.

A message and the call's context come in. No method raises: see `service.rpc.calls`. Names are those of the contract;
the methods of jobs are in `service.rpc.jobs`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse

from service.api.backend import Report, result_of
from service.api.once import KEY_HEADER, begin
from service.api.shares import Places
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.rpc.answers import finished_events, image_response, model_message, report_event
from service.rpc.calls import answering, enter, streaming
from service.rpc.health import MOST_OF_ONE, MOST_WATCHERS, check, watch
from service.rpc.jobs import JobMethods
from service.rpc.requests import chunk_bytes, in_message, stream_warnings, to_generation, to_streamed
from service.rpc.statuses import Context, admit, metadata, tell
from workers.errors import GangLost
from workers.messages import GenerationResult, Profiled

REFUSED_WITHIN_S = 0.5
"""A request that the gateway refuses is refused by then, so one that waits counts as taken on."""

_watchers = Places()
"""By the addresses of clients."""


class GrpcMethods(JobMethods):
    """A backend that answers RPCs."""

    @answering(pb.GenerateImageResponse)
    async def GenerateImage(self, request: pb.GenerateImageRequest, grpc_context: Context) -> pb.GenerateImageResponse:
        """Pictures, all in one answer."""
        began = time.monotonic()
        request_id = enter(self, request, grpc_context)
        generation = await to_generation(request, self.models(), request_id)
        attempt = await begin(self, generation, metadata(grpc_context).get(KEY_HEADER))
        tell(grpc_context, attempt.headers)
        with in_message():
            result = await result_of(attempt.reports)
        return image_response(generation, result, began)

    @streaming(lambda error: pb.GenerateStreamResponse(error=error))
    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, grpc_context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse]:
        """Pictures or a video, with all that happens on the way."""
        began = time.monotonic()
        request_id = enter(self, request, grpc_context)
        size, ignored = chunk_bytes(request.options), stream_warnings(request.options)
        generation = await to_streamed(request, self.models(), request_id)
        taken: list[float] = []
        attempt = await begin(self, generation, metadata(grpc_context).get(KEY_HEADER))
        tell(grpc_context, attempt.headers)
        async with contextlib.aclosing(_taken_on(attempt.reports)) as reports:
            async for report in reports:
                if report is None:
                    yield pb.GenerateStreamResponse(accepted=pb.GenerateStreamResponse.Accepted(job_id=request_id))
                elif isinstance(report, GenerationResult):
                    for event in finished_events(generation, report, size, began, ignored):
                        yield event
                    return
                elif not isinstance(report, Profiled):
                    yield report_event(report, taken)
        raise GangLost("the ranks ended without a result")

    @answering(pb.ListModelsResponse)
    async def ListModels(self, request: pb.ListModelsRequest, grpc_context: Context) -> pb.ListModelsResponse:
        """The models of the deployment."""
        admit(self, grpc_context)
        states = self.states()
        return pb.ListModelsResponse(
            models=[model_message(model, states.get(name)) for name, model in self.models().items()]
        )

    @answering(HealthCheckResponse)
    async def Check(self, request: HealthCheckRequest, grpc_context: Context) -> HealthCheckResponse:
        """Health, once."""
        return check(self, request.service)

    @answering(HealthListResponse)
    async def List(self, request: HealthListRequest, grpc_context: Context) -> HealthListResponse:
        """Health of the server and of every model."""
        return HealthListResponse(statuses={name: check(self, name) for name in ("", *self.models())})

    @streaming(lambda error: HealthCheckResponse())
    async def Watch(self, request: HealthCheckRequest, grpc_context: Context) -> AsyncGenerator[HealthCheckResponse]:
        """Health, whenever it changes."""
        host = grpc_context.peer().rpartition(":")[0]  # without its port
        what = "of Watch are open; close some, or call Check"
        with _watchers.taken(host, MOST_WATCHERS, MOST_OF_ONE, what):
            async with contextlib.aclosing(watch(self, request.service)) as answers:
                async for answer in answers:
                    yield answer


async def _taken_on(reports: AsyncGenerator[Report]) -> AsyncGenerator[Report | None]:
    """None once a request is taken on, then its reports. The first may take long, while the request waits."""
    coming = asyncio.ensure_future(anext(reports, None))
    try:
        with in_message():
            await asyncio.wait([coming], timeout=REFUSED_WITHIN_S)
            if coming.done():
                coming.result()  # raises if it is refused
            yield None
            first = await coming
            if first is not None:
                yield first
            async for report in reports:
                yield report
    finally:
        coming.cancel()
        await asyncio.wait([coming])
        await reports.aclose()
