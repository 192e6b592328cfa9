"""`generate` of PyTorch models."""

import pytest

from olmozoo import InputError
from tests.helpers.configs import SMALL_OLMO2

torch = pytest.importorskip("torch")

from olmozoo import pt


def test_generate_stops_pads_and_keeps_the_mode(model, batch):
    ids, mask = batch
    free = model.generate(ids, mask, max_new_tokens=6, eos_token_id=[])
    assert free.shape == (3, 17)
    assert torch.equal(free, model.generate(ids, mask, max_length=17, eos_token_id=[]))
    ended = model.generate(ids, mask, max_new_tokens=6, eos_token_id=int(free[0, 11]), pad_token_id=9)
    assert ended[0, :12].tolist() == free[0, :12].tolist()
    assert (ended[0, 12:] == 9).all()
    assert model.train().generate(ids, mask, max_new_tokens=1).shape == (3, 12)
    assert model.training


def test_generate_takes_embeddings_and_returns_the_answer(model, batch):
    ids, mask = batch
    embeds = model.get_input_embeddings()(ids)
    tokens = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(tokens, model.generate(ids, mask, max_new_tokens=6)[:, 11:])
    with pytest.raises(InputError, match="one of input_ids and inputs_embeds, not both"):
        model.generate(ids, inputs_embeds=embeds)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_length": 11}, "no room"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temprature": 1.0}, "temprature"),
    ],
)
def test_generate_refuses_what_it_cannot_do(model, batch, settings, named):
    with pytest.raises(InputError, match=named):
        model.generate(*batch, **settings)


def test_a_config_that_asks_for_tuples_changes_no_generation(batch):
    ids, mask = batch
    model = pt.Olmo2ForCausalLM(SMALL_OLMO2, seed=1).eval()
    expected = model.generate(ids, mask, max_new_tokens=3)
    for asked in (False, None):
        model.config = model.model.config = SMALL_OLMO2.replace(extra={"return_dict": asked})
        assert isinstance(model(ids, mask), tuple) == (asked is False)
        assert torch.equal(model.generate(ids, mask, max_new_tokens=3), expected)
