"""A folder of weights in any format, with no framework.

Modules of olmozoo import from the modules in here: `convert` is on top of all of them, the wings included.
"""

from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.matching import initial_weights, load_weights
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.writer import save_checkpoint

__all__ = ["Checkpoint", "convert_checkpoint", "initial_weights", "load_weights", "save_checkpoint"]
