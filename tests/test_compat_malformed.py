"""The storm of test_malformed.py over the foreign APIs: nothing but documented answers."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from conftest import FOREIGN_PATHS, ServerProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from test_malformed import AS_DOCUMENTED, EXAMPLES, JSON_VALUES, SETTINGS

from api.json_text import MAX_TEXT_BYTES
from compat.a1111_shapes import ImageToImage
from compat.mcp_messages import MOST_ID_CHARS
from compat.ollama_shapes import OllamaGenerate
from compat.openai_shapes import OpenAIGeneration

POSTS = {
    ("/v1/images/generations", "POST"),
    ("/v1/images/edits", "POST"),
    ("/v1/images/variations", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/sdapi/v1/txt2img", "POST"),
    ("/sdapi/v1/img2img", "POST"),
    ("/sdapi/v1/options", "POST"),
    ("/sdapi/v1/png-info", "POST"),
    ("/sdapi/v1/extra-single-image", "POST"),
    ("/api/show", "POST"),
    ("/mcp", "POST"),
}
GETS = {
    ("/v1/images/img-{name}", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/sdapi/v1/progress", "GET"),
}


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose pictures are small and quick."""
    limits = ("--max-pixels", "65536", "--max-steps", "2", "--max-count", "2")
    server = ServerProcess(tmp_path_factory.mktemp("server"), "--model", "noise-flux1", *limits)
    yield server
    assert server.wait_until_ended(server.submit()["task_id"])["status"] == "done"
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


def check_error(answer: Any, path: str) -> None:
    assert 400 <= answer.status_code < 500
    body = answer.json()
    if path.startswith("/v1/"):
        assert answer.status_code != 422
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    elif path.startswith("/api/"):
        assert set(body) == {"error"}
        assert isinstance(body["error"], str)
    elif path == "/mcp":
        assert set(body) - {"id"} == {"jsonrpc", "error"}
        assert set(body["error"]) - {"data"} == {"code", "message"}
    else:
        assert set(body) == {"error", "detail", "body", "errors"}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("path", "method"), sorted(POSTS | GETS))
def test_every_answer_of_the_foreign_apis_is_as_documented(
    small_server: ServerProcess, path: str, method: str, mode: GenerationMode, examples: int
) -> None:
    schema = schemathesis.openapi.from_url(small_server.url + "/openapi.json")
    operation = schema[path][method]

    @settings(SETTINGS, max_examples=examples)
    @given(case=operation.as_strategy(generation_mode=mode))
    def storm(case: schemathesis.Case[Any]) -> None:
        answer = case.call(timeout=60)
        case.validate_response(answer, checks=AS_DOCUMENTED)
        if answer.status_code not in (200, 202):
            check_error(answer, path)

    storm()
    assert small_server.get("/health").status_code == 200


PROMPT = {"prompt": "x", "size": "64x64", "width": 64, "height": 64, "steps": 1}
TOOL = {"type": "image_generation", "size": "64x64", "steps": 1}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/images/generations", PROMPT, "user"),
        ("/v1/responses", {"input": "x", "tools": [TOOL]}, "user"),
        ("/v1/chat/completions", {"modalities": ["image"], "messages": "x"}, "stream_options"),
        ("/sdapi/v1/txt2img", PROMPT, "sampler_name"),
        ("/sdapi/v1/img2img", {**PROMPT, "init_images": ["x"]}, "hr_upscaler"),
        ("/api/generate", {"model": "noise-flux1", "stream": False}, "options"),
    ],
)
def test_only_pictures_may_be_large_because_the_rest_stays_while_a_caller_waits(
    small_server: ServerProcess, path: str, body: dict[str, Any], field: str
) -> None:
    large = {field: {"x": ["y" * (MAX_TEXT_BYTES + 1)]}}
    answer = requests.post(small_server.url + path, json={**body, **large}, timeout=60)
    check_error(answer, path)
    assert f"{field} is too large" in answer.text


def test_the_id_of_a_message_of_mcp_is_short_because_answers_repeat_it(
    small_server: ServerProcess,
) -> None:
    long = "i" * (MOST_ID_CHARS + 1)
    body: dict[str, Any] = {"jsonrpc": "2.0", "id": long, "method": "ping"}
    answer = requests.post(small_server.url + "/mcp", json=body, timeout=60)
    check_error(answer, "/mcp")
    assert len(answer.content) < MOST_ID_CHARS
    arguments = {"prompt": "x", "width": 64, "height": 64, "steps": 1}
    params = {"name": "generate_image", "arguments": arguments, "_meta": {"progressToken": long}}
    body = {"jsonrpc": "2.0", "id": long[1:], "method": "tools/call", "params": params}
    headers = {"Accept": "application/json, text/event-stream"}
    answer = requests.post(small_server.url + "/mcp", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["id"] == long[1:]  # and no progress


def test_every_route_that_takes_nothing_answers_as_documented(small_server: ServerProcess) -> None:
    schema = schemathesis.openapi.from_url(small_server.url + "/openapi.json")
    paths = small_server.get("/openapi.json").json()["paths"]
    known = {(path, method.upper()) for path in paths for method in paths[path]}
    quiet = {one for one in known if one[0].startswith(FOREIGN_PATHS)} - POSTS - GETS
    assert len(quiet) == 38
    for path, method in sorted(quiet):
        case = schema[path][method].Case()
        answer = case.call(timeout=60)
        assert answer.status_code == 200
        case.validate_response(answer, checks=AS_DOCUMENTED)
        other = requests.request("PATCH", small_server.url + path, timeout=60)
        assert other.status_code == 405
        if path != "/queue/status":
            check_error(other, path)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/generate", sorted(OllamaGenerate.model_fields)),
        ("/v1/images/generations", sorted(OpenAIGeneration.model_fields)),
        ("/sdapi/v1/txt2img", sorted(ImageToImage.model_fields)),
        ("/sdapi/v1/img2img", sorted(ImageToImage.model_fields)),
    ],
)
def test_fields_of_any_kind_are_taken_or_refused(
    small_server: ServerProcess, path: str, fields: list[str]
) -> None:
    @SETTINGS
    @given(body=st.dictionaries(st.sampled_from(fields), JSON_VALUES))
    def storm(body: dict[str, Any]) -> None:
        named = {"model": "noise-flux1", "stream": False} if path.startswith("/api/") else {}
        whole = {
            **named,
            "prompt": "x",
            "size": "64x64",
            "width": 64,
            "height": 64,
            "steps": 1,
            **body,
        }
        content = json.dumps(whole)  # NaN and all
        answer = requests.post(small_server.url + path, data=content, timeout=60)
        if answer.status_code == 200:
            assert answer.text
        else:
            check_error(answer, path)

    storm()
