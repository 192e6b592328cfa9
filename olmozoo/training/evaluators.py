"""What is measured during a run: losses on files of tokens, perplexity of texts, accuracy on questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from olmozoo.backends import Backend
from olmozoo.errors import InputError
from olmozoo.evaluation import scoring
from olmozoo.families.config import ModelConfig
from olmozoo.quantization import Quantization, check_groups
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.training.config import EvaluatorConfig, TrainConfig
from olmozoo.training.data import TokenFiles, TrainingData, open_evaluation
from olmozoo.training.metrics import perplexity


def open_evaluators(
    config: TrainConfig, model: ModelConfig, data: TrainingData, tokenizer: Tokenizer | None
) -> list[Evaluator]:
    """The evaluators of a run, whose files are open and checked.

    Raises:
        InputError: a file does not fit, or needs a tokenizer and there is none.
    """
    if config.sample_prompt is not None and tokenizer is None:
        raise InputError(f"sample_prompt is {config.sample_prompt!r}, and the run has no tokenizer: set tokenizer")
    found: list[Evaluator] = []
    for evaluator in config.evaluators:
        scheme = _quantization(evaluator, model)
        if evaluator.file is None:
            for label, files in open_evaluation(evaluator, config, model, data.files.length).items():
                found.append(TokenLoss(label, files, evaluator, config, scheme))
        elif tokenizer is None:
            raise InputError(f"the evaluator {evaluator.label} has texts, and the run no tokenizer: set tokenizer")
        else:
            found.append(TextScore(evaluator.label, scoring.read(evaluator.file), tokenizer, evaluator, scheme))
    return found


def _quantization(evaluator: EvaluatorConfig, model: ModelConfig) -> Quantization | None:
    """How the weights are rounded that an evaluator scores."""
    if evaluator.quantization is None:
        return None
    try:
        scheme = Quantization.of(evaluator.quantization, evaluator.group_size)
        check_groups(model.parameters(), scheme)
    except InputError as error:
        raise InputError(f"the evaluator {evaluator.label}: {error}") from error
    return scheme


class TokenLoss:
    """The loss on files of tokens.

    Args:
        label: of the metrics.
        files: the instances.
        evaluator: its config.
        config: the run's. With `eval_divisor` "positions" the loss is the mean over instances of their sums divided by
            length - 1, as in AI2's trainer; else the mean over the tokens that are learned.
        quantization: how the weights are rounded that it scores; None for floats.
    """

    def __init__(
        self,
        label: str,
        files: TokenFiles,
        evaluator: EvaluatorConfig,
        config: TrainConfig,
        quantization: Quantization | None,
    ) -> None:
        self.quantization = quantization
        self.label, self.files, self.by_positions = label, files, config.eval_divisor == "positions"
        self.device_rows = evaluator.device_eval_batch_size or config.device_train_microbatch_size
        self.batch_size = self.device_rows or config.global_train_batch_size
        order = np.arange(len(files))
        if evaluator.subset_num_batches is not None:
            np.random.default_rng(config.data_seed).shuffle(order)
            order = order[: evaluator.subset_num_batches * self.batch_size]
        self.order = order

    def __call__(self, step: Any, backend: Backend) -> dict[str, float]:
        """The loss and its exponential."""
        total, targets = 0.0, 0
        rows = self.device_rows * step.world.rows if self.device_rows else self.batch_size
        for start in range(0, len(self.order), rows):
            batch = self.files.batch(self.order[start : start + rows])
            total += float(np.sum(step.evaluate(batch), dtype=np.float64))
            targets += batch.num_targets
        loss = total / (len(self.order) * (self.files.length - 1) if self.by_positions else max(targets, 1))
        name = f"eval/{self.label}"
        return {f"{name}/CrossEntropyLoss": loss, f"{name}/Perplexity": perplexity(loss)}


class TextScore:
    """Perplexity of texts, or accuracy on multiple-choice questions, as `olmozoo evaluate` computes them."""

    def __init__(
        self,
        label: str,
        entries: Sequence[Any],
        tokenizer: Tokenizer,
        evaluator: EvaluatorConfig,
        quantization: Quantization | None,
    ) -> None:
        self.quantization = quantization
        self.label, self.entries, self.tokenizer = label, entries, tokenizer
        self.batch_size = evaluator.device_eval_batch_size or 4

    def __call__(self, step: Any, backend: Backend) -> dict[str, float]:
        """The perplexity and the loss of a token, or the accuracy."""
        name = f"eval/{self.label}"
        if self.entries and isinstance(self.entries[0], scoring.Question):
            answers = scoring.multiple_choice(backend, self.tokenizer, self.entries, batch_size=self.batch_size)
            return {f"{name}/accuracy": answers.accuracy, f"{name}/accuracy_normalized": answers.accuracy_normalized}
        result = scoring.perplexity(backend, self.tokenizer, self.entries, batch_size=self.batch_size)
        loss = -result.log_likelihood / result.tokens
        return {f"{name}/CrossEntropyLoss": loss, f"{name}/Perplexity": result.perplexity}


Evaluator = TokenLoss | TextScore
