"""The registry of wings: classes by config and head, devices, and one trip to the hub."""

import sys

import numpy as np
import pytest

import olmozoo
from olmozoo import ConfigError, InputError, Olmo2Config, OlmoConfig, OPTConfig
from olmozoo.backends import BACKENDS, backend_class, load
from olmozoo.families.parameter import ARCHITECTURES
from olmozoo.text.pipeline import pipeline
from olmozoo.verify import verify
from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.hub_server import HubServer
from tests.helpers.wings import WINGS

CONFIG = Olmo2Config(
    vocab_size=320, hidden_size=40, intermediate_size=36, num_hidden_layers=1, num_attention_heads=4, pad_token_id=1
)
PREFIX = {"pt": "", "tf": "TF", "flax": "Flax"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("backends"), CONFIG, dtype="float32")
    train_tokenizer(folder, "The quick brown fox jumps over the lazy dog. " * 20)
    return folder


# -- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_every_family_has_a_class_for_each_of_its_heads(wing):
    module = BACKENDS[wing].module()
    for config in (OlmoConfig, Olmo2Config, OPTConfig):
        for head in (None, *config.heads):
            cls = BACKENDS[wing].model_class(config, head)
            assert cls is getattr(module, PREFIX[wing] + config.name + ARCHITECTURES[head])
    with pytest.raises(ConfigError, match="Olmo2 has no 'question_answering' head; it has causal_lm, sequence_cla"):
        BACKENDS[wing].model_class(Olmo2Config, "question_answering")


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("name", ["olmo2", "opt"])
def test_auto_classes_pick_the_family_and_the_head(wing, name, tmp_path):
    module, config = BACKENDS[wing].module(), CONFIGS[name]
    for head in (None, *config.heads):
        folder = write_checkpoint(tmp_path / str(head), config, head, dtype="float32")
        auto = getattr(module, f"{PREFIX[wing]}AutoModel{ARCHITECTURES[head].removeprefix('Model')}")
        cls = BACKENDS[wing].model_class(config, head)
        model = auto.from_pretrained(folder, use_cache=False)
        assert type(model) is cls
        assert model.config.use_cache is False
        assert type(auto.from_config(config)) is cls
    if "question_answering" not in config.heads:
        auto = getattr(module, f"{PREFIX[wing]}AutoModelForQuestionAnswering")
        for make in (lambda: auto.from_pretrained(folder), lambda: auto.from_config(config)):
            with pytest.raises(ConfigError, match=r"has no 'question_answering' head; it has"):
                make()


@pytest.mark.parametrize("wing", WINGS)
def test_a_users_subclass_replaces_no_class(wing):
    cls = BACKENDS[wing].model_class(Olmo2Config, "causal_lm")
    type("Mine", (cls,), {"__module__": __name__})
    assert BACKENDS[wing].model_class(Olmo2Config, "causal_lm") is cls


def test_an_unknown_backend_is_answered_with_the_names():
    for call in (lambda: backend_class("torch"), lambda: pipeline("text-generation", "nowhere", backend="torch")):
        with pytest.raises(InputError, match="backend is 'torch', expected one of pt, tf, flax"):
            call()


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_a_device_can_be_chosen(folder, wing):
    ids = np.array([[5, 9, 11]])
    model = load(folder, wing, device="cpu")
    assert model.device is not None
    assert model.config is model.model.config
    found = model.forward(ids, np.ones_like(ids))["logits"]
    assert np.array_equal(found, load(folder, wing, device="cpu:0").forward(ids, np.ones_like(ids))["logits"])
    assert model.generate(ids, np.ones_like(ids), max_new_tokens=2).shape == (1, 5)
    for device in ("abacus", "cpu:99" if wing != "pt" else "abacus:1"):
        with pytest.raises(InputError, match=f"device is '{device}', and .* has .*cpu"):
            load(folder, wing, device=device)


@pytest.mark.pt
def test_pytorch_loads_onto_its_device(folder):
    torch = pytest.importorskip("torch")
    assert load(folder, "pt", device="meta").model.device == torch.device("meta")
    assert pipeline("text-generation", folder, backend="pt", device="meta").backend.model.device.type == "meta"


@pytest.mark.pt
@pytest.mark.parametrize(
    ("accelerator", "dtype", "expected"),
    [
        (None, None, "cpu"),
        ("cuda", None, "cuda"),
        ("cuda", "float64", "cuda"),
        ("mps", None, "mps"),
        ("mps", "bfloat16", "mps"),
        ("mps", "float64", "cpu"),  # which MPS does not have
    ],
)
def test_pytorch_takes_an_accelerator_by_default(folder, monkeypatch, accelerator, dtype, expected):
    torch = pytest.importorskip("torch")
    found = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    chosen = []
    monkeypatch.setattr(BACKENDS["pt"], "load", lambda self, *arguments: chosen.append(self.device))
    load(folder, "pt", dtype)
    load(folder, "pt", dtype, "cpu")
    assert [device.type for device in chosen] == [expected, "cpu"]
    if accelerator != "cuda":
        with pytest.raises(InputError, match="device is 'cuda', and PyTorch has cpu, meta"):
            load(folder, "pt", dtype, "cuda")


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder, monkeypatch, tmp_path):
    from huggingface_hub.utils import close_session

    with HubServer() as server:
        server.attach(monkeypatch, tmp_path)
        server.add_repo("org/name", {"main": {path.name: path.read_bytes() for path in folder.iterdir()}})
        close_session()
        yield server
        close_session()


def trips(hub) -> int:
    return sum("/api/models/" in request.path for request in hub.log)


@pytest.mark.parametrize("wing", WINGS)
def test_a_pipeline_asks_the_hub_once(hub, wing):
    assert isinstance(pipeline("text-generation", "org/name", backend=wing)("The quick", max_new_tokens=2), str)
    assert trips(hub) == 1


@pytest.mark.pt
def test_verify_asks_the_hub_once_a_repository(hub):
    pytest.importorskip("torch")
    hub.add_repo("org/other", {"main": hub.repos["org/name"].commits[hub.commit("org/name")]})
    assert verify("org/name", against="org/other", backends=["pt"], device="cpu").ok
    assert trips(hub) == 2


@pytest.mark.pt
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate", "org/name", "The", "--max-new-tokens", "2", "--backend", "pt"], 1),
        (["evaluate", "org/name", "text.txt", "--window", "16", "--backend", "pt"], 1),
        (["info", "org/name"], 1),
        (["info", "olmo2-7b"], 0),
        (["diff", "org/name", "org/name"], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_command_asks_the_hub_once(hub, words, expected, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The quick brown fox")
    monkeypatch.setattr(sys, "argv", ["olmozoo", *words])
    from olmozoo import cli

    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert trips(hub) == expected


# -- live models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wing", WINGS)
def test_a_live_model_keeps_its_head_on_the_way_to_another_wing(wing):
    config = CONFIGS["opt"]
    cls = BACKENDS[wing].model_class(config, "question_answering")
    made = olmozoo.convert(cls(config), to=wing)
    assert type(made) is cls
    assert made.config == config
