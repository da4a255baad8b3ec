"""Stores without a data dir: each is closed, with its folder, after the tests of its module."""

from collections.abc import Iterator

import pytest

from storage.task_store import TaskStore

_opened: list[TaskStore] = []


def memory_store() -> TaskStore:
    _opened.append(TaskStore(None))
    return _opened[-1]


@pytest.fixture(scope="module", autouse=True)
def _close_memory_stores() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()
