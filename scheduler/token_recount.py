"""Counts the tokens of waiting prompts once the tokenizer of their model is loaded."""

from models.model_catalog import LoadSpec
from scheduler.scheduler import Scheduler


def recount(scheduler: Scheduler, spec: LoadSpec) -> None:
    """Weights were loaded. If it is the first time, the prompts that wait for them were estimated
    by their characters: count them. Takes milliseconds for each long prompt, and no lock
    meanwhile."""
    estimates, schedule = scheduler.estimates, scheduler.schedule
    with scheduler.lock:
        if estimates.was_loaded(spec):
            return
        stages = [stage for task in schedule for stage in task.stages]
        prompts = {s.params.prompt for s in stages if s.load_spec.model.name == spec.model.name}
    counted = {prompt: estimates.prompt_tokens(prompt, spec.model) for prompt in prompts}
    if counted:
        with scheduler.lock:
            estimates.take_counts(spec.model, counted)
            schedule.rebuild()
            estimates.take_counts(spec.model, {})  # they are in the schedule now
