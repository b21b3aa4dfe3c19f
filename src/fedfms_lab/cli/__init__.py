"""The laboratory's commands. `fedfms` finds them by the entry points in pyproject.toml."""

PANEL = "Data sets and studies"  # of `fedfms --help`
