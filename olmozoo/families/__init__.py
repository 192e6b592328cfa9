"""Model families: configs, parameter tables, presets. NumPy and the standard library only."""

from olmozoo.families import olmo2  # noqa: F401  (registers the family)
