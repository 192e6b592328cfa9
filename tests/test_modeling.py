"""Inputs that are wrong, and lists and arrays as inputs: alike in every wing."""

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.backends import BACKENDS, load
from olmozoo.families.parameter import ARCHITECTURES
from olmozoo.quantization import QuantizedTensor
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


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("auto", [False, True])
def test_keywords_of_transformers(folders, wing, auto):
    transformers = pytest.importorskip("transformers")
    config = CONFIGS["olmo2"]
    cls = made(wing, folders["olmo2"], config).__class__
    if auto:
        cls = getattr(BACKENDS[wing].module(), {"pt": "", "tf": "TF", "flax": "Flax"}[wing] + "AutoModelForCausalLM")
    harmless = {
        "attn_implementation": "sdpa",
        "low_cpu_mem_usage": True,
        "trust_remote_code": False,
        "device_map": "auto",
        "from_pt": True,
        "load_in_8bit": False,
    }
    model = cls.from_pretrained(folders["olmo2"], torch_dtype="bfloat16", **harmless)
    if wing == "tf":
        assert model.dtype_policy.name == "bfloat16"
    else:
        assert "bfloat16" in str(model.dtype)
    assert model.config == cls.from_pretrained(folders["olmo2"]).config
    theirs = transformers.AutoConfig.from_pretrained(folders["olmo2"])
    for given in (config.replace(rms_norm_eps=0.5), theirs):
        found = cls.from_pretrained(folders["olmo2"], config=given).config
        assert found.rms_norm_eps == given.rms_norm_eps
        assert found.hidden_size == config.hidden_size
    own = cls.from_config(theirs) if auto else cls(theirs)
    assert own.config.num_key_value_heads == config.num_key_value_heads
    for wrong, named in (
        ({"attn_implementation": "flash_attention_2"}, "expected 'eager' or 'sdpa'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "expected 8 or 4 bits of bitsandbytes"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "device_map is"),
    ):
        with pytest.raises(InputError, match=named):
            cls.from_pretrained(folders["olmo2"], **wrong)
    with pytest.warns(UserWarning, match="load_in_8bit: olmozoo quantizes the linear weights itself"):
        quantized = cls.from_pretrained(folders["olmo2"], load_in_8bit=True)
    assert any(isinstance(values, QuantizedTensor) for _, values in quantized.read_parameters())


@pytest.mark.tf
def test_a_mixed_policy_of_the_user_is_taken(folders):
    keras = pytest.importorskip("keras")
    pytest.importorskip("tensorflow")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = made("tf", folders["olmo2"], CONFIGS["olmo2"])
        given = (
            BACKENDS["tf"].model_class(CONFIGS["olmo2"], "causal_lm").from_pretrained(folders["olmo2"], dtype="float32")
        )
    finally:
        keras.config.set_dtype_policy(before)
    assert (model.compute_dtype, model.variable_dtype) == ("float16", "float32")
    assert given.compute_dtype == "float32"
