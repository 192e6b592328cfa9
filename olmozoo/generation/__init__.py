"""Settings and rules of text generation, in no framework."""

from olmozoo.generation.config import GenerationConfig

__all__ = ["GenerationConfig"]
