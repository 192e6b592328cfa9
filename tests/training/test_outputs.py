"""What a run leaves: folders of steps, adapters, the finished model, evaluations, samples."""

import contextlib
import copy
import json

import numpy as np
import pytest

pytest.importorskip("omegaconf", reason="olmozoo[training] is not installed")

from olmozoo import InputError, Olmo2Config
from olmozoo.backends import backend_class, load
from olmozoo.evaluation import scoring
from olmozoo.quantization import Quantization
from olmozoo.text.tokenizer import Tokenizer
from olmozoo.training.prepare import prepare
from tests.helpers.checkpoints import left_padded, train_tokenizer, write_checkpoint
from tests.helpers.runs import close, run, same_weights, weights_of, write_tokens
from tests.helpers.training import word_tokenizer, write_lines
from tests.helpers.wings import PRESENT, WINGS, needs

CONFIG = Olmo2Config(
    **{"vocab_size": 320, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 1, "eos_token_id": 0, "tie_word_embeddings": True},
)
LORA = {"rank": 2, "alpha": 8.0, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    write_checkpoint(folder / "start", CONFIG, dtype="float32")
    train_tokenizer(folder / "start", "The quick brown fox jumps over the lazy dog. " * 20)
    data = write_tokens(folder / "data", 300, 8 * 11)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("The fox", "a lazy dog", "x")))
    question = {"context": "The quick brown", "choices": [" fox", " dog", " lazy dog"], "answer": 0}
    (folder / "questions.jsonl").write_text((json.dumps(question) + "\n") * 3)
    return {
        **{"load_path": str(folder / "start"), "data": data, "max_sequence_length": 8, "max_duration": 6},
        **{"global_train_batch_size": 4, "save_interval": 3, "optimizer": {"learning_rate": 5e-3}},
        **{"eval_interval": 3, "sample_prompt": "The quick", "sample_tokens": 5},
        "evaluators": [
            {"label": "tokens", "paths": data["paths"][1:], "label_mask_paths": data["label_mask_paths"][1:]},
            {"label": "texts", "file": str(folder / "texts.jsonl")},
            {"label": "questions", "file": str(folder / "questions.jsonl")},
            {"label": "tokens-int8", "paths": data["paths"][1:], "quantization": "int8"},
            {"label": "texts-int4", "file": str(folder / "texts.jsonl"), "quantization": "int4", "group_size": 4},
        ],
    }


@pytest.fixture(scope="module", params=WINGS)
def finished(request, fields, tmp_path_factory):
    """A run in each wing. Evaluations of integers leave everything as it is."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    step = backend_class(request.param).training().TrainStep
    rounded, seen = step.rounded, []

    @contextlib.contextmanager
    def watched(self, quantization):
        before = copy.deepcopy((dict(self.values()), dict(self.moments())))
        with rounded(self, quantization):
            changed = {name for name, value in self.values() if (value != before[0][name]).any()}
            yield
        after = dict(self.values()), dict(self.moments())
        assert all(
            (values[name] == value).all()
            for old, values in zip(before, after, strict=True)
            for name, value in old.items()
        )
        seen.append((quantization, changed))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step, "rounded", watched)
        found = run(fields, backend=request.param, save_folder=str(folder))
    linear = {p.name for p in CONFIG.parameters() if p.kind == "linear"}
    assert seen == [(Quantization.of("int8"), linear), (Quantization.of("int4", 4), linear)] * 2
    return request.param, found


@pytest.fixture(scope="module", params=WINGS)
def adapted(request, fields, tmp_path_factory):
    """A run with LoRA in each wing, that was stopped and went on."""
    folder = tmp_path_factory.mktemp(request.param) / "lora"
    texts = fields["evaluators"][1]
    integers = {**texts, "label": "texts-int8", "quantization": "int8"}
    short = {**fields, "evaluators": [texts, integers], "lora": LORA, "backend": request.param}
    assert not run(short, save_folder=str(folder), stop_after=2).result.finished
    return request.param, short, run(short, save_folder=str(folder))


def logits(folder, wing, **options):
    ids, mask = left_padded(CONFIG, length=8)
    return load(folder, wing, **options).forward(ids, mask)["logits"] * mask[..., None]


def hugging_face(model):
    import torch

    ids, mask = left_padded(CONFIG, length=8)
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    return found * mask[..., None]


def test_a_step_is_a_model_of_every_wing_and_of_transformers(finished):
    from transformers import AutoModelForCausalLM

    _, found = finished
    expected = logits(found.folder / "step6", PRESENT[0])
    for wing in PRESENT:
        np.testing.assert_allclose(logits(found.folder / "step6", wing), expected, atol=2e-5)
    if "pt" in PRESENT:
        model = AutoModelForCausalLM.from_pretrained(found.folder / "step6", dtype="float32").eval()
        np.testing.assert_allclose(hugging_face(model), expected, atol=2e-5)
    same_weights(weights_of(found.folder / "step6"), found.weights(), 0)
    assert abs(logits(found.folder / "step3", PRESENT[0]) - expected).max() > 1e-2


def test_evaluations_are_those_of_evaluate(finished):
    wing, found = finished
    assert [line["step"] for line in found.evaluations] == [3, 6]
    for line in found.evaluations:
        folder = found.folder / f"step{line['step']}"
        backend, tokenizer = load(folder, wing), Tokenizer.from_pretrained(folder)
        result = scoring.perplexity(backend, tokenizer, scoring.read(texts(found)), batch_size=2)
        assert line["eval/texts/Perplexity"] == pytest.approx(result.perplexity, rel=1e-5)
        answers = scoring.multiple_choice(backend, tokenizer, scoring.read(texts(found, "questions")))
        assert line["eval/questions/accuracy"] == answers.accuracy
        assert line["eval/questions/accuracy_normalized"] == answers.accuracy_normalized


def texts(found, name="texts"):
    from olmozoo.training.config import load_config

    config, _ = load_config(found.folder / "config.yaml")
    return next(e.file for e in config.evaluators if e.label == name)


def test_evaluations_of_integers_are_those_of_the_quantized_model(finished, fields):
    wing, found = finished
    for line in found.evaluations:
        folder = found.folder / f"step{line['step']}"
        losses, _ = token_losses(load(folder, wing, quantization="int8"), fields)
        floats, _ = token_losses(load(folder, wing), fields)
        assert line["eval/tokens-int8/CrossEntropyLoss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert abs(losses.mean() - floats.mean()) > 1e-4
        backend = load(folder, wing, quantization="int4", group_size=4)
        result = scoring.perplexity(
            backend, Tokenizer.from_pretrained(folder), scoring.read(texts(found)), batch_size=2
        )
        assert line["eval/texts-int4/Perplexity"] == pytest.approx(result.perplexity, rel=1e-5)
        assert abs(line["eval/texts/Perplexity"] / result.perplexity - 1) > 1e-4


def test_groups_that_do_not_divide_a_layer_are_refused_before_the_first_step(fields, tmp_path):
    evaluators = [{**fields["evaluators"][0], "label": "whole", "quantization": "int4", "group_size": 8}]
    with pytest.raises(InputError, match="the evaluator whole: group_size 8 does not divide every layer, 4 does"):
        run({**fields, "evaluators": evaluators}, save_folder=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def token_losses(backend, fields):
    """Losses (instances, 7) on the tokens of the first evaluator, and which are learned."""
    entry = fields["evaluators"][0]
    ids = np.fromfile(entry["paths"][0], "uint16").reshape(-1, 8).astype(np.int64)
    mask = np.fromfile(entry["label_mask_paths"][0], "bool").reshape(-1, 8)[:, 1:]
    scores = backend.forward(ids, np.ones_like(ids))["logits"][:, :-1].astype(np.float64)
    scores = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return -np.take_along_axis(scores, ids[:, 1:, None], -1)[..., 0], mask


def test_the_loss_on_tokens_is_the_mean_over_those_that_are_learned(finished, fields):
    wing, found = finished
    losses, mask = token_losses(load(found.folder / "step6", wing), fields)
    assert found.evaluations[-1]["eval/tokens/CrossEntropyLoss"] == pytest.approx(losses[mask].mean(), rel=1e-5)
    assert found.evaluations[-1]["eval/tokens/Perplexity"] == pytest.approx(np.exp(losses[mask].mean()), rel=1e-5)


def test_the_finished_model_generates(finished):
    from typer.testing import CliRunner

    from olmozoo.cli import app

    wing, found = finished
    command = ["generate", str(found.folder / "model"), "The quick", "--backend", wing]
    result = CliRunner().invoke(app, [*command, "--max-new-tokens", "5", "--greedy"])
    if result.exit_code == 2:
        result = CliRunner().invoke(app, [*command, "--max-new-tokens", "5"])
    assert result.exit_code == 0, result.output
    samples = [line for line in found.text.splitlines() if line.startswith("sample: 'The quick' -> ")]
    assert len(samples) == 2


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_is_one_of_peft_and_of_every_wing(adapted, fields):
    _, _, found = adapted
    expected = logits(found.folder / "model", PRESENT[0])
    assert abs(expected - logits(fields["load_path"], PRESENT[0])).max() > 1e-2
    for other in PRESENT:
        np.testing.assert_allclose(logits(found.folder / "model", other), expected, atol=2e-5)
        np.testing.assert_allclose(logits(found.folder / "adapter", other), expected, atol=2e-5)
        np.testing.assert_allclose(logits(found.folder / "step6", other), expected, atol=2e-5)
        cls = type(load(found.folder / "model", other).model)
        assert cls.from_pretrained(fields["load_path"], adapter=found.folder / "adapter") is not None
    if "pt" in PRESENT:
        peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
        base = transformers.AutoModelForCausalLM.from_pretrained(fields["load_path"], dtype="float32")
        model = peft.PeftModel.from_pretrained(base, found.folder / "adapter").eval()
        np.testing.assert_allclose(hugging_face(model), expected, atol=2e-5)


def test_a_run_with_adapters_that_stopped_goes_on(adapted, tmp_path):
    _, short, found = adapted
    expected = run(short, save_folder=str(tmp_path), evaluators=short["evaluators"][:1])  # without integers
    lines = [{name: value for name, value in line.items() if "int8" not in name} for line in found.exact()]
    assert lines == expected.exact()
    same_weights(found.weights(), expected.weights(), 0)


def test_the_model_with_its_adapters_is_evaluated(adapted):
    wing, _, found = adapted
    backend, tokenizer = load(found.folder / "step6", wing), Tokenizer.from_pretrained(found.folder / "step6")
    result = scoring.perplexity(backend, tokenizer, scoring.read(texts(found)), batch_size=2)
    assert found.evaluations[-1]["eval/texts/Perplexity"] == pytest.approx(result.perplexity, rel=1e-5)
    integers = load(found.folder / "step6", wing, quantization="int8")
    rounded = scoring.perplexity(integers, tokenizer, scoring.read(texts(found)), batch_size=2)
    assert found.evaluations[-1]["eval/texts-int8/Perplexity"] == pytest.approx(rounded.perplexity, rel=1e-5)
    assert abs(rounded.perplexity / result.perplexity - 1) > 1e-4
    samples = [line for line in found.text.splitlines() if line.startswith("sample: ")]
    from olmozoo.text.pipeline import TextGenerationPipeline

    text = TextGenerationPipeline(backend, tokenizer)("The quick", max_new_tokens=5, do_sample=False)
    assert samples[-1] == f"sample: 'The quick' -> {text!r}"


@needs("pt")
def test_adapters_on_a_checkpoint_of_another_format(fields, tmp_path):
    """The base is written, since an adapter has to name a folder."""
    from tests.training.test_ai2 import FIXTURES

    start = {"load_path": str(FIXTURES / "olmo1-continue" / "initial-unsharded"), "evaluators": [], "lora": LORA}
    start |= {"sample_prompt": None, "backend": "pt", "model": {}}
    data = {"paths": [str(FIXTURES / "olmo1-continue" / "data" / "part-0.npy")]}
    found = run({**fields, **start, "data": data}, save_folder=str(tmp_path / "run"), stop_after=4)
    found = run({**fields, **start, "data": data}, save_folder=str(tmp_path / "run"))
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "run" / "base")
    merged, adapter = found.weights(), weights_of(tmp_path / "run" / "adapter")
    same_weights(merged, adapter, 0)
    base = weights_of(tmp_path / "run" / "base")
    assert {n for n in base if (base[n] != merged[n]).any()} == {
        f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }


@needs("pt")
def test_the_adapter_of_another_run_goes_on(fields, tmp_path):
    start = {**fields, "lora": LORA, "evaluators": [], "sample_prompt": None, "backend": "pt"}
    whole = run(start, save_folder=str(tmp_path / "whole"))
    reset = {"reset_optimizer_state": False, "reset_trainer_state": False}
    found = run(start, save_folder=str(tmp_path / "more"), load_path=str(whole.folder / "step3"), **reset)
    close(found.curve("loss"), whole.curve("loss")[3:], 0)
    same_weights(found.weights(), whole.weights(), 0)
    wrong = {**start, "lora": {**LORA, "rank": 3}, "load_path": str(whole.folder / "step3")}
    with pytest.raises(InputError, match=r"does not fit the settings of lora") as caught:
        run(wrong, save_folder=str(tmp_path / "wrong"))
    assert "q_proj.lora_A.weight is [2, 24], expected [3, 24]" in str(caught.value)


def test_dropout_of_adapters_is_for_pytorch(fields, tmp_path, monkeypatch):
    lora = {**fields, "lora": {**LORA, "dropout": 0.5}, "evaluators": [], "sample_prompt": None}
    for wing in PRESENT:
        if wing != "pt":
            with pytest.raises(InputError, match=r"lora.dropout is 0.5, expected 0"):
                run(lora, save_folder=str(tmp_path / wing), backend=wing)
    if "pt" in PRESENT:
        found = run(lora, save_folder=str(tmp_path / "pt"), backend="pt")
        plain = run({**lora, "lora": LORA}, save_folder=str(tmp_path / "plain"), backend="pt")
        assert abs(found.curve("loss") - plain.curve("loss")).max() > 1e-4
    others = [wing for wing in PRESENT if wing != "pt"]
    if others:  # of a config that names none
        monkeypatch.setattr("olmozoo.backends.installed", lambda: others)
        with pytest.raises(InputError, match=r"lora.dropout is 0.5, expected 0"):
            run(lora, save_folder=str(tmp_path / "default"), backend=None)


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_bfloat16_learns_and_keeps_its_weights_in_float32(fields, wing, tmp_path):
    more = {"evaluators": [], "sample_prompt": None, "backend": wing, "max_duration": 15, "save_interval": None}
    found = run({**fields, **more}, save_folder=str(tmp_path), precision="amp_bf16")
    exact = run({**fields, **more}, save_folder=str(tmp_path / "exact"))
    losses = found.curve("loss_per_target")
    assert losses[-3:].mean() < losses[:3].mean() - 0.3
    assert 1e-5 < abs(found.curve("loss") - exact.curve("loss")).max() < 0.1
    weights = found.weights()
    assert {value.dtype for value in weights.values()} == {np.dtype("float32")}
    bits = np.concatenate([value.reshape(-1) for value in weights.values()]).view(np.uint32)
    assert (bits & 0xFFFF).astype(bool).mean() > 0.9  # no bfloat16 in disguise


@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "lora"])
def test_generation_stops_where_the_answers_of_chats_end(fields, tmp_path, lora):
    pytest.importorskip("torch")
    if lora:
        pytest.importorskip("peft")
    tokenizer = word_tokenizer()
    tokenizer.backend.add_special_tokens(["w9"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}w4 {% generation %}{{ m.content }} w9{% endgeneration %} "
        "{% else %}w3 {{ m.content }} w9 {% endif %}{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
    )
    chat = {"messages": [{"role": "user", "content": "w20"}, {"role": "assistant", "content": "w30 w31"}]}
    long = {"messages": [chat["messages"][0], {"role": "assistant", "content": "w30 w9 " * 9}]}  # its end is cut
    prepare(write_lines(tmp_path / "a.jsonl", [chat, long] * 4), tmp_path / "data", tokenizer=tokenizer, length=8)
    more = {
        "data": {"paths": [str(tmp_path / "data")]},
        "evaluators": [],
        "tokenizer": str(tmp_path / "data/tokenizer"),
    }
    run({**fields, **more}, backend="pt", save_folder=str(tmp_path / "run"), max_duration=1, lora=lora)
    for folder in ("model", "step1", *(["adapter"] if lora else [])):
        model = load(tmp_path / "run" / folder, "pt")
        assert model.generation_config.eos_token_id == [0, 9], folder
        assert model.config.eos_token_id == 0


@pytest.mark.parametrize("wing", WINGS)
def test_an_evaluation_has_the_length_and_the_mask_of_its_prepared_data(fields, tmp_path, wing):
    needs(wing)
    texts = write_lines(tmp_path / "a.jsonl", [{"text": f"w{n} w20 w{n + 1} w30"} for n in range(40, 52)])
    for folder, length in (("same", 8), ("other", 6)):
        prepare(texts, tmp_path / folder, tokenizer=word_tokenizer(), length=length, packing="none")
    np.tile(np.arange(6) < 3, (12, 1)).tofile(tmp_path / "mask.npy")
    evaluators = [
        {"label": "same", "paths": [str(tmp_path / "same")]},
        {"label": "other", "paths": [str(tmp_path / "other")]},
        {"label": "masked", "paths": [str(tmp_path / "other")], "label_mask_paths": [str(tmp_path / "mask.npy")]},
    ]
    short = {**fields, "evaluators": evaluators, "max_duration": 1, "sample_prompt": None}
    (line,) = run(short, backend=wing, save_folder=str(tmp_path / "run")).evaluations
    same, other, masked = (line[f"eval/{x['label']}/CrossEntropyLoss"] for x in evaluators)
    assert abs(same - other) < 1e-5  # padding apart, the instances are the same
    assert abs(masked - other) > 1e-3
