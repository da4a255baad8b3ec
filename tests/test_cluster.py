"""Workers on other machines: a real Redis, real Celery workers in processes, real mflux."""

from collections.abc import Iterator

import pytest
from cluster_bench import Cluster, needs_redis
from conftest import ServerProcess

pytestmark = needs_redis


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that does not draw, and one worker."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.worker("cellar")
    yield cluster
    cluster.close()


def test_a_worker_draws_the_picture_that_the_head_would_draw(
    cluster: Cluster, server: ServerProcess
) -> None:
    fields = {"seed": 7, "steps": 3, "format": "PNG", "metadata": False}
    remote = cluster.submit("a red house", **fields)
    local = server.submit("a red house", **fields)["task_id"]
    status = cluster.ended(remote)
    server.wait_until_ended(local)
    assert status["status"] == "done"
    assert cluster.image(remote) == server.get("/image", task_id=local).content
