"""Attention masks of four dimensions: what each query sees, or floats that are added to the scores."""

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.backends import load
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.configs import BOUND, CONFIGS, OTHERS, REFERENCE
from tests.helpers.wings import WINGS, scope

NAMES = ["olmo2", "olmo-clip-tied", "opt-projected-post-norm"]
LENGTHS = (4, 6)  # of two documents, packed into a row
CAUSAL = np.tril(np.ones((sum(LENGTHS), sum(LENGTHS)), bool))
FIRST = np.arange(sum(LENGTHS)) < LENGTHS[0]
PACKED = (CAUSAL & (FIRST[:, None] == FIRST))[None, None]  # (1, 1, s, t): each document sees itself alone
IDS = np.random.default_rng(0).integers(2, 61, (2, sum(LENGTHS)))
POSITIONS = np.concatenate([np.arange(length) for length in LENGTHS])[None]


@pytest.fixture(params=NAMES, scope="module")
def folder(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


def answers(model, wing, ids, mask, **inputs):
    """The logits, in float64; arrays as the wing takes them."""
    if wing == "pt":
        import torch

        inputs = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}
    return model.forward(ids, mask, **inputs)["logits"]


@pytest.mark.parametrize("wing", WINGS)
def test_packed_documents_are_as_if_alone(folder, wing):
    model = load(folder, wing, "float64")
    alone = [model.forward(ids, np.ones_like(ids))["logits"] for ids in np.split(IDS, LENGTHS[:1], axis=1)]
    expected = np.concatenate(alone, axis=1)
    smallest = np.finfo(np.float64).min
    for mask in (PACKED, PACKED.astype(np.int64), np.where(PACKED, 0.0, -np.inf), np.where(PACKED, 0.0, smallest)):
        mask = np.repeat(mask, 2, axis=0)
        for attentions in (False, True)[: 2 if wing == "pt" else 1]:  # they take another path in PyTorch alone
            found = answers(model, wing, IDS, mask, position_ids=POSITIONS, output_attentions=attentions)
            assert np.abs(found - expected).max() <= BOUND
    plain = answers(model, wing, IDS, np.ones_like(IDS), position_ids=POSITIONS)
    assert np.abs(plain - expected).max() > 1e-3


@pytest.mark.parametrize("wing", OTHERS)
def test_masks_of_each_head_and_biases_agree(folder, wing):
    reference, other = load(folder, REFERENCE, "float64"), load(folder, wing, "float64")
    stream = np.random.default_rng(1)
    seen = CAUSAL & (stream.random((2, 4, *CAUSAL.shape)) < 0.7) | np.eye(len(CAUSAL), dtype=bool)
    bias = np.where(CAUSAL, stream.standard_normal((2, 4, *CAUSAL.shape)), -np.inf)
    for mask in (seen, bias, bias[:, :1], bias.astype(np.float32)):
        expected, found = (answers(model, each, IDS, mask) for model, each in ((reference, REFERENCE), (other, wing)))
        assert np.abs(found - expected).max() <= BOUND


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("kind", ["tuple", "object"])
def test_masks_of_four_dimensions_go_with_caches(folder, wing, kind):
    backend = load(folder, wing, "float64")
    mask = np.repeat(np.where(PACKED, 0.0, -np.inf), 2, axis=0)
    expected = answers(backend, wing, IDS, mask, position_ids=POSITIONS)
    begin = LENGTHS[0] + 2
    with scope(wing):
        cache = None if kind == "tuple" else backend.model.init_cache(2, 13)
    for whole in (mask, mask > -1):
        first = whole[:, :, :begin, :begin]
        inputs = {"position_ids": POSITIONS[:, :begin], "past_key_values": cache, "use_cache": True}
        output = forward(backend, wing, IDS[:, :begin], first, **inputs)
        inputs = {"position_ids": POSITIONS[:, begin:], "past_key_values": output.past_key_values}
        found = forward(backend, wing, IDS[:, begin:], whole[:, :, begin:], **inputs).logits
        assert np.abs(np.asarray(found) - expected[:, begin:]).max() <= BOUND
        if wing == "pt" and cache is not None:
            cache.rewind(0)  # which was changed in place


def forward(backend, wing, ids, mask, **inputs):
    """The wing's own output, with its cache."""
    arrays = {"input_ids": ids, "attention_mask": mask, **inputs}
    if wing == "pt":
        import torch

        arrays = {n: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for n, x in arrays.items()}
        with torch.inference_mode():
            return backend.model(**arrays)
    with scope(wing):
        return backend.model(**arrays)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_query_that_sees_nothing_gives_no_nan(folder, wing, dtype):
    mask = np.repeat(np.where(PACKED, 0.0, -np.inf), 2, axis=0).astype(np.float32)
    mask[:, :, 3] = -np.inf
    assert np.isfinite(answers(load(folder, wing, dtype), wing, IDS, mask)).all()


@pytest.mark.parametrize("wing", [wing for wing in WINGS if wing.values[0] != "pt"])
def test_a_mask_of_another_shape_is_named(folder, wing):
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 1, 10, 9\), expected"):
        answers(load(folder, wing, "float64"), wing, IDS, np.repeat(PACKED, 2, axis=0)[..., :9])
