"""OLMo 3 in PyTorch (arXiv:2512.13961): the blocks of OLMo 2, most of them with attention in a sliding window.

The window is in the masks that `Decoder` makes; rotary positions may be scaled in layers with full attention alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmozoo.families.olmo3 import SLIDING, Olmo3Config
from olmozoo.pt.heads import CausalLM, SequenceClassifier
from olmozoo.pt.layers import rotary
from olmozoo.pt.olmo2 import Olmo2Model


class Olmo3Model(Olmo2Model):
    """The OLMo 3 decoder without a head."""

    config_class = Olmo3Config

    def make_layers(self) -> None:
        super().make_layers()
        self.sliding_rope = self.config.rope(SLIDING)

    def rotary_tables(self, position_ids: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        full, sliding = (rotary(rope, position_ids, dtype) for rope in (self.rope, self.sliding_rope))
        return [sliding if kind == SLIDING else full for kind in self.config.layer_types]


class Olmo3ForCausalLM(CausalLM):
    """The OLMo 3 decoder with its language-model head."""

    config_class = Olmo3Config
    base_class = Olmo3Model


class Olmo3ForSequenceClassification(SequenceClassifier):
    """The OLMo 3 decoder with a classification head."""

    config_class = Olmo3Config
    base_class = Olmo3Model
