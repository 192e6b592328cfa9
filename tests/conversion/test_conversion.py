"""AI2's native trainer and OLMo-core, to a canonical folder and back.

`fixtures/native` and `fixtures/trainer` were written by the trainer's own code (ai2-olmo 0.6.0), the sharded ones under
FSDP, with the logits it computed; `fixtures/olmo_core` by OLMo-core's (ai2-olmo-core 3.0.0).
"""

import importlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.conversions import FIXTURES, ROOT, assert_logits, run_program, tree
from tests.helpers.wings import WINGS

yaml = pytest.importorskip("yaml")

from conversion import archives, common, olmo_core, olmo_native, pickles, sharded, tensors
from olmozoo import FlexOlmoConfig, Olmo2Config, Olmo3Config, OlmoConfig, OlmoeConfig, OPTConfig
from olmozoo.checkpoint.files import write_json
from olmozoo.checkpoint.formats.pytorch import write as write_pickled
from olmozoo.checkpoint.formats.safetensors import read_tensors as read_safetensors
from olmozoo.checkpoint.formats.safetensors import write as write_safetensors
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import CheckpointError, ConfigError, InputError
from olmozoo.families.config import ModelConfig, read_json

NATIVE = {path.name: path for path in sorted((FIXTURES / "native").iterdir())}
TRAINER = {path.name: path for path in sorted((FIXTURES / "trainer").iterdir())}
CORE = FIXTURES / "olmo_core"
PROGRAMS = {"olmo_native": (olmo_native, NATIVE["olmo2-gqa"]), "olmo_core": (olmo_core, CORE)}


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("src", [*NATIVE.values(), *TRAINER.values()], ids=lambda path: path.name)
def test_native_checkpoints_give_the_trainers_logits(tmp_path, src, wing):
    olmo_native.main(src, tmp_path / "out")
    assert_logits(tmp_path / "out", wing, src)


@pytest.mark.parametrize("wing", WINGS)
def test_an_olmo_core_checkpoint_gives_its_logits(tmp_path, wing):
    olmo_core.main(CORE, tmp_path / "out")
    assert_logits(tmp_path / "out", wing, CORE)


@pytest.mark.parametrize("src", [*NATIVE.values(), *TRAINER.values()], ids=lambda path: path.name)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_back_and_forth_is_the_same_folder_byte_for_byte(tmp_path, src, form):
    olmo_native.main(src, tmp_path / "canonical")
    olmo_native.main(tmp_path / "canonical", tmp_path / "native", reverse=True, form=form)
    olmo_native.main(tmp_path / "native", tmp_path / "again")
    assert tree(tmp_path / "canonical") == tree(tmp_path / "again")


def test_olmo_core_back_and_forth_is_the_same_folder(tmp_path):
    olmo_core.main(CORE, tmp_path / "canonical", max_sequence_length=64)
    olmo_core.main(tmp_path / "canonical", tmp_path / "core", reverse=True)
    olmo_core.main(tmp_path / "core", tmp_path / "again")
    assert tree(tmp_path / "canonical") == tree(tmp_path / "again")
    assert read_json(tmp_path / "again/config.json")["max_position_embeddings"] == 64


def test_an_olmo_in_olmo_core_goes_back_and_forth(tmp_path):
    olmo_native.main(NATIVE["olmo1-mha-clip"], tmp_path / "canonical")
    olmo_core.main(tmp_path / "canonical", tmp_path / "core", reverse=True)
    olmo_core.main(tmp_path / "core", tmp_path / "again")
    assert tree(tmp_path / "canonical") == tree(tmp_path / "again")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 30, "beta_slow": 2}
OLMO3 = Olmo3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"] * 2,
    rope_scaling={**YARN, "attention_factor": 1.1386294361119891},
    rms_norm_eps=1e-6,
    pad_token_id=1,
    eos_token_id=2,
)
WINDOWS = {"_CLASS_": "olmo_core.nn.attention.SlidingWindowAttentionConfig", "pattern": [8, 8, 8, -1]}
FORCED = [f"force_full_attention_on_{end}_layer" for end in ("first", "last")]


def core_of(folder, config=OLMO3):
    """The config.json that an OLMo 3 has in OLMo-core."""
    olmo_core.main(write_checkpoint(folder / "canonical", config, dtype="float32"), folder / "core", reverse=True)
    return read_json(folder / "core/config.json")


@pytest.mark.parametrize("scaling", [None, YARN, OLMO3.rope_scaling], ids=["none", "yarn", "factor"])
def test_an_olmo3_in_olmo_core_goes_back_and_forth(tmp_path, scaling):
    model = core_of(tmp_path, OLMO3.replace(rope_scaling=scaling))["model"]
    mixer = model["block"]["sequence_mixer"]
    assert mixer["sliding_window"] == WINDOWS | {"pattern": [8, -1, 8]} | dict.fromkeys(FORCED, False)
    assert "scaling" not in mixer["rope"]
    assert list(model.get("block_overrides", ())) == ([] if scaling is None else ["1", "4"])
    for block in model.get("block_overrides", {}).values():
        found = block["sequence_mixer"]["rope"].pop("scaling")
        assert found == {
            "_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig",
            "factor": 4.0,
            "beta_fast": 30,
            "beta_slow": 2,
            "old_context_len": 32,
        }
        assert block == model["block"]
    olmo_core.main(tmp_path / "core", tmp_path / "again")
    again = ModelConfig.from_folder(tmp_path / "again")
    expected = OLMO3 if scaling else OLMO3.replace(rope_scaling=None)  # with its attention factor written out
    assert again.replace(extra={}) == expected
    olmo_core.main(tmp_path / "again", tmp_path / "core2", reverse=True)
    olmo_core.main(tmp_path / "core2", tmp_path / "last")
    assert tree(tmp_path / "again") == tree(tmp_path / "last")


@pytest.mark.parametrize(
    ("free", "full"), [([], {0, 4, 5}), (FORCED[:1], {3, 5}), (FORCED[1:], {0, 4}), (FORCED, {3})], ids=str
)
def test_the_windows_of_olmo_core(tmp_path, free, full):
    """The first and the last layer are full by default; the pattern begins after such a first one."""
    data = core_of(tmp_path)
    data["model"]["block_overrides"] = None
    data["model"]["block"]["sequence_mixer"]["sliding_window"] = WINDOWS | dict.fromkeys(free, False)
    config = olmo_core.to_config(data, tmp_path, None)
    assert {i for i, window in enumerate(config.windows) if window is None} == full
    assert config.sliding_window == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["block"]["sequence_mixer"]["sliding_window"].update(pattern=[8, 4, -1]), r"the windows \[4, 8\]"),
        (lambda m: m["block"]["sequence_mixer"]["sliding_window"].update(pattern=[8, 0]), r"pattern is \[8, 0\]"),
        (lambda m: m["block_overrides"]["1"]["feed_forward"].update(hidden_size=1), r"block_overrides\.1 differs"),
        (lambda m: m["block_overrides"].update({"9": m["block"]}), r"block_overrides\.9 differs"),
        (lambda m: m["block_overrides"].pop("1"), "rope.scaling differs between layers with full_attention"),
        (
            lambda m: m["block_overrides"]["1"]["sequence_mixer"]["rope"]["scaling"].update(_CLASS_="other"),
            "expected one of olmo_core.nn.rope.YaRN",
        ),
        (lambda m: m.update(block_overrides=7), "block_overrides"),
    ],
)
def test_an_olmo3_of_olmo_core_that_cannot_be_expressed_is_refused(tmp_path, change, message):
    data = core_of(tmp_path)
    change(data["model"])
    with pytest.raises(ConfigError, match=message):
        olmo_core.to_config(data, tmp_path, None)


SMALL = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 1e5, "rms_norm_eps": 1e-6},
}
EXPERTS = {
    "flex_olmo": FlexOlmoConfig(**SMALL, num_experts=3, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**SMALL, num_experts=5, num_experts_per_tok=1, norm_topk_prob=True),
}


@pytest.mark.parametrize("kind", ["dropless", "default"])
@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_in_olmo_core_goes_back_and_forth(tmp_path, family, kind):
    config = EXPERTS[family]
    data = core_of(tmp_path, config)
    folder, block = tmp_path / "core", data["model"]["block"]
    assert (data["model"]["name"], block["name"]) == ("moe", "moe" if family == "olmoe" else "moe_reordered_norm")
    found = sharded.read_distributed(folder / olmo_core.FOLDER, olmo_core.PREFIX)
    source = Checkpoint(tmp_path / "canonical")
    count, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size
    layer = "blocks.1.feed_forward_moe."
    assert np.array_equal(found[f"{layer}router.weight"].read(), source["model.layers.1.mlp.gate.weight"].reshape(-1))
    for name, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        whole = found[f"{layer}experts.mlp.{name}"].read().reshape(count, inner, hidden)
        for expert in range(count):
            weight = source[f"model.layers.1.mlp.experts.{expert}.{ours}.weight"]
            assert np.array_equal(whole[expert], weight.T if name == "w2" else weight)
    if kind == "default":  # each expert of w1 and w3 is transposed
        block["feed_forward_moe"]["name"] = "default"
        write_json(folder / "config.json", data)
        for layer, name in ((layer, name) for layer in range(2) for name in ("w1", "w3")):
            key = f"blocks.{layer}.feed_forward_moe.experts.mlp.{name}"
            found[key] = olmo_core.transposed_blocks(found[key], count)
            assert found[key].shape == (count * hidden, inner)
        arrays = {name: np.array(tensor.read()) for name, tensor in found.items()}
        shutil.rmtree(folder / olmo_core.FOLDER)
        changed = [LazyTensor(name, x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()]
        sharded.write_distributed(folder / olmo_core.FOLDER, changed, "model")
    olmo_core.main(folder, tmp_path / "again")
    (tmp_path / "again/generation_config.json").unlink()  # which the first folder has not
    assert tree(tmp_path / "again") == tree(tmp_path / "canonical")


def test_any_rows_of_transposed_blocks():
    blocks = np.arange(3 * 4 * 5).reshape(3 * 4, 5)
    tensor = LazyTensor("x", blocks.dtype, blocks.shape, lambda: blocks)
    expected = np.concatenate([blocks[i : i + 4].T for i in (0, 4, 8)])
    found = olmo_core.transposed_blocks(tensor, 3)
    assert found.shape == (15, 4)
    assert all(np.array_equal(found.rows(i, j), expected[i:j]) for i in range(15) for j in range(i + 1, 16))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("feed_forward_moe.name", "v2"),
        ("feed_forward_moe.shared_mlp", {"hidden_size": 4}),
        ("feed_forward_moe.num_experts", 0),
        ("feed_forward_moe.router.gating_function", "sigmoid"),
        ("feed_forward_moe.router.normalize_expert_weights", 2.0),
        ("feed_forward_moe.router.bias_gamma", 1e-4),
        ("feed_forward", {"hidden_size": 4}),
    ],
)
def test_experts_of_olmo_core_that_cannot_be_expressed_are_refused(tmp_path, path, value):
    data = core_of(tmp_path, EXPERTS["flex_olmo"])
    *parents, field = path.split(".")
    section = data["model"]["block"]
    for parent in parents:
        section = section[parent]
    section[field] = value
    with pytest.raises(ConfigError, match=rf"model\.block\.{path}"):
        olmo_core.to_config(data, tmp_path, None)


@pytest.mark.parametrize("name", NATIVE)
def test_pytorch_loads_what_reverse_writes_and_it_is_the_trainers_own(tmp_path, name):
    torch = pytest.importorskip("torch")
    olmo_native.main(NATIVE[name], tmp_path / "canonical")
    olmo_native.main(tmp_path / "canonical", tmp_path / "native", reverse=True)
    expected = torch.load(NATIVE[name] / "model.pt", weights_only=True)
    for mmap in (False, True):
        found = torch.load(tmp_path / "native/model.pt", weights_only=True, mmap=mmap)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values()) or not mmap


def test_pytorchs_own_reader_loads_the_distributed_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    olmo_core.main(CORE, tmp_path / "canonical")
    olmo_core.main(tmp_path / "canonical", tmp_path / "core", reverse=True)
    sources = olmo_core.core_sources(CORE, ModelConfig.from_pretrained(tmp_path / "canonical"))
    state = {"model": {name: torch.zeros(source.shape) for name, source in sources.items()}}
    dcp.load(state, checkpoint_id=str(tmp_path / "core/model_and_optim"), no_dist=True)
    for name, source in sources.items():
        assert np.array_equal(state["model"][name].numpy(), source.read())


def test_the_distributed_checkpoint_is_described_as_pytorch_describes_one(tmp_path):
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    olmo_core.main(CORE, tmp_path / "canonical")
    olmo_core.main(tmp_path / "canonical", tmp_path / "core", reverse=True)
    sources = olmo_core.core_sources(CORE, ModelConfig.from_pretrained(tmp_path / "canonical"))
    state = {"model": {name: torch.tensor(source.read()) for name, source in sources.items()}}
    dcp.save(state, checkpoint_id=str(tmp_path / "theirs"), no_dist=True)
    theirs = dcp.FileSystemReader(tmp_path / "theirs").read_metadata()
    ours = dcp.FileSystemReader(tmp_path / "core/model_and_optim").read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    for place in ours.storage_data.values():
        assert type(place) is type(next(iter(theirs.storage_data.values())))
        assert (tmp_path / "core/model_and_optim" / place.relative_path).stat().st_size == place.length


def test_reading_torch_files_needs_no_pytorch(tmp_path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from conversion import olmo_core, olmo_native\n"
        "from pathlib import Path\n"
        "core, native, out = map(Path, sys.argv[1:])\n"
        "olmo_core.main(core, out / 'a'); olmo_native.main(native, out / 'b')"
    )
    words = [sys.executable, "-c", program, str(CORE), str(NATIVE["olmo2-gqa"]), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_trainers_safetensors_keys(tmp_path):
    key = "gASVHwAAAAAAAACMFnRyYW5zZm9ybWVyLnd0ZS53ZWlnaHSUhZSJhpQu"  # as the trainer wrote it
    assert pickles.decode_key(key, "file") == "transformer.wte.weight"
    assert pickles.encode_key("transformer.wte.weight") == key
    assert any("." not in name for name in read_safetensors(TRAINER["mqa"] / "model.safetensors"))


def test_bfloat16_stays_as_it_is(tmp_path):
    olmo_native.main(TRAINER["bf16"], tmp_path / "out")
    found = read_safetensors(tmp_path / "out/model.safetensors")
    assert {info.dtype.name for info in found.values()} == {"bfloat16"}
    assert read_json(tmp_path / "out/config.json")["dtype"] == "bfloat16"


# -- configs ----------------------------------------------------------------------------------------------------------


def native_config(folder, tmp_path, **changes):
    data = yaml.safe_load((folder / "config.yaml").read_text())
    data["model"] |= changes
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    return olmo_native.to_config(olmo_native.read_config(tmp_path), tmp_path)


def test_every_field_of_a_native_config_arrives(tmp_path):
    changes = {
        "d_model": 96,
        "n_heads": 6,
        "n_kv_heads": 3,
        "n_layers": 5,
        "mlp_hidden_size": 200,
        "vocab_size": 50280,
        "embedding_size": 50304,
        "max_sequence_length": 77,
        "rope_theta": 12345,
        "weight_tying": True,
        "eos_token_id": 0,
        "pad_token_id": 7,
    }
    shared = {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 5,
        "intermediate_size": 100,
        "vocab_size": 50304,
        "max_position_embeddings": 77,
        "rope_theta": 12345.0,
        "tie_word_embeddings": True,
        "eos_token_id": 50279,
        "pad_token_id": 7,
        "bos_token_id": None,
    }
    found = native_config(NATIVE["olmo1-mha-clip"], tmp_path, **changes, clip_qkv=2.5)
    assert found == OlmoConfig(**shared, clip_qkv=2.5)
    found = native_config(NATIVE["olmo2-gqa"], tmp_path, **changes, layer_norm_eps="1e-7")
    assert found == Olmo2Config(**shared, rms_norm_eps=1e-7)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"n_kv_heads": None}, "num_key_value_heads", 4),
        ({"n_kv_heads": None, "multi_query_attention": True}, "num_key_value_heads", 1),
        ({"n_kv_heads": None, "multi_query_attention": False}, "num_key_value_heads", 4),
        ({"mlp_hidden_size": None, "mlp_ratio": 6}, "intermediate_size", 192),
        ({"embedding_size": None}, "vocab_size", 250),
        ({"eos_token_id": 0}, "eos_token_id", 0),  # there is no 50279 in a vocabulary of 256
        ({"eos_token_id": 3}, "eos_token_id", 3),
    ],
)
def test_what_native_configs_mean(tmp_path, changes, field, value):
    assert getattr(native_config(NATIVE["olmo1-mha-clip"], tmp_path, **changes), field) == value


OLMO, OLMO2 = "olmo1-mha-clip", "olmo2-gqa"


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        (OLMO, "alibi", True),
        (OLMO, "rope", False),
        (OLMO, "activation_type", "gelu"),
        (OLMO, "include_bias", True),
        (OLMO, "embedding_layer_norm", True),
        (OLMO, "scale_logits", True),
        (OLMO, "layer_norm_with_affine", True),
        (OLMO, "layer_norm_type", "rms"),
        (OLMO, "layer_norm_eps", 1e-6),
        (OLMO, "attention_layer_norm", True),
        (OLMO, "block_type", "parallel"),
        (OLMO, "mlp_hidden_size", 127),
        (OLMO2, "layer_norm_type", "default"),
        (OLMO2, "attention_layer_norm", False),
        (OLMO2, "attention_layer_norm_with_affine", False),
        (OLMO2, "layer_norm_with_affine", False),
        (OLMO2, "bias_for_layer_norm", True),
        (OLMO2, "clip_qkv", 1.0),
        (OLMO2, "block_type", "llama"),
        (OLMO2, "n_heads", "eight"),
    ],
)
def test_a_native_config_that_cannot_be_expressed_is_refused_by_its_field(tmp_path, name, field, value):
    with pytest.raises(ConfigError, match=rf"model\.{field} is"):
        native_config(NATIVE[name], tmp_path, **{field: value})


def test_kv_heads_said_twice_differently(tmp_path):
    with pytest.raises(ConfigError, match=r"n_kv_heads is 2, expected 1 by model\.multi_query_attention"):
        native_config(NATIVE[OLMO], tmp_path, n_kv_heads=2, multi_query_attention=True)


def test_every_problem_of_a_config_is_in_one_error(tmp_path):
    with pytest.raises(ConfigError, match=r"3 problem\(s\)") as error:
        native_config(NATIVE[OLMO], tmp_path, alibi=True, rope=False, include_bias=True)
    assert all(f"model.{field} is" in str(error.value) for field in ("alibi", "rope", "include_bias"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("block.name", "peri_norm"),
        ("block.sequence_mixer.sliding_window", {"pattern": []}),
        ("block.sequence_mixer.use_head_qk_norm", True),
        ("block.sequence_mixer.qk_norm", None),
        ("block.sequence_mixer.rope", None),
        ("block.sequence_mixer.rope.scaling", {"factor": 8}),
        ("block.sequence_mixer.head_dim", 16),
        ("block.sequence_mixer.name", "fused"),
        ("block.sequence_mixer.bias", True),
        ("block.layer_norm.bias", None),
        ("block.feed_forward.activation", "gelu_tanh"),
        ("lm_head.layer_norm.eps", 1e-3),
        ("block_overrides", {"0": {}}),
        ("embed_scale", 2.0),
        ("d_model", "wide"),
    ],
)
def test_an_olmo_core_config_that_cannot_be_expressed_is_refused_by_its_field(path, value):
    data = read_json(CORE / "config.json")
    *parents, field = path.split(".")
    section = data["model"]
    for parent in parents:
        section = section[parent]
    section[field] = value
    with pytest.raises(ConfigError, match=rf"model\.{path}"):
        olmo_core.to_config(data, CORE / "config.json", None)


def test_olmo_core_configs_before_version_3_say_attention():
    data = read_json(CORE / "config.json")
    expected = olmo_core.to_config(data, CORE, None)
    block = data["model"]["block"]
    block["attention"] = block.pop("sequence_mixer")
    assert olmo_core.to_config(data, CORE, None) == expected
    assert (expected.num_key_value_heads, expected.rope_theta, expected.rms_norm_eps) == (2, 500000.0, 1e-6)
    assert (expected.eos_token_id, expected.pad_token_id, expected.max_position_embeddings) == (2, 1, 4096)
    for norm in (block["layer_norm"], block["attention"]["qk_norm"], data["model"]["lm_head"]["layer_norm"]):
        norm["eps"] = None
    assert olmo_core.to_config(data, CORE, None).rms_norm_eps == 1e-5
    data["dataset"]["sequence_length"] = 128
    assert olmo_core.to_config(data, CORE, None).max_position_embeddings == 128


@pytest.mark.parametrize("module", [olmo_native, olmo_core])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OPTConfig(hidden_size=32, num_attention_heads=2, ffn_dim=64, vocab_size=50), "model_type is 'opt'"),
        (OlmoConfig(attention_bias=True), "attention_bias is True"),
        (OlmoConfig(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is"),
        (OlmoConfig(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (OlmoConfig(rope_theta=10000.5), "rope_theta is 10000.5"),
        (OlmoConfig(extra={"head_dim": 64}), "head_dim is 64"),
        (EXPERTS["olmoe"].replace(clip_qkv=1.0), "clip_qkv is 1.0|model_type is 'olmoe'"),
        (OLMO3.replace(sliding_rope_theta=1e4), "sliding_rope_theta is 10000|model_type is 'olmo3'"),
        (OLMO3.replace(rope_scaling={**YARN, "attention_factor": 2.0}), "rope_scaling is .*|model_type is 'olmo3'"),
    ],
)
def test_reverse_refuses_what_the_trainers_do_not_have(tmp_path, module, config, message):
    config.save_pretrained(tmp_path / "src")
    with pytest.raises(ConfigError, match=message):
        module.main(tmp_path / "src", tmp_path / "out", reverse=True)
    assert not (tmp_path / "out").exists()


# -- files ------------------------------------------------------------------------------------------------------------


def changed_native(src, folder, change):
    """A copy of a native model.pt with its tensors changed by a function of the dict of arrays."""
    shutil.copytree(src, folder)
    state = {name: source.read() for name, source in olmo_native.read_tensors(src).items()}
    state = change(state)
    (folder / "model.pt").unlink()
    write_pickled(folder / "model.pt", outputs(state))
    return folder


def outputs(state):
    return [LazyTensor(name, array.dtype, array.shape, lambda array=array: array) for name, array in state.items()]


def test_every_missing_unexpected_and_misshapen_tensor_is_named(tmp_path):
    def change(state):
        state["transformer.extra.weight"] = state.pop("transformer.blocks.1.attn_out.weight")
        state["transformer.wte.weight"] = state["transformer.wte.weight"][:-1]
        return state

    src = changed_native(NATIVE[OLMO2], tmp_path / "src", change)
    with pytest.raises(CheckpointError, match=r"3 problem\(s\)") as error:
        olmo_native.main(src, tmp_path / "out")
    assert "missing: transformer.blocks.1.attn_out.weight [64, 64]" in str(error.value)
    assert "unexpected: transformer.extra.weight [64, 64]" in str(error.value)
    assert "transformer.wte.weight is [255, 64], expected [256, 64]" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path, equal):
    def change(state):
        return state | {"transformer.ff_out.weight": state["transformer.wte.weight"] + (0 if equal else 1)}

    src = changed_native(NATIVE["olmo1-tied"], tmp_path / "src", change)
    if equal:
        olmo_native.main(src, tmp_path / "out")
        assert "lm_head.weight" not in read_safetensors(tmp_path / "out/model.safetensors")
    else:
        with pytest.raises(CheckpointError, match=r"transformer\.ff_out\.weight differs from the embedding"):
            olmo_native.main(src, tmp_path / "out")


def test_one_tensor_under_two_spellings_is_refused(tmp_path):
    def change(state):
        return state | {"_fsdp_wrapped_module.transformer.wte.weight": state["transformer.wte.weight"]}

    src = changed_native(NATIVE[OLMO], tmp_path / "src", change)
    with pytest.raises(CheckpointError, match="which is there under another name too"):
        olmo_native.main(src, tmp_path / "out")


def test_shards_and_reruns(tmp_path):
    olmo_native.main(NATIVE[OLMO2], tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    (tmp_path / "out/notes.txt").write_text("mine")
    olmo_native.main(NATIVE[OLMO2], tmp_path / "out", force=True)
    assert sorted(tree(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors", "notes.txt"]
    olmo_native.main(tmp_path / "out", tmp_path / "back", reverse=True)
    olmo_native.main(tmp_path / "out", tmp_path / "back", reverse=True, form="safetensors", force=True)
    assert sorted(tree(tmp_path / "back")) == ["config.yaml", "model.safetensors"]


def test_a_failed_run_leaves_the_old_folder_and_a_killed_ones_remains_go(tmp_path):
    olmo_core.main(CORE, tmp_path / "out")
    before = tree(tmp_path / "out")
    broken = shutil.copytree(CORE, tmp_path / "src")
    shard = max((broken / "model_and_optim").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes().replace(b"data.pkl", b"data.bad"))
    abandoned = tmp_path / ".out.saving-999999999"
    abandoned.mkdir()
    with pytest.raises(CheckpointError, match=r"it has 0 data\.pkl, expected 1"):
        olmo_core.main(broken, tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_wrong_write_is_found_and_does_not_take_its_place(tmp_path, name, monkeypatch):
    module, src = PROGRAMS[name]
    real = common.write_weights

    def flip(folder, *arguments, **options):
        real(folder, *arguments, **options)
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(common, "write_weights", flip)
    with pytest.raises(CheckpointError, match="what was written is not what was read"):
        module.main(src, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "it does not take its place"
    module.main(src, tmp_path / "out", verify=False)


def test_dst_must_not_hold_src(tmp_path):
    src = shutil.copytree(NATIVE[OLMO], tmp_path / "a/src")
    for dst in (src, tmp_path / "a"):
        with pytest.raises(InputError, match="is or contains the source"):
            olmo_native.main(src, dst)


@pytest.mark.parametrize("program", ["olmo_native", "olmo_core", "mha_to_gqa", "gguf_export"])
def test_config_and_tensors_are_of_one_save(tmp_path, monkeypatch, program):
    if program == "gguf_export":
        pytest.importorskip("gguf")
    module = importlib.import_module(f"conversion.{program}")
    options = {"mha_to_gqa": {"kv_heads": 1}, "gguf_export": {}}.get(program, {"reverse": True})
    src, out = tmp_path / "src", tmp_path / "out.gguf"
    config = Olmo2Config(
        vocab_size=40, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=6
    )
    write_checkpoint(src, config, dtype="float32")
    read = module.canonical_sources

    def replace_first(folder, config):
        monkeypatch.setattr(module, "canonical_sources", read)
        write_checkpoint(src, config.replace(num_hidden_layers=2), dtype="float32")
        return read(folder, config)

    monkeypatch.setattr(module, "canonical_sources", replace_first)
    module.main(src, out, **options)
    assert out.exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_foreign_checkpoint_that_is_replaced_before_its_tensors_are_read_is_refused(tmp_path, monkeypatch, program):
    module, fixture = PROGRAMS[program]
    src = shutil.copytree(fixture, tmp_path / "src")
    check = common.check_dst

    def replace(*args):
        check(*args)
        src.rename(tmp_path / "old")
        shutil.copytree(fixture, src)

    monkeypatch.setattr(common, "check_dst", replace)
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        module.main(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_any_rows_of_a_tensor_in_boxes():
    whole = np.arange(7 * 5 * 2, dtype=np.float32).reshape(7, 5, 2)

    def piece(rows, columns):
        part = whole[rows, columns]
        source = tensors.by_rows("x", "file", part.dtype, part.shape, lambda a, b: part[a:b])
        return tensors.Piece((rows.start, columns.start, 0), part.shape, lambda: source)

    boxes = [
        (slice(0, 3), slice(0, 5)),
        (slice(3, 7), slice(0, 2)),
        (slice(3, 7), slice(2, 5)),
        (slice(7, 7), slice(0, 5)),
    ]
    source = tensors.assembled("x", FIXTURES, whole.dtype, whole.shape, [piece(*box) for box in boxes])
    for start in range(7):
        for stop in range(start, 8):
            assert np.array_equal(source.rows(start, stop), whole[start:stop])
    flat = tensors.by_rows("x", "file", whole.dtype, (70,), lambda a, b: whole.reshape(-1)[a:b])
    assert np.array_equal(tensors.reshaped(flat, whole.shape).rows(2, 5), whole[2:5])


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([((0, 0), (2, 4)), ((3, 0), (1, 4))], "have 12 values, expected 16"),
        ([((0, 0), (2, 4)), ((1, 0), (2, 4))], "overlap at"),
        ([((0, 0), (2, 4)), ((3, 0), (2, 4))], "reaches outside"),
        ([((-1, 0), (4, 4))], "reaches outside"),
        ([((0,), (16,))], "a piece of shape"),
    ],
)
def test_pieces_that_do_not_make_up_their_tensor(boxes, message):
    pieces = [tensors.Piece(offsets, shape, lambda: None) for offsets, shape in boxes]
    with pytest.raises(CheckpointError, match=message):
        tensors.assembled("x", FIXTURES, np.dtype(np.float32), (4, 4), pieces)


def test_a_missing_rank_is_named(tmp_path):
    for name, inside in (("rank", ""), ("flat", "model")):
        src = shutil.copytree(TRAINER[name], tmp_path / name)
        (src / inside / "rank0.pt").unlink()
        with pytest.raises(CheckpointError, match=r"rank0\.pt is not there"):
            olmo_native.main(src, tmp_path / "out")
        shutil.copy(TRAINER[name] / inside / "rank0.pt", src / inside)
        (src / inside / "rank1.pt").unlink()
        with pytest.raises(CheckpointError, match="the pieces have"):
            olmo_native.main(src, tmp_path / "out")


def test_a_tensor_saved_transposed_is_read_right(tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": values.T, "b": values[1:, 1:3], "c": values[0, 0]}, tmp_path / "x.pt")
    state = archives.read_archive(tmp_path / "x.pt")
    for name, expected in (("a", values.T), ("b", values[1:, 1:3]), ("c", values[0, 0])):
        assert np.array_equal(archives.as_tensor(state[name], name).read(), expected.numpy())
    assert np.array_equal(archives.as_tensor(state["a"], "a").rows(1, 3), values.T[1:3].numpy())


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olmo_native", "olmo_core", "mha_to_gqa", "gguf_export"])
def test_help(name):
    if name == "gguf_export":
        pytest.importorskip("gguf")
    result = run_program(name, "--help")
    assert result.returncode == 0
    assert "--dry-run" in result.stdout
    assert "--no-verify" in result.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_dry_run_lists_and_writes_nothing(tmp_path, name):
    module, src = PROGRAMS[name]
    result = run_program(name, src, tmp_path / "out", "--dry-run")
    assert result.returncode == 0, result.stderr
    module.main(src, tmp_path / "real")
    config = ModelConfig.from_folder(tmp_path / "real")
    assert all(parameter.name in result.stdout for parameter in config.parameters("causal_lm"))
    assert not (tmp_path / "out").exists()
    result = run_program(name, tmp_path / "real", tmp_path / "out", "--reverse", "--dry-run")
    assert "model.layers.1.self_attn.v_proj.weight" in result.stdout
    assert not (tmp_path / "out").exists()


def test_the_command_converts_and_says_that_it_verified(tmp_path):
    result = run_program("olmo_native", NATIVE[OLMO2], tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "verified: 25 tensors are the same" in result.stderr
    assert (tmp_path / "out/model.safetensors").is_file()


def test_bad_input_is_a_message_and_exit_code_2(tmp_path):
    for name in PROGRAMS:
        result = run_program(name, tmp_path / "nowhere", tmp_path / "out")
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr


def test_a_tokenizer_is_checked_and_copied(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    train_tokenizer(tmp_path / "tokenizer", "some text for a tokenizer")
    with pytest.raises(CheckpointError, match="largest id is"):  # its 258 ids are more than the model's 256
        olmo_native.main(NATIVE[OLMO], tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "out").exists()
    config = OlmoConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=0,
        pad_token_id=1,
    )
    write_checkpoint(tmp_path / "model", config, dtype="float32")
    olmo_native.main(tmp_path / "model", tmp_path / "native", reverse=True)
    for path in (tmp_path / "tokenizer", tmp_path / "tokenizer/tokenizer.json"):
        (tmp_path / path.name).mkdir(exist_ok=True)
        if path.is_file():
            (tmp_path / path.name / "chat_template.jinja").write_text("of an older tokenizer")
        olmo_native.main(tmp_path / "native", tmp_path / path.name, tokenizer=path)
        found = (tmp_path / path.name / "tokenizer.json").read_bytes()
        assert found == (tmp_path / "tokenizer/tokenizer.json").read_bytes()
        assert not (tmp_path / path.name / "chat_template.jinja").exists()
    write_checkpoint(tmp_path / "other", config.replace(pad_token_id=310), dtype="float32")
    olmo_native.main(tmp_path / "other", tmp_path / "native", reverse=True, force=True)
    with pytest.raises(CheckpointError, match="no token 310, the config's pad_token_id"):
        olmo_native.main(tmp_path / "native", tmp_path / "out", tokenizer=tmp_path / "tokenizer")


# -- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import os, re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit:
    pass
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("reverse", [False, True])
def test_memory_is_bounded_by_a_shard_and_two_tensors(tmp_path, reverse):
    small = OlmoConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    large = small.replace(vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    peaks = []
    for name, config in (("small", small), ("large", large)):
        src = tmp_path / name
        write_safetensors_of_zeros(src, config)
        if not reverse:
            olmo_native.main(src, tmp_path / f"{name}-native", reverse=True, verify=False)
            src = tmp_path / f"{name}-native"
        options = ["--reverse"] if reverse else ["--max-shard-size", "20MB"]
        command = [
            sys.executable,
            "-c",
            MEASURE,
            "conversion.olmo_native",
            src,
            tmp_path / f"{name}-out",
            *options,
        ]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout) * 1024)
    tensor = 8192 * 512 * 4
    total = sum(parameter.size for parameter in large.parameters("causal_lm")) * 4
    assert total > 10 * tensor
    shard = total if reverse else 20_000_000  # the trainer's checkpoint is one file
    assert peaks[1] - peaks[0] < shard + 2 * tensor


def write_safetensors_of_zeros(folder, config):
    folder.mkdir()
    config.save_pretrained(folder)
    table = config.parameters("causal_lm")
    written = [
        LazyTensor(p.name, np.dtype(np.float32), p.shape, lambda p=p: np.ones(p.shape, np.float32)) for p in table
    ]
    write_safetensors(folder / "model.safetensors", written)
