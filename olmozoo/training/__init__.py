"""Training from one config in any wing: `TrainConfig`, `train`."""

from olmozoo.training.config import TrainConfig, load_config
from olmozoo.training.loop import train

__all__ = ["TrainConfig", "load_config", "train"]
