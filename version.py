"""The version of the server and of the package that pyproject.toml describes."""

VERSION = "2.0.0.dev0"
