"""AsyncClient with the methods of Client, each run to its end: so that one test is of both."""

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import pytest

from client.mflux_client import AsyncClient


class Awaited:
    """Args: those of Client."""

    def __init__(
        self,
        url: str | None = None,
        *,
        sleep: Callable[[float], object] = time.sleep,
        **options: Any,
    ) -> None:
        wait = sleep

        async def pause(seconds: float) -> None:
            wait(seconds)

        self._loop = asyncio.new_event_loop()
        self._thread = ThreadPoolExecutor(1)  # the browser tests have an event loop in this one
        self._client = AsyncClient(url, sleep=pause, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._result(self._client.close())
        self._thread.shutdown()
        self._loop.close()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if inspect.isasyncgenfunction(found):
            return lambda *given, **named: self._one_by_one(found(*given, **named))
        if inspect.iscoroutinefunction(found):
            return lambda *given, **named: self._result(found(*given, **named))
        return found

    def _result(self, found: Awaitable[Any]) -> Any:
        return self._thread.submit(self._loop.run_until_complete, found).result()

    def _one_by_one(self, found: AsyncGenerator[Any, None]) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._result(anext(found))
                except StopAsyncIteration:
                    return
        finally:
            self._result(found.aclose())


@pytest.fixture(params=["requests", "httpx"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test of a module that uses this is one of its Client and one of AsyncClient."""
    if request.param == "httpx":
        monkeypatch.setattr(request.module, "Client", Awaited)
