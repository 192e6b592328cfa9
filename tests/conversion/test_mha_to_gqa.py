"""Multi-head checkpoints made into ones with fewer key/value heads, in all three wings."""

import numpy as np
import pytest

from conversion import mha_to_gqa
from olmozoo import Olmo2Config, OlmoConfig, OPTConfig
from olmozoo.backends import load
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.writer import save_checkpoint
from olmozoo.errors import ConfigError, InputError
from olmozoo.families.config import ModelConfig
from tests.helpers.checkpoints import left_padded, random_values, train_tokenizer, write_checkpoint
from tests.helpers.conversions import run_program
from tests.helpers.wings import WINGS

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
    "eos_token_id": 0,
}
CONFIGS = {
    "olmo": OlmoConfig(**SHAPE, attention_bias=True, clip_qkv=2.0),
    "olmo2": Olmo2Config(**SHAPE, attention_bias=True),
}


def equal_groups(parameter, config, group):
    """Random values, but the key/value heads of each group are the first one's."""
    values = random_values(parameter)
    if mha_to_gqa.POOLED.search(parameter.name):
        heads = values.reshape(config.kv_heads, config.head_dim, -1)
        values = np.repeat(heads[::group], group, axis=0).reshape(parameter.shape)
    return values


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_heads_that_were_equal_give_the_same_logits(tmp_path, family, kv_heads, wing):
    config = CONFIGS[family]
    group = config.kv_heads // kv_heads
    save_checkpoint(
        tmp_path / "mha",
        config,
        "causal_lm",
        read=lambda parameter: equal_groups(parameter, config, group),
        dtype=lambda parameter: "float64",
    )
    mha_to_gqa.main(tmp_path / "mha", tmp_path / "gqa", kv_heads)
    assert ModelConfig.from_folder(tmp_path / "gqa") == ModelConfig.from_folder(tmp_path / "mha").replace(
        num_key_value_heads=kv_heads
    )
    ids, mask = left_padded(config)
    before, after = (load(tmp_path / name, wing).forward(ids, mask)["logits"] for name in ("mha", "gqa"))
    assert np.abs(before - after)[mask == 1].max() < 1e-9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_are_pooled_by_their_mean_and_nothing_else_changes(tmp_path, dtype):
    config = CONFIGS["olmo2"]
    write_checkpoint(tmp_path / "mha", config, dtype=dtype)
    mha_to_gqa.main(tmp_path / "mha", tmp_path / "gqa", 2)
    before, after = Checkpoint(tmp_path / "mha"), Checkpoint(tmp_path / "gqa")
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        found, old = after[name], before[name]
        assert found.dtype == old.dtype == after.dtype
        if any(part in name for part in ("k_proj", "v_proj", "k_norm")):
            heads = old.astype(np.float64).reshape(2, 3, 8, -1)
            assert np.array_equal(found.reshape(2, 8, -1), heads.mean(axis=1).astype(old.dtype))
        else:
            assert np.array_equal(found, old)


def test_what_cannot_be_pooled_is_refused(tmp_path):
    write_checkpoint(tmp_path / "mha", CONFIGS["olmo"])
    for kv_heads in (0, -1, 4, 12):
        with pytest.raises(
            InputError, match=f"--kv-heads is {kv_heads}, expected a divisor of num_key_value_heads = 6"
        ):
            mha_to_gqa.main(tmp_path / "mha", tmp_path / "out", kv_heads)
    OPTConfig(vocab_size=40, hidden_size=16, num_attention_heads=2, ffn_dim=32).save_pretrained(tmp_path / "opt")
    with pytest.raises(ConfigError, match="model_type is 'opt', which has no num_key_value_heads"):
        mha_to_gqa.main(tmp_path / "opt", tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_comes_along_and_a_dry_run_writes_nothing(tmp_path):
    write_checkpoint(tmp_path / "mha", CONFIGS["olmo"])
    train_tokenizer(tmp_path / "mha", "some text")
    (tmp_path / "mha/generation_config.json").write_text('{"temperature": 0.7}')
    result = run_program("mha_to_gqa", tmp_path / "mha", tmp_path / "gqa", "--kv-heads", 2, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "model.layers.1.self_attn.v_proj.bias" in result.stdout
    assert not (tmp_path / "gqa").exists()
    result = run_program("mha_to_gqa", tmp_path / "mha", tmp_path / "gqa", "--kv-heads", 2)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "gqa/tokenizer.json").read_bytes() == (tmp_path / "mha/tokenizer.json").read_bytes()
    assert (tmp_path / "gqa/generation_config.json").read_text() == '{"temperature": 0.7}'
