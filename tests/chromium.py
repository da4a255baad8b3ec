"""The Chromium of the tests, of the screenshots (docs/make_images.py) and of the benchmarks."""

import shutil

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""The first one that is installed is used: that without windows needs the least processor time."""
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
