"""Token embeddings of Flax models: replaced and resized."""

import copy
import pickle

import numpy as np
import pytest

from olmozoo import ConfigError, InputError
from tests.helpers.checkpoints import left_padded
from tests.helpers.flax_models import (
    ALL,
    answer,
    ask,
    close,
    each,
    make,
    old_rows,
)

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp

from olmozoo import flax


@each
@pytest.mark.parametrize("tied", [True, False])
def test_resizing_changes_config_parameters_head_and_tie(cls, tied):
    model = make(cls, ALL[cls].replace(tie_word_embeddings=tied))
    model.gradient_checkpointing_enable()
    ids, mask = left_padded(model.config)
    logits, before = answer(ask(model, ids, mask)), model.params
    embedding = model.resize_token_embeddings(66, pad_to_multiple_of=8)
    assert embedding is model.get_input_embeddings()
    assert embedding.shape[0] == model.config.vocab_size == model.module.config.vocab_size == 72
    assert model.module.gradient_checkpointing
    assert np.array_equal(embedding[:61], old_rows(model, before))
    assert np.array_equal(embedding[61:], model.config.embedding.initial(0)[61:])
    found = answer(ask(model, ids, mask))
    if cls.head == "causal_lm":
        assert found.shape == (*ids.shape, 72)
        assert close(found[..., :61], logits)
        head = embedding.T if tied else model.params["lm_head"]["kernel"]
        hidden = ask(model, ids, mask, output_hidden_states=True).hidden_states[-1]
        assert close(found, hidden @ head)
        assert model.generate(ids[:, :2], max_new_tokens=3).sequences.shape == (3, 5)
    else:
        assert close(found, logits)
    for rows in (50, None):
        assert model.resize_token_embeddings(rows).shape[0] == model.config.vocab_size == 50
    for use in (lambda: model.resize_token_embeddings(0), lambda: model.resize_token_embeddings(-1)):
        with pytest.raises(ConfigError, match="vocab_size"):
            use()
    assert model.config.vocab_size == 50
    model.params = model.to_bf16(model.params)
    assert model.resize_token_embeddings(70).dtype == jnp.bfloat16
    assert model.module.config == model.config


@each
def test_the_three_wings_resize_alike(cls, tmp_path):
    pt = pytest.importorskip("olmozoo.pt")
    model = make(cls)
    model.save_pretrained(tmp_path / "m")
    twin = getattr(pt, cls.__name__.removeprefix("Flax")).from_pretrained(tmp_path / "m")
    for one in (twin, model):
        one.resize_token_embeddings(66, pad_to_multiple_of=8)
    model.save_pretrained(tmp_path / "flax")
    twin.save_pretrained(tmp_path / "pt")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "flax" / name).read_bytes() == (tmp_path / "pt" / name).read_bytes()


@each
def test_the_input_embedding_can_be_had_and_replaced(cls):
    model = make(cls)
    ids, mask = left_padded(model.config)
    old = model.params
    embedding = model.get_input_embeddings()
    assert embedding is old_rows(model, old)
    model.set_input_embeddings(embedding[::-1])
    assert close(
        ask(model, ids, mask, output_hidden_states=True).hidden_states[-1],
        ask(model, 60 - ids, mask, old, output_hidden_states=True).hidden_states[-1],
    )
    assert old_rows(model, old) is embedding  # a tree that others hold is left as it is
    with pytest.raises(InputError, match=r"wrong shape: model/.*embed_tokens/embedding is"):
        model.set_input_embeddings(embedding[1:])
    bare = cls(model.config, _do_init=False)
    for use in (bare.get_input_embeddings, bare.resize_token_embeddings, lambda: bare.set_input_embeddings(embedding)):
        with pytest.raises(InputError, match="set `params`"):
            use()


def test_copies_made_before_resizing_keep_their_size():
    model = make(flax.FlaxOlmo2ForCausalLM)
    ids, mask = left_padded(model.config)
    expected = model.generate(ids, mask, max_new_tokens=3).sequences
    others = [copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))]
    model.resize_token_embeddings(72)
    model.generate(ids, mask, max_new_tokens=3)
    for other in others:
        assert other.config.vocab_size == 61
        assert np.array_equal(other.generate(ids, mask, max_new_tokens=3).sequences, expected)
