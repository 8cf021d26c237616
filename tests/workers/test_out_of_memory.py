"""Which errors mean that memory ran out, and what the caller reads."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.deployments import model
from workers.errors import OutOfMemory, RequestFailed
from workers.gang.boundary import Boundary
from workers.messages import GenerationRequest
from workers.model.out_of_memory import advice, free_memory, is_device_failure, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: ..."), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (torch.distributed.DistBackendError("NCCL error ... Last error:\nCuda failure 2 'out of memory'"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (None, False),
    ],
)
def test_which_errors_mean_it(error: BaseException | None, means: bool) -> None:
    assert is_out_of_memory(error) is means


@pytest.mark.parametrize(
    "broken",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, ...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    ],
    ids=["torch", "cuBLAS", "cuDNN"],
)
def test_a_device_that_has_failed_is_not_agreed_upon(broken: RuntimeError) -> None:
    """All that follows in its process fails, so the rank is lost; the others would be told that all is well."""
    assert is_device_failure(broken)
    assert not is_device_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_device_failure(torch.AcceleratorError("CUDA error: out of memory"))
    told: list[object] = []
    mesh = SimpleNamespace(agree=lambda *flags: told.append(flags) or (True, False, False, 0))
    with pytest.raises(type(broken), match="error"):
        Boundary(0).cross(mesh, None, broken)  # type: ignore[arg-type]
    assert told == []
    with pytest.raises(RequestFailed):
        Boundary(0).cross(mesh, None, ValueError("of the request"))  # type: ignore[arg-type]
    assert told == [(True, False, False, 0)]


def test_the_real_allocators_error_means_it() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert free_memory(torch.device("cpu")) is None


def test_the_caller_reads_what_would_fit(demo_model: Path) -> None:
    spec = model(demo_model)
    request = GenerationRequest(
        request_id="a", model="a", prompt="x", width=512, height=512, n=2, seed=0, num_inference_steps=2
    )
    unknown = advice(spec, request, None)
    assert unknown == f"{spec.name!r} has too little memory for 512x512, n=2: ask for fewer pixels, frames or pictures"
    assert advice(spec, request, 2**40).endswith("456x456, n=2 would fit")  # one picture after the other is decoded
    assert "(1024.0 GiB are free, about " in advice(spec, request, 2**40)
    assert advice(spec, request, 1).endswith("ask for fewer pixels, frames or pictures")


def test_it_crosses_processes() -> None:
    again = pickle.loads(pickle.dumps(OutOfMemory("too large", False)))
    assert (str(again), again.agreed) == ("too large", False)
