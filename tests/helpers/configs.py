"""Configs in which a mistake shows: fewer key/value heads than heads, odd sizes, every option on."""

import pytest

from olmozoo import FlexOlmoConfig, Olmo2Config, Olmo3Config, OlmoConfig, OlmoeConfig, OPTConfig
from tests.helpers.wings import PRESENT, WINGS

BOUND, GRADIENT_BOUND = 1e-9, 1e-8  # of hidden states and logits, and of gradients, in float64
ROTARY = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "eos_token_id": 3,
}
OPT = {
    "vocab_size": 61,
    "hidden_size": 40,
    "ffn_dim": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "eos_token_id": 3,
}


def scaled(kind, **fields):
    return {"rope_scaling": {"rope_type": kind, **fields}}


CONFIGS = {
    "olmo2": Olmo2Config(**ROTARY),
    "olmo2-mha": Olmo2Config(**ROTARY | {"num_key_value_heads": 4}, rms_norm_eps=1e-2, hidden_act="gelu_new"),
    "olmo2-mqa-bias-tied": Olmo2Config(
        **ROTARY | {"num_key_value_heads": 1}, attention_bias=True, tie_word_embeddings=True
    ),
    "olmo2-linear": Olmo2Config(**ROTARY, **scaled("linear", factor=2.5)),
    "olmo2-dynamic": Olmo2Config(**ROTARY, **scaled("dynamic", factor=2.5)),
    "olmo2-yarn": Olmo2Config(**ROTARY, **scaled("yarn", factor=4.0, original_max_position_embeddings=8)),
    "olmo2-llama3": Olmo2Config(
        **ROTARY,
        **scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "olmo2-longrope": Olmo2Config(
        **ROTARY,
        **scaled(
            "longrope",
            short_factor=[1.0, 1.2, 1.5, 2.0, 2.5],
            long_factor=[2.0, 3.0, 4.0, 5.0, 6.0],
            original_max_position_embeddings=12,
        ),
    ),
    "olmo3": Olmo3Config(  # a window shorter than the tests' texts, and each rotary table another
        **ROTARY | {"num_hidden_layers": 3},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=4,
        rope_theta=5e5,
        sliding_rope_theta=1e4,
        **scaled("yarn", factor=4.0, original_max_position_embeddings=8),
    ),
    "olmo-clip-tied": OlmoConfig(**ROTARY, clip_qkv=0.4, tie_word_embeddings=True),
    "olmo-bias": OlmoConfig(**ROTARY | {"num_key_value_heads": 1}, attention_bias=True),
    "olmoe": OlmoeConfig(**ROTARY, num_experts=5, num_experts_per_tok=2, clip_qkv=1.1),
    "olmoe-one-normed-tied": OlmoeConfig(
        **ROTARY | {"num_key_value_heads": 1},
        num_experts=3,
        num_experts_per_tok=1,
        norm_topk_prob=True,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "flexolmo-all": FlexOlmoConfig(**ROTARY, num_experts=3, num_experts_per_tok=3, norm_topk_prob=True),
    "opt": OPTConfig(**OPT),
    "opt-projected-post-norm": OPTConfig(**OPT, word_embed_proj_dim=24, do_layer_norm_before=False),
    "opt-bare": OPTConfig(**OPT, enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"),
    "opt-no-final-norm-untied": OPTConfig(**OPT, _remove_final_layer_norm=True, tie_word_embeddings=False),
}
WIDE = 1 << 16  # rows of an embedding that is most of a small model
LENGTH_DEPENDENT = ("olmo2-dynamic", "olmo2-longrope")  # cached and uncached answers differ by definition
REFERENCE = PRESENT[0]
OTHERS = [  # each is compared with the reference, so that it needs both
    pytest.param(*param.values, marks=[*param.marks, getattr(pytest.mark, REFERENCE)])
    for param in WINGS
    if param.values[0] != REFERENCE
]
# One of each family that never ends by itself, for what a wing does beyond the numbers.
SMALL_OLMO2 = CONFIGS["olmo2"].replace(max_position_embeddings=4096, eos_token_id=None)
SMALL_OLMO3 = CONFIGS["olmo3"].replace(max_position_embeddings=4096, eos_token_id=None)
SMALL_OLMOE = CONFIGS["olmoe"].replace(max_position_embeddings=4096, eos_token_id=None)
SMALL_FLEXOLMO = CONFIGS["flexolmo-all"].replace(max_position_embeddings=4096, eos_token_id=None)
SMALL_OLMO = CONFIGS["olmo-bias"].replace(max_position_embeddings=4096, eos_token_id=None, tie_word_embeddings=True)
SMALL_OPT = CONFIGS["opt-projected-post-norm"].replace(eos_token_id=None)


def config_of(cls):
    """A small config of a model class's family."""
    configs = (SMALL_OLMO2, SMALL_OLMO3, SMALL_OPT, SMALL_OLMO, SMALL_OLMOE, SMALL_FLEXOLMO)
    return next(config for config in configs if isinstance(config, cls.config_class))
