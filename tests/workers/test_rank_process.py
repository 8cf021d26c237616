"""A rank's process works offline and quietly, whatever it imported before; importing our modules changes nothing."""

import os
import subprocess
import sys

import pytest

WORK = """
import os, sys
before = dict(os.environ)
import workers.gang.local, workers.gang.rank_process, workers.model.files
assert "huggingface_hub" in sys.modules and "torch" not in sys.modules
assert dict(os.environ) == before
import gc
paused = []
set_up = workers.gang.rank_process.set_up_rank_process
workers.gang.rank_process.set_up_rank_process = lambda: (paused.append(not gc.isenabled()), set_up())
assert workers.gang.rank_process.import_rank().__name__ == "Rank"
assert paused == [True] and gc.isenabled() and gc.get_freeze_count() > 100_000
import diffusers.utils.hub_utils, huggingface_hub, torchvision, transformers
offline = huggingface_hub.is_offline_mode()
assert diffusers.utils.hub_utils.HF_HUB_OFFLINE is offline
assert diffusers.logging.get_verbosity() == transformers.logging.get_verbosity() == diffusers.logging.ERROR
print(os.environ["HF_HUB_OFFLINE"], offline)
"""


@pytest.mark.parametrize(("operator", "said"), [(None, "1 True"), ("0", "0 False")])
def test_offline_unless_the_operator_says_otherwise(operator: str | None, said: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {"HF_HUB_OFFLINE": operator} if operator else {}
    done = subprocess.run([sys.executable, "-c", WORK], env=env, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr
