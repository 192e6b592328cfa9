"""Toy in Keras."""

import keras

from olmozoo.tf.decoder import Decoder
from olmozoo.tf.heads import CausalLM, SequenceClassifier
from olmozoo.tf.layers import GatedMLP, Layer, LayerNorm, embedding
from olmozoo.tf.olmo import OlmoAttention
from tests.toy_family.config import ToyConfig


class ToyBlock(Layer):
    def __init__(self, config, name):
        super().__init__(name)
        self.input_norm = LayerNorm(True, name="input_norm")
        self.self_attn = OlmoAttention(config, name="self_attn")
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, name="mlp")

    def call(self, x, cos_sin, past, seed, key_mask):
        normed = self.input_norm(x)
        out, present, weights = self.self_attn(normed, cos_sin, past, seed, key_mask=key_mask)
        return x + out + self.mlp(normed), present, weights


@keras.saving.register_keras_serializable("toy")
class TFToyModel(Decoder):
    config_class = ToyConfig

    def make_layers(self):
        config = self.config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, name="embed_tokens")
        self.blocks = [ToyBlock(config, name=str(layer)) for layer in range(config.num_hidden_layers)]
        self.norm = LayerNorm(True, name="norm")
        self.rope = config.rope()


@keras.saving.register_keras_serializable("toy")
class TFToyForCausalLM(CausalLM):
    config_class = ToyConfig
    base_class = TFToyModel


@keras.saving.register_keras_serializable("toy")
class TFToyForSequenceClassification(SequenceClassifier):
    config_class = ToyConfig
    base_class = TFToyModel
