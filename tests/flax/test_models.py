"""Flax models: parameters, dtypes, calls, outputs and what is refused."""

import copy
import pickle
import time

import numpy as np
import pytest

from olmozoo import ConfigError, InputError, Olmo2Config
from olmozoo.families.parameter import Parameter
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import SMALL_OLMO2, config_of
from tests.helpers.flax_models import (
    all_close,
    answer,
    ask,
    close,
    each,
    each_causal,
    equal,
    labelled,
    make,
)

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from olmozoo import flax
from olmozoo.flax.layers import attention, causal_mask

CLASSES = [getattr(flax, name) for name in flax.__all__ if hasattr(getattr(flax, name), "config_class")]


OPTIONS = {"tied": {"tie_word_embeddings": True}, "untied": {"tie_word_embeddings": False}}


LARGEST = {
    flax.FlaxOlmo2ForCausalLM: "olmo2-32b",
    flax.FlaxOlmoForCausalLM: "olmo-7b",
    flax.FlaxOPTForCausalLM: "opt-66b",
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_variables_of_the_module_are_the_table(cls, name):
    config = config_of(cls).replace(**OPTIONS[name])
    model = cls(config, seed=3)
    ids = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    variables = jax.eval_shape(model.module.init, jax.random.key(0), ids)["params"]
    assert variables == model.params_shape_tree
    leaves = flatten_dict(model.params, sep=".")
    renamed = {"linear": "kernel", "embedding": "embedding", "norm": "scale", "bias": "bias"}
    table = [parameter for parameter in config.parameters(cls.head) if parameter.tied_to is None]
    stacks = {}
    for parameter in table:
        if parameter.stack is not None:  # a leaf has all experts of a layer
            stacked, index = parameter.stack
            leaf = ".".join((*stacked.removeprefix("" if cls.head else "model.").split(".")[:-1], "kernel"))
            assert np.array_equal(leaves[leaf][index], parameter.initial(3).T)
            stacks[leaf] = stacks.get(leaf, 0) + 1
            continue
        path = parameter.name.removeprefix("" if cls.head else "model.").rpartition(".")[0]
        value, expected = leaves.pop(f"{path}.{renamed[parameter.kind]}"), parameter.initial(3)
        assert np.array_equal(value, expected.T if parameter.kind == "linear" else expected)
    assert {path: len(leaf) for path, leaf in leaves.items()} == stacks
    assert model.num_parameters() == sum(config.count_parameters(cls.head).values())
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == config.embedding.size


def test_nothing_is_allocated_where_only_shapes_are_asked_for(monkeypatch):
    config = Olmo2Config.from_preset("olmo2-32b")
    monkeypatch.setattr(Parameter, "initial", lambda *_: pytest.fail("an initial value was drawn"))
    model = flax.FlaxOlmo2ForCausalLM(config, dtype=jnp.bfloat16, _do_init=False)
    for tree in (
        model.params_shape_tree,
        jax.eval_shape(lambda: flax.FlaxOlmo2ForCausalLM(config, dtype=jnp.bfloat16).params),
        jax.eval_shape(lambda: model.init_weights(0)),
        jax.eval_shape(model.init_weights, 0),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(np.float32)}
        assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == sum(config.count_parameters().values())
    ids = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    output = jax.eval_shape(lambda params, ids: model(ids, params=params), model.params_shape_tree, ids)
    assert output.logits.shape == (2, 7, config.vocab_size)
    assert output.logits.dtype == jnp.bfloat16
    assert output.past_key_values[63][0].shape == (2, 8, 7, 128)


@each_causal
def test_the_shapes_of_the_largest_are_had_at_once_and_without_memory(cls, monkeypatch):
    def draws(parameter, seed, dtype):
        raise AssertionError(f"{parameter.name} was drawn for its shape")

    monkeypatch.setattr(Parameter, "initial", draws)
    largest = cls.config_class.from_preset(LARGEST[cls])
    before = {id(array) for array in jax.live_arrays()}

    def shapes(config):
        start = time.process_time()
        model = cls(config, dtype=jnp.bfloat16, _do_init=False)
        trees = [model.params_shape_tree, jax.eval_shape(lambda: cls(config, dtype=jnp.bfloat16).params)]
        return time.process_time() - start, model, trees

    one_layer = min(shapes(largest.replace(num_hidden_layers=1))[0] for _ in range(3))
    took, model, trees = min((shapes(largest) for _ in range(3)), key=lambda result: result[0])
    assert took < 4 * largest.num_hidden_layers * one_layer
    assert trees[0] == trees[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(trees[0])) == model.num_parameters() > 6e9
    made = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(array.nbytes for array in made) < 1e6
    with pytest.raises(InputError, match="_do_init=False"):
        model(np.ones((1, 2), int))


def test_without_parameters_of_its_own_a_model_takes_them_with_each_call(model, batch, tmp_path):
    ids, mask = batch
    bare = flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2, _do_init=False)
    for call in (lambda: bare(ids), lambda: bare.params, lambda: bare.generate(ids), lambda: bare.save_pretrained("x")):
        with pytest.raises(InputError, match="_do_init=False"):
            call()
    expected = model(ids, mask).logits
    assert np.array_equal(bare(ids, mask, params=model.params).logits, expected)
    assert np.array_equal(bare(ids, mask, params={"params": model.params}).logits, expected)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, bare.init_weights(2), flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2, seed=2).params)
    )
    initial = flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2, seed=2).params
    for drawn in (bare.init_weights(2), jax.jit(bare.init_weights)(2)):
        assert jax.tree.all(jax.tree.map(np.array_equal, drawn, initial))
    bare.save_pretrained(tmp_path / "m", params=model.params)
    loaded, params = flax.FlaxOlmo2ForCausalLM.from_pretrained(tmp_path / "m", _do_init=False)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, model.params))
    with pytest.raises(InputError, match="_do_init=False"):
        loaded(ids)
    sequences = bare.generate(ids, mask, params=params, max_new_tokens=3).sequences
    assert np.array_equal(sequences, model.generate(ids, mask, max_new_tokens=3).sequences)


def test_parameters_that_do_not_fit_are_all_named(model):
    other = flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2, _do_init=False)
    other.params = {"params": model.params}
    assert other.params["lm_head"]["kernel"] is model.params["lm_head"]["kernel"]
    broken = jax.tree.map(lambda leaf: leaf, model.params)
    attention = broken["model"]["layers"]["1"]["self_attn"]
    attention["q_proj"]["kernel"] = jnp.zeros((40, 41))
    attention["q_proj"]["bias"] = jnp.zeros(40)
    del broken["model"]["norm"]["scale"]
    for use in (lambda: setattr(other, "params", broken), lambda: other.save_pretrained("x", params=broken)):
        with pytest.raises(InputError) as error:
            use()
        text = str(error.value)
        assert "3 problem(s)" in text
        assert "wrong shape: model/layers/1/self_attn/q_proj/kernel is (40, 41), expected (40, 40)" in text
        assert "unexpected: model/layers/1/self_attn/q_proj/bias (40,)" in text
        assert "missing: model/norm/scale (40,)" in text
    assert "norm" in other.params["model"]


def test_float64_is_refused_while_jax_has_it_off(tmp_path):
    folder = write_checkpoint(tmp_path / "m", SMALL_OLMO2, dtype="float64")
    for build in (
        lambda: flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2, dtype=jnp.float64),
        lambda: flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2, param_dtype="float64"),
        lambda: flax.FlaxOlmo2ForCausalLM.from_pretrained(folder),
        lambda: flax.FlaxAutoModelForCausalLM.from_pretrained(folder, dtype="float64"),
    ):
        with pytest.raises(ConfigError, match="jax_enable_x64"):
            build()
    assert flax.FlaxOlmo2ForCausalLM.from_pretrained(folder, dtype="float32").dtype == np.float32
    with jax.enable_x64(True):
        model = flax.FlaxOlmo2ForCausalLM.from_pretrained(folder)
        assert model.params["lm_head"]["kernel"].dtype == jax.eval_shape(model, np.ones((1, 3), int)).logits.dtype


def test_parameters_start_in_float32_and_can_be_cast():
    def dtypes(tree):
        return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}

    model = flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2, dtype=jnp.bfloat16)
    assert dtypes(model.params) == {"float32"}
    assert dtypes(jax.eval_shape(lambda: model(np.ones((1, 3), int), output_hidden_states=True))) == {"bfloat16"}
    assert dtypes(jax.eval_shape(model.to_bf16, model.params)) == {"bfloat16"}
    assert dtypes(jax.eval_shape(lambda params: model.to_fp32(model.to_fp16(params)), model.params)) == {"float32"}
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", model.params)
    leaves = flatten_dict(model.to_fp16(model.params, mask), sep=".")
    kinds = {(name.endswith("scale"), leaf.dtype.name) for name, leaf in leaves.items()}
    assert kinds == {(False, "float16"), (True, "float32")}


@each_causal
def test_a_mask_says_which_parameters_are_cast(cls):
    model = make(cls)
    ids, mask = left_padded(model.config)
    chosen = unflatten_dict({path: path[-1] == "kernel" for path in flatten_dict(model.params)})
    mixed = model.to_fp16(model.params, chosen)
    leaves = flatten_dict(mixed)
    assert {(path[-1] == "kernel", leaf.dtype.name) for path, leaf in leaves.items()} == {
        (True, "float16"),
        (False, "float32"),
    }
    assert equal(model.to_fp32(mixed, chosen), model.to_fp32(model.to_fp16(model.params, chosen)))
    output = ask(model, ids, mask, mixed)
    assert output.logits.dtype == np.float32
    assert close(output.logits, ask(model, ids, mask).logits, 2e-2)


@each
def test_jit_grad_checkpoint_and_vmap_agree_with_plain_calls(cls):
    model = make(cls)
    ids, mask = left_padded(model.config)
    labels = labelled(cls, ids)

    def loss(params):
        return model(ids, mask, params=params, **labels).loss

    plain = model(ids, mask, **labels)
    jitted = jax.jit(lambda params, ids, mask: model(ids, mask, params=params, **labels))(model.params, ids, mask)
    assert all_close(jitted, plain)

    value, gradient = jax.jit(jax.value_and_grad(loss))(model.params)
    assert close(value, plain.loss)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(moving(model, gradient)))
    rematerialized = jax.grad(jax.checkpoint(loss))
    assert "remat" in str(jax.make_jaxpr(rematerialized)(model.params))
    assert all_close(jax.jit(rematerialized)(model.params), gradient)

    other = model.init_weights(1)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), model.params, other)
    by_params = jax.jit(jax.vmap(lambda params: answer(model(ids, mask, params=params))))(stacked)
    assert close(by_params[0], answer(plain))
    assert close(by_params[1], answer(ask(model, ids, mask, other)))
    assert not close(by_params[0], by_params[1], 1e-2)
    by_row = jax.jit(jax.vmap(lambda row, seen: answer(model(row[None], seen[None]))[0]))(ids, mask)
    assert close(by_row, answer(plain))


def moving(model, gradient):
    """The leaves of a gradient that are not nought by mathematics: a key's bias moves all scores of a query alike."""
    rotated = hasattr(model.config, "rope_theta")
    return [leaf for path, leaf in flatten_dict(gradient).items() if rotated or path[-2:] != ("k_proj", "bias")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masks_give_no_nan_in_low_precision(dtype):
    weights = np.full((1, 2, 4, 8), 200, dtype)  # scores at the end of float16, beyond it when added to a finite mask
    mask = causal_mask(np.array([[0, 0, 1, 1]]), 1, 4, 0, 4)
    out, seen = attention(weights, -weights, weights, mask, 8**-0.5, lambda x: x)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert np.array_equal(
        np.asarray(seen[0, 0], np.float32), [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5]]
    )
    model = flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2, dtype=dtype, param_dtype=dtype)
    ids, mask = left_padded(SMALL_OLMO2)
    mask[0] = 0
    output = jax.jit(lambda: model(ids, mask, output_hidden_states=True))()
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(output))


@each_causal
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_low_precision_is_finite_with_left_padding_and_near_the_truth(cls, name):
    model = make(cls)
    ids, mask = left_padded(model.config)
    mask[0] = 0  # a row that is all padding
    expected = answer(ask(model, ids, mask))
    params = {"bfloat16": model.to_bf16, "float16": model.to_fp16}[name](model.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {name}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}
    low = cls(model.config, dtype=name, _do_init=False)
    output = ask(low, ids, mask, params, output_hidden_states=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(output)} == {name}
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(output))
    found, bound = np.asarray(answer(output), np.float32), {"bfloat16": 0.1, "float16": 0.02}[name]
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()
    wide = model.to_fp32(params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}
    assert all_close(wide, model.params, {"bfloat16": 2**-8, "float16": 2**-10}[name])
    assert not equal(wide, model.params)


def test_embeddings_positions_and_kept_logits(model, batch):
    ids, _ = batch
    expected = model(ids).logits
    embeds = model.params["model"]["embed_tokens"]["embedding"][ids]
    assert np.array_equal(model(inputs_embeds=embeds).logits, expected)
    places = np.arange(11)[None] + 5
    moved = model(ids, position_ids=places).logits
    assert np.array_equal(model(ids, cache_position=places[0]).logits, moved)
    assert close(moved, expected, 1e-4)  # rotary positions are relative
    assert not close(model(ids, position_ids=places * 2).logits, expected, 1e-2)
    assert close(model(ids, logits_to_keep=2).logits, expected[:, -2:])
    assert close(model(ids, num_logits_to_keep=np.array([0, 3])).logits, expected[:, [0, 3]])


def test_outputs_are_tuples_dicts_and_pytrees(model, batch):
    ids, mask = batch
    output = model(ids, mask, labels=ids)
    loss, logits, _ = output
    assert output.keys() == ["loss", "logits", "past_key_values"]
    assert output[0] is loss
    assert output["logits"] is logits
    doubled = jax.tree.map(lambda leaf: leaf * 2, output)
    assert type(doubled) is type(output)
    assert doubled.hidden_states is None
    assert np.array_equal(doubled.logits, 2 * logits)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(output)]
    assert paths[:2] == [".loss", ".logits"]
    plain = model(ids, mask, return_dict=False, output_attentions=True, use_cache=False)
    assert isinstance(plain, tuple)
    assert [len(part) for part in plain] == [3, 2]
    chatty = flax.FlaxOlmo2ForCausalLM(SMALL_OLMO2.replace(extra={"output_hidden_states": True}, use_cache=False))
    assert chatty(ids).keys() == ["logits", "hidden_states"]
    assert chatty(ids, output_hidden_states=False, use_cache=True).keys() == ["logits", "past_key_values"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": [1, 2]}, r"shape \(2,\), expected \(batch, seq\)"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]}, r"attention_mask has shape \(1, 3\)"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1], [1, 1]]}, r"attention_mask has shape \(2, 2\)"),
        ({"input_ids": [[1, 2]], "position_ids": [[1]]}, r"position_ids has shape \(1, 1\)"),
        ({"input_ids": [[1, 2]], "past_key_values": "x"}, "past_key_values is a str"),
        ({"input_ids": [[1, 2]], "past_key_values": ((1, 2),)}, "past_key_values has 1 layers, expected 2"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]], "logits_to_keep": 1}, "leave out logits_to_keep"),
    ],
)
def test_arguments_that_do_not_fit_are_named(model, arguments, named):
    arguments = {key: value if key == "past_key_values" else np.array(value) for key, value in arguments.items()}
    arguments = {key: int(value) if key == "logits_to_keep" else value for key, value in arguments.items()}
    with pytest.raises(InputError, match=named):
        model(**arguments)


def test_copies_and_pickles_answer_the_same(model, batch):
    ids, mask = batch
    expected = model.generate(ids, mask, max_new_tokens=2).sequences
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(other(ids, mask).logits, model(ids, mask).logits)
        assert np.array_equal(other.generate(ids, mask, max_new_tokens=2).sequences, expected)
