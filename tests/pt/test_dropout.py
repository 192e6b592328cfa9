"""Dropout and layerdrop of PyTorch models."""

import pytest

from tests.helpers.configs import SMALL_OPT

torch = pytest.importorskip("torch")

from olmozoo import pt


def test_dropout_is_alive_in_training_and_dead_in_inference(batch):
    model = pt.OPTModel(SMALL_OPT.replace(dropout=0.5), seed=1)
    torch.manual_seed(0)
    calls = [model.train()(*batch)[0] for _ in range(2)]
    assert not torch.equal(*calls)
    calls = [model.eval()(*batch)[0] for _ in range(2)]
    assert torch.equal(*calls)
    quiet = pt.OPTModel(SMALL_OPT.replace(dropout=0.0), seed=1).train()
    torch.testing.assert_close(quiet(*batch)[0], calls[0])
    attentive = pt.OPTModel(SMALL_OPT.replace(dropout=0.0, attention_dropout=0.5), seed=1).train()
    assert not torch.equal(attentive(*batch)[0], attentive(*batch)[0])


def test_dropout_keeps_the_mean_and_drops_its_share(batch):
    block = pt.OPTModel(SMALL_OPT.replace(dropout=0.25), seed=1).decoder.layers[0].train()
    block.self_attn.forward = lambda x, *rest: (torch.ones_like(x), None)
    block.self_attn_layer_norm.forward = lambda x: x
    block.fc2.forward = lambda x: torch.zeros(*x.shape[:-1], 40)
    block.final_layer_norm.forward = lambda x: x
    torch.manual_seed(0)
    out = torch.cat([block(torch.zeros(3, 11, 40), None, None, None, False)[0].flatten() for _ in range(40)])
    assert abs((out == 0).float().mean().item() - 0.25) < 0.01
    assert abs(out.mean().item() - 1) < 0.01


def test_layerdrop_skips_its_share_of_blocks_in_training_alone(batch):
    config = SMALL_OPT.replace(dropout=0.0, num_hidden_layers=1, layerdrop=0.3, word_embed_proj_dim=40)
    model = pt.OPTModel(config, seed=1).train()
    torch.manual_seed(0)
    skipped = 0
    for _ in range(300):
        states = model(*batch, output_hidden_states=True, use_cache=False).hidden_states
        skipped += torch.equal(states[0], states[1])
    assert abs(skipped / 300 - 0.3) < 0.08
    states = model.eval()(*batch, output_hidden_states=True).hidden_states
    assert not torch.equal(states[0], states[1])
