"""`olmozoo diff`: what differs between two checkpoints is found and named, and nothing else is."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from olmozoo import CheckpointError, ConfigError, Olmo2Config, OPTConfig
from olmozoo.checkpoint.diff import ABSENT, PART, ConfigDifference, diff
from olmozoo.checkpoint.writer import save_checkpoint
from tests.helpers.checkpoints import random_values, write_checkpoint

CONFIG = Olmo2Config(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
)
OPT = OPTConfig(vocab_size=37, hidden_size=24, ffn_dim=20, num_hidden_layers=1, num_attention_heads=4)
UP = "model.layers.1.mlp.up_proj.weight"


def write(folder, change=lambda name, array: array, config=CONFIG, head="causal_lm", dtype="float32", **options):
    """A checkpoint whose tensors went through `change`."""
    save_checkpoint(
        folder,
        config,
        head,
        read=lambda p: change(p.name, random_values(p).astype(dtype)),
        dtype=lambda p: dtype,
        **options,
    )
    return folder


def put(name, place, value):
    def change(found, array):
        if found == name:
            array[place] = value
        return array

    return change


def command(*words):
    return subprocess.run([sys.executable, "-m", "olmozoo", "diff", *map(str, words)], capture_output=True, text=True)


def rows(found):
    return {row.name: row for row in found.tensors}


def test_the_same_weights_in_other_files_are_the_same(tmp_path):
    found = diff(write(tmp_path / "a"), write(tmp_path / "b", max_shard_size="3KB"))
    assert found.same
    assert len(found.tensors) == len(CONFIG.parameters("causal_lm"))
    assert all(row.elements and row.largest == row.relative == 0 for row in found.tensors)


def test_one_changed_number_is_found_and_measured(tmp_path):
    a = write(tmp_path / "a", put(UP, (3, 4), 0.5))
    found = diff(a, write(tmp_path / "b", put(UP, (3, 4), 100.5)))
    row = found.tensors[0]
    assert [r.name for r in found.differing] == [UP]
    assert (row.name, row.differing, row.elements) == (UP, 1, 20 * 24)
    assert row.largest == 100
    assert row.relative == pytest.approx(100 / 100.5)
    assert not found.config


def test_rows_come_with_the_largest_difference_first(tmp_path):
    def change(name, array):
        return array * (1 + {UP: 1e-3, "model.norm.weight": 0.1, "lm_head.weight": 1e-2}.get(name, 0))

    found = diff(write(tmp_path / "a"), write(tmp_path / "b", change))
    assert [row.name for row in found.differing] == ["model.norm.weight", "lm_head.weight", UP]


def test_nan_and_infinity_are_counted_and_equal_to_themselves(tmp_path):
    a = write(tmp_path / "a", put(UP, (0, slice(0, 3)), [np.nan, np.inf, -np.inf]))
    same = diff(a, a)
    assert same.same
    assert (rows(same)[UP].nan_a, rows(same)[UP].inf_b, rows(same)[UP].largest) == (1, 2, 0)
    row = rows(diff(a, write(tmp_path / "b", put(UP, (0, slice(0, 3)), [np.nan, 1.0, np.inf]))))[UP]
    assert (row.differing, row.nan_a, row.nan_b, row.inf_a, row.inf_b) == (2, 1, 1, 2, 1)
    assert row.largest == 0, "only finite values have a difference"


def test_differences_past_the_first_part_of_a_large_tensor_count(tmp_path):
    config = CONFIG.replace(vocab_size=3 * PART // 24)
    head = "lm_head.weight"
    a = write(tmp_path / "a", config=config)
    found = rows(diff(a, write(tmp_path / "b", put(head, (slice(None, None, config.vocab_size - 1), 0), 9), config)))
    assert (found[head].differing, found[head].elements) == (2, config.vocab_size * 24)


def test_memory_is_that_of_a_part_and_not_of_a_tensor(tmp_path):
    config = CONFIG.replace(vocab_size=40 * PART // 24, tie_word_embeddings=True)  # a tensor of 168 MB, 336 in float64
    a, b = write(tmp_path / "a", config=config), write(tmp_path / "b", config=config)
    tracemalloc.start()  # NumPy reports its arrays there; what is mapped is not one
    assert diff(a, b).same
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6


def test_dtypes_shapes_and_absent_tensors_are_named(tmp_path):
    a = write(tmp_path / "a")
    found = diff(a, write(tmp_path / "b", dtype="bfloat16"))
    row = rows(found)["lm_head.weight"]
    assert (row.a, row.b) == ("float32 [37, 24]", "bfloat16 [37, 24]")
    assert not row.same
    assert 0 < row.relative < 2**-8
    assert [entry.name for entry in found.config] == ["dtype"]

    found = diff(a, write(tmp_path / "c", config=CONFIG.replace(vocab_size=41, num_hidden_layers=1)))
    assert found.tensors[0].elements == 0
    assert rows(found)["lm_head.weight"].b == "float32 [41, 24]"
    assert (rows(found)[UP].a, rows(found)[UP].b) == ("float32 [20, 24]", None)
    assert found.config == [ConfigDifference("num_hidden_layers", 2, 1), ConfigDifference("vocab_size", 37, 41)]


def test_names_are_canonical_and_a_tied_head_is_its_embedding(tmp_path):
    causal = write(tmp_path / "a", config=OPT)
    found = diff(causal, write(tmp_path / "base", config=OPT, head=None))
    assert not found.differing
    assert [entry.name for entry in found.config] == ["architectures"]

    from safetensors.numpy import load_file, save_file

    explicit = write(tmp_path / "b", config=OPT)
    tensors = load_file(explicit / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].copy()
    save_file(tensors, explicit / "model.safetensors")
    for pair in ((causal, explicit), (explicit, causal)):
        assert diff(*pair).same
        assert "lm_head.weight" in rows(diff(*pair))
    tensors["lm_head.weight"][1, 2] += 1
    save_file(tensors, explicit / "model.safetensors")
    assert [row.name for row in diff(explicit, causal).differing] == ["lm_head.weight"]
    tensors["decoder.embed_tokens.weight"] = tensors["lm_head.weight"]
    save_file(tensors, explicit / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has model\.decoder\.embed_tokens\.weight twice"):
        diff(explicit, causal)


def test_spellings_of_a_config_are_one_and_real_differences_are_not(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    data = json.loads((b / "config.json").read_text())
    data["torch_dtype"] = data.pop("dtype")
    data["rope_parameters"] = {"rope_type": "default", "rope_theta": data.pop("rope_theta")}
    data["transformers_version"] = "9"
    (b / "config.json").write_text(json.dumps(data))
    assert diff(a, b).same
    data |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}, "mine": [1]}
    (b / "config.json").write_text(json.dumps(data))
    found = {entry.name: (entry.a, entry.b) for entry in diff(a, b).config}
    assert found == {
        "mine": (ABSENT, [1]),
        "rope_scaling": (None, {"rope_type": "linear", "factor": 2.0}),
        "rope_theta": (10000.0, 7.0),
    }


def test_a_folder_that_is_broken_or_of_no_known_family_is_refused(tmp_path):
    a = write(tmp_path / "a")
    write(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="llama"):
        diff(a, tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"")
    with pytest.raises((CheckpointError, ConfigError)):
        diff(a, tmp_path / "b")


def test_the_command_says_it_by_exit_code_table_and_json(tmp_path):
    a = write(tmp_path / "a")
    b = write_checkpoint(tmp_path / "b", CONFIG.replace(eos_token_id=3), dtype="float32", seed=1)
    same = command(a, a)
    assert (same.returncode, same.stderr) == (0, "")
    assert "the same config and the same weights" in same.stdout
    assert UP not in same.stdout
    assert UP in command(a, a, "--all").stdout

    done = command(a, b)
    assert done.returncode == 1
    count = len(CONFIG.parameters("causal_lm"))
    assert f"different: {count} of {count} tensors, 1 in the config" in done.stdout
    assert all(part in done.stdout for part in ("eos_token_id", UP, "480 (100.0%)"))
    data = json.loads(command(a, b, "--json").stdout)
    assert data["same"] is False
    assert data["config"] == [{"name": "eos_token_id", "a": 50279, "b": 3}]
    assert len(data["tensors"]) == count
    assert json.loads(command(a, a, "--json").stdout)["tensors"] == []

    done = command(a, tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr


def test_what_files_say_is_shown_as_text_and_not_as_markup(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    data = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps({**data, "[/x]": "[bold]y[/z]", "half": "\ud800"}))
    done = command(a, b)
    assert done.returncode == 1
    assert done.stderr == ""
    assert all(part in done.stdout for part in ("[/x]", "[bold]y[/z]", r"\ud800"))


def test_no_framework_is_imported(tmp_path):
    a = write(tmp_path / "a")
    code = (
        f"import sys; from olmozoo.checkpoint.diff import diff; assert diff({str(a)!r}, {str(a)!r}).same\n"
        "assert not set(sys.modules) & {'torch', 'tensorflow', 'keras', 'jax', 'flax'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
