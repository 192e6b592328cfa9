"""Toy in PyTorch."""

from torch import nn

from olmozoo.pt.decoder import Decoder
from olmozoo.pt.heads import CausalLM, SequenceClassifier
from olmozoo.pt.layers import GatedMLP, LayerNorm
from olmozoo.pt.olmo import OlmoAttention
from tests.toy_family.config import ToyConfig


class ToyBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_norm = LayerNorm(config.hidden_size, affine=True)
        self.self_attn = OlmoAttention(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x, mask, cos_sin, cache, want_weights):
        normed = self.input_norm(x)
        out, weights = self.self_attn(normed, mask, cos_sin, cache, want_weights)
        return x + out + self.mlp(normed), weights


class ToyModel(Decoder):
    config_class = ToyConfig

    def make_layers(self):
        config = self.config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LayerNorm(config.hidden_size, affine=True)
        self.rope = config.rope()


class ToyForCausalLM(CausalLM):
    config_class = ToyConfig
    base_class = ToyModel


class ToyForSequenceClassification(SequenceClassifier):
    config_class = ToyConfig
    base_class = ToyModel
