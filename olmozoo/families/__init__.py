"""Model families: configs, parameter tables, presets. NumPy and the standard library only."""

from olmozoo.families import flexolmo, olmo, olmo2, olmo3, olmoe, opt  # noqa: F401  (registers the families)
