"""What `workers.model.torch_internals` relies on inside torch."""

import os
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.programs import needs_compiler
from workers.model.torch_internals import VARIABLE, compile_into, default_cache_dir, graphs


@needs_compiler
def test_the_compiler_writes_where_it_is_told_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, default_cache_dir())  # torch itself sets it so
    assert compile_into(tmp_path)
    assert os.environ[VARIABLE] == str(tmp_path)
    seen = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        assert torch.compile(torch.sin)(torch.zeros(3)).tolist() == [0, 0, 0]
        seen.append(graphs())
    assert seen == [(0, 1), (1, 0)]
    assert list(tmp_path.glob("fxgraph/*/*/*"))


def test_a_folder_that_somebody_named_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/theirs")
    assert not compile_into(tmp_path)
    assert os.environ[VARIABLE] == "/theirs"
