"""Model families: configs, parameter tables, presets. NumPy and the standard library only."""

from olmozoo.families import olmo, olmo2, olmo3, opt  # noqa: F401  (registers the families)
