"""Verbs of `python -m compiler`: one file each with `arguments(parser)` and `run(options) -> exit code`."""
