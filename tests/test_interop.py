"""Live models of one framework as those of another."""

import numpy as np
import pytest

import olmozoo
from olmozoo import InputError
from olmozoo.checkpoint.tensors import dtype_of
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.formats import CONFIGS, answer, model_of
from tests.helpers.wings import scope

PAIRS = [(a, b) for a in ("pt", "tf", "flax") for b in ("pt", "tf", "flax") if a != b]


@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_a_live_model_of_another_wing_gives_the_same_and_shares_nothing(tmp_path, source, to):
    for wing in (source, to):
        pytest.importorskip({"pt": "torch", "tf": "tensorflow", "flax": "flax"}[wing])
    for family, head in [("olmo", "sequence_classification"), ("olmo2", "causal_lm"), ("opt", None)]:
        config = CONFIGS[family]
        folder = write_checkpoint(tmp_path / f"{family}", config, head)
        model = model_of(source, family, head, folder, tie_word_embeddings=False)
        model.generation_config = model.generation_config.replace(top_k=3)
        with scope("flax"):
            made = olmozoo.convert(model, to=to)
        assert type(made).__module__.startswith(f"olmozoo.{to}.")
        assert made.config == model.config
        assert made.head == head
        assert made.generation_config == model.generation_config
        before = answer(source, model, config)
        assert np.abs(answer(to, made, config) - before).max() < 1e-9
        disturb(to, made)
        assert np.abs(answer(to, made, config) - before).max() > 1e-3
        assert np.array_equal(answer(source, model, config), before)
        with scope("flax"):
            made = olmozoo.convert(model, to=to)  # anew: what was disturbed may have moved
        after = answer(to, made, config)
        disturb(source, model)
        assert np.array_equal(answer(to, made, config), after)


def disturb(wing: str, model) -> None:
    """Change every weight in place, as training does."""
    if wing == "pt":
        import torch

        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
    elif wing == "tf":
        for variable in model.weights:
            variable.value.assign_add(variable.value * 0.25)
    else:
        import jax

        with jax.enable_x64(True):
            model.params = jax.tree.map(lambda leaf: leaf * 1.25, model.params)


def test_a_live_model_keeps_its_dtype_its_tie_and_its_mode(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    folder = write_checkpoint(tmp_path / "a", CONFIGS["opt"], dtype=dtype_of("bfloat16"))
    model = model_of("pt", "opt", "causal_lm", folder)
    keras_model = olmozoo.convert(model, to="tf")
    assert keras_model.variable_dtype == keras_model.compute_dtype == "bfloat16"
    back = olmozoo.convert(keras_model, to="pt")
    assert back.lm_head.weight is back.get_input_embeddings().weight
    assert not back.training
    assert olmozoo.convert(model.train(), to="pt").training
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
        assert back.state_dict()[name].dtype == torch.bfloat16


def test_live_conversion_refuses_what_it_does_not_know(tmp_path):
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match="a Linear is no model of olmozoo"):
        olmozoo.convert(torch.nn.Linear(2, 2), to="tf")
    with pytest.raises(InputError, match="to is 'mxnet', expected one of pt, tf, flax"):
        olmozoo.convert(torch.nn.Linear(2, 2), to="mxnet")
