"""Losses and gradients of PyTorch models: recomputed, on two processes, and with adapters."""

import subprocess
import sys
from pathlib import Path

import pytest

from olmozoo import InputError, OPTConfig
from tests.helpers.configs import config_of
from tests.helpers.pt_models import CLASSES

torch = pytest.importorskip("torch")

from olmozoo import pt


def test_labels_that_are_all_ignored_give_no_loss_and_no_nan(model, batch):
    assert model(*batch, labels=torch.full_like(batch[0], -100)).loss.item() == 0.0


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_gradient_checkpointing_changes_no_gradient(cls, batch):
    grads = []
    for enable in (False, True):
        model = cls(
            config_of(cls).replace(**({"dropout": 0.0} if cls.config_class is OPTConfig else {})), seed=1
        ).train()
        if enable:
            model.gradient_checkpointing_enable()
        output = model(*batch, use_cache=True)
        assert ("past_key_values" in output) != enable
        output[0].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "cls",
    [pt.Olmo2ForCausalLM, pt.OlmoForCausalLM, pt.OPTForCausalLM, pt.OPTForSequenceClassification],
    ids=lambda cls: cls.__name__,
)
def test_peft_adds_trains_saves_loads_and_merges_adapters(cls, batch, tmp_path):
    peft = pytest.importorskip("peft")
    ids, mask = batch
    causal = cls.head == "causal_lm"
    config = peft.LoraConfig(task_type="CAUSAL_LM" if causal else "SEQ_CLS", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(cls(config_of(cls), seed=1), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    labels = ids if causal else torch.tensor([0, 1, 1])
    for _ in range(3):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = model.eval()(input_ids=ids, attention_mask=mask).logits
    plain = cls(config_of(cls), seed=1).eval()
    assert not torch.allclose(plain(ids, mask).logits, tuned)
    with pytest.raises(InputError, match=r"not merged, such as model.*q_proj.lora_A.default.weight: call merge_and"):
        model.get_base_model().save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, tuned)
    if causal:
        tokens = again.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
        assert torch.equal(tokens, again.merge_and_unload().generate(ids, mask, max_new_tokens=4))


def test_two_processes_under_torchrun_get_the_gradient_of_the_whole_batch(tmp_path):
    program = tmp_path / "train.py"
    program.write_text(f"""
import sys
import torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from olmozoo import pt
from tests.helpers.checkpoints import left_padded
from tests.helpers.configs import SMALL_OLMO, SMALL_OLMO2, SMALL_OPT
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
ids, mask = (torch.from_numpy(array) for array in left_padded(SMALL_OLMO2, batch=4))
mine = slice(2 * rank, 2 * rank + 2)
for config in (SMALL_OLMO2, SMALL_OLMO, SMALL_OPT.replace(dropout=0.0)):
    model = torch.nn.parallel.DistributedDataParallel(pt.AutoModelForCausalLM.from_config(config, seed=1))
    model(input_ids=ids[mine], attention_mask=mask[mine], labels=ids[mine]).loss.backward()
    whole = pt.AutoModelForCausalLM.from_config(config, seed=1)
    sum(whole(ids[i : i + 2], mask[i : i + 2], labels=ids[i : i + 2]).loss / 2 for i in (0, 2)).backward()
    for ours, expected in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(ours.grad, expected.grad)
print("agreed")
""")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("agreed") == 2, done.stderr
