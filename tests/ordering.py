"""The files of tests that take longest start first."""

import pytest

LONGEST = """
    page_queue cluster built_in_model page_sending page_form paused_pictures page_access
    contract page client_command loading supervision switching webhooks upload_limits
    page_viewer page_operator page_dropped malformed page_tools compat_malformed
    start_and_stop page_mask client models proxies tiny_pipelines page_results page_gallery
    documentation many_images full_disk disk_faults stops submission compat_apps
    weights_cache inpainting_server failing_pictures memory_guard fair_share schedule
    painter build_options mcp http_server events model_servers generator uploads api
    refusals compat_openai keeping webhook_receivers compat_edges forecast_reasons
    client_retries data_dir_faults compat_a1111_upscaling downloads ownership keys pipelines
    compat_openai_edits tiny_models timing_model crashes page_languages fuzz hostile_files
    transparency
"""
"""Files that take longest: they start first, so that all processes end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: ranks.get(item.path.stem.removeprefix("test_"), len(ranks)))
