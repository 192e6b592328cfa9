"""Programs that convert foreign checkpoints: `python -m conversion.olmo_core SRC DST`."""
