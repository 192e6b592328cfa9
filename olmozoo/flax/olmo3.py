"""OLMo 3 in Flax (arXiv:2512.13961): the blocks of OLMo 2, most of them with attention in a sliding window.

The window is in the masks that `Decoder` makes; rotary positions may be scaled in layers with full attention alone.
"""

from __future__ import annotations

from typing import Any

from jax import Array

from olmozoo.families.olmo3 import SLIDING, Olmo3Config
from olmozoo.flax.decoder import Decoder
from olmozoo.flax.heads import CausalLM, SequenceClassifier
from olmozoo.flax.layers import rotary
from olmozoo.flax.olmo2 import Olmo2Module


class Olmo3Module(Olmo2Module):
    """The OLMo 3 decoder without a head, as a function of its parameters."""

    def setup(self) -> None:
        super().setup()
        self.sliding_rope = self.config.rope(SLIDING)

    def rotary_tables(self, position_ids: Array, dtype: Any) -> list[tuple[Array, Array]]:
        full, sliding = (rotary(rope, position_ids, dtype) for rope in (self.rope, self.sliding_rope))
        return [sliding if kind == SLIDING else full for kind in self.config.layer_types]


class FlaxOlmo3Model(Decoder):
    """The OLMo 3 decoder without a head."""

    config_class = Olmo3Config
    module_class = Olmo3Module


class FlaxOlmo3ForCausalLM(CausalLM):
    """The OLMo 3 decoder with its language-model head."""

    config_class = Olmo3Config
    base_class = FlaxOlmo3Model


class FlaxOlmo3ForSequenceClassification(SequenceClassifier):
    """The OLMo 3 decoder with a classification head."""

    config_class = Olmo3Config
    base_class = FlaxOlmo3Model
