"""A real S3 server for tests: moto's, in a process of its own with packages of its own, which `make s3` installs.

Its packages cannot lie beside ours: they ask for an older dateutil.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

PYTHON = Path(sys.prefix) / "s3" / "bin" / "python"
NEEDED = "there is no S3 server: make s3"
PROGRAM = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3:
    """One server with empty buckets.

    Attributes:
        url: of the server.
        variables: what the environment of its callers has to say.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self.url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        self.variables = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> None:
        """Make a bucket."""
        httpx.put(f"{self.url}/{name}", timeout=30, trust_env=False).raise_for_status()


@contextlib.contextmanager
def running_s3() -> Iterator[S3]:
    """A server that ends with the block. Without `make s3` the test is skipped, in CI it fails."""
    if not PYTHON.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NEEDED)
    with subprocess.Popen(
        [PYTHON, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield S3(process)
        finally:
            process.kill()
