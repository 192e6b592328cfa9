"""What users of JAX and Flax expect beyond the numbers."""

import copy
import pickle

import numpy as np
import pytest

from olmozoo import ConfigError, InputError, Olmo2Config, OlmoConfig, OPTConfig
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.families.parameter import Parameter
from tests.helpers.checkpoints import left_padded, write_checkpoint

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from olmozoo import flax
from olmozoo.flax.base import from_numpy
from olmozoo.flax.layers import attention, causal_mask
from olmozoo.generation.prepare import BUCKET

CONFIG = Olmo2Config(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    eos_token_id=None,
)
OPT = OPTConfig(
    vocab_size=61,
    hidden_size=40,
    ffn_dim=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
    pad_token_id=0,
    word_embed_proj_dim=24,
    do_layer_norm_before=False,
)
OLMO = OlmoConfig(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    attention_bias=True,
    tie_word_embeddings=True,
    pad_token_id=0,
)
CLASSES = [getattr(flax, name) for name in flax.__all__ if hasattr(getattr(flax, name), "config_class")]
OPTIONS = {"tied": {"tie_word_embeddings": True}, "untied": {"tie_word_embeddings": False}}


@pytest.fixture
def x64():
    """float64 in JAX, for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model in float32; tests do not change it."""
    return flax.FlaxOlmo2ForCausalLM.from_pretrained(
        write_checkpoint(tmp_path_factory.mktemp("m"), CONFIG, dtype="float32")
    )


@pytest.fixture(scope="module")
def batch():
    return left_padded(CONFIG)


def close(found, expected, bound=2e-5):
    return np.allclose(np.asarray(found), np.asarray(expected), rtol=bound, atol=bound)


def all_close(found, expected, bound=2e-5):
    return jax.tree.all(jax.tree.map(lambda a, b: close(a, b, bound), found, expected))


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_variables_of_the_module_are_the_table(cls, name):
    config = next(config for config in (CONFIG, OPT, OLMO) if isinstance(config, cls.config_class))
    config = config.replace(**OPTIONS[name])
    model = cls(config, seed=3)
    ids = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    variables = jax.eval_shape(model.module.init, jax.random.key(0), ids)["params"]
    assert variables == model.params_shape_tree
    leaves = flatten_dict(model.params, sep=".")
    renamed = {"linear": "kernel", "embedding": "embedding", "norm": "scale", "bias": "bias"}
    table = [parameter for parameter in config.parameters(cls.head) if parameter.tied_to is None]
    for parameter in table:
        path = parameter.name.removeprefix("" if cls.head else "model.").rpartition(".")[0]
        value, expected = leaves.pop(f"{path}.{renamed[parameter.kind]}"), parameter.initial(3)
        assert np.array_equal(value, expected.T if parameter.kind == "linear" else expected)
    assert not leaves
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


def test_without_parameters_of_its_own_a_model_takes_them_with_each_call(model, batch, tmp_path):
    ids, mask = batch
    bare = flax.FlaxOlmo2ForCausalLM(CONFIG, _do_init=False)
    for call in (lambda: bare(ids), lambda: bare.params, lambda: bare.generate(ids), lambda: bare.save_pretrained("x")):
        with pytest.raises(InputError, match="_do_init=False"):
            call()
    expected = model(ids, mask).logits
    assert np.array_equal(bare(ids, mask, params=model.params).logits, expected)
    assert np.array_equal(bare(ids, mask, params={"params": model.params}).logits, expected)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, bare.init_weights(2), flax.FlaxOlmo2ForCausalLM(CONFIG, seed=2).params)
    )
    initial = flax.FlaxOlmo2ForCausalLM(CONFIG, seed=2).params
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
    other = flax.FlaxOlmo2ForCausalLM(CONFIG, _do_init=False)
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
    folder = write_checkpoint(tmp_path / "m", CONFIG, dtype="float64")
    for make in (
        lambda: flax.FlaxOlmo2ForCausalLM(CONFIG, dtype=jnp.float64),
        lambda: flax.FlaxOlmo2ForCausalLM(CONFIG, param_dtype="float64"),
        lambda: flax.FlaxOlmo2ForCausalLM.from_pretrained(folder),
        lambda: flax.FlaxAutoModelForCausalLM.from_pretrained(folder, dtype="float64"),
    ):
        with pytest.raises(ConfigError, match="jax_enable_x64"):
            make()
    assert flax.FlaxOlmo2ForCausalLM.from_pretrained(folder, dtype="float32").dtype == np.float32
    with jax.enable_x64(True):
        model = flax.FlaxOlmo2ForCausalLM.from_pretrained(folder)
        assert model.params["lm_head"]["kernel"].dtype == jax.eval_shape(model, np.ones((1, 3), int)).logits.dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_are_kept_and_files_come_back_byte_for_byte(tmp_path, dtype, x64):
    config = CONFIG.replace(attention_bias=True)
    folder = write_checkpoint(tmp_path / "m", config, dtype=dtype)
    model = flax.FlaxAutoModelForCausalLM.from_pretrained(folder)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {model.dtype.name} == {dtype}
    assert jax.eval_shape(model, np.ones((1, 3), int)).logits.dtype.name == dtype
    model.save_pretrained(tmp_path / "a", max_shard_size=20_000)
    flax.FlaxOlmo2ForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_parameters_start_in_float32_and_can_be_cast():
    def dtypes(tree):
        return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}

    model = flax.FlaxOlmo2ForCausalLM(CONFIG, dtype=jnp.bfloat16)
    assert dtypes(model.params) == {"float32"}
    assert dtypes(jax.eval_shape(lambda: model(np.ones((1, 3), int), output_hidden_states=True))) == {"bfloat16"}
    assert dtypes(jax.eval_shape(model.to_bf16, model.params)) == {"bfloat16"}
    assert dtypes(jax.eval_shape(lambda params: model.to_fp32(model.to_fp16(params)), model.params)) == {"float32"}
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", model.params)
    leaves = flatten_dict(model.to_fp16(model.params, mask), sep=".")
    kinds = {(name.endswith("scale"), leaf.dtype.name) for name, leaf in leaves.items()}
    assert kinds == {(False, "float16"), (True, "float32")}


# -- calls ------------------------------------------------------------------------------------------------------------


def test_a_call_is_a_pure_function_under_jit_grad_and_vmap(model, batch):
    ids, mask = batch
    expected = model(ids, mask, labels=ids, output_hidden_states=True)
    compiled = jax.jit(lambda params, *inputs: model(*inputs, params=params, labels=ids, output_hidden_states=True))
    assert all_close(compiled(model.params, ids, mask), expected)

    other = model.init_weights(1)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), model.params, other)
    each = jax.jit(jax.vmap(lambda params: model(ids, mask, params=params).logits))(stacked)
    assert close(each[0], expected.logits)
    assert close(each[1], model(ids, mask, params=other).logits)
    rows = jax.jit(jax.vmap(lambda row, seen: model(row[None], seen[None]).logits[0]))(ids, mask)
    assert close(rows, expected.logits)


def test_gradients_are_those_of_the_loss(model, batch, x64):
    ids, mask = batch
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params)
    double = flax.FlaxOlmo2ForCausalLM(CONFIG, dtype=np.float64, _do_init=False)

    def loss(params):
        output = double(ids, mask, params=params, labels=np.where(mask == 1, ids, -100))
        return output.loss, output.logits

    graded = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradient = graded(params)
    chances = np.exp(logits[:, :-1]) / np.exp(logits[:, :-1]).sum(-1, keepdims=True)
    picked = np.take_along_axis(chances, ids[:, 1:, None], axis=-1)[..., 0]
    assert close(value, -np.log(picked)[mask[:, 1:] == 1].mean(), 1e-12)
    for seed in range(3):
        stream = np.random.default_rng(seed)
        way = jax.tree.map(lambda leaf, stream=stream: stream.standard_normal(leaf.shape), params)
        ahead, back = (
            graded(jax.tree.map(lambda leaf, step, by=by: leaf + by * step, params, way))[0][0] for by in (1e-6, -1e-6)
        )
        slope = sum(np.vdot(*pair) for pair in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
        assert close(slope, (ahead - back) / 2e-6, 1e-6)


def test_labels_that_are_all_ignored_give_no_loss_and_no_nan(model, batch):
    ids, mask = batch
    loss = jax.jit(jax.value_and_grad(lambda params: model(ids, mask, params=params, labels=0 * ids - 100).loss))
    value, gradient = loss(model.params)
    assert value == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_gradient_checkpointing_recomputes_blocks_and_changes_no_gradient(batch):
    ids, mask = batch
    model = flax.FlaxOlmo2ForCausalLM(CONFIG)

    def loss(params):
        return model(ids, mask, params=params, labels=ids).loss

    def recomputed():
        return str(jax.make_jaxpr(jax.grad(loss))(model.params)).count("remat")

    def cache_of_training():
        return jax.eval_shape(lambda: model(ids, mask, deterministic=False, use_cache=True).past_key_values)

    assert recomputed() == 0
    plain = jax.jit(jax.grad(loss))(model.params)
    logits = model(ids, mask).logits
    model.gradient_checkpointing_enable()
    assert recomputed() >= CONFIG.num_hidden_layers
    assert all_close(jax.jit(jax.grad(lambda params: loss(params)))(model.params), plain, 1e-6)
    output = model(ids, mask)
    assert close(output.logits, logits)
    assert output.past_key_values is not None
    assert cache_of_training() is None
    model.gradient_checkpointing_disable()
    assert recomputed() == 0
    assert cache_of_training() is not None


def test_dropout_is_alive_in_training_and_needs_a_key(model, batch):
    ids, mask = batch
    still = model(ids, mask).logits
    assert np.array_equal(model(ids, mask, deterministic=False).logits, still)  # no dropout in the config
    dropping = flax.FlaxOlmo2ForCausalLM(CONFIG.replace(attention_dropout=0.5), _do_init=False)
    dropping.params = model.params
    assert np.array_equal(dropping(ids, mask, dropout_rng=jax.random.key(0)).logits, still)
    one, same, two = (
        dropping(ids, mask, dropout_rng=jax.random.key(seed), deterministic=False, output_attentions=True)
        for seed in (0, 0, 1)
    )
    assert np.array_equal(one.logits, same.logits)
    assert not close(one.logits, still)
    assert not close(one.logits, two.logits)
    with pytest.raises(Exception, match="dropout"):
        dropping(ids, mask, deterministic=False)


@pytest.mark.parametrize(("cache", "compiled"), [("tuple", True), ("object", True), ("object", False)])
def test_the_cache_that_goes_in_comes_out_and_answers_alike(model, batch, cache, compiled):
    ids, mask = batch
    expected = model(ids, mask).logits
    past = None if cache == "tuple" else model.init_cache(3, 14)
    wide = np.pad(mask, ((0, 0), (0, 3)), constant_values=1)  # as long as the cache: its end is not written yet

    def step(ids, mask, past):
        return model(ids, mask, past_key_values=past)

    run, start = jax.jit(step) if compiled else step, 0
    for end in (4, 5, 6, 11) if compiled else (10, 11):
        seen = wide if cache == "object" and compiled else mask[:, :end]
        output = run(ids[:, start:end], seen, past)
        past = output.past_key_values
        assert close(output.logits[mask[:, start:end] == 1], expected[:, start:end][mask[:, start:end] == 1])
        start = end
    if cache == "tuple":
        assert isinstance(past, tuple)
        assert past[1][0].shape == (3, 2, 11, 10)
        assert isinstance(model(ids[:, :1], past_key_values=list(past), use_cache=False).past_key_values, tuple)
    else:
        assert isinstance(past, flax.KVCache)
        assert past.max_length == 14
        assert past.get_seq_length() == 11
        assert not past.keys[1][:, :, 11:].any()
        with pytest.raises(InputError, match="room for 14 positions, 15"):
            model(ids[:, :4], past_key_values=past)
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masks_give_no_nan_in_low_precision(dtype):
    weights = np.full((1, 2, 4, 8), 200, dtype)  # scores at the end of float16, beyond it when added to a finite mask
    mask = causal_mask(np.array([[0, 0, 1, 1]]), 1, 4, 0, 4)
    out, seen = attention(weights, -weights, weights, mask, 8**-0.5, lambda x: x)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert np.array_equal(
        np.asarray(seen[0, 0], np.float32), [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5]]
    )
    model = flax.FlaxOlmo2ForCausalLM(CONFIG, dtype=dtype, param_dtype=dtype)
    ids, mask = left_padded(CONFIG)
    mask[0] = 0
    output = jax.jit(lambda: model(ids, mask, output_hidden_states=True))()
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(output))


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
    chatty = flax.FlaxOlmo2ForCausalLM(CONFIG.replace(extra={"output_hidden_states": True}, use_cache=False))
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


def test_a_cache_of_other_rows_is_refused(model):
    with pytest.raises(InputError, match=r"the cache has \(3, \d+\) rows and heads, expected \(2, "):
        model(np.ones((2, 3), int), past_key_values=model.init_cache(3, 8))


def test_a_mask_shorter_than_what_is_cached_is_refused(model):
    ids, past = np.ones((2, 3), int), model.init_cache(2, 8).replace(length=jnp.int32(3))
    for length in (5, 9):
        with pytest.raises(InputError, match=rf"attention_mask has shape \(2, {length}\), expected \(2, 6 to 8\)"):
            model(ids, np.ones((2, length), int), past_key_values=past)


# -- decoding ---------------------------------------------------------------------------------------------------------


def by_hand(model, ids, mask, steps):
    """Greedy decoding, all tokens anew at each step; those still to come are out of sight behind the causal mask."""
    length = ids.shape[1]
    ids, mask = np.pad(ids, ((0, 0), (0, steps))), np.pad(mask, ((0, 0), (0, steps)), constant_values=1)
    predict = jax.jit(lambda ids: model(ids, mask, np.maximum(mask.cumsum(-1) - 1, 0)).logits)
    for end in range(length, length + steps):
        ids[:, end] = np.asarray(predict(ids)[:, end - 1]).argmax(-1)
    return ids


def test_generate_writes_the_likeliest_tokens_and_compiles_once_a_bucket(model, batch, caplog):
    ids, mask = batch
    model = copy.copy(model)
    expected = by_hand(model, ids, mask, 9)
    output = model.generate(ids, mask, max_new_tokens=9)
    assert np.array_equal(output.sequences, expected)
    assert model.trace_count == 2  # the prompt and the answer
    assert np.array_equal(model.generate(ids, mask, max_new_tokens=4).sequences, expected[:, :15])
    row = model.generate(ids[1:2, 2:], max_length=16)
    assert model.trace_count == 4  # another number of rows
    assert np.array_equal(np.asarray(row.sequences)[0], expected[1, 2:18])

    def compiled():
        return sum("Compiling" in record.getMessage() for record in caplog.records)

    with jax.log_compiles(True):
        for length in (5, 8):
            model.generate(ids[1:2, -length:], max_new_tokens=3, eos_token_id=[60, 59], pad_token_id=7)
        model.generate(ids[1:2], max_new_tokens=BUCKET)
        assert compiled() == 0
        assert model.trace_count == 4
        model.generate(ids[1:2], max_new_tokens=BUCKET + 1)
    assert compiled() > 0
    assert model.trace_count == 6


def test_generate_stops_pads_and_trims(model, batch):
    ids, mask = batch
    free = np.asarray(model.generate(ids, mask, max_new_tokens=12).sequences)[:, 11:]
    ends = [int(free[0, 2]), int(free[1, 4]), int(free[2, 0])]
    found = np.asarray(model.generate(ids, mask, max_new_tokens=12, eos_token_id=ends, pad_token_id=9).sequences)
    lengths = [next(i for i, token in enumerate(row) if token in ends) + 1 for row in free]
    assert found.shape == (3, 11 + max(lengths))
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        assert np.array_equal(found[row, :11], ids[row])
        assert np.array_equal(found[row, 11 : 11 + length], free[row, :length])
        assert (found[row, 11 + length :] == 9).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"nonsense": 1}, "nonsense"),
        ({"attention_mask": np.ones((3, 2))}, "attention_mask has shape"),
    ],
)
def test_generate_refuses_what_it_cannot_do(model, batch, settings, named):
    with pytest.raises(InputError, match=named):
        model.generate(batch[0], **settings)
    with pytest.raises(InputError, match="outside of jit"):
        jax.jit(model.generate)(batch[0])


def test_copies_and_pickles_answer_the_same(model, batch):
    ids, mask = batch
    expected = model.generate(ids, mask, max_new_tokens=2).sequences
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(other(ids, mask).logits, model(ids, mask).logits)
        assert np.array_equal(other.generate(ids, mask, max_new_tokens=2).sequences, expected)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_base_model_loads_from_a_headed_checkpoint_and_saves_its_own(model, batch, tmp_path):
    ids, mask = batch
    model.save_pretrained(tmp_path / "lm")
    base = flax.FlaxOlmo2Model.from_pretrained(tmp_path / "lm")
    hidden = base(ids, mask).last_hidden_state
    assert np.array_equal(hidden, model(ids, mask, output_hidden_states=True).hidden_states[-1])
    base.save_pretrained(tmp_path / "base")
    assert "embed_tokens.weight" in Checkpoint(tmp_path / "base").tensors
    with pytest.warns(UserWarning, match=r"started anew.*lm_head"):
        again = flax.FlaxOlmo2ForCausalLM.from_pretrained(tmp_path / "base")
    assert np.array_equal(again.module.apply({"params": again.params}, ids, mask).logits, again(ids, mask).logits)
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
