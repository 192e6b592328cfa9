"""`transformers.Trainer` and trl's `SFTTrainer` on our models, beside the same run on Transformers' own class."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from olmozoo.pt import AutoModelForCausalLM
from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.configs import CONFIGS

pytestmark = [pytest.mark.pt, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TEXT = "the quick brown fox jumps over the lazy dog and then the dog sleeps all day long "


@pytest.fixture(scope="module", params=["opt", "olmo2"])
def folder(request, tmp_path_factory):
    config = CONFIGS[request.param].replace(vocab_size=300, max_position_embeddings=64)
    if request.param == "opt":
        config = config.replace(dropout=0.0)
    folder = write_checkpoint(tmp_path_factory.mktemp(request.param) / "base", config, dtype="float32")
    train_tokenizer(folder, TEXT)
    return folder


def arguments(cls, folder, **options):
    return cls(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", "learning_rate": 5e-3} | options,
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows(count=32):
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        ids = torch.randint(2, 20, (12,), generator=generator)
        labels = ids.clone()
        labels[: number % 5] = -100
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_trainer_equals_a_run_on_transformers_class(folder, tmp_path):
    found = []
    for auto in (AutoModelForCausalLM, transformers.AutoModelForCausalLM):
        trainer = transformers.Trainer(
            auto.from_pretrained(folder),
            arguments(transformers.TrainingArguments, tmp_path),
            train_dataset=list(rows()),
        )
        found.append(losses(trainer))
    assert len(found[0]) == 6
    assert sum(found[0][3:]) < sum(found[0][:3])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Trainer(transformers.Trainer):
    """As docs/pytorch.md shows it."""

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        self.model.config.save_pretrained(output_dir or self.args.output_dir)


def test_checkpoints_resume_and_the_best_one_loads(folder, tmp_path):
    """The folder of OPT has tied weights, that of OLMo 2 has not."""
    data = list(rows())
    options = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 5e-2,
    }

    def trainer():
        model = AutoModelForCausalLM.from_pretrained(folder)
        return Trainer(
            model,
            arguments(transformers.TrainingArguments, tmp_path, **options),
            train_dataset=data,
            eval_dataset=data[:4],
        )

    whole, resumed = trainer(), trainer()
    expected = losses(whole)
    best = whole.state.best_model_checkpoint
    whole.save_model(tmp_path / "best")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == pytest.approx(expected)
    for path in (best, tmp_path / "best"):
        again = AutoModelForCausalLM.from_pretrained(path)
        assert again.config == whole.model.config
        for name, tensor in whole.model.named_parameters():
            assert torch.equal(tensor, again.get_parameter(name)), name
    tied = whole.model.config.tie_word_embeddings
    assert (whole.model.lm_head.weight is whole.model.get_input_embeddings().weight) == tied


def test_sft_trainer_equals_a_run_on_transformers_class(folder, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|padding|>"
    )
    data = datasets.Dataset.from_list([{"text": TEXT[n:]} for n in range(16)])
    found = []
    for auto in (AutoModelForCausalLM, transformers.AutoModelForCausalLM):
        options = arguments(trl.SFTConfig, tmp_path, max_length=32, bf16=False)
        trainer = trl.SFTTrainer(auto.from_pretrained(folder), options, train_dataset=data, processing_class=tokenizer)
        found.append(losses(trainer))
    assert found[0][-1] < found[0][0]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
