"""`generate` of PyTorch models."""

import pytest

from olmozoo import InputError
from olmozoo.generation.prepare import BUCKET
from tests.helpers.configs import SMALL_OLMO2

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from olmozoo import pt


class Waits(TorchDispatchMode):
    """Counts what lets the host wait for a device: numbers and shapes that are read from tensors."""

    NAMES = (
        *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"),
        *("aten::masked_select", "aten::_unique2"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.name() in self.NAMES
        return function(*args, **kwargs or {})


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


def test_generate_waits_for_the_device_once_a_token(model, batch, monkeypatch):
    """To see whether all rows have ended."""
    copied = []
    for name in ("cpu", "tolist"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, method=method: copied.append(x.shape) or method(x))

    def waits(new, **settings):
        copied.clear()
        with Waits() as found:
            model.generate(*batch, max_new_tokens=new, eos_token_id=[5], pad_token_id=1, min_new_tokens=new, **settings)
        return found.number + len(copied)

    sampling = {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "seed": 1, "repetition_penalty": 1.2}
    for settings in ({}, sampling):
        assert waits(14, **settings) - waits(4, **settings) == 10


def test_generate_compiles_one_step_for_all_lengths_of_a_bucket(model, batch, monkeypatch):
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, mode: compiled(f, fullgraph=fullgraph, backend=counter))
    ids, mask = batch
    expected = model.generate(ids, mask, max_new_tokens=9)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=9, compile=True), expected)
    for length, new in ((11, 4), (5, 12), (8, BUCKET)):
        model.generate(ids[:, -length:], mask[:, -length:], max_new_tokens=new, compile=True)
    assert counter.frame_count == 1
    with torch._dynamo.config.patch(recompile_limit=1):  # which would make the next shape an error
        model.generate(ids, mask, max_new_tokens=BUCKET + 1, compile=True)
    assert counter.frame_count == 2
