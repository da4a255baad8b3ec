"""The queue follows its rules through random histories."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from queue_rules import QueueRules


@pytest.mark.slow
def test_the_queue_follows_its_rules_through_any_history() -> None:
    run_state_machine_as_test(
        QueueRules,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
