"""Decoding: one prefill, then a token at a time over a cache set aside once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olmozoo.errors import InputError
from olmozoo.generation import GenerationConfig, plan, prompt_mask


class GenerationMixin:
    """Adds `generate` to a model with a language-model head."""

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Continue each row of a batch, greedily: at each step the likeliest token.

        Args:
            input_ids: (batch, seq) prompts, padded on the left.
            attention_mask: (batch, seq), 0 at padding; default as in `olmozoo.generation.prompt_mask`.
            generation_config: default the model's own.
            inputs_embeds: (batch, seq, hidden) prompts as embeddings, in place of `input_ids`.
            **settings: single settings of `GenerationConfig`, such as `max_new_tokens`.

        Returns:
            (batch, seq + new) ids of prompt and answer; of the answer alone for `inputs_embeds`. A row that has ended
            holds pad tokens; the call ends with its longest row.

        Raises:
            InputError: a setting is unknown or impossible, or shapes do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("expected exactly one of input_ids and inputs_embeds")
        training = self.training
        self.eval()
        try:
            config = generation_config or self.generation_config
            return self._decode(input_ids, inputs_embeds, attention_mask, config, settings)
        finally:
            self.train(training)

    def prepare_inputs_for_generation(self, input_ids: Tensor | None, **arguments: Any) -> dict[str, Any]:
        """The arguments of the next forward call. Libraries such as PEFT put their own in its place."""
        return {"input_ids": input_ids, **arguments}

    def _decode(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        config: GenerationConfig,
        settings: dict[str, Any],
    ) -> Tensor:
        batch, prompt = (inputs_embeds if input_ids is None else input_ids).shape[:2]
        rule = plan(config, self.config, prompt, settings)
        real = torch.from_numpy(prompt_mask(to_numpy(input_ids), to_numpy(attention_mask), rule, (batch, prompt)))
        total = prompt + rule.max_new
        padded = not bool(real.all())
        mask = torch.ones(batch, total, dtype=torch.bool, device=self.device)
        mask[:, :prompt] = real
        positions = (mask.long().cumsum(-1) - 1).masked_fill(~mask, 0)
        ends = torch.tensor(rule.eos, device=self.device)
        ids = torch.full((batch, total), rule.pad, dtype=torch.long, device=self.device)
        if input_ids is not None:
            ids[:, :prompt] = input_ids
        done = torch.zeros(batch, dtype=torch.bool, device=self.device)
        cache = self.init_cache(batch, total)

        first = 0 if inputs_embeds is None else prompt  # what is returned begins here
        start, end = 0, prompt
        while True:
            inputs = self.prepare_inputs_for_generation(
                ids[:, start:end] if start or inputs_embeds is None else None,
                inputs_embeds=None if start else inputs_embeds,
                past_key_values=cache,
                attention_mask=mask[:, :end] if padded else None,
                position_ids=positions[:, start:end],
                logits_to_keep=1,
            )
            logits = self(**inputs).logits[:, -1]
            ids[:, end] = torch.where(done, rule.pad, logits.argmax(-1))
            if rule.eos:
                done |= torch.isin(ids[:, end], ends)
            start, end = end, end + 1
            if end == total or (rule.eos and done.all()):
                return ids[:, first:end]


def to_numpy(tensor: Tensor | None) -> Any:
    """The tensor as an array; None for None."""
    return None if tensor is None else tensor.cpu().numpy()
