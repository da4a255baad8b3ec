"""The command line: python3 -m client "a lighthouse" -o out.png

On stdout: the names of the files that were written, or what was asked for (--json, --queue, ...,
the bytes with -o -). All else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import Any

from .mflux_client import Client, MfluxError, Status, Task, Unreachable
from .options import FIELDS, FIRST_PATIENCE_S, PATIENCE_S, parser
from .terminal import Waiting, duration, in_words, picture_escape, picture_protocol

OK, FAILED, BAD_USAGE, UNREACHABLE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 130
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".zip": None}
TICK_S = 0.2


class BadUsage(Exception):
    pass


class Left(Exception):
    """The user stops waiting. The message says what happens to the task."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code.

    Raises:
        SystemExit: as argparse does: 0 for --help, 2 for a bad option.
    """
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except BadUsage as error:
        return _complain(str(error), BAD_USAGE)
    except Left as left:
        return _complain(str(left), INTERRUPTED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except Unreachable as error:
        hint = "Is the server running? --url or MFLUX_SERVER_URL says where it is."
        return _complain(f"{error} {hint}", UNREACHABLE)
    except MfluxError as error:
        if error.code == "cannot_ask":
            return _complain(str(error), BAD_USAGE)
        after = error.retry_after_s
        again = f" Try again in {duration(after)}." if after else ""
        return _complain(f"{error}{again}", UNREACHABLE if error.code == "not_mflux" else REFUSED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _complain(f"cannot write: {error}", FAILED)


def _complain(message: str, exit_code: int) -> int:
    line_before = "\n" if exit_code == INTERRUPTED and sys.stderr.isatty() else ""  # ends at ^C
    print(f"{line_before}mflux: {message}", file=sys.stderr)
    return exit_code


def _run(options: argparse.Namespace) -> int:
    patience_s = FIRST_PATIENCE_S if options.retry_s is None else options.retry_s
    with Client(options.url, key=options.key, retry_s=patience_s) as client:
        if options.queue:
            return _list_queue(client, options.json)
        if options.models:
            return _list_models(client, options.json)
        if options.status:
            status = client.status(options.status)
            print(_as_json(status.raw) if options.json else in_words(status))
            return OK
        if options.cancel:
            was = client.cancel(options.cancel, after_current=options.after_current)
            print(f"{options.cancel} was {was}")
            return OK
        _check_output(options)
        if options.task:
            return _wait_and_fetch(options, client, options.task)
        try:
            task = _submit(options, client)
        except KeyboardInterrupt:
            raise Left("interrupted while submitting; --queue shows what was accepted") from None
        return _wait_and_fetch(options, client, task.task_id)


def _check_output(options: argparse.Namespace) -> None:
    """Checks the output file before a task is submitted."""
    if options.output is None:
        return
    if options.output == "-":
        if options.json:
            raise BadUsage("-o - and --json both want stdout")
        if sys.stdout.isatty():
            raise BadUsage("stdout is a terminal: -o - is for pipes")
        if (options.count or 1) > 1:
            raise BadUsage("several images do not fit into -o -: name a file")
        return
    path = Path(options.output)
    if not options.task and path.suffix.lower() not in FORMATS:
        raise BadUsage(f"{path}: the ending must be one of {', '.join(FORMATS)}")
    try:
        if not path.absolute().parent.is_dir():
            raise BadUsage(f"{path}: there is no such folder")
        if path.is_dir():
            raise BadUsage(f"{path} is a folder: name a file")
    except OSError as error:  # too long, not ours to look at
        raise BadUsage(f"{path}: {error.strerror}") from error


def _submit(options: argparse.Namespace, client: Client) -> Task:
    fields = {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    if options.output and (kind := FORMATS.get(Path(options.output).suffix.lower())):
        fields["format"] = kind
    try:
        task = client.submit(options.prompt, **fields)
    except OSError as error:  # of a picture's file
        raise BadUsage(f"cannot read {error.filename}: {error.strerror}") from error
    for name in task.ignored_fields:
        print(f"mflux: {task.params.get('model')} has no use for {name}", file=sys.stderr)
    for warning in task.raw.get("warnings", ()):
        print(f"mflux: {warning}", file=sys.stderr)
    return task


def _wait_and_fetch(options: argparse.Namespace, client: Client, task_id: str) -> int:
    later = f"Fetch its picture: {_later(options, task_id)}"
    try:
        status = _watch(options, task_id)
        if status.status == "done":
            _fetch(options, client, status)
    except KeyboardInterrupt:
        raise Left(f"task {task_id} goes on. {later}") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        return _complain(f"cannot write: {error}. It stays on the server. {later}", FAILED)
    if options.json:
        print(_as_json(status.raw))
    if status.status == "done":
        return OK
    why = (status.error or {}).get("message", "")
    return _complain(f"task {task_id} {_ending(status)}. {why}".rstrip(), FAILED)


def _ending(status: Status) -> str:
    return "was cancelled" if status.status == "cancelled" else status.status


def _watch(options: argparse.Namespace, task_id: str) -> Status:
    """Wait for the end in a thread of its own, so that the bar moves and Ctrl-C is heard."""
    shown = Waiting(sys.stderr)
    ended: Future[Status] = Future()
    patience_s = PATIENCE_S if options.retry_s is None else options.retry_s

    def listen() -> None:
        try:
            with Client(
                options.url, key=options.key, retry_s=patience_s, on_retry=shown.trouble
            ) as client:
                ended.set_result(client.wait(task_id, on_status=shown.update))
        except BaseException as error:
            ended.set_exception(error)

    Thread(target=listen, name="waits", daemon=True).start()
    try:
        while not _has_ended(ended, shown.tick):
            shown.clear()
            _ask_whether_to_cancel(options, task_id, ended)
        return ended.result()
    finally:
        shown.close()


def _has_ended(ended: Future[Status], tick: Callable[[], None]) -> bool:
    """Wait for the end; False: Ctrl-C came before. It is noted, not raised: an exception in the
    middle of what holds a lock would break that."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        while not pressed and not wait([ended], TICK_S).done:
            tick()
        return ended.done()
    finally:
        signal.signal(signal.SIGINT, before)


def _ask_whether_to_cancel(
    options: argparse.Namespace, task_id: str, ended: Future[Status]
) -> None:
    """Returns if the user wants to continue waiting.

    Raises:
        Left: the task was cancelled.
        KeyboardInterrupt: it is left to the server.
    """
    if not sys.stdin.isatty():
        raise KeyboardInterrupt
    question = f"\nCancel task {task_id}? y: cancel it; n: wait on; Ctrl-C: leave it running [n] "
    print(question, end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:
        raise KeyboardInterrupt
    if answer.strip().lower() in ("y", "yes") and not ended.done():
        with Client(options.url, key=options.key, retry_s=FIRST_PATIENCE_S) as client:
            client.cancel(task_id)
        raise Left(f"task {task_id} is cancelled")


def _later(options: argparse.Namespace, task_id: str) -> str:
    where = f" --url {options.url}" if options.url else ""
    return f"python3 -m client{where} --task {task_id}"


def _fetch(options: argparse.Namespace, client: Client, status: Status) -> None:
    task_id, output = status.task_id, options.output
    count = status.params.get("count", 1)
    if output == "-" and count == 1:
        sys.stdout.buffer.write(client.image(task_id).data)
        sys.stdout.buffer.flush()
    elif output == "-" or Path(output or "").suffix.lower() == ".zip":
        data = client.archive(task_id)
        if output == "-":
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            _tell(options, _write(Path(output), data))
    else:
        for index in range(count):
            image = client.image(task_id, index)
            path = Path(output or f"{task_id}.{image.extension}")
            if count > 1:
                path = path.with_name(f"{path.stem}-{index}{path.suffix}")
            _tell(options, _write(path, image.data))
            _show(options, image.data)
    if options.remove:
        client.cancel(task_id)


def _write(path: Path, data: bytes) -> Path:
    """Writes a complete file or none."""
    part = path.with_name(f".mflux-{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return path


def _tell(options: argparse.Namespace, path: Path) -> None:
    print(path, file=sys.stderr if options.json else sys.stdout, flush=True)


def _show(options: argparse.Namespace, data: bytes) -> None:
    if options.no_show or options.json or not sys.stdout.isatty():
        return
    if protocol := picture_protocol(os.environ):
        sys.stdout.write(picture_escape(data, protocol, shutil.get_terminal_size().columns))
        sys.stdout.flush()


def _list_queue(client: Client, as_json: bool) -> int:
    queue = client.queue()
    if as_json:
        print(_as_json(queue.raw))
        return OK
    for task in queue.tasks:
        prompt = " ".join(str(task.params.get("prompt", "")).split())
        print(f"{task.task_id}  {task.status:7}  about {duration(task.wait_remaining):7}  {prompt}")
    if queue.length > len(queue.tasks):
        print(f"and {queue.length - len(queue.tasks)} more")
    if not queue.tasks:
        print("Nothing waits.", file=sys.stderr)
    return OK


def _list_models(client: Client, as_json: bool) -> int:
    models = client.models()
    if as_json:
        print(_as_json(models.raw))
        return OK
    for model in models.models:
        if model.allowed:
            default = "*" if model.name == models.default else " "
            print(f"{default} {model.name:24} {model.title}")
    for name in models.loras:
        print(f"  lora {name}")
    return OK


def _as_json(raw: dict[str, Any]) -> str:
    return json.dumps(raw, indent=2, ensure_ascii=False)
