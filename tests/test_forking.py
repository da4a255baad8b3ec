"""The process from which tests fork their servers, and servers whose pictures are held."""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import forking
import pytest
from conftest import StartServer
from holding import Hold
from played_app import PlayedApp

from api.api_docs import answer_schemas
from api.web_page import read_files


def count_computed(folder: Path, answer: Connection) -> None:
    PlayedApp(folder)
    answer.send([answer_schemas.cache_info().misses, read_files.cache_info().misses])


@pytest.mark.skipif(not forking.CAN_FORK, reason="servers are not forked here")
def test_the_process_for_forking_has_computed_what_every_server_needs(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    forking._start_forking()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=count_computed, args=(tmp_path, writer))
    process.start()
    writer.close()
    assert reader.recv() == [1, 1], "computed once, before the fork"
    process.join()


def test_a_held_picture_waits_at_its_step_can_be_cancelled_and_goes_on(
    start_server: StartServer, hold: Hold
) -> None:
    hold.close(after=1, step=2)
    server = start_server("--model", "noise-flux1", hold=hold)
    first, second, third = (server.submit(steps=4)["task_id"] for _ in range(3))
    assert server.wait_until_ended(first)["status"] == "done"
    held = server.wait_for(second, lambda status: status["steps_done"] >= 2)
    assert (held["status"], held["steps_done"]) == ("running", 2)
    server.delete(second)
    assert server.wait_for(third, lambda status: status["steps_done"] >= 2)["steps_done"] == 2
    assert server.get("/status", task_id=second).json()["status"] == "cancelled"
    hold.open()
    assert server.wait_until_ended(third)["status"] == "done"
