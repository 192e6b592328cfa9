"""Outside answers: AI2's native trainer on its own small checkpoints, and an OPT that Transformers 4 wrote.

`fixtures/native` holds state dicts of the native trainer and the logits it computed for them; `fixtures/opt-bin` a
`pytorch_model.bin` (post-norm, with projections) and the logits of Transformers 4.57.6.
"""

from pathlib import Path

import numpy as np
import pytest

from olmozoo import Olmo2Config, OlmoConfig
from olmozoo.backends import load
from olmozoo.checkpoint.writer import save_checkpoint
from tests.helpers.wings import WINGS

FIXTURES = Path(__file__).parents[1] / "fixtures"
COMMON = {"vocab_size": 256, "max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 1}
CONFIGS = {
    "olmo1-mha-clip": OlmoConfig(
        **COMMON, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, clip_qkv=0.05
    ),
    "olmo1-tied": OlmoConfig(
        **COMMON,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=3,
        tie_word_embeddings=True,
    ),
    "olmo2-gqa": Olmo2Config(
        **COMMON,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_theta=500000.0,
        rms_norm_eps=1e-6,
    ),
}
SINGLE = {
    "model.embed_tokens": "wte",
    "model.norm": "ln_f",
    "lm_head": "ff_out",
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "mlp.down_proj": "ff_out",
    "post_attention_layernorm": "attn_norm",
    "post_feedforward_layernorm": "ff_norm",
}


def native_tensor(state, config, name):
    """The tensor of a canonical name in a native state dict: fused rows are q, k, v and up, gate, in that order."""
    parts = name.removesuffix(".weight").split(".layers.")
    if len(parts) == 1:
        return state[f"transformer.{SINGLE[parts[0]]}.weight"]
    layer, _, module = parts[1].partition(".")
    block = f"transformer.blocks.{layer}"
    if module in SINGLE:
        return state[f"{block}.{SINGLE[module]}.weight"]
    if module.startswith("mlp."):
        up, gate = state[f"{block}.ff_proj.weight"].split(config.intermediate_size)
        return up if module == "mlp.up_proj" else gate
    kv = config.kv_heads * config.head_dim
    rows = state[f"{block}.att_proj.weight"].split([config.hidden_size, kv, kv])
    return rows["qkv".index(module.removeprefix("self_attn.")[0])]


@pytest.mark.pt
@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_native_checkpoints_give_the_native_trainers_logits(tmp_path, name, wing):
    torch = pytest.importorskip("torch")
    config = CONFIGS[name]
    state = torch.load(FIXTURES / "native" / name / "model.pt", weights_only=True)
    save_checkpoint(
        tmp_path,
        config,
        "causal_lm",
        read=lambda parameter: native_tensor(state, config, parameter.name).numpy(),
        dtype=lambda parameter: "float32",
    )
    expected = np.load(FIXTURES / "native" / name / "expected.npz")
    ids = expected["input_ids"]
    found = load(tmp_path, wing).forward(ids, np.ones_like(ids))["logits"]
    assert np.abs(found - expected["logits"]).max() < 1e-5


@pytest.mark.pt
@pytest.mark.parametrize("wing", WINGS)
def test_an_old_opt_bin_file_gives_its_logits(wing):
    pytest.importorskip("torch")  # reads the file
    expected = np.load(FIXTURES / "opt-bin" / "expected.npz")
    ids = expected["input_ids"]
    found = load(FIXTURES / "opt-bin", wing, "float32").forward(ids, np.ones_like(ids))["logits"]
    assert np.abs(found - expected["logits"]).max() < 1e-5 * max(1, np.abs(expected["logits"]).max())
