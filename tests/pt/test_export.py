"""PyTorch models compiled and exported."""

import pytest

from tests.helpers.configs import config_of
from tests.helpers.pt_models import CLASSES

torch = pytest.importorskip("torch")

from olmozoo import pt

CAUSAL = [pt.Olmo2ForCausalLM, pt.Olmo3ForCausalLM, pt.OlmoForCausalLM, pt.OlmoeForCausalLM, pt.OPTForCausalLM]


@pytest.mark.parametrize("cls", CAUSAL, ids=lambda c: c.__name__)
def test_it_compiles_without_graph_breaks(cls, batch):
    model = cls(config_of(cls), seed=1).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = batch
    torch.testing.assert_close(compiled(ids, mask).logits, model(ids, mask).logits, rtol=1e-4, atol=1e-5)
    loss = compiled(ids, mask, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    for length in (7, 9, 5, 1):  # without a mask; the second one makes the length a symbol
        torch.testing.assert_close(compiled(ids[:, :length]).logits, model(ids[:, :length]).logits)


@pytest.mark.parametrize("cls", CAUSAL, ids=lambda c: c.__name__)
def test_it_exports_without_a_mask(cls, batch):
    model, ids = cls(config_of(cls), seed=1).eval(), batch[0]
    length = torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(model, (ids,), dynamic_shapes=({1: length},))
    torch.testing.assert_close(program.module()(ids[:, :5]).logits, model(ids[:, :5]).logits)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_it_exports_for_any_batch_and_length(cls, batch):
    model = cls(config_of(cls), seed=1).eval()
    ids, mask = batch
    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(
        model, (ids, mask), {"use_cache": False}, dynamic_shapes=({0: rows, 1: length}, {0: rows, 1: length}, None)
    )
    ids, mask = (torch.cat([tensor, tensor])[:, 2:].contiguous() for tensor in batch)
    exported, own = program.module()(ids, mask, use_cache=False), model(ids, mask, use_cache=False)
    assert type(exported) is type(own)
    torch.testing.assert_close(exported[0], own[0])
