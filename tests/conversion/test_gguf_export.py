"""GGUF files: read back with the gguf library, and run by llama.cpp where llama-cpp-python is installed."""

import json

import numpy as np
import pytest

from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.conversions import run_program

gguf = pytest.importorskip("gguf")

from conversion import gguf_export
from olmozoo import FlexOlmoConfig, Olmo2Config, Olmo3Config, OlmoConfig, OlmoeConfig, OPTConfig
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.errors import CheckpointError, ConfigError
from olmozoo.families.config import read_json

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
CONFIGS = {
    "olmo": OlmoConfig(**SHAPE, clip_qkv=1.5),
    "olmo-tied": OlmoConfig(**SHAPE, tie_word_embeddings=True, rope_theta=5000.0),
    "olmo2": Olmo2Config(**SHAPE, rms_norm_eps=1e-4, rope_theta=500000.0),
    "olmo2-tied": Olmo2Config(**SHAPE, tie_word_embeddings=True),
    "olmo3": Olmo3Config(
        **SHAPE,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=8,
        rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 30.0},
    ),
}
OLMOE = OlmoeConfig(**SHAPE | {"num_key_value_heads": 4}, num_experts=3, num_experts_per_tok=2, rms_norm_eps=1e-4)
TEXT = "the quick brown fox jumps over the lazy dog, in 2048 steps; don't stop"


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_gguf_library_reads_the_same_tensors(tmp_path, name, dtype):
    config = CONFIGS[name]
    write_checkpoint(tmp_path / "src", config, dtype=dtype)
    gguf_export.main(tmp_path / "src", tmp_path / "x.gguf")
    found = gguf_export.read_back(tmp_path / "x.gguf")
    source = Checkpoint(tmp_path / "src")
    wanted = {"float64": "float32"}.get(dtype, dtype)
    table = {p.name: p for p in config.parameters("causal_lm")}
    names = {"blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight"}
    names |= {"blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight"}
    names |= {
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    if name.startswith(("olmo2", "olmo3")):
        names |= {"blk.1.attn_k_norm.weight": "model.layers.1.self_attn.k_norm.weight"}
        names |= {"blk.1.post_ffw_norm.weight": "model.layers.1.post_feedforward_layernorm.weight"}
    for key, canonical in names.items():
        array = found[key].read()
        assert array.dtype.name == ("float32" if table[canonical].kind == "norm" else wanted)
        expected = source[canonical].astype(array.dtype)
        if name.startswith(("olmo2", "olmo3")) or "attn" not in key:
            assert np.array_equal(array, expected)
        else:  # the first pair of a head that llama.cpp turns is the first and the ninth row of ours
            assert np.array_equal(array[:4], expected[[0, 8, 1, 9]])
    tied, second = config.tie_word_embeddings, name.startswith(("olmo2", "olmo3"))
    assert ("output.weight" in found) == (second or not tied)
    assert len(found) == len(list(config.backbone())) + (second or not tied)


def test_the_metadata_that_llama_cpp_needs(tmp_path):
    for name, config in CONFIGS.items():
        write_checkpoint(tmp_path / name, config, dtype="bfloat16")
        train_tokenizer(tmp_path / name, TEXT)
        gguf_export.main(tmp_path / name, tmp_path / "x.gguf", force=True)
        found, arch = fields(tmp_path / "x.gguf"), "olmo" if config.model_type == "olmo" else "olmo2"
        expected = {
            "general.architecture": arch,
            "general.name": name,
            "general.file_type": int(gguf.LlamaFileType.MOSTLY_BF16),
            f"{arch}.block_count": 2,
            f"{arch}.context_length": 64,
            f"{arch}.embedding_length": 64,
            f"{arch}.feed_forward_length": 96,
            f"{arch}.attention.head_count": 4,
            f"{arch}.attention.head_count_kv": 2,
            f"{arch}.rope.freq_base": config.rope_theta,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "olmo",
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.padding_token_id": 1,
        }
        assert {key: found.get(key) for key in expected} == expected
        tokens = found["tokenizer.ggml.tokens"]
        assert (len(tokens), tokens[0], tokens[-1]) == (320, "<|endoftext|>", "[PAD319]")
        kinds = found["tokenizer.ggml.token_type"]
        assert (kinds[0], kinds[2], kinds[-1]) == (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED)
        if arch == "olmo2":
            assert found["olmo2.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
        else:
            assert found.get("olmo.attention.clamp_kqv") == config.clip_qkv


def test_windows_and_yarn_of_an_olmo3(tmp_path):
    config = CONFIGS["olmo3"].replace(
        rope_scaling=CONFIGS["olmo3"].rope_scaling | {"attention_factor": 1.2079441541679836}
    )
    write_checkpoint(tmp_path / "src", config, dtype="float32")
    gguf_export.main(tmp_path / "src", tmp_path / "x.gguf")
    found = fields(tmp_path / "x.gguf")
    expected = {
        "olmo2.attention.sliding_window": 8,
        "olmo2.attention.sliding_window_pattern": [False, True],
        "olmo2.rope.scaling.type": "yarn",
        "olmo2.rope.scaling.factor": 8.0,
        "olmo2.rope.scaling.original_context_length": 8,
        "olmo2.rope.scaling.yarn_beta_fast": 30.0,
        "olmo2.rope.scaling.yarn_beta_slow": 1.0,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert not [key for key in found if key.endswith("attn_factor")]  # which llama.cpp would multiply its own by


def test_the_experts_of_a_layer_are_one_tensor(tmp_path):
    write_checkpoint(tmp_path / "src", OLMOE, dtype="bfloat16")
    gguf_export.main(tmp_path / "src", tmp_path / "x.gguf")
    expected = {
        "general.architecture": "olmoe",
        "olmoe.feed_forward_length": 96,
        "olmoe.expert_count": 3,
        "olmoe.expert_used_count": 2,
        "olmoe.attention.head_count_kv": 4,
        "olmoe.attention.layer_norm_rms_epsilon": pytest.approx(1e-4),
    }
    found = fields(tmp_path / "x.gguf")
    assert {key: found.get(key) for key in expected} == expected
    found, source = gguf_export.read_back(tmp_path / "x.gguf"), Checkpoint(tmp_path / "src")
    assert len(found) == 3 + 2 * 12
    for name in ("gate", "up", "down"):
        tensor = found[f"blk.1.ffn_{name}_exps.weight"]
        assert tensor.shape == ((3, 64, 96) if name == "down" else (3, 96, 64))
        assert tensor.dtype.name == "bfloat16"
        for expert in range(3):
            assert np.array_equal(
                tensor.read()[expert], source[f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"]
            )
    router = found["blk.1.ffn_gate_inp.weight"]
    assert (router.shape, router.dtype.name) == ((3, 64), "float32")
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj"}
    for name, canonical in names.items():
        array = found[f"blk.0.{name}.weight"].read()
        assert np.array_equal(array, source[f"model.layers.0.{canonical}.weight"].astype(array.dtype))


def test_the_chat_template_comes_along_from_wherever_it_is(tmp_path):
    folder = write_checkpoint(tmp_path / "model", CONFIGS["olmo2"], dtype="bfloat16")
    train_tokenizer(folder, TEXT)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    templates = [{"name": "default", "template": "{{ messages }}"}, {"name": "tools", "template": "{{ tools }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": templates}))
    gguf_export.main(folder, tmp_path / "x.gguf")
    found = fields(tmp_path / "x.gguf")
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert found["tokenizer.chat_template.tools"] == "{{ tools }}"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")  # goes first, as in Transformers
    gguf_export.main(folder, tmp_path / "x.gguf", force=True)
    assert fields(tmp_path / "x.gguf")["tokenizer.chat_template"] == "{{ bos_token }}"


CL100K = "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s+"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "olmo"),
        ({"type": "ByteLevel"}, "olmo"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": CL100K}},
                    {"type": "ByteLevel", "use_regex": False},
                ],
            },
            "dbrx",
        ),
        ({"type": "Whitespace"}, None),
        ({"type": "ByteLevel", "use_regex": False}, None),
        (None, None),
    ],
)
def test_how_text_is_split(tmp_path, rule, expected):
    if expected:
        assert gguf_export.pre_tokenizer(rule, tmp_path) == expected
    else:
        with pytest.raises(CheckpointError, match="splits text by"):
            gguf_export.pre_tokenizer(rule, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            OPTConfig(vocab_size=40, hidden_size=16, num_attention_heads=2, ffn_dim=32),
            "model_type is 'opt', expected 'olmo', 'olmo2', 'olmo3' or 'olmoe'",
        ),
        (FlexOlmoConfig(**SHAPE), "model_type is 'flex_olmo'"),
        (OLMOE.replace(norm_topk_prob=True), "norm_topk_prob is True"),
        (OLMOE.replace(clip_qkv=1.0), "clip_qkv is 1.0"),
        (OLMOE.replace(num_key_value_heads=2), "num_key_value_heads is 2"),
        (CONFIGS["olmo"].replace(attention_bias=True), "attention_bias is True"),
        (CONFIGS["olmo"].replace(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (CONFIGS["olmo2"].replace(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is"),
        (CONFIGS["olmo3"].replace(sliding_rope_theta=1e4), "sliding_rope_theta is 10000"),
        (CONFIGS["olmo3"].replace(rope_scaling={"type": "yarn", "factor": 2.0, "mscale": 2.0}), "rope_scaling is"),
        (
            CONFIGS["olmo3"].replace(rope_scaling={"type": "yarn", "factor": 2.0, "attention_factor": 2.0}),
            "rope_scaling is",
        ),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        gguf_export.main(tmp_path, tmp_path / "x.gguf")


def test_the_command(tmp_path):
    write_checkpoint(tmp_path / "src", CONFIGS["olmo"], dtype="float32")
    result = run_program("gguf_export", tmp_path / "src", tmp_path / "x.gguf", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "blk.1.ffn_down.weight" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
    result = run_program("gguf_export", tmp_path / "src", tmp_path / "x.gguf")
    assert result.returncode == 0, result.stderr
    assert "verified: 16 tensors" in result.stderr
    assert "not text" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src", "x.gguf"]


def test_only_a_gguf_file_is_written_over(tmp_path):
    source = write_checkpoint(tmp_path / "src", CONFIGS["olmo"], dtype="float32")
    before = (source / "model.safetensors").read_bytes()
    for target in (source / "model.safetensors", source, tmp_path / "x", ""):
        result = run_program("gguf_export", source, target)
        assert result.returncode == 2, result.stderr
        assert "expected a name that ends in .gguf" in result.stderr
    assert (source / "model.safetensors").read_bytes() == before


def test_a_source_that_is_replaced_before_its_tokenizer_is_read_is_refused(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "src", CONFIGS["olmo"], dtype="float32")
    add = gguf_export.add_config

    def replace(*args):
        add(*args)
        write_checkpoint(source, CONFIGS["olmo"], dtype="float32")

    monkeypatch.setattr(gguf_export, "add_config", replace)
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        gguf_export.main(source, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "src", CONFIGS["olmo"], dtype="float32")
    (tmp_path / "x.gguf").write_text("old")

    def fail(self, data):
        raise OSError("the disk is full")

    monkeypatch.setattr(gguf_export.gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(OSError, match="the disk is full"):
        gguf_export.main(tmp_path / "src", tmp_path / "x.gguf", force=True)
    assert (tmp_path / "x.gguf").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src", "x.gguf"]


@pytest.mark.parametrize("name", [*CONFIGS, "olmoe"])
def test_llama_cpp_generates_the_same_tokens(tmp_path, name):
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("torch")
    from olmozoo.backends import load

    write_checkpoint(tmp_path / "src", {**CONFIGS, "olmoe": OLMOE}[name], dtype="float32")
    train_tokenizer(tmp_path / "src", TEXT)
    gguf_export.main(tmp_path / "src", tmp_path / "x.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    ids = [int(i) for i in np.random.default_rng(0).integers(2, 258, 8)]
    found = list(ids)
    for _ in range(20):
        llama.eval(found[llama.n_tokens :])
        found.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
    model = load(tmp_path / "src", "pt")
    prompt = np.array([ids])
    expected = model.generate(prompt, np.ones_like(prompt), max_new_tokens=20, eos_token_id=319)[0].tolist()
    assert found == expected
    import tokenizers

    own = tokenizers.Tokenizer.from_file(str(tmp_path / "src/tokenizer.json"))
    assert llama.tokenize(TEXT.encode(), add_bos=False) == own.encode(TEXT).ids
