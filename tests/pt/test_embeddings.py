"""Token embeddings of PyTorch models: replaced and resized."""

import pytest

from tests.helpers.configs import SMALL_OLMO, SMALL_OLMO2, SMALL_OLMOE, SMALL_OPT

torch = pytest.importorskip("torch")

from olmozoo import pt


@pytest.mark.parametrize("config", [SMALL_OLMO2, SMALL_OLMO, SMALL_OPT, SMALL_OLMOE], ids=lambda config: config.name)
def test_resizing_the_vocabulary_keeps_rows_and_moves_head_config_and_tie(config, batch):
    model = pt.AutoModelForCausalLM.from_config(config, seed=1).eval()
    ids, mask = batch
    before = model(ids, mask).logits
    embedding = model.resize_token_embeddings(66, pad_to_multiple_of=8)
    assert embedding is model.get_input_embeddings()
    assert embedding.weight.shape[0] == embedding.num_embeddings == model.config.vocab_size == 72
    assert model.model.config.vocab_size == 72
    assert (model.lm_head.weight is embedding.weight) == config.tie_word_embeddings
    after = model(ids, mask).logits
    assert torch.equal(after[..., :61], before)
    model.resize_token_embeddings(50)
    assert model(ids.clamp(max=49), mask).logits.shape[-1] == 50
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(False).resize_token_embeddings(60)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_save_after_resize_loads(tmp_path):
    model = pt.Olmo2ForCausalLM(SMALL_OLMO2, seed=1)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    assert pt.Olmo2ForCausalLM.from_pretrained(tmp_path).config.vocab_size == 70
    kept = model.lm_head.weight.detach().clone()
    assert model.resize_token_embeddings(pad_to_multiple_of=32).weight.shape[0] == model.config.vocab_size == 96
    assert torch.equal(model.lm_head.weight[:70], kept)


def test_a_new_input_embedding_moves_a_tied_head():
    model = pt.OlmoForCausalLM(SMALL_OLMO)
    new = torch.nn.Embedding(61, 40)
    model.set_input_embeddings(new)
    assert model.lm_head.weight is new.weight
