"""The heads for classification and question answering, and OPT's head_mask, in every wing."""

from importlib import import_module

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.backends import load
from olmozoo.families.parameter import ARCHITECTURES
from tests.helpers.checkpoints import left_padded, random_values, write_checkpoint
from tests.helpers.configs import CONFIGS, GRADIENT_BOUND, OTHERS, REFERENCE
from tests.helpers.wings import WINGS, call, gradients, model_class, scope

BOUND = 1e-9
CLASSIFIERS = ["olmo2-mqa-bias-tied", "olmo3", "olmo-clip-tied", "opt-projected-post-norm"]
LABELS = {
    "single_label_classification": np.array([2, 0, 1]),
    "multi_label_classification": np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "regression": np.array([0.3, -1.2, 2.0]),
}


def reference_answers(config, folder, ids, mask, **labels):
    """What Transformers computes for the same folder, in float64."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    head = "ForQuestionAnswering" if "start_positions" in labels else "ForSequenceClassification"
    model = getattr(transformers, config.name + head).from_pretrained(folder, dtype=torch.float64)
    arguments = {name: torch.from_numpy(value) for name, value in labels.items()}
    output = model(torch.from_numpy(ids), torch.from_numpy(mask), **arguments)
    return {name: value.detach().numpy() for name, value in output.items() if name == "loss" or "logits" in name}


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("problem", LABELS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_pool_and_lose_as_transformers_does(tmp_path, name, problem, wing):
    labels = LABELS[problem]
    config = CONFIGS[name].replace(num_labels=1 if problem == "regression" else 3, id2label=None, label2id=None)
    folder = write_checkpoint(tmp_path, config, "sequence_classification")
    ids, left = left_padded(config)
    for mask in (left, left[:, ::-1].copy()):
        padded = np.where(mask == 1, np.where(ids == 0, 7, ids), 0)
        expected = reference_answers(config, folder, padded, mask, labels=labels)
        found = call(
            wing, model_class(wing, config.name, "ForSequenceClassification"), folder, padded, mask, labels=labels
        )
        # The reference keeps norms and rotary tables in float32 here.
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=2e-5)
        named = config.replace(problem_type=problem)
        named.save_pretrained(folder)
        again = call(
            wing, model_class(wing, config.name, "ForSequenceClassification"), folder, padded, mask, labels=labels
        )
        assert again["loss"] == found["loss"]


@pytest.mark.parametrize("wing", OTHERS)
@pytest.mark.parametrize("name", ["olmo2", *CLASSIFIERS, "opt", "olmo-bias"])
def test_heads_agree_between_the_wings(tmp_path, name, wing):
    config = CONFIGS[name].replace(num_labels=3, id2label=None, label2id=None)
    ids, mask = left_padded(config)
    ids = np.where(mask == 1, np.where(ids == 0, 7, ids), 0)
    inputs = {"sequence_classification": {"labels": LABELS["multi_label_classification"]}}
    if config.name == "OPT":
        inputs["question_answering"] = {"start_positions": np.array([6, 7, 8]), "end_positions": np.array([7, 10, 40])}
    for head, labels in inputs.items():
        folder = write_checkpoint(tmp_path / head, config, head)
        options = {"output_hidden_states": True, "output_attentions": True, **labels}
        expected, found = (
            call(each, model_class(each, config.name, ARCHITECTURES[head]), folder, ids, mask, **options)
            for each in (REFERENCE, wing)
        )
        assert found.keys() == expected.keys()
        for key in ("loss", "logits"):
            if key in expected:
                assert np.abs(found[key] - expected[key]).max() <= BOUND, key
        for key in ("start_logits", "end_logits"):
            if key in expected:
                assert np.abs(found[key] - expected[key])[mask == 1].max() <= BOUND, key
        for ours, theirs in zip(found["hidden_states"], expected["hidden_states"], strict=True):
            assert np.abs(ours - theirs)[mask == 1].max() <= BOUND


@pytest.mark.parametrize("wing", OTHERS)
@pytest.mark.parametrize("problem", [*LABELS, "question_answering"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_gradients_of_heads_agree_between_the_wings(tmp_path, name, problem, wing):
    config = CONFIGS[name].replace(num_labels=1 if problem == "regression" else 3, id2label=None, label2id=None)
    head, labels = "sequence_classification", {"labels": LABELS.get(problem)}
    if problem == "question_answering":
        if config.name != "OPT":
            pytest.skip("only OPT has this head")
        head, labels = problem, {"start_positions": np.array([6, 7, 8]), "end_positions": np.array([7, 10, 40])}
    folder = write_checkpoint(tmp_path, config, head)
    ids, mask = left_padded(config)
    ids = np.where(mask == 1, np.where(ids == 0, 7, ids), 0)
    results = []
    for each in (REFERENCE, wing):
        with scope(each):
            model = model_class(each, config.name, ARCHITECTURES[head]).from_pretrained(folder)
        results.append(gradients(each, model, ids, mask, **labels))
    (loss, expected), (other_loss, found) = results
    assert abs(loss - other_loss) <= BOUND
    assert found.keys() == expected.keys()
    for key in expected:
        assert np.abs(expected[key]).max() > 0, key
        assert np.abs(found[key] - expected[key]).max() <= GRADIENT_BOUND, key


@pytest.mark.pt
@pytest.mark.parametrize("wing", OTHERS)
def test_pruned_heads_load_in_the_other_wings(tmp_path, wing):
    pytest.importorskip("torch")
    from olmozoo import pt

    config = CONFIGS["opt"]
    model = pt.OPTForCausalLM.from_pretrained(write_checkpoint(tmp_path / "whole", config))
    model.prune_heads({0: [1], 1: [0, 3]})
    model.save_pretrained(tmp_path / "pruned")
    ids, mask = left_padded(config)
    expected, found = (load(tmp_path / "pruned", each).forward(ids, mask)["logits"] for each in ("pt", wing))
    assert np.abs(found - expected)[mask == 1].max() <= BOUND
    expected, found = (load(tmp_path / "pruned", each).generate(ids, mask, max_new_tokens=9) for each in ("pt", wing))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("wing", WINGS)
def test_several_rows_without_a_pad_token_are_refused(tmp_path, wing):
    config = CONFIGS["olmo2"].replace(pad_token_id=None)
    folder = write_checkpoint(tmp_path, config, "sequence_classification")
    ids = np.arange(6).reshape(2, 3) + 2
    cls = model_class(wing, "Olmo2", "ForSequenceClassification")
    with pytest.raises(InputError, match="pad_token_id"):
        call(wing, cls, folder, ids, np.ones_like(ids))
    assert call(wing, cls, folder, ids[:1], np.ones_like(ids[:1]))["logits"].shape == (1, 2)


@pytest.mark.parametrize("wing", WINGS)
def test_arguments_of_another_head_are_named(tmp_path, wing):
    config = CONFIGS["opt"]
    ids, mask = left_padded(config)
    row = ids[:, 0]
    for head, wrong, named in (
        ("causal_lm", {"labels": ids, "start_positions": row}, "this head takes labels, not start_positions"),
        ("causal_lm", {"labels": ids, "logits_to_keep": 2}, "leave out logits_to_keep"),
        ("sequence_classification", {"end_positions": row}, "this head takes labels, not end_positions"),
        ("sequence_classification", {"logits_to_keep": 2}, "logits_to_keep is an argument of causal language models"),
        ("question_answering", {"labels": ids}, "this head takes start_positions and end_positions, not labels"),
    ):
        folder = write_checkpoint(tmp_path / head, config, head)
        with pytest.raises(InputError, match=named):
            call(wing, model_class(wing, "OPT", ARCHITECTURES[head]), folder, ids, mask, **wrong)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("name", ["opt", "opt-projected-post-norm"])
def test_question_answering_is_that_of_transformers(tmp_path, name, wing):
    config = CONFIGS[name]
    folder = write_checkpoint(tmp_path, config, "question_answering")
    ids, left = left_padded(config)
    mask = left[:, ::-1].copy()
    places = {
        "start_positions": np.array([2, 40, 5]),
        "end_positions": np.array([4, -3, 6]),
    }  # beyond: ignored, below: 0
    expected = reference_answers(config, folder, ids, mask, **places)
    found = call(wing, model_class(wing, "OPT", "ForQuestionAnswering"), folder, ids, mask, **places)
    for key in ("start_logits", "end_logits", "loss"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-9, atol=BOUND)


@pytest.mark.pt
@pytest.mark.parametrize("wing", WINGS)
def test_a_head_mask_takes_heads_away(tmp_path, wing):
    torch = pytest.importorskip("torch")
    from olmozoo import pt

    folder = write_checkpoint(tmp_path, CONFIGS["opt"])
    ids, mask = left_padded(CONFIGS["opt"])
    real = mask.astype(bool)
    head_mask = np.array([[1.0, 0.0, 0.5, 1.0], [0.0, 1.0, 1.0, 1.0]])
    found = call(wing, model_class(wing, "OPT", "ForCausalLM"), folder, ids, mask, head_mask=head_mask)["logits"]
    model = pt.OPTForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # a head's share of the output is its columns of out_proj: scale those instead
        for layer, factors in zip(model.model.decoder.layers, torch.from_numpy(head_mask), strict=True):
            layer.self_attn.out_proj.weight.mul_(factors.repeat_interleave(layer.self_attn.head_dim))
        expected = model(torch.from_numpy(ids), torch.from_numpy(mask)).logits.numpy()
    assert np.abs(found - expected)[real].max() <= BOUND
    whole = call(wing, model_class(wing, "OPT", "ForCausalLM"), folder, ids, mask)["logits"]
    assert np.abs(whole - expected)[real].max() > 1e-3
    shared = call(wing, model_class(wing, "OPT", "ForCausalLM"), folder, ids, mask, head_mask=head_mask[0])["logits"]
    assert np.abs(shared - found)[real].max() > 1e-3


@pytest.mark.parametrize("wing", WINGS)
def test_base_models_load_and_answer(tmp_path, wing):
    for name in ("olmo2", "olmo-bias", "opt-projected-post-norm"):
        config = CONFIGS[name]
        folder = write_checkpoint(tmp_path / name, config)
        ids, mask = left_padded(config)
        real = mask.astype(bool)
        causal = call(wing, model_class(wing, config.name, "ForCausalLM"), folder, ids, mask, output_hidden_states=True)
        base = call(wing, model_class(wing, config.name, "Model"), folder, ids, mask)
        assert np.abs(base["last_hidden_state"] - causal["hidden_states"][-1])[real].max() <= BOUND
        saved = write_checkpoint(tmp_path / f"{name}-base", config, None)
        again = call(wing, model_class(wing, config.name, "Model"), saved, ids, mask)
        assert np.abs(again["last_hidden_state"] - base["last_hidden_state"])[real].max() <= BOUND


@pytest.mark.parametrize("wing", WINGS)
def test_the_canonical_state_is_the_checkpoint_and_binds_again(tmp_path, wing):
    canonical_state = import_module(f"olmozoo.{wing}").canonical_state
    for name, head in (
        ("olmo-clip-tied", "causal_lm"),
        ("opt-projected-post-norm", None),
        ("opt", "question_answering"),
    ):
        config = CONFIGS[name]
        cls = model_class(wing, config.name, ARCHITECTURES[head])
        table = [parameter for parameter in config.parameters(head) if parameter.tied_to is None]
        with scope(wing):
            model = cls.from_pretrained(write_checkpoint(tmp_path / name, config, head))
            other = cls(config, seed=7, dtype="float64")
            other.bind_parameters((parameter, random_values(parameter)) for parameter in table)
        for state in (canonical_state(model), canonical_state(other)):
            assert list(state) == [parameter.name for parameter in table]
            for parameter in table:
                assert state[parameter.name].dtype == np.float64
                assert np.array_equal(state[parameter.name], random_values(parameter)), parameter.name


@pytest.mark.parametrize("wing", WINGS)
def test_a_classifier_from_a_language_model_announces_its_new_head(tmp_path, wing):
    config = CONFIGS["olmo2"]
    folder = write_checkpoint(tmp_path, config)
    ids, mask = left_padded(config)
    with pytest.warns(UserWarning, match=r"score\.weight"):
        output = call(wing, model_class(wing, "Olmo2", "ForSequenceClassification"), folder, ids, mask)
    assert output["logits"].shape == (3, 2)
