"""Sends requests that nobody should send to a server, and judges it: what it answers, who dies, who grows.

For the tests of a live cluster: 200 in the quick ones, 10,000 in `make soak`.
"""

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import httpx
import psutil

from tests.support.fuzz_requests import Shot
from tests.support.listeners import process_tree

ANSWERS_WITHIN_S = 120.0

OF_A_DEADLINE = (504, "deadline_exceeded")
"""What a request is told whose own header asks for an answer within a second."""


@dataclass
class Judged:
    """What came of the requests.

    Attributes:
        statuses: how often each kind of request had each status; 0: the connection was closed without one.
        faults: answers that should not be, in words.
        pictures: the bytes of all pictures of the one right request.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    pictures: Counter[bytes] = field(default_factory=Counter)


async def fire(
    url: str, shots: Iterable[Shot], judged: Judged, at_once: int = 3, sent: Callable[[int], None] = lambda number: None
) -> None:
    """Send all, a few at once.

    Args:
        url: of the server.
        shots: what to send.
        judged: where the results go.
        at_once: how many are under way; where more may wait than a model lets wait, right ones are refused.
        sent: called after each one with how many have been answered.
    """
    host, _, port = url.removeprefix("http://").rpartition(":")
    coming = iter(shots)
    done = 0

    async def send_next() -> None:
        nonlocal done
        for shot in coming:
            try:
                async with asyncio.timeout(ANSWERS_WITHIN_S):
                    raw = await _answer(host, int(port), shot)
            except TimeoutError:
                judged.faults.append(f"{shot.kind}: no answer within {ANSWERS_WITHIN_S:g} s: {_shown(shot)}")
            else:
                await asyncio.to_thread(_judge, url, shot, raw, judged)
            done += 1
            sent(done)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(send_next())


async def _answer(host: str, port: int, shot: Shot) -> bytes | None:
    """All that a server says; None where the client does not listen."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        for part in shot.parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(shot.pause_s)
        return None if shot.leaves else await reader.read(-1)
    except ConnectionError:  # it has heard enough
        return b""
    finally:
        writer.close()


def _judge(url: str, shot: Shot, raw: bytes | None, judged: Judged) -> None:
    if raw is None:
        judged.statuses[shot.kind, 0] += 1
        return
    if raw.startswith(b"HTTP/1.1 100 "):  # then comes the answer
        raw = raw.partition(b"\r\n\r\n")[2]
    start, _, body = raw.partition(b"\r\n\r\n")
    status = int(start.split()[1]) if start.startswith(b"HTTP/1.1 ") else 0
    judged.statuses[shot.kind, status] += 1
    fault = _fault(shot, status, start.lower(), body)
    if fault:
        judged.faults.append(f"{shot.kind}: {fault}: {_shown(shot)} -> {raw[:300]!r}")
    if shot.kind == "picture" and status == 200:
        judged.pictures[_picture(url, start, body)] += 1


def _fault(shot: Shot, status: int, start: bytes, body: bytes) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if shot.kind == "picture":
        return "" if status == 200 else "a right request is not answered"
    if b"traceback" in body.lower() or b"ray." in body:
        return "it tells of the inside"
    code = None
    if body and b"application/json" in start and status >= 400:  # HEAD has none
        try:
            error = json.loads(_unchunked(start, body))["error"]
            code = error["code"]
            assert {"message", "type", "param", "code"} == error.keys() and error["message"]
        except (ValueError, KeyError, TypeError, AssertionError):
            return "an error that is in no envelope"
    if status >= 500 and (status, code) != OF_A_DEADLINE:
        return "a mistake of the server"
    if shot.heard and (not status or (status >= 400 and code is None)):
        return "no answer in the envelope"
    return ""


def _unchunked(start: bytes, body: bytes) -> bytes:
    if b"transfer-encoding: chunked" not in start:
        return body
    found = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        found, body = found + body[:length], body[length + 2 :]
    return found


def _picture(url: str, start: bytes, body: bytes) -> bytes:
    """The file of an answer in whatever form."""
    content = _unchunked(start.lower(), body)
    if content.startswith(b"\x89PNG"):
        return content
    if content.startswith((b"event:", b"data:", b":")):
        lines = [line[6:] for line in content.decode().splitlines() if line.startswith("data: {")]
        return base64.b64decode(json.loads(lines[-1])["b64_json"])
    drawn = json.loads(content)["data"][0]
    if "url" in drawn:
        path = drawn["url"].removeprefix("http://127.0.0.1")  # the shot names no port
        return httpx.get(url + path, trust_env=False, timeout=60).content
    return base64.b64decode(drawn["b64_json"])


def _shown(shot: Shot) -> str:
    return repr(b"".join(shot.parts)[:1500])


TITLES = {
    "ray::ServeReplica:gateway": "gateway", "ray::ServeReplica:": "gang", "ray::ProxyActor": "proxy",
    "ray::RankActor": "rank",
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Resident bytes of each process of a cluster, by its title and process id."""

    resident: dict[tuple[str, int], int]

    def grown(self, before: "Memory") -> dict[tuple[str, int], float]:
        """By which share each process has grown since then; only those that were there."""
        return {who: size / before.resident[who] - 1 for who, size in self.resident.items() if who in before.resident}


def serving(root: int) -> dict[tuple[str, int], psutil.Process]:
    """The processes under `root` that serve. Ray names them in their titles."""
    found = {}
    for pid in process_tree(root):
        try:
            process = psutil.Process(pid)
            title = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        name = next((name for begin, name in TITLES.items() if title.startswith(begin)), None)
        if name is not None:
            found[name, pid] = process
    return found


def memory(processes: dict[tuple[str, int], psutil.Process]) -> Memory:
    """What they hold now; a process that has ended raises."""
    return Memory({who: process.memory_info().rss for who, process in processes.items()})
