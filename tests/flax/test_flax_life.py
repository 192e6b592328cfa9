"""The Flax wing as JAX users live it: transformations, precisions, saving, export, NNX, dropout, embeddings."""

import copy
import pickle
import time

import numpy as np
import pytest

from olmozoo import ConfigError, InputError
from tests.flax.test_flax import CONFIG, OLMO, OPT, all_close, by_hand, close
from tests.helpers.checkpoints import left_padded, random_values

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
from flax import nnx, serialization
from flax.nnx import bridge
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from olmozoo import flax
from olmozoo.families.parameter import Parameter

CAUSAL = {
    flax.FlaxOlmo2ForCausalLM: CONFIG.replace(num_hidden_layers=1),
    flax.FlaxOlmoForCausalLM: OLMO.replace(num_hidden_layers=1, clip_qkv=1.5, eos_token_id=None),
    flax.FlaxOPTForCausalLM: OPT.replace(num_hidden_layers=1, eos_token_id=None, dropout=0.0),
}
HEADED = {
    flax.FlaxOlmoForSequenceClassification: OLMO.replace(
        num_hidden_layers=1, num_labels=3, id2label=None, label2id=None
    ),
    flax.FlaxOPTForQuestionAnswering: OPT.replace(num_hidden_layers=1, dropout=0.0),
}
ALL = CAUSAL | HEADED
LARGEST = {
    flax.FlaxOlmo2ForCausalLM: "olmo2-32b",
    flax.FlaxOlmoForCausalLM: "olmo-7b",
    flax.FlaxOPTForCausalLM: "opt-66b",
}
by_name = {"ids": lambda cls: cls.__name__}
each_causal = pytest.mark.parametrize("cls", CAUSAL, **by_name)
each = pytest.mark.parametrize("cls", ALL, **by_name)


def make(cls, config=None, **options):
    """A model with random weights in which every mistake shows."""
    model = cls(config or ALL[cls], _do_init=False, **options)
    model.bind_parameters(
        (parameter, random_values(parameter).astype("float32"))
        for parameter in model.config.parameters(model.head)
        if parameter.tied_to is None
    )
    return model


def ask(model, ids, mask, params=None, dropout_rng=None, **inputs):
    """A compiled call: uncompiled, each operation would be compiled by itself, which takes longer."""
    call = jax.jit(lambda params, key: model(ids, mask, params=params, dropout_rng=key, **inputs))
    return call(model.params if params is None else params, dropout_rng)


def labelled(cls, ids):
    """The labels that a class takes for its loss."""
    rows = np.arange(len(ids)) % 3
    if cls.head == "question_answering":
        return {"start_positions": rows, "end_positions": rows + 4}
    return {"labels": ids if cls.head == "causal_lm" else rows}


def answer(output):
    """What a head says: its logits, for the start of an answer where there are two."""
    return output.start_logits if "start_logits" in output.keys() else output.logits  # noqa: SIM118


def equal(one, other):
    """Whether two trees are alike in form, dtypes and bits."""
    alike = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
    return jax.tree.all(alike)


# -- transformations --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("cls", "checkpointing"),
    [*((cls, False) for cls in ALL), (flax.FlaxOPTForCausalLM, True)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_training_step_with_optax_lowers_the_loss(cls, checkpointing):
    optax = pytest.importorskip("optax")
    model = make(cls)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, mask = left_padded(model.config)
    labels = labelled(cls, ids)
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(
            lambda params: model(ids, mask, params=params, deterministic=False, **labels).loss
        )(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state = model.params, optimizer.init(model.params)
    losses = []
    for _ in range(12):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert ask(model, ids, mask, params, **labels).loss < losses[-1]


# -- precisions -------------------------------------------------------------------------------------------------------


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


# -- saving -----------------------------------------------------------------------------------------------------------


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


# -- other homes ------------------------------------------------------------------------------------------------------


@each
def test_an_exported_forward_pass_answers_alike_at_every_length(cls):
    model = make(cls)
    batch, length = export.symbolic_shape("batch, length")
    inputs = [jax.ShapeDtypeStruct((batch, length), jnp.int32)] * 2
    forward = jax.jit(lambda params, ids, mask: answer(model(ids, mask, params=params)))
    blob = export.export(forward)(model.params_shape_tree, *inputs).serialize()
    run = export.deserialize(blob).call
    for rows, length in ((3, 11), (1, 7)):
        ids, mask = (array.astype(np.int32) for array in left_padded(model.config, rows, length))
        assert close(run(model.params, ids, mask), answer(ask(model, ids, mask)))


@each
def test_modules_live_in_nnx(cls):
    model = make(cls)
    ids, mask = left_padded(model.config)
    module = bridge.ToNNX(model.module, rngs=nnx.Rngs(0)).lazy_init(ids, mask)
    state = nnx.state(module, nnx.Param)
    found = {path: leaf.get_value().shape for path, leaf in nnx.to_flat_state(state)}
    assert found == {path: leaf.shape for path, leaf in flatten_dict(model.params).items()}
    nnx.replace_by_pure_dict(state, model.params)
    nnx.update(module, state)

    @nnx.jit
    def graded(module):
        def loss(module):
            output = module(ids, mask, **labelled(cls, ids))
            return output.loss, answer(output)

        return nnx.value_and_grad(loss, has_aux=True)(module)

    @jax.jit
    def plainly_graded(params):
        def loss(params):
            output = model(ids, mask, params=params, **labelled(cls, ids))
            return output.loss, answer(output)

        return jax.value_and_grad(loss, has_aux=True)(params)

    found, gradient = graded(module)
    expected, plain = plainly_graded(model.params)
    assert all_close(found, expected)
    assert all_close(nnx.to_pure_dict(gradient), plain)


# -- dropout ----------------------------------------------------------------------------------------------------------

DROPS = {
    "dropout": (flax.FlaxOPTForCausalLM, OPT),
    "attention_dropout": (flax.FlaxOPTForCausalLM, OPT),
    "layerdrop": (flax.FlaxOPTForCausalLM, OPT),
    "olmo": (flax.FlaxOlmoForCausalLM, OLMO),
    "olmo2": (flax.FlaxOlmo2ForCausalLM, CONFIG),
}


def dropping(kind, share):
    """A model of which one kind of dropout is on."""
    cls, config = DROPS[kind]
    field = "attention_dropout" if kind.startswith("olmo") else kind
    quiet = {"dropout": 0.0} if cls is flax.FlaxOPTForCausalLM else {}
    return make(cls, config.replace(**{**quiet, field: share}))


@pytest.mark.parametrize("kind", DROPS)
def test_dropout_is_alive_in_training_alone(kind):
    model, off = dropping(kind, 0.5), dropping(kind, 0.0)
    ids, mask = left_padded(model.config)
    still = ask(off, ids, mask).logits
    assert np.array_equal(ask(model, ids, mask).logits, still)
    assert np.array_equal(ask(model, ids, mask, dropout_rng=jax.random.key(0)).logits, still)
    assert np.array_equal(ask(off, ids, mask, deterministic=False).logits, still)  # nothing to draw: no key is needed
    train = jax.jit(lambda key: model(ids, mask, deterministic=False, dropout_rng=key).logits)
    draws = [train(jax.random.key(seed)) for seed in range(24)]
    assert np.array_equal(train(jax.random.key(3)), draws[3])
    assert len({np.asarray(draw).tobytes() for draw in draws}) > 3  # of the four ways that two layers can be dropped
    assert len({np.asarray(draw).tobytes() for draw in (*draws, still)}) > 3
    field = "attention_dropout" if kind.startswith("olmo") else kind
    for call in (model, jax.jit(model, static_argnames="deterministic")):
        with pytest.raises(InputError, match=rf"{field} is 0\.5: pass `dropout_rng`"):
            call(ids, mask, deterministic=False)


def test_a_layer_is_dropped_as_often_as_layerdrop_says():
    config = OPT.replace(num_hidden_layers=1, layerdrop=0.3, dropout=0.0)
    model = make(flax.FlaxOPTForCausalLM, config)
    ids, mask = left_padded(config)
    keys = jax.random.split(jax.random.key(0), 2000)
    still = ask(model, ids, mask, output_hidden_states=True).hidden_states
    last = jax.jit(
        jax.vmap(
            lambda key: (
                model.module.bind({"params": model.params}, rngs={"dropout": key})
                .model(ids[1:2], mask[1:2], output_hidden_states=True, deterministic=False)
                .hidden_states[1]
            )
        )
    )(keys)
    project = model.params["model"]["decoder"]["project_out"]["kernel"]
    skipped = np.abs(last - (still[0] @ project)[1:2]).max((1, 2, 3)) < 1e-4
    kept = np.abs(last - still[1][1:2]).max((1, 2, 3)) < 1e-4
    assert (skipped ^ kept).all()
    assert abs(skipped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(keys))


def test_attention_weights_are_dropped_as_often_as_said_and_keep_their_mean():
    model = dropping("attention_dropout", 0.25)
    ids, mask = left_padded(model.config)
    still = np.asarray(ask(model, ids, mask, output_attentions=True).attentions[0])
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = jax.jit(
        jax.vmap(
            lambda key: model(ids, mask, deterministic=False, dropout_rng=key, output_attentions=True).attentions[0]
        )
    )(keys)
    seen = np.broadcast_to(still > 1e-6, drawn.shape)
    zeros = np.asarray(drawn) == 0
    assert abs(zeros[seen].mean() - 0.25) < 0.005
    assert close(np.where(zeros, still, drawn * 0.75), still)
    assert np.abs(drawn.mean(0) - still).max() < 0.15


def test_what_sublayers_put_out_is_dropped_as_often_as_said():
    config = OPT.replace(num_hidden_layers=1, dropout=0.25, word_embed_proj_dim=40, do_layer_norm_before=True)
    model = make(flax.FlaxOPTForCausalLM, config.replace(_remove_final_layer_norm=True))
    for name in ("kernel", "bias"):  # an MLP that adds nothing, so that what is left is what attention added
        leaf = model.params["model"]["decoder"]["layers"]["0"]["fc2"]
        leaf[name] = jnp.zeros_like(leaf[name])
    ids, mask = left_padded(config)
    before, after = ask(model, ids, mask, output_hidden_states=True).hidden_states
    added = np.asarray(after - before)
    keys = jax.random.split(jax.random.key(0), 400)

    def draw(key):
        return model(ids, mask, deterministic=False, dropout_rng=key, output_hidden_states=True).hidden_states[1]

    # One key after another: in a product of this many rows with a matrix of zeros, as fc2 is here, jaxlib 0.10.2 reads
    # memory that nothing has written to on the CPU.
    drawn = jax.jit(lambda keys: jax.lax.map(draw, keys))(keys)
    drawn = np.asarray(drawn) - before
    dropped, kept = np.abs(drawn) < 1e-4, np.abs(drawn - added / 0.75) < 1e-4
    assert (dropped | kept).all()
    assert abs(dropped[:, np.abs(added) > 1e-3].mean() - 0.25) < 0.005


@pytest.mark.parametrize("kind", DROPS)
def test_gradient_checkpointing_draws_the_same_dropout(kind):
    model = dropping(kind, 0.3)
    ids, mask = left_padded(model.config)

    def gradients():
        def loss(params, key):
            return model(ids, mask, params=params, labels=ids, deterministic=False, dropout_rng=key).loss

        graded = jax.jit(jax.value_and_grad(loss))
        return [graded(model.params, jax.random.key(seed)) for seed in range(3)]

    plain = gradients()
    model.gradient_checkpointing_enable()
    again = gradients()
    assert all_close(again, plain)
    assert len({float(loss) for loss, _ in again}) > 1


# -- embeddings -------------------------------------------------------------------------------------------------------


@each_causal
def test_generate_continues_prompts_of_embeddings(cls):
    model = make(cls)
    ids, mask = left_padded(model.config)
    expected = by_hand(model, ids.copy(), mask, 6)
    embeds = np.asarray(model.get_input_embeddings()[ids])
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6).sequences
    assert np.array_equal(found, expected[:, 11:])
    assert model.trace_count == 2
    for length in (6, 9):  # no program for each length, nor for each dtype of the prompt
        part = model.generate(inputs_embeds=embeds[:, -length:].astype(np.float64), max_new_tokens=3).sequences
        assert np.array_equal(part, by_hand(model, ids[:, -length:], mask[:, -length:] ** 0, 3)[:, length:])
    assert model.trace_count == 2
    assert np.array_equal(model.generate(ids, mask, max_new_tokens=6).sequences, expected)
    assert model.trace_count == 4  # ids are another program
    answer = expected[0, 11:].tolist()
    stopped = model.generate(inputs_embeds=embeds[:1], max_length=17, eos_token_id=answer[2]).sequences
    assert stopped[0].tolist() == answer[: answer.index(answer[2]) + 1]


def test_prompts_of_embeddings_that_do_not_fit_are_refused():
    model = make(flax.FlaxOlmo2ForCausalLM)
    ids, mask = left_padded(model.config)
    embeds = model.get_input_embeddings()[ids]
    with pytest.raises(InputError, match="one of input_ids and inputs_embeds, not both"):
        model.generate(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(InputError, match="expected input_ids or inputs_embeds, or a bos_token_id"):
        model.generate()
    with pytest.raises(InputError, match=r"inputs_embeds has shape \(11, 40\), expected \(batch, seq, hidden\)"):
        model.generate(inputs_embeds=embeds[0])
    with pytest.raises(InputError, match=r"attention_mask has shape \(3, 10\)"):
        model.generate(inputs_embeds=embeds, attention_mask=mask[:, 1:])
    with pytest.raises(InputError, match="outside of jit"):
        jax.jit(lambda embeds: model.generate(inputs_embeds=embeds))(embeds)


@each
@pytest.mark.parametrize("tied", [True, False])
def test_resizing_changes_config_parameters_head_and_tie(cls, tied):
    model = make(cls, ALL[cls].replace(tie_word_embeddings=tied))
    model.gradient_checkpointing_enable()
    ids, mask = left_padded(model.config)
    logits, before = answer(ask(model, ids, mask)), model.params
    embedding = model.resize_token_embeddings(66, pad_to_multiple_of=8)
    assert embedding is model.get_input_embeddings()
    assert embedding.shape[0] == model.config.vocab_size == model.module.config.vocab_size == 72
    assert model.module.gradient_checkpointing
    assert np.array_equal(embedding[:61], old_rows(model, before))
    assert np.array_equal(embedding[61:], model.config.embedding.initial(0)[61:])
    found = answer(ask(model, ids, mask))
    if cls.head == "causal_lm":
        assert found.shape == (*ids.shape, 72)
        assert close(found[..., :61], logits)
        head = embedding.T if tied else model.params["lm_head"]["kernel"]
        hidden = ask(model, ids, mask, output_hidden_states=True).hidden_states[-1]
        assert close(found, hidden @ head)
        assert model.generate(ids[:, :2], max_new_tokens=3).sequences.shape == (3, 5)
    else:
        assert close(found, logits)
    for rows in (50, None):
        assert model.resize_token_embeddings(rows).shape[0] == model.config.vocab_size == 50
    for use in (lambda: model.resize_token_embeddings(0), lambda: model.resize_token_embeddings(-1)):
        with pytest.raises(ConfigError, match="vocab_size"):
            use()
    assert model.config.vocab_size == 50
    model.params = model.to_bf16(model.params)
    assert model.resize_token_embeddings(70).dtype == jnp.bfloat16
    assert model.module.config == model.config


def old_rows(model, params):
    """The token embedding in a tree of parameters of another size."""
    return next(leaf for path, leaf in flatten_dict(params).items() if path[-2:] == ("embed_tokens", "embedding"))


@each
def test_the_three_wings_resize_alike(cls, tmp_path):
    pt = pytest.importorskip("olmozoo.pt")
    model = make(cls)
    model.save_pretrained(tmp_path / "m")
    twin = getattr(pt, cls.__name__.removeprefix("Flax")).from_pretrained(tmp_path / "m")
    for one in (twin, model):
        one.resize_token_embeddings(66, pad_to_multiple_of=8)
    model.save_pretrained(tmp_path / "flax")
    twin.save_pretrained(tmp_path / "pt")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "flax" / name).read_bytes() == (tmp_path / "pt" / name).read_bytes()


@each
def test_the_input_embedding_can_be_had_and_replaced(cls):
    model = make(cls)
    ids, mask = left_padded(model.config)
    old = model.params
    embedding = model.get_input_embeddings()
    assert embedding is old_rows(model, old)
    model.set_input_embeddings(embedding[::-1])
    assert close(
        ask(model, ids, mask, output_hidden_states=True).hidden_states[-1],
        ask(model, 60 - ids, mask, old, output_hidden_states=True).hidden_states[-1],
    )
    assert old_rows(model, old) is embedding  # a tree that others hold is left as it is
    with pytest.raises(InputError, match=r"wrong shape: model/.*embed_tokens/embedding is"):
        model.set_input_embeddings(embedding[1:])
    bare = cls(model.config, _do_init=False)
    for use in (bare.get_input_embeddings, bare.resize_token_embeddings, lambda: bare.set_input_embeddings(embedding)):
        with pytest.raises(InputError, match="set `params`"):
            use()


def test_copies_made_before_resizing_keep_their_size():
    model = make(flax.FlaxOlmo2ForCausalLM)
    ids, mask = left_padded(model.config)
    expected = model.generate(ids, mask, max_new_tokens=3).sequences
    others = [copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))]
    model.resize_token_embeddings(72)
    model.generate(ids, mask, max_new_tokens=3)
    for other in others:
        assert other.config.vocab_size == 61
        assert np.array_equal(other.generate(ids, mask, max_new_tokens=3).sequences, expected)
