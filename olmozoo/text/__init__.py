"""Text to token ids and back, chats, streaming and the text-generation pipeline."""

from olmozoo.text.streaming import TextIteratorStreamer, TextStreamer
from olmozoo.text.tokenizer import Tokenizer

__all__ = ["TextIteratorStreamer", "TextStreamer", "Tokenizer"]
