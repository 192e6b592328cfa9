"""Adapters of PEFT, merged while loading, against PEFT itself on Transformers' own models."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import peft
from safetensors.numpy import load_file, save_file

from olmozoo import CheckpointError, HubError
from olmozoo.backends import load
from olmozoo.checkpoint import bounded
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.diff import diff
from olmozoo.pt import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.hub_server import HubServer
from tests.helpers.wings import WINGS

ATTENTION = ["q_proj", "v_proj"]
SETTINGS = {
    "plain": ("olmo2-mqa-bias-tied", {"target_modules": ATTENTION}),
    "patterns": (
        "olmo2",
        {
            "target_modules": r".*\.(q_proj|k_proj|up_proj|down_proj)",
            "rank_pattern": {"layers.1.self_attn.q_proj": 5, "up_proj": 2},
            "alpha_pattern": {"k_proj": 3, r"layers\.0\.mlp\.up_proj": 11},
        },
    ),
    "rslora-layers": (
        "olmo-bias",
        {"target_modules": ["q_proj", "gate_proj"], "use_rslora": True, "layers_to_transform": [1]},
    ),
    "dora": ("opt", {"target_modules": ["q_proj", "fc1", "out_proj"], "use_dora": True}),
    "dora-embedding": ("olmo2", {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True}),
    "all-linear": ("opt", {"target_modules": "all-linear"}),
    "bias-all": ("opt", {"target_modules": ATTENTION, "bias": "all"}),
    "bias-lora-only": ("opt", {"target_modules": ATTENTION, "bias": "lora_only", "fan_in_fan_out": True}),
    "lora-bias": ("opt", {"target_modules": ATTENTION, "lora_bias": True}),
    "saved-head-tied": ("opt", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "saved-embedding-tied": ("opt", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "saved-norm": ("olmo2", {"target_modules": ATTENTION, "modules_to_save": ["post_attention_layernorm"]}),
    "embedding-tied": ("opt", {"target_modules": ["embed_tokens", "fc2"]}),
    "embedding": ("olmo2", {"target_modules": ["embed_tokens", "lm_head"]}),
    "head-tied": ("opt", {"target_modules": ["lm_head", "v_proj"]}),
    "tokens": ("opt", {"target_modules": ATTENTION, "trainable_token_indices": [5, 60]}),
    "tokens-untied": ("olmo2", {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [5, 7]}}),
    "resized": ("opt", {"target_modules": ATTENTION}),
    "resized-untied": ("olmo2", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}),
}


def randomize(parameters) -> None:
    """Give trained parameters values that matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += (0.2 * noise).to(parameter.dtype)


def trained(folder, adapter, settings, dtype="float64", rows=None, **tuning):
    """Save an adapter with random values; return the unmerged PEFT model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if rows:
        model.resize_token_embeddings(rows)
        randomize([model.get_input_embeddings().weight])
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, **settings), autocast_adapter_dtype=False)
    randomize(model.parameters())
    model.eval().save_pretrained(adapter)
    return model


def expected_logits(model, ids, mask):
    with torch.no_grad():
        return model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.double().numpy()


def by_hand(folder, adapter, ids, mask, rows=None):
    """The logits of PEFT's unmerged adapter on our PyTorch model, which computes all in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if rows:
        model.resize_token_embeddings(rows)
    return expected_logits(peft.PeftModel.from_pretrained(model, adapter).eval(), ids, mask)


def found_logits(wing, folder, ids, mask, **options):
    return load(folder, wing, **options).forward(ids, mask)["logits"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """By name of the settings: folder, adapter, batch, and the logits of PEFT on Transformers' model and on ours."""
    made = {}

    def case(name):
        if name not in made:
            config, settings = SETTINGS[name]
            home = tmp_path_factory.mktemp(name)
            folder = write_checkpoint(home / "base", CONFIGS[config])
            rows = 67 if name.startswith("resized") else None
            model = trained(folder, home / "adapter", settings, rows=rows)
            ids, mask = left_padded(CONFIGS[config])
            answers = expected_logits(model, ids, mask), by_hand(folder, home / "adapter", ids, mask, rows)
            made[name] = folder, home / "adapter", ids, mask, *answers
        return made[name]

    return case


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("name", SETTINGS)
def test_merged_logits_equal_those_of_peft(cases, name, wing):
    folder, adapter, ids, mask, expected, exact = cases(name)
    found = found_logits(wing, folder, ids, mask, adapter=adapter)
    real = mask.astype(bool)
    assert found.shape == expected.shape
    assert np.abs(found - expected)[real].max() < 1e-5
    assert np.abs(found - exact)[real].max() < 1e-9
    assert np.abs(found_logits(wing, folder, ids, mask)[..., :61] - expected[..., :61])[real].max() > 1e-3


def small(tmp_path, name="patterns", **options):
    """A base folder and an adapter of it."""
    config, settings = SETTINGS[name]
    folder = write_checkpoint(tmp_path / "base", CONFIGS[config], dtype=options.get("dtype", "float64"))
    return folder, tmp_path / "adapter", trained(folder, tmp_path / "adapter", settings, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.pt
def test_an_adapter_is_found_beside_the_model_or_names_it(cases):
    folder, adapter, ids, mask, _, exact = cases("plain")
    beside = adapter.parent / "beside"
    shutil.copytree(folder, beside)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, beside)
    for source in (adapter, beside):
        found = found_logits("pt", source, ids, mask)
        assert np.abs(found - exact)[mask.astype(bool)].max() < 1e-9
    with pytest.raises(CheckpointError, match="has an adapter of its own"):
        load(beside, "pt", adapter=adapter)
    assert diff(beside, adapter).same
    assert len(diff(folder, adapter).differing) == 4
    with pytest.raises(CheckpointError, match="has an adapter, which loading would merge"):
        AutoModelForCausalLM.from_pretrained(beside).save_pretrained(beside)


def change_settings(adapter, **changes):
    settings = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.pt
def test_a_missing_base_is_named_with_its_adapter(tmp_path, monkeypatch):
    _, adapter, _ = small(tmp_path)
    change_settings(adapter, base_model_name_or_path="nowhere/base")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"adapter is an adapter of 'nowhere/base', which cannot be loaded"):
        load(adapter, "pt", local_files_only=True)
    change_settings(adapter, base_model_name_or_path=None)
    with pytest.raises(HubError, match="names none"):
        load(adapter, "pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.pt
def test_convert_writes_the_merged_model(cases, tmp_path):
    folder, adapter, ids, mask, _, exact = cases("head-tied")
    target = tmp_path / "merged"
    shutil.copytree(adapter, target)  # whose adapter must not be merged once more
    convert_checkpoint(folder, target, to="safetensors", adapter=adapter, verify=True, force=True)
    assert not (target / "adapter_config.json").exists()
    found = found_logits("pt", target, ids, mask)
    assert np.abs(found - exact)[mask.astype(bool)].max() < 1e-9
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is False
    assert diff(target, adapter).same


@pytest.mark.filterwarnings("ignore")
@pytest.mark.pt
def test_values_are_rounded_once(tmp_path):
    folder, adapter, model = small(tmp_path, dtype="float32")
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = dict(model.merge_and_unload().double().named_parameters())[name].detach().numpy()
    found = AutoModelForCausalLM.from_pretrained(folder, adapter=adapter)
    assert found.dtype == torch.float32
    assert np.abs(dict(found.named_parameters())[name].detach().numpy() - merged).max() < 1e-6
    wide = AutoModelForCausalLM.from_pretrained(folder, adapter=adapter, dtype="bfloat16")
    expected = dict(found.named_parameters())[name].detach().bfloat16()
    assert torch.equal(dict(wide.named_parameters())[name], expected)


REFUSED = [
    ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING', expected 'LORA'"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"peft_type": "XLORA"}, "peft_type is 'XLORA'"),
    ({"use_qalora": True}, "use_qalora is True"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ({"a_new_setting": 3}, "a_new_setting is 3"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"r": 0}, "r is 0"),
    ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern"),
    ({"rank_pattern": True}, "rank_pattern is True, expected an object"),
    ({"alpha_pattern": 5}, "alpha_pattern is 5, expected an object"),
    ({"target_modules": ".*("}, "not a regular expression"),
    ({"exclude_modules": "(" * 5000}, "not a regular expression"),
    ({"modules_to_save": ["a"] * 10_001}, "has 10,0.. patterns, expected at most 10,000"),
    ({"use_dora": True}, "missing: magnitude of model.layers.0.self_attn.q_proj"),
    ({"r": 4}, r"wrong shape: A of model.layers.0.self_attn.k_proj is \[3, 40\], expected \[4, 40\]"),
    ({"target_modules": ["q_proj"]}, "unexpected: model.layers.0.self_attn.k_proj.lora_A.weight"),
    ({"target_modules": r".*(q_proj|k_proj|up_proj|down_proj|o_proj)"}, "missing: the factors of .*o_proj"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.pt
@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(cases, tmp_path, changes, message):
    folder, adapter, *_ = cases("patterns")
    shutil.copytree(adapter, tmp_path / "changed")
    change_settings(tmp_path / "changed", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder, "pt", adapter=tmp_path / "changed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.pt
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "(.*)*Z"},
        {"rank_pattern": {"(.*)*Z": 3}},
        {"modules_to_save": ["(.|.)*Z"]},
        {"layers_pattern": ".*" * 12 + "Z", "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_regular_expressions_that_never_end_are_refused(cases, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(bounded, "SECONDS", 0.5)
    folder, adapter, *_ = cases("patterns")
    shutil.copytree(adapter, tmp_path / "changed")
    change_settings(tmp_path / "changed", **changes)
    with pytest.raises(
        CheckpointError, match=r"regular expressions cannot be matched: it takes more than 0\.5 seconds"
    ):
        load(folder, "pt", adapter=tmp_path / "changed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.pt
def test_every_problem_of_the_tensors_is_in_one_error(cases, tmp_path):
    folder, adapter, *_ = cases("patterns")
    shutil.copytree(adapter, tmp_path / "changed")
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    tensors[f"{prefix}.7.self_attn.q_proj.lora_A.weight"] = np.ones((3, 40))
    del tensors[f"{prefix}.1.mlp.up_proj.lora_B.weight"]
    tensors[f"{prefix}.0.mlp.down_proj.lora_B.weight"] = np.ones((39, 3))
    save_file(tensors, tmp_path / "changed" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="3 problem") as caught:
        load(folder, "pt", adapter=tmp_path / "changed")
    for part in ("layers.7.self_attn.q_proj.lora_A.weight", "missing: B of model.layers.1.mlp.up_proj", "[39, 3]"):
        assert part in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.pt
def test_an_adapter_comes_from_the_hub_with_its_base(cases, tmp_path, monkeypatch):
    folder, adapter, ids, mask, _, exact = cases("plain")
    shutil.copytree(adapter, tmp_path / "adapter")
    change_settings(tmp_path / "adapter", base_model_name_or_path="org/base")
    with HubServer() as hub:
        hub.attach(monkeypatch, tmp_path)
        for repo, source in (("org/base", folder), ("org/adapter", tmp_path / "adapter")):
            hub.add_repo(repo, {"main": {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}})
        for arguments in ({"path_or_repo": "org/adapter"}, {"path_or_repo": "org/base", "adapter": "org/adapter"}):
            found = load(backend="pt", **arguments).forward(ids, mask)["logits"]
            assert np.abs(found - exact)[mask.astype(bool)].max() < 1e-9
        assert hub.count("GET", "README.md") == 0
    found = load("org/adapter", "pt", local_files_only=True).forward(ids, mask)["logits"]
    assert np.abs(found - exact)[mask.astype(bool)].max() < 1e-9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.pt
def test_adapters_of_other_classes(tmp_path):
    """Of a base model, whose names have no `model.`, and of a classifier with another number of labels."""
    folder = write_checkpoint(tmp_path / "base", CONFIGS["olmo2"])
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float64)
    settings = peft.LoraConfig(r=3, target_modules=r"layers\.\d\.self_attn\.q_proj", rank_pattern={"layers.0": 2})
    model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    randomize(model.parameters())
    model.save_pretrained(tmp_path / "adapter")
    found = AutoModel.from_pretrained(folder, adapter=tmp_path / "adapter")
    ids = torch.from_numpy(left_padded(CONFIGS["olmo2"])[0])[:1]
    with torch.no_grad():
        expected, answer = model.eval()(ids).last_hidden_state, found(ids).last_hidden_state
    assert (expected - answer).abs().max() < 1e-5

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64, num_labels=5)
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    randomize(model.parameters())
    model.save_pretrained(tmp_path / "classifier")
    found = AutoModelForSequenceClassification.from_pretrained(folder, adapter=tmp_path / "classifier")
    assert found.config.num_labels == 5
    with torch.no_grad():
        assert (model.eval()(ids).logits - found(ids).logits).abs().max() < 1e-5
