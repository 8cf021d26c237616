"""What a request takes to other ranks, where some of it was on a GPU."""

from unittest import mock

import pytest
import torch

from workers.model.handover import packed, unpacked


@pytest.mark.parametrize("keep_on_host", [True, False])
def test_tensors_of_a_gpu_are_unpacked(keep_on_host: bool) -> None:
    """A scheduler has tensors on its GPU and others on the host; here the first only say that they are."""

    def tag(storage: torch.UntypedStorage) -> str:
        return "cuda:3" if storage.nbytes() == 64 else "cpu"

    values = [torch.arange(16.0), torch.arange(3.0), 7]
    with mock.patch.object(torch.serialization, "location_tag", tag):
        data = packed(values)
    on_gpu, on_host, number = unpacked(data, torch.device("cpu"), keep_on_host)
    assert torch.equal(on_gpu, values[0])
    assert torch.equal(on_host, values[1])
    assert number == 7
