"""Workers on other machines: a real Redis, real Celery workers in processes, real mflux."""

import base64
import io
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from cluster_bench import (
    PASSWORD,
    Cluster,
    Redis,
    TlsRedis,
    WorkerProcess,
    logged,
    needs_redis,
)
from conftest import GIVE_UP_S, ServerProcess, allow, params_for, until
from PIL import Image

from cluster.carrier import PRESENCE, Carrier, CarrierUnavailable
from cluster.messages import PROTOCOL
from cluster.source import RemoteSource
from storage.data_dir import WORKER_INPUTS

pytestmark = needs_redis


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that does not draw, and one worker, for tests that leave both alive and idle."""
    with closing(Cluster(tmp_path_factory.mktemp("cluster"))) as cluster:
        cluster.worker("cellar")
        yield cluster


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Cluster]:
    """A head without a worker, of one test."""
    with closing(Cluster(tmp_path)) as cluster:
        yield cluster


def picture(color: str) -> str:
    """A PNG in base64."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# -- the whole path --------------------------------------------------------------------------------


def test_a_worker_draws_the_picture_that_the_head_would_draw(
    cluster: Cluster, server: ServerProcess
) -> None:
    fields = {"seed": 7, "steps": 3, "format": "PNG", "metadata": False}
    started = {**fields, "init_image": picture("teal"), "image_strength": 0.4}
    for body in (fields, started):
        remote = cluster.submit("a red house", **body)
        local = server.submit("a red house", **body)["task_id"]
        server.wait_until_ended(local)
        assert cluster.ended(remote)["status"] == "done"
        assert cluster.image(remote) == server.get("/image", task_id=local).content


def test_the_images_of_a_task_come_one_by_one(cluster: Cluster) -> None:
    task_id = cluster.submit(count=3, seed=1)
    assert cluster.ended(task_id)["images_done"] == 3
    images = {cluster.head.get("/image", task_id=task_id, index=n).content for n in range(3)}
    assert len(images) == 3


def test_a_machine_says_what_it_is_and_does(cluster: Cluster) -> None:
    cluster.ended(cluster.submit())
    machine = cluster.machines()["cellar"]
    assert machine["allowed_models"] == ["noise-flux1"]
    assert machine["loaded_models"] == ["noise-flux1"]
    assert machine["versions"]["celery"]
    assert machine["tasks_last_hour"] >= 1


def test_progress_and_previews_come_from_the_worker(cluster: Cluster) -> None:
    task_id = cluster.running()
    until(lambda: cluster.head.get("/preview", task_id=task_id).status_code == 200)
    preview = cluster.head.get("/preview", task_id=task_id)
    assert preview.headers["Content-Type"] == "image/jpeg"
    assert cluster.status(task_id)["phase"] == "denoising"
    cluster.delete(task_id)


def test_a_running_task_is_cancelled_and_the_worker_draws_the_next_one(cluster: Cluster) -> None:
    task_id = cluster.running()
    following = cluster.submit()
    cluster.delete(task_id)
    assert cluster.status(task_id)["status"] == "cancelled"
    assert cluster.ended(following)["status"] == "done"


def test_a_task_that_was_sent_ahead_is_taken_back_for_an_urgent_one(cluster: Cluster) -> None:
    running = cluster.running()
    normal = cluster.submit("normal")
    until(lambda: cluster.machines()["cellar"].get("next_task") == normal)
    urgent = cluster.submit("urgent", priority=True)
    until(lambda: cluster.machines()["cellar"].get("next_task") == urgent)
    cluster.delete(running)
    assert cluster.ended(urgent)["status"] == "done"
    assert cluster.ended(normal)["status"] == "done"
    started = [cluster.status(task_id)["started_at"] for task_id in (urgent, normal)]
    assert started == sorted(started)


def test_a_drained_machine_draws_nothing_until_it_is_resumed(cluster: Cluster) -> None:
    cluster.post("/machines/cellar/drain")
    task_id = cluster.submit()
    assert cluster.machines()["cellar"].get("next_task") is None
    assert cluster.status(task_id)["status"] == "waiting"
    cluster.post("/machines/cellar/resume")
    assert cluster.ended(task_id)["status"] == "done"


# -- who may work ----------------------------------------------------------------------------------


def test_a_worker_of_another_version_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with closing(Redis(tmp_path)) as broker:
        presence = {"protocol": PROTOCOL + 1, "session": "s", "lease_s": 20}
        client = redis.Redis("127.0.0.1", broker.port, password=PASSWORD)
        client.set(PRESENCE, json.dumps(presence))
        worker = WorkerProcess(tmp_path / "worker", broker.url, "old")
        assert worker.process.wait(GIVE_UP_S) == 1
        until(logged(worker, "install the same version of mflux-server on both"))
        client.close()


def test_a_head_refuses_a_worker_of_another_version(alone: Cluster) -> None:
    client = redis.Redis("127.0.0.1", alone.redis.port, password=PASSWORD)
    until(lambda: client.exists(PRESENCE))
    heartbeat = {"kind": "heartbeat", "protocol": 0, "worker": "f" * 32, "session": "s"}
    body = base64.b64encode(json.dumps(heartbeat).encode()).decode()
    properties = {"body_encoding": "base64", "delivery_tag": "1", "delivery_info": {}}
    message = {"body": body, "content-type": "application/json", "content-encoding": "utf-8"}
    client.lpush("mflux.head", json.dumps({**message, "properties": properties, "headers": {}}))
    found = client.brpop(["mflux.worker." + "f" * 32], timeout=GIVE_UP_S)
    client.close()
    assert found
    answer = json.loads(base64.b64decode(json.loads(found[1])["body"]))
    assert "install the same version" in str(answer)
    assert alone.machines() == {}


def test_two_machines_cannot_have_the_same_name(alone: Cluster) -> None:
    alone.worker("twin")
    other = WorkerProcess(alone.folder / "other", alone.redis.url, "twin")
    assert other.process.wait(GIVE_UP_S) == 1
    until(logged(other, "There is a machine 'twin' already: choose another --worker-name"))
    assert alone.ended(alone.submit())["status"] == "done"


def test_a_task_goes_only_to_a_machine_that_allows_its_model(tmp_path: Path) -> None:
    with closing(Cluster(tmp_path, "--models", "noise-flux1,noise-z-image")) as cluster:
        cluster.worker("small", "--model", "noise-flux1")
        task_id = cluster.submit(model="noise-z-image")
        assert cluster.ended(cluster.submit(model="noise-flux1"))["status"] == "done"
        assert cluster.status(task_id)["status"] == "waiting"
        cluster.worker("large", "--models", "noise-flux1,noise-z-image")
        assert cluster.ended(task_id)["status"] == "done"


# -- security --------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl here")
def test_head_and_worker_meet_over_tls_and_check_the_certificate(tmp_path: Path) -> None:
    broker = TlsRedis(tmp_path)
    with closing(Cluster(tmp_path, redis=broker)) as cluster:
        cluster.worker("cellar")
        task_id = cluster.submit(init_image=picture("teal"), image_strength=0.5)
        assert cluster.ended(task_id)["status"] == "done"
        with pytest.raises(CarrierUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            Carrier(broker.bare_url).presence()
        other_name = broker.url.replace("localhost", "127.0.0.1", 1)
        with pytest.raises(CarrierUnavailable, match=r"127\.0\.0\.1"):
            Carrier(other_name).presence()


def test_without_the_password_nothing_is_read_or_sent(alone: Cluster) -> None:
    for url in (
        f"redis://127.0.0.1:{alone.redis.port}",
        f"redis://:x@127.0.0.1:{alone.redis.port}",
    ):
        stranger = Carrier(url)
        with pytest.raises(CarrierUnavailable, match=r"(?i)auth|password"):
            stranger.presence()
        with pytest.raises(CarrierUnavailable, match=r"(?i)auth|password"):
            stranger.publish({"kind": "heartbeat"})


HARMFUL: tuple[dict[str, Any], ...] = (
    {"params": {"model": "../../etc/passwd"}},
    {"params": {"model": "https://example.org/weights"}},
    {"params": {"model": "schnell"}},
    {"params": {"init_image": ["../../../../etc/passwd", 64, 64]}},
    {"params": {"loras": [["/tmp/lora.safetensors", 1.0]]}},
    {"params": {"quantize": 4}},
    {"params": {"scheduler": "os.system"}},
    {"inputs": {"../../secret": "0" * 32}},
    {"task_id": "../../etc/passwd"},
    {"__reduce__": "os.system"},
)


@pytest.mark.parametrize("change", HARMFUL, ids=str)
def test_a_worker_draws_only_what_its_own_options_allow(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    params = params_for(model="noise-flux1").model_dump(mode="json")
    source = RemoteSource(
        "f" * 32,
        Carrier("redis://127.0.0.1:1"),
        allow("noise-flux1"),
        registration=lambda: pytest.fail("nothing is sent"),
        resident=tuple,
        folder=tmp_path / "inputs",
        refused=pytest.fail,
    )
    session = vars(source)["_session"]
    offer = {"kind": "offer", "session": session, "task_id": "0" * 16, "attempt": 1}
    offer |= {"images_done": 0, "inputs": {}, "params": params}
    source.handle({**offer, **change, "params": {**params, **change.get("params", {})}})
    assert source.claim(0.0) is None
    assert not (tmp_path / "inputs").exists()
    source.handle(offer)
    assert source.claim(0.0), "else it would have been claimed"


# -- faults ----------------------------------------------------------------------------------------


def test_the_task_of_a_killed_worker_is_drawn_by_another_one(alone: Cluster) -> None:
    first = alone.worker("first")
    task_id = alone.running()
    alone.worker("second")
    first.stop(signal.SIGKILL)
    alone.until_running("second", task_id)
    alone.delete(task_id)
    assert alone.ended(alone.submit())["status"] == "done"


def test_the_input_pictures_of_a_worker_end_with_it_or_at_its_next_start(alone: Cluster) -> None:
    folder = alone.folder / "artist" / WORKER_INPUTS
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        worker = alone.worker("artist")
        task_id = alone.running(init_image=picture("teal"))
        assert [path.parent.name for path in folder.glob("*/*.png")] == [task_id]
        worker.stop(number)
        assert folder.exists() is (number == signal.SIGKILL)
        alone.delete(task_id)


def test_a_worker_that_cannot_start_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "worker-id").mkdir()
    worker = WorkerProcess(tmp_path, "redis://127.0.0.1:1", "artist")
    assert worker.stop(0) == 1
    assert "worker-id" in worker.log[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "worker-id"]


def test_a_task_during_which_two_workers_died_is_failed(alone: Cluster) -> None:
    task_id = alone.submit(steps=100, width=512, height=512, count=10)
    for name in ("first", "second"):
        worker = alone.worker(name)
        alone.until_running(name, task_id)
        worker.stop(signal.SIGKILL)
    assert alone.ended(task_id)["error"]["code"] == "ended_too_often"


def test_a_worker_that_was_restarted_goes_on_at_once(alone: Cluster) -> None:
    worker = alone.worker("laptop")
    task_id = alone.running()
    worker.stop(signal.SIGKILL)
    alone.worker("laptop")
    again = alone.head.wait_for(task_id, lambda s: s.get("steps_done", 0) > 0)
    assert again["status"] == "running"
    alone.delete(task_id)


def test_a_worker_that_is_stopped_gives_its_task_back_without_blame(alone: Cluster) -> None:
    first = alone.worker("first")
    task_id = alone.running()
    assert first.stop(signal.SIGTERM) == 0
    until(lambda: alone.status(task_id)["status"] == "waiting")
    until(lambda: "first" not in alone.machines())
    for name in ("second", "third"):
        worker = alone.worker(name)
        alone.until_running(name, task_id)
        worker.stop(signal.SIGTERM)
    assert alone.status(task_id)["status"] == "waiting", "stopping is no failure of the task"


def test_a_frozen_worker_loses_its_task_and_is_refused_when_it_wakes(alone: Cluster) -> None:
    frozen = alone.worker("frozen")
    task_id = alone.running(count=4, seed=3, metadata=False)
    frozen.send(signal.SIGSTOP)
    until(lambda: alone.status(task_id)["status"] == "waiting")
    alone.worker("other")
    alone.until_running("other", task_id)
    frozen.send(signal.SIGCONT)
    until(lambda: alone.machines().get("frozen", {}).get("state") == "idle")
    assert alone.ended(task_id)["status"] == "done"
    again = alone.submit(steps=100, width=512, height=512, seed=3, metadata=False)
    alone.ended(again)
    assert alone.image(again) == alone.image(task_id), "the picture is whole, and the same"


def test_the_broker_restarts_empty_and_nothing_is_lost(alone: Cluster) -> None:
    alone.worker("worker")
    running = alone.running(count=1)
    waiting = [alone.submit() for _ in range(3)]
    alone.redis.kill()
    later = alone.submit("while the broker is away")
    alone.redis.start()
    for task_id in (running, *waiting, later):
        assert alone.ended(task_id)["status"] == "done"


def test_without_the_broker_the_head_answers_and_draws_itself(tmp_path: Path) -> None:
    with closing(Cluster(tmp_path, "--local-worker", "on")) as cluster:
        cluster.redis.kill()
        assert cluster.ended(cluster.submit())["status"] == "done"
        cluster.redis.start()
        cluster.worker("late")
        busy = [cluster.running(), cluster.running()]
        machines = cluster.machines()
        assert sorted(machines[name]["running"] for name in machines) == sorted([[b] for b in busy])
        for task_id in busy:
            cluster.delete(task_id)


def test_a_head_that_was_killed_finds_its_workers_again(alone: Cluster) -> None:
    alone.worker("worker")
    running, waiting = alone.running(), alone.submit()
    for _ in range(3):  # which is not the fault of the task
        alone.head.stop(signal.SIGKILL)
        alone.start_head()
        alone.until_running("worker", running)
    alone.delete(running)
    assert alone.status(running)["status"] == "cancelled"
    running = alone.submit()
    for task_id in (running, waiting):
        assert alone.ended(task_id)["status"] == "done"


def test_a_head_that_is_stopped_stops_what_its_workers_draw(alone: Cluster) -> None:
    alone.worker("worker")
    task_id = alone.running()
    assert alone.head.stop(signal.SIGINT) == 0
    alone.start_head()
    alone.head.wait_for(task_id, lambda s: s.get("steps_done", 0) > 0)
    alone.delete(task_id)
