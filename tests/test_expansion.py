"""Prompts that the operator's chat model writes, with a far end that is slow, broken or huge."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import GIVE_UP_S, PlayedQueue, StartServer, allow, forecast_of, params_for
from far_ends import Asked, FarEnd
from memory_stores import memory_store
from submission_desk import Desk

from images import read_metadata
from scheduler import pending
from scheduler.download_api import ExpansionApi
from storage.task_store import TaskStore
from task import Phase, TaskStatus
from timing_model import TimingModel
from workers.expander import MOST_ANSWER_BYTES, ChatEndpoint, Expander

WRITTEN = "a lighthouse at dusk, with a red lantern"


def answer_of(content: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


def sent_text(asked: Asked) -> str:
    """The text that the far end was asked to rewrite."""
    text: str = json.loads(asked.body)["messages"][-1]["content"]
    return text


class Studio:
    """A queue, an expander and a far end; the test runs them step by step."""

    def __init__(self, answer: Callable[[Asked], None], folder: Path | None = None) -> None:
        self.at = 1000.0
        self.asked: list[Asked] = []
        self.queue = PlayedQueue(
            allow("noise-flux1"),
            TimingModel(),
            TaskStore(folder) if folder else memory_store(),
            monotonic=lambda: self.at,
        )
        self.queue.load()
        self.api = ExpansionApi(self.queue.scheduler)
        self._answer = answer
        self.far_end = FarEnd(self._answered)
        self.expander = self.expander_for(ChatEndpoint(self.far_end.url + "/v1", "gemma", "key"))

    def _answered(self, asked: Asked) -> None:
        self.asked.append(asked)
        self._answer(asked)

    def expander_for(self, endpoint: ChatEndpoint) -> Expander:
        return Expander(self.api, endpoint, most_chars=1000)

    def submit(self, prompt: str = "a lighthouse", **fields: Any) -> str:
        return self.queue.submit(params_for(prompt, expand=True, **fields))[0].task_id


@contextmanager
def studio(answer: Callable[[Asked], None], folder: Path | None = None) -> Iterator[Studio]:
    made = Studio(answer, folder)
    with made.far_end:
        yield made


def writes(content: Any = WRITTEN) -> Callable[[Asked], None]:
    return lambda asked: asked.answer(200, answer_of(content))


def test_the_prompt_is_written_before_the_task_joins_the_schedule() -> None:
    with studio(writes()) as made:
        task_id = made.submit()
        before = made.queue.status(task_id)
        assert (before.status, before.phase) == (TaskStatus.WAITING, Phase.PROMPT_EXPANSION)
        assert before.params.prompt == "a lighthouse"
        assert made.queue.claim() is None
        assert made.expander.run_once()
        claimed = made.queue.claim()
    assert claimed is not None
    assert claimed.stages[0].params.prompt == claimed.params.prompt == WRITTEN
    assert (claimed.params.expand, claimed.params.warnings) == (False, ())
    stored = made.queue.scheduler.store.unfinished()
    assert [task.params.prompt for task in stored] == [WRITTEN]


def test_the_endpoint_gets_the_model_the_key_and_the_text() -> None:
    with studio(writes()) as made:
        made.submit("http://127.0.0.1:1/evil\r\nHost: x")
        assert made.expander.run_once()
    (asked,) = made.asked
    assert (asked.command, asked.path) == ("POST", "/v1/chat/completions")
    assert asked.headers["Authorization"] == "Bearer key"
    assert json.loads(asked.body)["model"] == "gemma"
    assert sent_text(asked) == "http://127.0.0.1:1/evil\r\nHost: x"


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ('  "a lighthouse"\n', "a lighthouse"),
        ("<think>They want a tower.</think>\n\na tower", "a tower"),
        ("\u706f\u53f0", "\u706f\u53f0"),
    ],
)
def test_quotes_and_thoughts_are_left_out(content: str, prompt: str) -> None:
    with studio(writes(content)) as made:
        task_id = made.submit()
        assert made.expander.run_once()
    assert made.queue.status(task_id).params.prompt == prompt


def test_each_different_prompt_of_a_list_is_written() -> None:
    with studio(lambda asked: writes(sent_text(asked).upper())(asked)) as made:
        task_id = made.submit("a", prompts=("a", "b", "a"), count=3)
        assert made.expander.run_once()
    assert [sent_text(asked) for asked in made.asked] == ["a", "b"]
    params = made.queue.status(task_id).params
    assert (params.prompt, params.prompts) == ("A", ("A", "B", "A"))


def hang_up(asked: Asked) -> None:
    asked.hang_up()


def huge(asked: Asked) -> None:
    asked.answer(200, b" " * (MOST_ANSWER_BYTES + 1))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda asked: asked.answer(500, b"no"), "the endpoint answered 500"),
        (lambda asked: asked.answer(401, answer_of(WRITTEN)), "the endpoint answered 401"),
        (hang_up, "the call failed (RemoteDisconnected)"),
        (huge, "the answer is too large"),
        (lambda asked: asked.answer(200, b"{"), "the answer has no prompt"),
        (lambda asked: asked.answer(200, b"[" * 900_000), "the answer has no prompt"),
        (lambda asked: asked.answer(200, b"\xff\xfe\xfd"), "the answer has no prompt"),
        (lambda asked: asked.answer(200, {"choices": []}), "the answer has no prompt"),
        (lambda asked: asked.answer(200, {"choices": {}}), "the answer has no prompt"),
        (writes(None), "the answer has no prompt"),
        (writes(["a"]), "the answer has no prompt"),
        (writes('" "'), "the answer has no prompt"),
        (writes("<think>too long"), "the answer has no prompt"),
        (writes("a\0b"), "the answer has no prompt"),
        (writes("\ud83d"), "the answer has no prompt"),
        (writes("x" * 1001), "the answer is too large"),
    ],
)
def test_a_failure_falls_back_to_the_prompt_with_a_warning(
    answer: Callable[[Asked], None], reason: str
) -> None:
    with studio(answer) as made:
        task_id = made.submit(warnings=("earlier",))
        assert made.expander.run_once()
        claimed = made.queue.claim()
    assert claimed is not None
    assert (claimed.task_id, claimed.params.prompt) == (task_id, "a lighthouse")
    sentence = f"The prompt was not expanded: {reason}. It is used as it was sent."
    assert claimed.params.warnings == ("earlier", sentence)
    assert made.queue.scheduler.pending.expansion_s == pending.USUAL_EXPANSION_S


def test_no_redirect_is_followed() -> None:
    with studio(writes()) as elsewhere:
        location = {"Location": elsewhere.far_end.url + "/v1/chat/completions"}
        with studio(lambda asked: asked.answer(307, b"", location)) as made:
            task_id = made.submit()
            assert made.expander.run_once()
    (warning,) = made.queue.status(task_id).params.warnings
    assert "answered 307" in warning
    assert elsewhere.asked == []


def test_a_dead_endpoint_falls_back() -> None:
    with studio(writes()) as made:
        task_id = made.submit()
    assert made.expander.run_once()
    (warning,) = made.queue.status(task_id).params.warnings
    assert "ConnectionRefusedError" in warning


@pytest.mark.parametrize("drip", [False, True])
def test_a_silent_or_dripping_endpoint_is_left_in_time(
    monkeypatch: pytest.MonkeyPatch, drip: bool
) -> None:
    monkeypatch.setattr(pending, "MOST_EXPANSION_S", 0.3)
    over = threading.Event()

    def answer(asked: Asked) -> None:
        asked.begin(200, {"Content-Length": "100000"})
        while not over.wait(0.02 if drip else GIVE_UP_S):
            asked.wfile.write(b" ")

    with studio(answer) as made:
        task_id = made.submit()
        assert made.expander.run_once()
        over.set()
    (warning,) = made.queue.status(task_id).params.warnings
    assert "it took too long" in warning


def test_tasks_that_waited_for_a_slow_endpoint_do_not_wait_again_for_each_other() -> None:
    with studio(writes()) as made:
        task_id = made.submit()
        made.at += pending.MOST_EXPANSION_S
        assert made.expander.run_once()
    assert made.asked == []
    assert "it took too long" in made.queue.status(task_id).params.warnings[0]


def test_other_tasks_are_drawn_and_answered_while_a_prompt_is_written() -> None:
    called, go_on = threading.Event(), threading.Event()

    def answer(asked: Asked) -> None:
        called.set()
        assert go_on.wait(GIVE_UP_S)
        asked.answer(200, answer_of(WRITTEN))

    with studio(answer) as made:
        slow = made.submit()
        made.expander.start()
        assert called.wait(GIVE_UP_S)
        plain = made.queue.submit(params_for("plain"))[0].task_id
        first = made.queue.claim()
        assert first is not None
        assert first.task_id == plain
        assert made.queue.finish(plain, [b"picture"])
        assert made.queue.status(slow).phase is Phase.PROMPT_EXPANSION
        assert [task.task_id for task in made.queue.unfinished(10, 0)[0]] == [slow]
        go_on.set()
        second = made.queue.claim(GIVE_UP_S)
        assert second is not None
        assert (second.task_id, second.params.prompt) == (slow, WRITTEN)
        made.queue.scheduler.stop()
        made.expander.stop(GIVE_UP_S)


def test_what_is_written_for_a_cancelled_task_is_dropped() -> None:
    with studio(lambda asked: asked.answer(200, answer_of(WRITTEN))) as made:
        task_id = made.submit()
        found = made.api.next_expansion()
        assert found is not None
        made.queue.delete(task_id)
        made.api.expanded(task_id, [WRITTEN], failure=None, seconds=1.0)
        assert made.queue.status(task_id).status is TaskStatus.CANCELLED
        assert made.queue.status(task_id).params.prompt == "a lighthouse"
    assert made.queue.claim() is None


# -- the forecast ----------------------------------------------------------------------------------


def test_the_forecast_includes_the_learned_time_of_a_prompt() -> None:
    with studio(writes()) as made:
        plain_s = made.queue.estimate(params_for())[0].end_s
        made.queue.scheduler.pending.expansion_s = 20.0
        expanded_s = made.queue.estimate(params_for(expand=True))[0].end_s
        assert expanded_s == pytest.approx(plain_s + 20.0)
        listed = params_for("a", prompts=("a", "b"), count=2, expand=True)
        assert made.queue.estimate(listed)[0].start_s == pytest.approx(40.0)
        first, second = made.submit(), made.submit()
        assert forecast_of(made.queue.status(first)).start_s == pytest.approx(20.0)
        assert forecast_of(made.queue.status(second)).start_s == pytest.approx(40.0)
        assert made.api.next_expansion() is not None
        made.at += 5.0
        assert forecast_of(made.queue.status(first)).start_s == pytest.approx(15.0)
        made.at += 20.0
        assert forecast_of(made.queue.status(first)).start_s == 0.0


def test_the_time_of_a_prompt_is_no_longer_than_it_may_take() -> None:
    with studio(writes()) as made:
        made.queue.scheduler.pending.expansion_s = 500.0
        expected_s = made.queue.estimate(params_for(expand=True))[0].start_s
    assert expected_s == pending.MOST_EXPANSION_S


def test_the_time_is_learned_for_the_next_start_and_a_waiting_prompt_is_written_then(
    tmp_path: Path,
) -> None:
    with studio(writes(), tmp_path) as made:
        made.submit()
        assert made.expander.run_once()
        learned_s = made.queue.scheduler.pending.expansion_s
        assert 0 < learned_s < pending.USUAL_EXPANSION_S
        waiting = made.submit("later")
        made.queue.scheduler.store.close()
    with studio(writes("even later"), tmp_path) as again:
        assert again.queue.scheduler.pending.expansion_s == learned_s
        task = again.queue.status(waiting)
        assert (task.phase, task.params.expand) == (Phase.PROMPT_EXPANSION, True)
        assert again.expander_for(ChatEndpoint()).run_once()
        (warning,) = again.queue.status(waiting).params.warnings
        assert "no --expand-url" in warning
        assert again.asked == []
        again.queue.scheduler.store.close()


# -- requests --------------------------------------------------------------------------------------


def test_expand_is_refused_without_an_endpoint_and_for_json_prompts() -> None:
    code, field, message = Desk("noise-flux1").refusal(expand=True)
    assert (code, field) == ("not_supported", "expand")
    assert "--expand-url" in message
    assert Desk("noise-flux1", expands=True).params(expand=True).expand
    assert Desk("fibo", expands=True).refusal(prompt="{}", expand=True)[1] == "expand"


def test_wildcards_are_expanded_first() -> None:
    params = Desk("noise-flux1", expands=True).params(
        prompt="{a|a} fox", expand=True, expand_wildcards=True
    )
    assert (params.prompt, params.expand) == ("a fox", True)


def test_a_server_lets_prompts_be_written_and_puts_them_into_files(
    start_server: StartServer,
) -> None:
    keys: list[str | None] = []

    def answer(asked: Asked) -> None:
        keys.append(asked.headers["Authorization"])
        asked.answer(200, answer_of(WRITTEN))

    with FarEnd(answer) as far_end:
        server = start_server(
            *("--model", "noise-flux1", "--expand-url", far_end.url + "/v1/"),
            environment={"MFLUX_SERVER_EXPAND_KEY": "secret"},
        )
        accepted = server.submit(expand=True, format="PNG")
        assert accepted["params"]["prompt"] == "a lighthouse"
        assert accepted["params"]["expand"] is True
        status = server.wait_until_ended(accepted["task_id"])
    assert keys == ["Bearer secret"]
    assert "secret" not in "".join(server.log)
    assert (status["status"], status["params"]["prompt"]) == ("done", WRITTEN)
    assert status["params"]["expand"] is False
    assert "warnings" not in status
    query = {"task_id": accepted["task_id"]}
    image = requests.get(server.url + "/image", params=query, timeout=60).content
    assert (read_metadata(image) or {})["prompt"] == WRITTEN
