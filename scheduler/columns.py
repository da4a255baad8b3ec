"""A table of numbers that changes in place."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from timing.corrections import Floats

ROOM = 16
"""Rows for which there is room at least."""


class Columns:
    """Numbers beside a list: one row for each of its items.

    Changes in place: removing the first row and appending one cost nothing, others move the rows
    behind them. Not thread-safe."""

    def __init__(self, names: Sequence[str]) -> None:
        self._index = {name: number for number, name in enumerate(names)}
        self._data: Floats = np.zeros((len(names), ROOM))
        self._begin = self._end = 0

    def __len__(self) -> int:
        return self._end - self._begin

    def __getitem__(self, name: str) -> Floats:
        """A column. It is valid, and may be written to, until the next change."""
        return self._data[self._index[name], self._begin : self._end]

    def values(self, names: slice, position: int) -> list[float]:
        """Of a row, the values of these columns, by their numbers."""
        values: list[float] = self._data[names, self._begin + position].tolist()
        return values

    def update(self, names: slice, position: int, values: Sequence[float]) -> None:
        """Give a row other values in these columns."""
        self._data[names, self._begin + position] = values

    def insert(self, position: int, values: Sequence[float]) -> None:
        """A row of values for all columns comes before this one."""
        if self._end == self._data.shape[1]:
            self._make_room()
        at = self._begin + position
        self._data[:, at + 1 : self._end + 1] = self._data[:, at : self._end]
        self._data[:, at] = values
        self._end += 1

    def delete(self, position: int) -> None:
        if position == 0:
            self._begin += 1
            return
        at = self._begin + position
        self._data[:, at : self._end - 1] = self._data[:, at + 1 : self._end]
        self._end -= 1

    def take(self, order: Any) -> None:
        """Order the rows: each index is that of the row which comes there."""
        self._data[:, self._begin : self._end] = self._data[:, self._begin : self._end][:, order]

    def _make_room(self) -> None:
        data = np.zeros((len(self._data), max(2 * len(self), ROOM)))
        data[:, : len(self)] = self._data[:, self._begin : self._end]
        self._begin, self._end, self._data = 0, len(self), data
