"""Saving and loading Flax models, by olmozoo, Orbax and msgpack."""

import numpy as np
import pytest

from olmozoo import ConfigError
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.families.parameter import Parameter
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import SMALL_OLMO2
from tests.helpers.flax_models import (
    answer,
    ask,
    close,
    each,
    equal,
    make,
)

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from flax import serialization

from olmozoo import flax
from olmozoo.flax.base import from_numpy


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_are_kept_and_files_come_back_byte_for_byte(tmp_path, dtype, x64):
    config = SMALL_OLMO2.replace(attention_bias=True)
    folder = write_checkpoint(tmp_path / "m", config, dtype=dtype)
    model = flax.FlaxAutoModelForCausalLM.from_pretrained(folder)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {model.dtype.name} == {dtype}
    assert jax.eval_shape(model, np.ones((1, 3), int)).logits.dtype.name == dtype
    model.save_pretrained(tmp_path / "a", max_shard_size=20_000)
    flax.FlaxOlmo2ForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_base_model_loads_from_a_headed_checkpoint_and_saves_its_own(model, batch, tmp_path):
    ids, mask = batch
    model.save_pretrained(tmp_path / "lm")
    base = flax.FlaxOlmo2Model.from_pretrained(tmp_path / "lm")
    hidden = base(ids, mask).last_hidden_state
    assert close(hidden, model(ids, mask, output_hidden_states=True).hidden_states[-1])
    base.save_pretrained(tmp_path / "base")
    assert "embed_tokens.weight" in Checkpoint(tmp_path / "base").tensors
    with pytest.warns(UserWarning, match=r"started anew.*lm_head"):
        again = flax.FlaxOlmo2ForCausalLM.from_pretrained(tmp_path / "base")
    assert close(again.module.apply({"params": again.params}, ids, mask).logits, again(ids, mask).logits)
    with pytest.raises(ConfigError, match="takes a Olmo2Config"):
        flax.FlaxOlmo2Model({})


@pytest.mark.parametrize("kind", ["linear", "embedding", "norm", "bias"])
def test_loaded_weights_do_not_hang_on_the_file(kind):
    memory = np.zeros(32 * 32 + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4  # where JAX would share the memory, if it were let
    values = memory[start : start + 32 * 32].reshape(32, 32)
    values[:] = np.arange(32)
    leaf = from_numpy(Parameter("x", (32, 32), ("embed", "embed"), kind), values)
    values[:] = 0
    assert np.array_equal(leaf[1] if kind != "linear" else leaf[:, 1], np.arange(32))


@each
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_parameters_come_back_bit_for_bit_from_orbax_and_msgpack(cls, name, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    model = make(cls)
    params = model.params if name == "float32" else model.to_bf16(model.params)
    empty = cls(model.config, _do_init=False, param_dtype=name).params_shape_tree
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        assert equal(checkpointer.restore(tmp_path / "params", empty), params)

    blob = serialization.to_bytes(params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), empty)
    ids, mask = left_padded(model.config)
    expected = answer(ask(model, ids, mask, params))
    for restored in (serialization.from_bytes(zeros, blob), serialization.msgpack_restore(blob)):
        assert equal(restored, params)
        other = cls(model.config, _do_init=False)
        other.params = restored
        assert np.array_equal(answer(ask(other, ids, mask)), expected)
