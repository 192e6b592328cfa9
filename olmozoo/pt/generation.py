"""Decoding: one prefill, then a token at a time over a cache set aside once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olmozoo.generation import GenerationConfig, plan, prompt_mask


class GenerationMixin:
    """Adds `generate` to a model with a language-model head."""

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Any,
    ) -> Tensor:
        """Continue each row of a batch, greedily: at each step the likeliest token.

        Args:
            input_ids: (batch, seq) prompts, padded on the left.
            attention_mask: (batch, seq), 0 at padding; default as in `olmozoo.generation.prompt_mask`.
            generation_config: default the model's own.
            **settings: single settings of `GenerationConfig`, such as `max_new_tokens`.

        Returns:
            (batch, seq + new) ids of prompt and answer. A row that has ended holds pad tokens; the call ends with its
            longest row.

        Raises:
            InputError: a setting is unknown or impossible, or shapes do not fit.
        """
        training = self.training
        self.eval()
        try:
            return self._decode(input_ids, attention_mask, generation_config or self.generation_config, settings)
        finally:
            self.train(training)

    def _decode(
        self, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig, settings: dict[str, Any]
    ) -> Tensor:
        rule = plan(config, self.config, input_ids.shape[-1], settings)
        real = torch.from_numpy(
            prompt_mask(input_ids.cpu(), None if attention_mask is None else attention_mask.cpu(), rule)
        )
        batch, prompt = input_ids.shape
        total = prompt + rule.max_new
        padded = not bool(real.all())
        mask = torch.ones(batch, total, dtype=torch.bool, device=self.device)
        mask[:, :prompt] = real
        positions = (mask.long().cumsum(-1) - 1).masked_fill(~mask, 0)
        ends = torch.tensor(rule.eos, device=self.device)
        ids = torch.full((batch, total), rule.pad, dtype=torch.long, device=self.device)
        ids[:, :prompt] = input_ids
        done = torch.zeros(batch, dtype=torch.bool, device=self.device)
        cache = self.init_cache(batch, total)

        start = 0
        for end in range(prompt, total):
            logits = self(
                ids[:, start:end],
                mask[:, :end] if padded else None,
                positions[:, start:end],
                cache,
                logits_to_keep=1,
            ).logits[:, -1]
            token = torch.where(done, rule.pad, logits.argmax(-1))
            ids[:, end] = token
            if rule.eos:
                done |= torch.isin(token, ends)
                if done.all():
                    return ids[:, : end + 1]
            start = end
        return ids
