"""Assistants for tests of MCP: the official client, on an event loop in a thread of its own."""

import json
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import httpx2
import requests
from anyio.from_thread import start_blocking_portal
from conftest import GIVE_UP_S, ask
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

MODERN, HANDSHAKE = "2026-07-28", "legacy"
ERAS = (MODERN, HANDSHAKE)
Progress = tuple[float, float | None, str | None]


class Answer:
    """What a tool has answered."""

    def __init__(self, result: Any) -> None:
        self.failed: bool = result.is_error
        text, *self.pictures = result.content
        self.said: dict[str, Any] = json.loads(text.text)

    @property
    def task_id(self) -> str:
        return str(self.said["task_id"])


class Assistant:
    """A host with a connection."""

    def __init__(self, portal: Any, client: Client) -> None:
        self._portal = portal
        self.client = client
        self.progress: list[Progress] = []

    def do(self, method: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any) -> Any:
        """The result of one of the client's methods."""
        return self.begin(method, *arguments, **options).result(GIVE_UP_S)

    def begin(
        self, method: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any
    ) -> Future[Any]:
        found: Future[Any] = self._portal.start_task_soon(partial(method, *arguments, **options))
        return found

    def call(self, tool: str, **arguments: Any) -> Answer:
        return Answer(self.do(self.client.call_tool, tool, arguments))

    def draw(self, tool: str, **arguments: Any) -> Answer:
        """The answer with the picture, also where it takes longer than a call waits."""
        return self.ended(self.call(tool, **arguments))

    def ended(self, answer: Answer) -> Answer:
        """The answer once its task has ended."""
        while not answer.failed and answer.said["status"] in ("waiting", "running"):
            answer = self.call("check_image", task_id=answer.task_id)
        return answer

    def begin_call(self, tool: str, *, watched: bool, **arguments: Any) -> Future[Any]:
        """A call that is not waited for. Cancelling the future cancels the call.

        Args:
            watched: whether it asks for notifications of progress; `progress` has them.
        """

        async def note(progress: float, total: float | None, message: str | None) -> None:
            self.progress.append((progress, total, message))

        return self.begin(
            self.client.call_tool, tool, arguments, progress_callback=note if watched else None
        )


@contextmanager
def assistant(
    server: str | StdioServerParameters, mode: Any = "auto", key: str = ""
) -> Iterator[Assistant]:
    """Args: server: its URL, or the program to be started."""
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal())
        target: Any = server
        if isinstance(server, str):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            http = httpx2.AsyncClient(headers=headers, timeout=GIVE_UP_S, trust_env=False)
            target = streamable_http_client(f"{server}/mcp", http_client=http)
            stack.callback(portal.call, http.aclose)
        client = Client(target, mode=mode)
        yield Assistant(portal, stack.enter_context(portal.wrap_async_context_manager(client)))


SMALL = {"prompt": "a fox", "width": 64, "height": 64, "steps": 2}


def post(url: str, body: Any, **headers: str) -> requests.Response:
    usual = {"Accept": "application/json, text/event-stream"}
    return ask("POST", url + "/mcp", json=body, headers={**usual, **headers})


def rpc(method: str, request_id: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
