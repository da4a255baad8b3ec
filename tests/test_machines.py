"""Several machines: which of them runs which task, and how operators see and drain them."""

from pathlib import Path

import pytest
from bench import BASE, KLEIN, SCHNELL, Bench, spec_of
from conftest import PlayedQueue, allow, params_for
from memory_stores import memory_store
from played_app import PlayedApp

from scheduler.machines import About, Machine
from task import Task
from timing_model import TimingModel


@pytest.fixture
def app(tmp_path: Path) -> PlayedApp:
    return PlayedApp(tmp_path)


def next_ids(bench: Bench) -> dict[str, str]:
    """By machine, the id of the task that it runs next."""
    return {name: task.task_id for name, task in bench.forecaster.next_tasks().items()}


def only(*names: str) -> object:
    return lambda task: all(stage.load_spec.model.name in names for stage in task.stages)


def with_loaded(bench: Bench, machine: Machine, model: object = SCHNELL) -> None:
    spec = spec_of(model)  # type: ignore[arg-type]
    machine.load_started(spec, bench.at)
    machine.load_finished(spec, [spec.key], bench.at)


def joined(bench: Bench, *tasks: Task) -> None:
    for task in tasks:
        bench.join(task)


def test_each_free_machine_runs_one_of_the_first_tasks() -> None:
    bench = Bench(machines=3)
    for machine in bench.machines:
        with_loaded(bench, machine)
    joined(bench, *(bench.task(name) for name in "abcd"))
    assert sorted(next_ids(bench).values()) == ["a", "b", "c"]


def test_a_task_goes_to_the_machine_that_may_run_it() -> None:
    bench = Bench(machines=2)
    bench.machines[0].allows = only("schnell")  # type: ignore[assignment]
    bench.machines[1].allows = only("schnell", KLEIN.name)  # type: ignore[assignment]
    joined(bench, bench.task("klein", KLEIN), bench.task("schnell"))
    assert next_ids(bench) == {"m0": "schnell", "m1": "klein"}
    bench.machines[1].drained = True
    assert next_ids(bench) == {"m0": "schnell"}, "nobody may run the other one now"
    assert bench.end_s(bench.schedule[0]) > 0.0, "it has a forecast all the same"


def test_a_task_that_a_machine_has_declined_goes_to_another_one() -> None:
    bench = Bench(machines=2)
    joined(bench, bench.task("a"), bench.task("b"))
    bench.machines[0].declined["a"] = "a reason"
    assert next_ids(bench) == {"m0": "b", "m1": "a"}
    bench.machines[1].declined["a"] = "a reason"
    assert "a" not in next_ids(bench).values()


def test_a_task_waits_for_a_fast_machine_where_a_slow_one_would_end_it_later() -> None:
    bench = Bench(machines=2)
    slow, fast = bench.machines
    slow.speed, fast.speed = 0.05, 1.0
    for machine in bench.machines:
        with_loaded(bench, machine)
    joined(bench, bench.task("runs"), bench.task("waits"))
    bench.start(bench.schedule[0], fast)
    assert next_ids(bench) == {"m1": "waits"}
    joined(bench, *(bench.task(f"more{n}") for n in range(30)))
    assert next_ids(bench)["m1"] == "waits"
    assert "m0" in next_ids(bench), "a long queue is worth the slow one's time"


def test_a_machine_with_the_weights_is_preferred_to_one_that_must_download_them() -> None:
    bench = Bench(machines=2)
    bench.machines[1].missing = frozenset({BASE.name})
    joined(bench, bench.task("a", BASE))
    assert next_ids(bench) == {"m0": "a"}
    bench.machines[0].missing, bench.machines[1].missing = bench.machines[1].missing, frozenset()
    assert next_ids(bench) == {"m1": "a"}


def test_a_task_stays_where_it_was_sent_unless_another_machine_is_clearly_earlier() -> None:
    bench = Bench(machines=2)
    for machine in bench.machines:
        machine.speed = 1.0
        with_loaded(bench, machine)
    joined(bench, bench.task("a"))
    for machine in bench.machines:
        machine.offered = bench.schedule[0]
        assert next_ids(bench) == {machine.name: "a"}
        machine.offered = None
    bench.machines[0].offered = bench.schedule[0]
    bench.machines[0].speed = 0.1
    assert next_ids(bench) == {"m1": "a"}


def test_an_idle_machine_gets_work_from_far_behind_if_it_may_run_nothing_else() -> None:
    bench = Bench(machines=2)
    bench.machines[0].allows = only("schnell")  # type: ignore[assignment]
    bench.machines[1].allows = only(KLEIN.name)  # type: ignore[assignment]
    joined(bench, *(bench.task(f"s{n}") for n in range(1001)), bench.task("k", KLEIN))
    assert next_ids(bench) == {"m0": "s0", "m1": "k"}


def test_what_another_machine_has_is_not_downloaded_here(tmp_path: Path) -> None:
    queue = PlayedQueue(
        allow("noise-flux1", "schnell"),
        TimingModel(),
        memory_store(),
        needs_download=lambda model: model.name == "schnell",
    )
    queue.load()
    before = queue.submit(params_for(model="schnell"))[0]
    assert before.waits_for_download
    other = Machine("other")
    other.about = About("M4", "macOS", 0, {}, ("noise-flux1", "schnell"), 0.0)
    queue.scheduler.machines.join(other)
    after = queue.submit(params_for(model="schnell"))[0]
    assert not after.waits_for_download
    tasks = queue.scheduler.next_tasks()
    assert {name: task.task_id for name, task in tasks.items()} == {"other": after.task_id}


def test_a_drained_machine_gets_no_more_tasks_also_after_a_restart(app: PlayedApp) -> None:
    app.submit("alice")
    drained = app.json("root", "POST", "/machines/local/drain")
    assert drained["drained"]
    assert app.queue.claim() is None
    app.reopen()
    assert app.queue.claim() is None
    (local,) = app.json("root", "GET", "/machines")["machines"]
    assert (local["name"], local["drained"], local["state"]) == ("local", True, "idle")
    app.json("root", "POST", "/machines/local/resume")
    assert app.run() == "x"
    (local,) = app.json("root", "GET", "/machines")["machines"]
    assert (local["tasks_last_hour"], local["images_today"]) == (1, 1)
    assert list(local["image_seconds"]) == ["noise-flux1"]


def test_an_unknown_machine_cannot_be_drained(app: PlayedApp) -> None:
    answer = app.ask("root", "POST", "/machines/cellar/drain")
    assert (answer.status_code, answer.get_json()["error"]["code"]) == (404, "unknown_machine")
