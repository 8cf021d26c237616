"""The RPCs of jobs, over the core that they share with REST: `service.api.job_calls`. For `service.rpc.methods`.

Names are those of the contract. A stream that fails ends with an empty message, which brings the status.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import get_args

from service.api import job_calls
from service.api.backend import Backend
from service.api.once import KEY_HEADER, REPLAYED_HEADER
from service.jobs.records import State
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.rpc.answers import job_message, output_header
from service.rpc.calls import answering, enter, streaming
from service.rpc.requests import CHUNK_BYTES, to_job
from service.rpc.statuses import Context, admit, metadata, tell
from workers.errors import InvalidParameter

PAGE, MOST_OF_A_PAGE = 20, 100


class JobMethods(Backend):
    """A backend that answers the RPCs of jobs."""

    @answering(pb.CreateJobResponse)
    async def CreateJob(self, request: pb.CreateJobRequest, grpc_context: Context) -> pb.CreateJobResponse:
        """Accept a job. It is on disk when this answers."""
        request_id = enter(self, request, grpc_context)
        asked, priority, deadline_s = await to_job(request, self.models(), request_id)
        key = metadata(grpc_context).get(KEY_HEADER)
        url = request.webhook_url or None
        job, fresh = await job_calls.submit(self, asked, priority, deadline_s, key, webhook_url=url)
        tell(grpc_context, {} if fresh else {REPLAYED_HEADER: "true"})
        return pb.CreateJobResponse(job=job_message(job_calls.Seen(job)))

    @answering(pb.GetJobResponse)
    async def GetJob(self, request: pb.GetJobRequest, grpc_context: Context) -> pb.GetJobResponse:
        """How a job is doing."""
        admit(self, grpc_context)
        return pb.GetJobResponse(job=job_message(await job_calls.find(self, request.id)))

    @answering(pb.ListJobsResponse)
    async def ListJobs(self, request: pb.ListJobsRequest, grpc_context: Context) -> pb.ListJobsResponse:
        """The jobs that the caller may see, the newest first."""
        admit(self, grpc_context)
        limit = request.page_size or PAGE
        if not 1 <= limit <= MOST_OF_A_PAGE:
            raise InvalidParameter("page_size", f"page_size must be 0, or 1 to {MOST_OF_A_PAGE}, got {limit}")
        page = await job_calls.page(
            self, None, _state(request.state), request.page_token or None, limit, name="page_token"
        )
        return pb.ListJobsResponse(
            jobs=[job_message(job_calls.Seen(job)) for job in page.jobs],
            next_page_token=page.jobs[-1].id if page.has_more else "",
        )

    @streaming(lambda error: pb.WatchJobResponse())
    async def WatchJob(self, request: pb.WatchJobRequest, grpc_context: Context) -> AsyncGenerator[pb.WatchJobResponse]:
        """A job as it is, and whenever something of it changes, until it has ended."""
        admit(self, grpc_context)
        for field, _ in request.options.ListFields():
            name = f"options.{field.name}"
            raise InvalidParameter(name, f"{name} is not supported: jobs have no previews", "unknown_parameter")
        async with contextlib.aclosing(job_calls.watch(self, request.id)) as looks:
            async for seen in looks:
                if seen is not None:
                    yield pb.WatchJobResponse(job=job_message(seen))

    @answering(pb.CancelJobResponse)
    async def CancelJob(self, request: pb.CancelJobRequest, grpc_context: Context) -> pb.CancelJobResponse:
        """End a job at its next step."""
        admit(self, grpc_context)
        return pb.CancelJobResponse(job=job_message(job_calls.Seen(await job_calls.cancel(self, request.id))))

    @answering(pb.DeleteJobResponse)
    async def DeleteJob(self, request: pb.DeleteJobRequest, grpc_context: Context) -> pb.DeleteJobResponse:
        """Forget a job and its files, and stop it if it runs."""
        admit(self, grpc_context)
        await job_calls.delete(self, request.id)
        return pb.DeleteJobResponse()

    @streaming(lambda error: pb.DownloadOutputResponse())
    async def DownloadOutput(
        self, request: pb.DownloadOutputRequest, grpc_context: Context
    ) -> AsyncGenerator[pb.DownloadOutputResponse]:
        """One file of a job, from an offset on."""
        admit(self, grpc_context)
        job, output, file = await job_calls.file_of(self, request.job_id, request.index)
        if not 0 <= request.offset <= output.size:
            raise InvalidParameter("offset", f"the file has {output.size} bytes; offset is {request.offset}")
        opened = await asyncio.to_thread(file.open)
        with opened:  # from now on nobody can take it away
            yield pb.DownloadOutputResponse(header=output_header(job, output, request.index))
            await asyncio.to_thread(opened.seek, offset := request.offset)
            while part := await asyncio.to_thread(opened.read, CHUNK_BYTES):
                yield pb.DownloadOutputResponse(chunk=pb.OutputChunk(index=request.index, offset=offset, data=part))
                offset += len(part)


def _state(asked: int) -> State | None:
    """The state that a list is to have; None: any.

    Raises:
        InvalidParameter: there is none of this number.
    """
    if asked == pb.JOB_STATE_UNSPECIFIED:
        return None
    name = pb.JobState.Name(asked) if asked in pb.JobState.values() else ""
    states: tuple[State, ...] = get_args(State)
    found = next((state for state in states if name == f"JOB_STATE_{state.upper()}"), None)
    if found is None:
        known = ", ".join(pb.JobState.keys())
        raise InvalidParameter("state", f"state must be one of {known}, got {asked}")
    return found
