"""OLMo 3 in Keras (arXiv:2512.13961): the blocks of OLMo 2, most of them with attention in a sliding window.

The window is in the masks that `Decoder` makes; rotary positions may be scaled in layers with full attention alone.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import keras
import tensorflow as tf

from olmozoo.families.olmo3 import SLIDING, Olmo3Config
from olmozoo.tf.heads import CausalLM, SequenceClassifier
from olmozoo.tf.layers import rotary
from olmozoo.tf.olmo2 import TFOlmo2Model

Tensor: TypeAlias = tf.Tensor


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmo3Model(TFOlmo2Model):
    """The OLMo 3 decoder without a head."""

    config_class = Olmo3Config

    def make_layers(self) -> None:
        super().make_layers()
        self.sliding_rope = self.config.rope(SLIDING)

    def rotary_tables(self, position_ids: Tensor, dtype: Any) -> list[tuple[Tensor, Tensor]]:
        full, sliding = (rotary(rope, position_ids, dtype) for rope in (self.rope, self.sliding_rope))
        return [sliding if kind == SLIDING else full for kind in self.config.layer_types]


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmo3ForCausalLM(CausalLM):
    """The OLMo 3 decoder with its language-model head."""

    config_class = Olmo3Config
    base_class = TFOlmo3Model


@keras.saving.register_keras_serializable("olmozoo")
class TFOlmo3ForSequenceClassification(SequenceClassifier):
    """The OLMo 3 decoder with a classification head."""

    config_class = Olmo3Config
    base_class = TFOlmo3Model
