"""Random tasks that a test submits."""

from dataclasses import dataclass
from typing import Any

import pytest
from bench import BASE, MODELS, Bench
from hypothesis import strategies as st

from models.model_catalog import Model
from task import Task


@dataclass(frozen=True)
class Asked:
    """A task that a test submits."""

    priority: int
    model: Model
    side: int
    steps: int
    count: int
    upscale: float | None

    def task(self, bench: Bench, task_id: str) -> Task:
        guided: dict[str, Any] = {}
        if self.model is BASE and self.steps % 2:
            guided["guidance"] = 4.0  # runs each step twice: another law of time
        return bench.task(
            task_id,
            self.model,
            priority=self.priority,
            side=self.side,
            steps=self.steps,
            count=self.count,
            upscale=self.upscale,
            **guided,
        )


requests = st.lists(
    st.builds(
        Asked,
        priority=st.integers(-1, 1),
        model=st.sampled_from(MODELS),
        side=st.sampled_from([256, 512, 1024]),
        steps=st.integers(1, 20),
        count=st.integers(1, 4),
        upscale=st.sampled_from([None, None, 2.0]),
    ),
    min_size=1,
    max_size=25,
)

EXAMPLES = [40, pytest.param(100, marks=pytest.mark.slow)]
