"""What decays, and how gradients are clipped."""

import numpy as np
import pytest

from olmozoo import ConfigError
from olmozoo.families.parameter import by_variable
from olmozoo.training.config import LoraConfig, OptimizerConfig, TrainConfig
from olmozoo.training.parameters import Clipping, trained_parameters, weight_decays
from tests.helpers.configs import CONFIGS

NAMES = ["model.embed_tokens.weight"]
NAMES += [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
NAMES += [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
NAMES += ["model.layers.1.self_attn.q_proj.weight"]
NORMS = np.array([2.0, 1.0, 2.0, 2.0, 4.0, 3.0, 4.0, 1.0, 7.0])


def test_the_norm_of_all_is_clipped():
    clipping = Clipping(None, [0.9, 0.95], NAMES, False)
    total = np.sqrt(np.square(NORMS).sum())
    np.testing.assert_allclose(clipping.scales(NORMS, 1.5), np.full(9, 1.5 / (total + 1e-6)))
    assert clipping.scales(NORMS, total + 1) is None
    assert clipping.scales(NORMS, None) is None
    assert clipping.scales(np.zeros(9), 1.0) is None


def test_each_norm_is_clipped_at_a_ratio_to_its_mean():
    clipping = Clipping(1.2, [0.9, 0.95], NAMES, False)
    np.testing.assert_allclose(clipping.scales(NORMS, None), np.ones(9))
    grown = NORMS * np.where(np.arange(9) == 3, 10, 1)
    scales = clipping.scales(grown, None)
    np.testing.assert_allclose(scales, np.where(np.arange(9) == 3, 1.2 * 2 / (20 + 1e-6), 1))
    np.testing.assert_allclose(clipping.means, NORMS + (grown * scales - NORMS) * 0.05)


def test_fused_matrices_are_clipped_as_one():
    clipping = Clipping(0.5, [0.9, 0.95], NAMES, True)
    scales = clipping.scales(NORMS, None)
    assert len(set(scales[1:4])) == len(set(scales[5:7])) == 1
    assert clipping.means.shape == (9,)
    clipping.means = np.array([2.0, 3.0, 3.0, 3.0, 4.0, 5.0, 5.0, 1.0, 7.0])  # what all of a matrix have
    scales = clipping.scales(NORMS * 2, None)
    np.testing.assert_allclose(scales, 0.25, rtol=1e-6)
    apart = NORMS.copy()
    apart[1] = 8
    norm = np.sqrt(64 + 4 + 4)
    clipping.means = np.array([2.0, 3.0, 3.0, 3.0, 4.0, 5.0, 5.0, 1.0, 7.0])
    expected = [0.5, *[1.5 / (norm + 1e-6)] * 3, 0.5, 0.5, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(clipping.scales(apart, None), expected, rtol=1e-5)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", ["olmo2", "olmo-bias", "opt", "olmo-clip-tied"])
def test_what_decays(name, norms, embeddings):
    table = [p for p in CONFIGS[name].parameters("causal_lm") if p.tied_to is None]
    settings = OptimizerConfig(weight_decay=0.3, decay_norm_and_bias=norms, decay_embeddings=embeddings)
    for parameter, decay in zip(table, weight_decays(settings, table), strict=True):
        if "embed" in parameter.name:
            decays = embeddings
        elif parameter.name.endswith("bias") or "norm" in parameter.name:
            decays = norms
        else:
            decays = True
        assert decay == (0.3 if decays else 0.0), parameter.name


def config(**fields):
    return TrainConfig(save_folder="run", **fields)


def test_what_is_frozen():
    names = [p.name for p in trained_parameters(config(freeze=["model.embed*", "*norm*"]), CONFIGS["olmo2"])]
    assert "lm_head.weight" in names
    assert not any("norm" in name or "embed" in name for name in names)
    with pytest.raises(ConfigError, match="fits no parameter"):
        trained_parameters(config(freeze=["model.embed*", "wte"]), CONFIGS["olmo2"])
    with pytest.raises(ConfigError, match="no parameter to train"):
        trained_parameters(config(freeze=["*"]), CONFIGS["olmo2"])


def test_adapters_of_experts_are_grouped_by_their_variables():
    chosen = LoraConfig(rank=3, target_modules=["o_proj", "up_proj"])
    found = by_variable(trained_parameters(config(lora=chosen), CONFIGS["olmoe"]))
    stem = "model.layers.1."
    expected = [
        *([f"{stem}self_attn.o_proj.lora_{factor}.weight"] for factor in "AB"),
        *([f"{stem}mlp.experts.{expert}.up_proj.lora_{factor}.weight" for expert in range(5)] for factor in "AB"),
    ]
    assert [[parameter.name for parameter in group] for group in found][4:] == expected
    assert [group[0].shape for group in found][6:] == [(3, 40), (36, 3)]
    frozen = trained_parameters(config(freeze=["*.experts.[!1].*", "*_proj.weight"]), CONFIGS["olmoe"])
    assert not [parameter for parameter in frozen if parameter.stack]


def test_the_factors_of_adapters():
    found = trained_parameters(
        config(lora=LoraConfig(rank=3, target_modules=["v_proj", "down_proj"])), CONFIGS["olmo2"]
    )
    shapes = {p.name: p.shape for p in found if ".layers.1." in p.name}
    assert shapes == {
        "model.layers.1.self_attn.v_proj.lora_A.weight": (3, 40),
        "model.layers.1.self_attn.v_proj.lora_B.weight": (20, 3),
        "model.layers.1.mlp.down_proj.lora_A.weight": (3, 36),
        "model.layers.1.mlp.down_proj.lora_B.weight": (40, 3),
    }
    a = next(p for p in found if "lora_A" in p.name).initial(1, np.dtype("float64"))
    assert abs(a.std() * np.sqrt(3 * 40) - 1) < 0.25
    assert not next(p for p in found if "lora_B" in p.name).initial(1, np.dtype("float64")).any()
    with pytest.raises(ConfigError, match="lm_head; there are"):
        trained_parameters(config(lora=LoraConfig(target_modules=["lm_head"])), CONFIGS["olmo2"])
