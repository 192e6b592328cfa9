"""Inputs that are wrong, and lists and arrays as inputs: alike in every wing."""

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.backends import BACKENDS, load
from olmozoo.families.parameter import ARCHITECTURES
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.wings import WINGS, scope

LIMIT = CONFIGS["opt"].max_position_embeddings


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_checkpoint(root / name, CONFIGS[name], dtype="float32") for name in ("opt", "olmo2")}


def made(wing, folder, config, head="causal_lm"):
    return BACKENDS[wing].model_class(config, head).from_pretrained(folder)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("family", ["opt", "olmo2"])
def test_ids_out_of_range_are_named(folders, wing, family):
    model = made(wing, folders[family], CONFIGS[family])
    backend = load(folders[family], wing)
    for bad in (61, -100, -1):
        ids = np.array([[5, 9, 3], [7, bad, 8]])
        with pytest.raises(InputError, match=rf"input_ids has {bad} at \[1, 1\], expected 0 to 60"):
            model(backend.to_framework(ids))
        with pytest.raises(InputError, match=rf"input_ids has {bad} at \[1, 1\], expected 0 to 60"):
            model(ids.tolist())
        with pytest.raises(InputError, match=rf"input_ids has {bad} in row 1, column 1"):
            model.generate(ids.tolist(), max_new_tokens=2)


@pytest.mark.parametrize("wing", WINGS)
def test_positions_out_of_range_are_named(folders, wing):
    model = made(wing, folders["opt"], CONFIGS["opt"])
    ids = np.full((1, LIMIT + 1), 5)
    for mask in (None, np.ones_like(ids)):
        with pytest.raises(
            InputError, match=rf"position_ids has {LIMIT} at \[0, {LIMIT}\], expected -2 to {LIMIT - 1}"
        ):
            model(input_ids=ids, attention_mask=mask)
    with pytest.raises(InputError, match="position_ids has 99"):
        model(input_ids=[[5]], position_ids=[[99]])
    mask = (np.arange(LIMIT + 1) > 0).astype(int)[None]
    model(input_ids=ids, attention_mask=mask)  # padding has no position of its own


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize(
    ("head", "labels", "wrong"),
    [
        ("causal_lm", [[5, -100, 61]], r"labels has 61 at \[0, 2\], expected 0 to 60, or -100"),
        ("causal_lm", [[5, -1, 6]], r"labels has -1 at \[0, 1\]"),
        ("sequence_classification", [2], r"labels has 2 at \[0\], expected 0 to 1, or -100"),
        ("sequence_classification", [-1], r"labels has -1 at \[0\], expected 0 to 1, or -100"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*started anew")
def test_labels_out_of_range_are_named(folders, wing, head, labels, wrong):
    assert ARCHITECTURES[head]
    model = made(wing, folders["olmo2"], CONFIGS["olmo2"], head)
    with scope(wing), pytest.raises(InputError, match=wrong):
        model(input_ids=[[5, 9, 3]], labels=labels)
    right = [[5, -100, 60]] if head == "causal_lm" else [1]
    assert np.isfinite(float(model(input_ids=[[5, 9, 3]], labels=right).loss))


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("family", ["opt", "olmo2"])
def test_empty_ids_are_one_named_error(folders, wing, family):
    model = made(wing, folders[family], CONFIGS[family])
    for shape in ((1, 0), (0, 3)):
        with pytest.raises(InputError, match=r"input_ids has shape \(\d, \d\), expected at least one row"):
            model(input_ids=np.zeros(shape, np.int64))
        with pytest.raises(InputError, match="at least one row and one token"):
            model.generate(np.zeros(shape, np.int64), max_new_tokens=2)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("family", ["opt", "olmo2"])
def test_lists_and_arrays_are_inputs(folders, wing, family):
    model = made(wing, folders[family], CONFIGS[family])
    backend = load(folders[family], wing)
    ids, mask = np.array([[0, 5, 9], [7, 6, 8]]), np.array([[0, 1, 1], [1, 1, 1]])
    expected = backend.forward(ids, mask)["logits"]
    for convert in (np.asarray, np.ndarray.tolist, backend.to_framework):
        output = model(convert(ids), convert(mask), labels=convert(ids))
        found = backend.to_numpy(output.logits.detach() if wing == "pt" else output.logits)
        np.testing.assert_allclose(found[mask > 0], expected[mask > 0], atol=1e-5)
        assert np.isfinite(float(output.loss))
        answer = model.generate(convert(ids), convert(mask), max_new_tokens=2)
        answer = answer.sequences if wing == "flax" else answer
        np.testing.assert_array_equal(answer, backend.generate(ids, mask, max_new_tokens=2))
    assert model([[5, 9]]).logits.shape[:2] == (1, 2)
