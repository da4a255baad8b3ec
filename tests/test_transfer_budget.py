"""What bodies and answers may take in memory, and how slowly they may be sent."""

import json
import socket
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import live
import pytest
import requests
from conftest import GIVE_UP_S, until
from live import SteppedServer
from PIL import Image
from raw_http import abort, head, opened, parsed, post, read_all, running

from api import transfer_budget
from api.transfer_budget import TransferBudget

NOISE = Image.effect_noise((1500, 1500), 100).convert("RGB")


def opened_for_little(server: SteppedServer) -> socket.socket:
    """A connection that takes little that its program does not read."""
    connection = socket.socket()
    connection.settimeout(GIVE_UP_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.server.port))
    return connection


def budget_of(server: SteppedServer) -> TransferBudget:
    budget: TransferBudget = server.server._http._server.budget
    return budget


def test_bodies_that_many_clients_half_send_take_no_more_than_the_budget(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = budget_of(stepped)
    monkeypatch.setattr(budget, "limit_bytes", 4_000_000)
    started = post("/generate", b" " * 1_000_000)[:-10]
    clients = []
    for _ in range(10):
        clients.append(opened(stepped))
        clients[-1].sendall(started)
    until(lambda: budget.held_bytes > 2_000_000)
    with opened(stepped) as late:  # one of the connections above the limit
        late.sendall(post("/generate", b" " * 3_000_000))
        answer = read_all(late)
    status, result = parsed(answer)
    assert (status, result["error"]["code"]) == (503, "too_many_transfers")
    assert b"Retry-After: 5\r\n" in answer
    assert budget.held_bytes <= 3_000_000
    assert stepped.submit()  # a small body always passes
    for client in clients:
        client.close()
    until(lambda: budget.held_bytes == 0)


def test_a_body_gives_its_room_back_as_soon_as_it_is_read(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"prompt": "x", "width": 64, "height": 64, "steps": 2}).encode()
    with opened(stepped) as connection:
        connection.sendall(post("/sdapi/v1/txt2img", body + b" " * 500_000))
        until(lambda: running(stepped))
        assert budget_of(stepped).held_bytes == 0
        stepped.end()
        assert parsed_head(connection) == 200


def parsed_head(connection: socket.socket) -> int:
    return int(connection.recv(1 << 16).split()[1])


def test_answers_that_nobody_reads_hold_no_thread_and_no_more_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = SteppedServer(tmp_path, threads=34)
    monkeypatch.setattr(live, "PICTURE", NOISE)
    task_id = server.running(format="PNG")
    server.end()
    picture = server.get("/image", task_id=task_id, wait=60, delete="false").content
    assert len(picture) > 4_500_000
    budget = budget_of(server)
    monkeypatch.setattr(budget, "limit_bytes", 3 * len(picture))
    asked = head(f"GET /image?task_id={task_id}&delete=false&base64=true HTTP/1.1")
    stalled = []
    for _ in range(2):
        stalled.append(opened_for_little(server))
        stalled[-1].sendall(asked)
        assert parsed_head(stalled[-1]) == 200
    refused = server.get("/image", task_id=task_id, delete="false", base64="true")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert refused.json()["error"]["code"] == "too_many_transfers"
    assert budget.held_bytes <= budget.limit_bytes
    for _ in range(40):
        assert server.get("/status", task_id=task_id).status_code == 200
    for connection in stalled:
        abort(connection)
    until(lambda: budget.held_bytes == 0)
    again = server.get("/image", task_id=task_id, base64="true")
    assert b64decode(again.text) == picture
    server.close()


def test_a_client_that_reads_too_slowly_is_closed(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PICTURE", NOISE)
    task_id = stepped.running(format="PNG")
    stepped.end()
    stepped.get("/image", task_id=task_id, wait=60, delete="false")
    with opened_for_little(stepped) as connection:
        connection.sendall(head(f"GET /image?task_id={task_id}&delete=false&base64=true HTTP/1.1"))
        until(lambda: budget_of(stepped).held_bytes > 0)
        monkeypatch.setattr(transfer_budget, "GRACE_S", 0.0)
        for channel in list(stepped.server._http._server.active_channels.values()):
            channel._sending._since -= 1_000_000  # as if so much time had passed
        until(lambda: budget_of(stepped).held_bytes == 0)


def test_a_form_and_its_answer_need_no_temporary_folder(
    stepped: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    monkeypatch.setattr(live, "PICTURE", NOISE)
    picture = BytesIO()
    NOISE.resize((640, 640)).save(picture, "PNG")
    assert len(picture.getvalue()) > 600_000
    answer = requests.post(
        stepped.url + "/generate",
        data={"prompt": "x", "width": "64", "height": "64", "steps": "2", "format": "PNG"},
        files={"init_image": picture.getvalue()},
        timeout=GIVE_UP_S,
    )
    assert answer.status_code == 200, answer.text
    stepped.end()
    task_id = answer.json()["task_id"]
    bundle = stepped.get("/image", task_id=task_id, wait=60, all="true")
    assert (bundle.status_code, len(bundle.content) > 1_000_000) == (200, True)
