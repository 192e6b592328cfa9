"""Toy in Flax."""

from typing import Any

from flax import linen as nn

from olmozoo.flax.decoder import Decoder, DecoderModule, Layers
from olmozoo.flax.heads import CausalLM, SequenceClassifier
from olmozoo.flax.layers import GatedMLP, LayerNorm
from olmozoo.flax.olmo import OlmoAttention
from tests.toy_family.config import ToyConfig


class ToyBlock(nn.Module):
    config: ToyConfig
    dtype: Any
    param_dtype: Any
    layer: int

    def setup(self):
        config, types = self.config, (self.dtype, self.param_dtype)
        self.input_norm = LayerNorm(True, self.param_dtype)
        self.self_attn = OlmoAttention(config, *types)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, *types)

    def __call__(self, x, mask, cos_sin, past, deterministic):
        normed = self.input_norm(x)
        out, present, weights = self.self_attn(normed, mask, cos_sin, past, deterministic)
        return x + out + self.mlp(normed), present, weights


class ToyModule(DecoderModule):
    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size, param_dtype=self.param_dtype)
        self.layers = Layers(ToyBlock, config, self.dtype, self.param_dtype, self.gradient_checkpointing)
        self.norm = LayerNorm(True, self.param_dtype)
        self.rope = config.rope()


class FlaxToyModel(Decoder):
    config_class = ToyConfig
    module_class = ToyModule


class FlaxToyForCausalLM(CausalLM):
    config_class = ToyConfig
    base_class = FlaxToyModel


class FlaxToyForSequenceClassification(SequenceClassifier):
    config_class = ToyConfig
    base_class = FlaxToyModel
