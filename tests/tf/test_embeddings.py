"""Token embeddings of Keras models, resized."""

import numpy as np
import pytest

from olmozoo.families.parameter import by_variable
from tests.helpers.keras_models import (
    BIASED_OLMO2,
    CONFIGS,
    IDS,
    MASK,
    OLMOE,
    REAL,
    make,
    olmo2,
)

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings(tied):
    model = olmo2(config=BIASED_OLMO2.replace(tie_word_embeddings=tied))
    before, count = model(IDS).logits.numpy(), len(model.weights)
    layer = model.resize_token_embeddings(pad_to_multiple_of=64)
    assert layer is model.get_input_embeddings()
    assert model.config.vocab_size == model.model.config.vocab_size == 128
    assert len(model.weights) == count
    table = {p.name: p for p in model.config.parameters("causal_lm")}
    np.testing.assert_array_equal(layer.embeddings[101:], table["model.embed_tokens.weight"].initial(0)[101:])
    after = model(IDS).logits.numpy()
    assert after.shape == (*IDS.shape, 128)
    np.testing.assert_allclose(after[..., :101], before, atol=1e-5)
    assert [v.path.split("/", 1)[1] for v in model.get_output_embeddings().weights] == [
        "model/embed_tokens/embeddings" if tied else "lm_head/kernel"
    ]
    assert len(model.trainable_weights) == count
    layer.trainable = False
    assert not model.resize_token_embeddings(50).trainable
    assert len(model.trainable_weights) == count - 1


@pytest.mark.parametrize(
    ("family", "tied", "rows"),
    [("Olmo2", False, 70), ("Olmo", True, 40), ("OPT", True, 70), ("OPT", False, 40), ("Olmoe", False, 70)],
)
def test_resized_embeddings_are_those_of_pytorch(family, tied, rows, tmp_path):
    pt = pytest.importorskip("olmozoo.pt", reason="olmozoo[pt] is not installed")
    config = OLMOE if family == "Olmoe" else CONFIGS[family]
    model = make(family, config=config.replace(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    other = getattr(pt, f"{family}ForCausalLM").from_pretrained(tmp_path)
    before = model(np.minimum(IDS, 39), MASK).logits.numpy()
    layer = model.resize_token_embeddings(rows)
    other.resize_token_embeddings(rows)
    assert layer is model.get_input_embeddings()
    assert (model.get_output_embeddings() is layer) == tied
    assert model.config == model.model.config == other.config
    assert model.config.vocab_size == rows
    table = [p for p in model.config.parameters("causal_lm") if p.tied_to is None]
    assert len(model.weights) == len(by_variable(table))
    found, expected = zoo.canonical_state(model), pt.canonical_state(other)
    assert {name: array.shape for name, array in found.items()} == {p.name: p.shape for p in table}
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
    after = model(np.minimum(IDS, 39), MASK).logits.numpy()
    assert after.shape == (*IDS.shape, rows)
    kept = min(rows, 53)
    np.testing.assert_allclose(after[..., :kept][REAL], before[..., :kept][REAL], atol=1e-5)
    model.save_pretrained(tmp_path / "resized")
    again = type(model).from_pretrained(tmp_path / "resized")
    np.testing.assert_array_equal(again(np.minimum(IDS, 39), MASK).logits, after)
    assert model.generate(IDS % 40, MASK, max_new_tokens=3).shape == (4, 12)
