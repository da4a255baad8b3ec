"""The command line: python3 -m client "a lighthouse" -o out.png

On stdout: the names of the files that were written, or what was asked for (--json, --queue, ...,
the bytes with -o -). All else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .mflux_client import CONTROLS, Client, MfluxError, Status, Task, Unreachable, say
from .options import FIELDS, FIRST_PATIENCE_S, parser
from .output import FORMATS, BadUsage, Output, check_output
from .terminal import duration, in_words
from .watching import Watched

OK, FAILED, BAD_USAGE, UNREACHABLE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 130


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
    say(f"{line_before}mflux: {message}", sys.stderr)
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
            say(_as_json(status.raw) if options.json else in_words(status))
            return OK
        if options.cancel:
            was = client.cancel(options.cancel, after_current=options.after_current)
            say(f"{options.cancel} was {was}")
            return OK
        check_output(options)
        if options.task:
            return _wait_and_save(options, client, options.task)
        return _estimate(options, client) if options.estimate else _draw(options, client)


def _draw(options: argparse.Namespace, client: Client) -> int:
    """Submit the task, or one for each of --seeds, then wait for one after the other."""
    try:
        seeds = options.seeds or [options.seed]
        tasks = [_submit(_with_seed(options, seed), client) for seed in seeds]
    except KeyboardInterrupt:
        raise Left("interrupted while submitting; --queue shows what was accepted") from None
    code = OK
    for number, task in enumerate(tasks):
        ended = _wait_and_save(_with_seed(options, seeds[number]), client, task.task_id)
        code = code or ended
        if ended == INTERRUPTED:
            for later in tasks[number + 1 :]:
                client.cancel(later.task_id)
            break
    return code


def _with_seed(options: argparse.Namespace, seed: int | None) -> argparse.Namespace:
    """The options of one of several tasks: its seed is a part of the name of its file."""
    changed = argparse.Namespace(**{**vars(options), "seed": seed})
    if len(options.seeds or ()) > 1 and options.output:
        path = Path(options.output)
        changed.output = str(path.with_name(f"{path.stem}-{seed}{path.suffix}"))
    return changed


def _estimate(options: argparse.Namespace, client: Client) -> int:
    estimate = client.estimate(options.prompt, **_fields(options))
    if options.json:
        say(_as_json(estimate.raw))
    else:
        likely, safe = duration(estimate.expected_time_seconds), duration(estimate.wait_p90_s)
        say(f"about {likely}, in 9 of 10 cases at most {safe}")
    return OK


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the request."""
    fields = {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    if options.output and (kind := FORMATS.get(Path(options.output).suffix.lower())):
        fields["format"] = kind
    return fields | dict(options.field or ())


def _submit(options: argparse.Namespace, client: Client) -> Task:
    try:
        task = client.submit(options.prompt, **_fields(options))
    except OSError as error:  # of a picture's file
        raise BadUsage(f"cannot read {error.filename}: {error.strerror}") from error
    for name in task.ignored_fields:
        say(f"mflux: {task.params.get('model')} has no use for {name}", sys.stderr)
    for warning in task.raw.get("warnings", ()):
        say(f"mflux: {warning}", sys.stderr)
    return task


def _wait_and_save(options: argparse.Namespace, client: Client, task_id: str) -> int:
    later = f"Fetch its picture: {_later(options, task_id)}"
    output = Output(options, task_id)
    watched = Watched(options, client, task_id, output)
    try:
        status = watched.until_ended()
        if options.remove and output.has_all(status):
            client.cancel(task_id)
    except KeyboardInterrupt:
        raise Left(f"task {task_id} goes on. {later}") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        return _complain(f"cannot write: {error}. It stays on the server. {later}", FAILED)
    if options.json:
        say(_as_json(status.raw))
    if status.status == "done":
        if not options.json:
            say(f"mflux: {_summary(status)}", sys.stderr)
        return OK
    why = (status.error or {}).get("message", "")
    interrupted = status.status == "cancelled" and watched.interrupted
    ending = "was cancelled" if status.status == "cancelled" else status.status
    code = INTERRUPTED if interrupted else FAILED
    return _complain(f"task {task_id} {ending}. {why}".rstrip(), code)


def _summary(status: Status) -> str:
    """How to draw it again, and how long it took: "seed 42, 12.5 s"."""
    seed, images = int(status.params.get("seed", 0)), status.params.get("count", 1)
    seeds = f"seed {seed}" if images == 1 else f"seeds {seed} to {seed + images - 1}"
    if status.started_at is None or status.ended_at is None:
        return seeds
    return f"{seeds}, {status.ended_at - status.started_at:.1f} s"


def _later(options: argparse.Namespace, task_id: str) -> str:
    where = f" --url {options.url}" if options.url else ""
    return f"python3 -m client{where} --task {task_id}"


def _list_queue(client: Client, as_json: bool) -> int:
    queue = client.queue()
    if as_json:
        say(_as_json(queue.raw))
        return OK
    for task in queue.tasks:
        prompt = " ".join(str(task.params.get("prompt", "")).split())
        task_id = task.task_id or "another client's"
        line = f"{task_id:16}  {task.status:7}  about {duration(task.wait_remaining):7}  {prompt}"
        say(line)
    if queue.length > len(queue.tasks):
        say(f"and {queue.length - len(queue.tasks)} more")
    if not queue.tasks:
        say("Nothing waits.", sys.stderr)
    return OK


def _list_models(client: Client, as_json: bool) -> int:
    models = client.models()
    if as_json:
        say(_as_json(models.raw))
        return OK
    for model in models.models:
        if model.allowed:
            default = "*" if model.name == models.default else " "
            say(f"{default} {model.name:24} {model.title}")
    for name in models.loras:
        say(f"  lora {name}")
    return OK


def _as_json(raw: dict[str, Any]) -> str:
    """What changes a terminal is escaped, so that the values stay the same."""
    text = json.dumps(raw, indent=2, ensure_ascii=False)
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
