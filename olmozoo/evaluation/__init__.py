"""Perplexity and multiple choice on any backend, and the adapter for the lm-eval harness."""

from olmozoo.evaluation.scoring import MultipleChoice, Perplexity, Question, evaluate

__all__ = ["MultipleChoice", "Perplexity", "Question", "evaluate"]
