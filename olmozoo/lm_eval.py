"""`olmozoo.evaluation.lm_eval` under its short path."""

from olmozoo.evaluation.lm_eval import OlmozooLM as OlmozooLM
