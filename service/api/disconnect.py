"""ASGI middleware that ends a request as soon as its client, or the proxy in between, is gone. For `api.rest`.

Starlette notices this only while it streams. Serve cancels a request whose client leaves, but a killed proxy cancels
nothing, and the gang would compute to the end in vain.
"""

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")

GONE: Message = {"type": "http.disconnect"}


class CancelWhenGone:
    """Cancels the application when its caller no longer waits for the answer.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body_read = asyncio.Event()
        gone = asyncio.ensure_future(_gone(receive, body_read))

        async def receive_until_gone() -> Message:
            if body_read.is_set():  # only one may wait for a message
                return await asyncio.shield(gone)
            message = await receive()
            if not message.get("more_body"):
                body_read.set()
            return message

        answering = asyncio.ensure_future(self._app(scope, receive_until_gone, send))
        try:
            await asyncio.wait([answering, gone], return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
                return
            logger.info("%s: the caller is gone", scope["path"])
        finally:
            for task in (answering, gone):
                task.cancel()
            await asyncio.wait([answering, gone])


async def _gone(receive: Receive, body_read: asyncio.Event) -> Message:
    """Return when the caller is gone."""
    await body_read.wait()
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception as error:
        logger.info("the proxy is gone: %s", type(error).__name__)
    return GONE
