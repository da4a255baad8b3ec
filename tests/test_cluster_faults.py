"""Faults of a cluster one by one: a GPU that hangs, large pictures, a full broker, wrong clocks,
connections of which one end has gone. Real processes over a real Redis, whose generator paints."""

import base64
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import forking
import pytest
import redis
from cluster_bench import PASSWORD, Cluster, logged, needs_redis
from conftest import until
from PIL import Image
from sleeping import Sleeping, signature_of

sys.path.insert(0, str(Path(__file__).parent / "chaos"))

from far_network import Proxy

from cluster.remote_machine import DEAF

pytestmark = [
    pytest.mark.slow,
    needs_redis,
    pytest.mark.skipif(not forking.CAN_FORK, reason="processes are changed as they are forked"),
]
PIXELS_16M = 4096


@dataclass(frozen=True)
class Painting:
    """What a process does before its main(): its generator paints noise from then on, or the size
    of what it was given.

    Args:
        hangs: file during whose presence a picture hangs at its first step, without a report.
        stall_s: seconds without progress that a head accepts; 0: as usual.
    """

    hangs: Path | None = None
    stall_s: float = 0.0

    def hold_pictures(self) -> None:
        from cluster import stalls
        from generator import MfluxGenerator
        from task import Drawn, Phase, Report, Stage

        if self.stall_s:
            stalls.LEAST_S, stalls.STALL_FACTOR = self.stall_s, 0.0
        hangs, pause = self.hangs, Event()

        def drawn(self_: MfluxGenerator, stage: Stage, inputs: Path, report: Report) -> Drawn:
            size = stage.params.width, stage.params.height
            report(Phase.DENOISING, 1, stage.params.steps)
            while hangs and hangs.exists():
                pause.wait(0.05)
            given = [Image.open(inputs / f"{one.file}.png") for one in stage.params.inputs]
            if given:
                size = sum(one.width for one in given), max(one.height for one in given)
            report(Phase.DENOISING, 2, stage.params.steps)
            return Drawn(Image.frombytes("RGB", size, os.urandom(3 * size[0] * size[1])))

        MfluxGenerator.generate = drawn  # type: ignore[method-assign, assignment]


class Deafness(Painting):
    """From the second offer on, a worker reads no message of its first connection."""

    def hold_pictures(self) -> None:
        super().hold_pictures()
        from cluster import source
        from cluster.carrier import Carrier

        source.DEAF_S = 3.0
        source_handle, connected_again, offers = source.RemoteSource.handle, Event(), []
        reconnect = Carrier.reconnect

        def handle(self_: source.RemoteSource, content: dict[str, object]) -> None:
            offers.append(content.get("kind") == "offer")
            if sum(offers) < 2 or connected_again.is_set():
                source_handle(self_, content)

        def reconnects(self_: Carrier) -> None:
            connected_again.set()
            reconnect(self_)

        source.RemoteSource.handle = handle  # type: ignore[method-assign, assignment]
        Carrier.reconnect = reconnects  # type: ignore[method-assign, assignment]


@dataclass(frozen=True)
class Absence(Painting):
    """A worker handles the offer of a task "the broker leaves" until a file is there."""

    left: Path = Path()

    def hold_pictures(self) -> None:
        super().hold_pictures()
        from cluster import source

        source_handle, pause = source.RemoteSource.handle, Event()

        def handle(self_: source.RemoteSource, content: dict[str, Any]) -> None:
            source_handle(self_, content)
            if content.get("params", {}).get("prompt") == "the broker leaves":
                while not self.left.exists():
                    pause.wait(0.01)

        source.RemoteSource.handle = handle  # type: ignore[method-assign, assignment]


def client(cluster: Cluster) -> redis.Redis:
    return redis.Redis("127.0.0.1", cluster.redis.port, password=PASSWORD)


def pictures_in(broker: redis.Redis) -> list[bytes]:
    found: list[bytes] = broker.keys("mflux.blob.*")  # type: ignore[assignment]
    return found


def noise(side: int) -> str:
    """A PNG in base64."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def painting(tmp_path: Path) -> Iterator[Cluster]:
    """A head that does not draw, with a worker that paints."""
    with closing(
        Cluster(tmp_path, "--models", "noise-flux1,noise-flux2", "--max-pixels", "17000000")
    ) as c:
        c.worker("cellar", "--models", "noise-flux1,noise-flux2", hold=Painting())
        yield c


def test_a_gpu_that_hangs_loses_its_task_and_draws_again_when_it_goes_on(tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    hangs.touch()
    with closing(Cluster(tmp_path, hold=Painting(stall_s=3.0))) as cluster:
        cluster.worker("hung", hold=Painting(hangs))
        task_id = cluster.submit()
        cluster.until_running("hung", task_id)
        until(lambda: "no progress" in cluster.machines()["hung"].get("last_error", ""))
        assert cluster.status(task_id)["status"] == "waiting"
        cluster.worker("other", hold=Painting())
        assert cluster.ended(task_id)["status"] == "done"
        image = cluster.image(task_id)
        cluster.post("/machines/other/drain")
        hangs.unlink()
        assert cluster.ended(cluster.submit())["status"] == "done", "it draws again"
        assert cluster.image(task_id) == image, "its late picture is refused"


def test_sixteen_megapixels_and_ten_inputs_pass_the_broker(painting: Cluster) -> None:
    large = painting.submit(width=PIXELS_16M, height=PIXELS_16M, format="PNG")
    assert painting.ended(large)["status"] == "done"
    image = painting.image(large)
    assert len(image) > 40_000_000
    assert Image.open(io.BytesIO(image)).size == (PIXELS_16M, PIXELS_16M)
    many = painting.submit(
        model="noise-flux2", images=[noise(128) for _ in range(10)], format="PNG"
    )
    assert painting.ended(many)["status"] == "done"
    assert Image.open(io.BytesIO(painting.image(many))).size == (1280, 128)
    with closing(client(painting)) as broker:
        until(lambda: not pictures_in(broker))


def test_a_broker_that_is_full_is_waited_for(painting: Cluster) -> None:
    """noeviction: it refuses whatever needs memory, and goes on when there is room."""
    with closing(client(painting)) as broker:
        used = int(broker.info("memory")["used_memory"])
        broker.config_set("maxmemory", used + 1_000_000)
        task_id = painting.submit(width=1024, height=1024, format="PNG")
        until(lambda: broker.info("stats")["total_error_replies"] > 0)
        assert painting.status(task_id)["status"] in ("waiting", "running")
        broker.config_set("maxmemory", 1_000)
        later = painting.submit("while nothing passes")
        until(lambda: "broker_away_since" in painting.head.get("/health").json())
        broker.config_set("maxmemory", 0)
        for one in (task_id, later):
            assert painting.ended(one)["status"] == "done"
    assert "broker_away_since" not in painting.head.get("/health").json()


@pytest.mark.parametrize("head_is_wrong", [True, False])
def test_a_clock_that_is_an_hour_wrong_does_no_harm(tmp_path: Path, head_is_wrong: bool) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    wrong, right = Sleeping(0.01, clock=clock), Sleeping(0.01)
    with closing(Cluster(tmp_path, hold=wrong if head_is_wrong else right)) as cluster:
        cluster.worker("cellar", hold=right if head_is_wrong else wrong)
        for seconds in ("3600", "-3600", "0"):
            task_id = cluster.submit(prompt=seconds, format="PNG", metadata=False)
            clock.write_text(seconds)
            after = cluster.submit(prompt=f"after {seconds}", format="PNG", metadata=False)
            for one in (task_id, after):
                assert cluster.ended(one)["status"] == "done"
            picture = Image.open(io.BytesIO(cluster.image(after)))
            assert signature_of(picture)["prompt"] == f"after {seconds}"
        assert list(cluster.machines()) == ["cellar"], "it was never lost"


def test_a_worker_whose_connections_have_lost_their_other_end_comes_back(tmp_path: Path) -> None:
    with closing(Cluster(tmp_path)) as cluster, closing(Proxy(cluster.redis.port, 1)) as proxy:
        url = cluster.redis.url.replace(str(cluster.redis.port), str(proxy.port))
        cluster.worker("far", url=url, hold=Sleeping(0.5))
        task_id = cluster.submit(steps=100)
        cluster.until_running("far", task_id)
        proxy.forget()
        until(lambda: cluster.status(task_id)["status"] == "waiting")
        cluster.worker("near", hold=Sleeping(0.01))
        assert cluster.ended(task_id)["status"] == "done"
        cluster.post("/machines/near/drain")
        proxy.heal()
        assert cluster.ended(cluster.submit())["status"] == "done"


def test_a_worker_that_slept_for_many_leases_gives_up_what_others_have_drawn(
    tmp_path: Path,
) -> None:
    with closing(Cluster(tmp_path)) as cluster:
        frozen = cluster.worker("frozen", hold=Sleeping(0.5))
        task_id = cluster.submit(steps=100, format="PNG", metadata=False)
        cluster.until_running("frozen", task_id)
        frozen.send(signal.SIGSTOP)
        cluster.worker("other", hold=Sleeping(0.01))
        assert cluster.ended(task_id)["status"] == "done"
        image = cluster.image(task_id)
        frozen.send(signal.SIGCONT)
        until(lambda: cluster.machines().get("frozen", {}).get("state") == "idle")
        assert cluster.image(task_id) == image


def test_a_worker_that_nothing_reaches_says_so_and_connects_again(tmp_path: Path) -> None:
    """Its messages go to a queue that nobody reads any more, as after some faults of a broker."""
    with closing(Cluster(tmp_path)) as cluster:
        cluster.worker("cellar", hold=Deafness())
        assert cluster.ended(cluster.submit())["status"] == "done"
        cluster.submit("deaf from now on")
        until(lambda: cluster.machines()["cellar"].get("last_error") == DEAF)
        assert cluster.ended(cluster.submit("heard"))["status"] == "done"


def test_a_worker_that_cannot_acknowledge_a_message_is_not_deaf_afterwards(tmp_path: Path) -> None:
    """Celery counts such a message as one that it still works on."""
    left = tmp_path / "left"
    with closing(Cluster(tmp_path)) as cluster:
        worker = cluster.worker("cellar", hold=Absence(left=left))
        assert cluster.ended(cluster.submit("the broker leaves"))["status"] == "done"
        cluster.redis.kill()
        left.touch()
        until(logged(worker, "Couldn't ack"))
        cluster.redis.start()
        assert cluster.ended(cluster.submit("afterwards"))["status"] == "done"
        assert not logged(worker, "nothing of the head has come")()
