"""PEFT on PyTorch models, beside PEFT on Transformers' own with the same weights."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from olmozoo import InputError
from olmozoo.pt import AutoModelForCausalLM
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.configs import CONFIGS

pytestmark = [pytest.mark.pt, pytest.mark.filterwarnings("ignore")]
IDS = torch.tensor([[5, 9, 23, 7], [11, 2, 60, 4]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("opt") / "base", CONFIGS["opt"], dtype="float32")


def both(folder, settings):
    """Our model and Transformers', each with an adapter of the same values."""
    models = []
    for auto in (AutoModelForCausalLM, transformers.AutoModelForCausalLM):
        model = peft.get_peft_model(auto.from_pretrained(folder), copy.deepcopy(settings))
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        models.append(model.eval())
    return models


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


PROMPTS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_equal_those_of_transformers(folder, kind):
    ours, theirs = both(folder, PROMPTS[kind])
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(ours.generate(input_ids=IDS, **options), theirs.generate(input_ids=IDS, **options))
    ours.train()
    ours(IDS, labels=IDS).loss.backward()


def test_the_base_is_named_and_resized_embeddings_are_saved(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.name_or_path == model.config.name_or_path == str(folder)
    model.resize_token_embeddings(70)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == str(folder)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 70
    assert (logits(loaded) - logits(model.eval())).abs().max() < 1e-5


@pytest.mark.parametrize("targets", [["q_proj", "fc1"], ["lm_head", "v_proj"], "all-linear"], ids=str)
def test_merged_equals_unmerged(folder, targets, tmp_path):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(target_modules=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape))
    embedding = model.get_input_embeddings().weight.clone()
    unmerged = logits(model.eval())
    merged = model.merge_and_unload()
    assert (logits(merged) - unmerged).abs().max() < 1e-4
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    merged.save_pretrained(tmp_path)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path)) - unmerged).abs().max() < 1e-4


def test_the_idioms_of_guides(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.use_cache = False
    assert model(IDS).past_key_values is None
    model.config.use_cache = True
    assert model(IDS).past_key_values is not None
    assert model.train()(IDS).past_key_values is None
    assert model(IDS, use_cache=True).past_key_values is not None
    model.generation_config.pad_token_id = 5
    assert model.generate(IDS, max_new_tokens=1).shape == (2, 5)
    model.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert model(IDS).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(IDS).logits.requires_grad


def test_the_loss_over_a_number_of_items(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for number in (None, 5, torch.tensor(9)):
        ours = model(IDS, labels=IDS, num_items_in_batch=number).loss
        assert torch.allclose(ours, theirs(IDS, labels=IDS, num_items_in_batch=number).loss, rtol=1e-5)


def test_unknown_keywords_are_named_and_none_is_no_keyword(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model(IDS, token_type_ids=None)
    with pytest.raises(InputError, match="OPTForCausalLM has no argument token_type_ids"):
        model(IDS, token_type_ids=torch.zeros_like(IDS))


def test_a_model_without_values_is_tied():
    model = AutoModelForCausalLM.from_config(CONFIGS["opt"], seed=None)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.num_parameters() == sum(CONFIGS["opt"].count_parameters().values())
    assert all(parameter.is_meta for parameter in model.parameters())
    np.testing.assert_equal(len(list(model.parameters())), len(set(model.parameters())))
