"""What is particular to the Keras wing; that its numbers are those of the others is in test_parity.py."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file

from olmozoo import InputError, Olmo2Config
from olmozoo.checkpoint.files import SAFETENSORS
from olmozoo.generation.prepare import prepare
from tests.helpers.checkpoints import left_padded, random_values, write_checkpoint

keras = pytest.importorskip("keras", reason="olmozoo[tf] is not installed")
tf = pytest.importorskip("tensorflow", reason="olmozoo[tf] is not installed")
zoo = pytest.importorskip("olmozoo.tf", reason="olmozoo[tf] is not installed")

from olmozoo.tf.generation import from_numpy

CONFIG = Olmo2Config(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    pad_token_id=1,
    eos_token_id=None,
    initializer_range=0.2,
)
IDS, MASK = left_padded(CONFIG, batch=4, length=9)
LABELS = np.where(MASK, IDS, -100)
REAL = MASK.astype(bool)


def make(dtype="float32", config=CONFIG, **options):
    """A model whose every parameter matters: norms away from 1, biases away from 0."""
    model = zoo.TFOlmo2ForCausalLM(config, seed=None, dtype=dtype, **options)
    model.bind_parameters(
        (parameter, random_values(parameter).astype(model.variable_dtype))
        for parameter in config.parameters("causal_lm")
        if parameter.tied_to is None
    )
    return model


@pytest.fixture(scope="module")
def model():
    """Shared by tests that leave it as it is."""
    return make("float64")


def greedy(model, ids, steps, mask=None):
    """Ids of the likeliest next tokens, by whole forward calls without a cache."""
    mask = np.ones_like(ids) if mask is None else mask
    for _ in range(steps):
        positions = np.where(mask, mask.cumsum(1) - 1, 0)
        token = np.argmax(model(ids, mask, positions).logits[:, -1], -1)[:, None]
        ids, mask = np.concatenate([ids, token], 1), np.concatenate([mask, np.ones_like(token)], 1)
    return ids


# -- making, binding, loading, saving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [None, "causal_lm"])
def test_variables_and_table_are_in_bijection(tied, head):
    config = CONFIG.replace(tie_word_embeddings=tied)
    cls = zoo.TFOlmo2ForCausalLM if head else zoo.TFOlmo2Model
    model = cls(config, name="zoo")
    table = [parameter for parameter in config.parameters(head) if parameter.tied_to is None]
    leaves = {"linear": "kernel", "embedding": "embeddings", "norm": "scale", "bias": "bias"}
    expected = {}
    for parameter in table:
        modules = parameter.name.removeprefix("" if head else "model.").split(".")[:-1]
        shape = parameter.shape[::-1] if parameter.kind == "linear" else parameter.shape
        expected["/".join(["zoo", *modules, leaves[parameter.kind]])] = shape
    assert {variable.path: tuple(variable.shape) for variable in model.weights} == expected
    assert len(model.weights) == len(table)
    assert model.num_parameters() == sum(parameter.size for parameter in table)


def test_initial_values_are_those_of_the_table():
    model = zoo.TFOlmo2ForCausalLM(CONFIG, seed=3, dtype="bfloat16")
    state = zoo.canonical_state(model)
    for parameter in CONFIG.parameters("causal_lm"):
        np.testing.assert_array_equal(state[parameter.name], parameter.initial(3, "bfloat16"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_load_and_save_give_the_same_bytes(tmp_path, dtype):
    folder = write_checkpoint(tmp_path / "a", CONFIG, dtype=dtype)
    model = zoo.TFAutoModelForCausalLM.from_pretrained(folder)
    assert {variable.dtype for variable in model.weights} == {dtype}
    model.save_pretrained(tmp_path / "b")
    zoo.TFOlmo2ForCausalLM.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    weights = (folder / SAFETENSORS).read_bytes()
    assert (tmp_path / "b" / SAFETENSORS).read_bytes() == weights
    for file in (tmp_path / "b").iterdir():
        assert (tmp_path / "c" / file.name).read_bytes() == file.read_bytes()


def test_copies_are_whole_and_aligned():
    from olmozoo.checkpoint.tensors import aligned_copy as copied

    for shape in ((1, 1), (3, 5), (517, 1031), (1031, 517)):  # the last two are copied in parts
        array = np.random.default_rng(0).standard_normal(shape)
        for transposed in (False, True):
            result = copied(array, transposed)
            assert result.flags.c_contiguous
            assert result.ctypes.data % 64 == 0
            np.testing.assert_array_equal(result, array.T if transposed else array)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_what_lies_aligned_is_the_mapped_file_and_never_changes_it(tmp_path):
    config = CONFIG.replace(vocab_size=64, hidden_size=32)  # so that everything lies aligned
    folder = write_checkpoint(tmp_path / "a", config, dtype="float32")
    before = (folder / SAFETENSORS).read_bytes()
    model = zoo.TFOlmo2ForCausalLM.from_pretrained(folder)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    bounds = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for variable in model.weights:
        address = np.frombuffer(variable.value.read_value(), np.float32).ctypes.data  # of the memory itself
        assert any(low <= address < high for low, high in bounds) == (not variable.path.endswith("/kernel"))
        variable.value.assign_add(variable.value)
    assert (folder / SAFETENSORS).read_bytes() == before
    model.save_pretrained(folder)
    for name, array in load_file(folder / SAFETENSORS).items():
        assert np.array_equal(array, 2 * load(before)[name])


def test_mixed_policies_load_wide_variables(tmp_path):
    folder = write_checkpoint(tmp_path / "a", CONFIG, dtype="bfloat16")
    model = zoo.TFOlmo2ForCausalLM.from_pretrained(folder, dtype="mixed_bfloat16")
    assert {variable.dtype for variable in model.weights} == {"float32"}
    output = model(IDS, MASK, labels=LABELS, output_hidden_states=True)
    assert output.logits.dtype == tf.bfloat16
    assert output.loss.dtype == tf.float32
    assert {state.dtype for state in output.hidden_states} == {tf.bfloat16}


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16", "bfloat16"])
def test_low_precision_is_finite_at_pads_and_near_at_tokens(model, dtype):
    logits = tf.cast(make(dtype)(IDS, MASK).logits, "float64").numpy()
    assert np.isfinite(logits).all()
    expected = model(IDS, MASK).logits.numpy()
    error = np.sqrt(np.square(logits - expected)[REAL].mean()) / expected[REAL].std()
    assert error < (0.05 if dtype == "bfloat16" else 0.006)


def test_norm_scales_stay_wide_under_a_mixed_policy():
    # 1 + 2**-10 is 1 in bfloat16: a scale that was cast would leave the input as it is, times 1.
    norm = make("mixed_bfloat16").model.norm
    norm.scale.assign(np.full(32, 1 + 2.0**-8 + 2.0**-10))
    x = tf.cast(np.random.default_rng(0).standard_normal((1, 64, 32)), tf.bfloat16)
    wide = tf.cast(x, tf.float32)
    wide = wide * tf.math.rsqrt(tf.reduce_mean(wide**2, -1, keepdims=True) + norm.eps)
    np.testing.assert_array_equal(norm(x), tf.cast(wide * norm.scale, tf.bfloat16))
    assert np.any(norm(x) != tf.cast(wide, tf.bfloat16) * tf.cast(norm.scale, tf.bfloat16))


def test_keras_file_round_trip(tmp_path):
    model = zoo.TFOlmo2ForCausalLM(CONFIG.replace(tie_word_embeddings=True), seed=5, name="zoo", dtype="mixed_bfloat16")
    model.compile(keras.optimizers.AdamW(1e-3))
    model.fit(IDS, IDS, verbose=0)
    model.generation_config = model.generation_config.replace(max_new_tokens=2)
    model.generate(IDS[:1])  # what it compiled is not saved
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for again in (loaded, pickle.loads(pickle.dumps(model))):
        assert type(again) is zoo.TFOlmo2ForCausalLM
        assert again.config == model.config
        assert again.generation_config == model.generation_config
        assert again.dtype_policy.name == "mixed_bfloat16"
        assert [v.path for v in again.weights] == [v.path for v in model.weights]
        for ours, theirs in zip(model.weights, again.weights, strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert loaded.optimizer.iterations == 1
    base = zoo.TFOlmo2Model(CONFIG, seed=6)
    base.save(tmp_path / "base.keras")
    np.testing.assert_array_equal(
        keras.models.load_model(tmp_path / "base.keras")(IDS).last_hidden_state, base(IDS).last_hidden_state
    )


def test_summary_counts_every_parameter(model):
    lines = []
    model.summary(print_fn=lambda text, **_: lines.append(text))
    assert f"{model.num_parameters():,}" in "\n".join(lines)


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings(tied):
    model = make(config=CONFIG.replace(tie_word_embeddings=tied))
    before, count = model(IDS).logits.numpy(), len(model.weights)
    layer = model.resize_token_embeddings(pad_to_multiple_of=64)
    assert layer is model.get_input_embeddings()
    assert model.config.vocab_size == model.model.config.vocab_size == 128
    assert len(model.weights) == count
    table = {p.name: p for p in model.config.parameters("causal_lm")}
    np.testing.assert_array_equal(layer.embeddings[101:], table["model.embed_tokens.weight"].initial(0)[101:])
    after = model(IDS).logits.numpy()
    assert after.shape == (*IDS.shape, 128)
    np.testing.assert_allclose(after[..., :101], before, atol=1e-5)
    assert [v.path.split("/", 1)[1] for v in model.get_output_embeddings().weights] == [
        "model/embed_tokens/embeddings" if tied else "lm_head/kernel"
    ]
    assert len(model.trainable_weights) == count
    layer.trainable = False
    assert not model.resize_token_embeddings(50).trainable
    assert len(model.trainable_weights) == count - 1


def test_keras_on_another_framework_is_named():
    code = (
        "import sys, types\n"
        "keras, backend = types.ModuleType('keras'), types.ModuleType('keras.backend')\n"
        "backend.backend, keras.backend = lambda: 'jax', backend\n"
        "sys.modules.update({'keras': keras, 'tensorflow': types.ModuleType('tensorflow')})\n"
        "import olmozoo.tf"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "MissingBackendError: olmozoo.tf needs Keras on TensorFlow, and here Keras runs on jax" in done.stderr


# -- calling ----------------------------------------------------------------------------------------------------------


def test_all_input_forms_are_one(model):
    expected = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
    tensors = tf.constant(IDS), tf.constant(MASK)
    for output in (
        model(IDS, MASK),
        model(*tensors),
        model([IDS, MASK]),
        model(tensors),
        model({"input_ids": IDS, "attention_mask": MASK}),
        model({"input_ids": IDS, "attention_mask": MASK}, use_cache=False),
        model({"inputs_embeds": model.get_input_embeddings()(IDS), "attention_mask": MASK}),
    ):
        np.testing.assert_array_equal(output.logits, expected)
    np.testing.assert_array_equal(model([IDS]).logits, model(IDS).logits)
    assert np.any(model(IDS).logits != expected)
    logits, past = model(IDS, MASK, return_dict=False)
    np.testing.assert_array_equal(logits, expected)
    assert len(past) == 2
    with pytest.raises(InputError, match="arguments, expected at most"):
        model([IDS] * 20)


def test_functional_models_take_it_as_a_layer(model):
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in ("input_ids", "attention_mask")}
    functional = keras.Model(inputs, model(inputs).logits)
    np.testing.assert_array_equal(functional({"input_ids": IDS, "attention_mask": MASK}), model(IDS, MASK).logits)


@pytest.mark.parametrize("jit", [False, True])
def test_one_graph_serves_all_shapes_and_returns_the_output(model, jit):
    spec = tf.TensorSpec((None, None), tf.int64)
    function = tf.function(lambda ids, mask: model(ids, mask), input_signature=[spec, spec], jit_compile=jit)
    for rows, length in ((1, 1), (3, 5), (4, 9)):
        ids, mask = IDS[:rows, -length:], MASK[:rows, -length:]
        output, expected = function(ids, mask), model(ids, mask)
        assert type(output) is type(expected)
        assert output.keys() == expected.keys()
        real = mask.astype(bool)
        np.testing.assert_allclose(output.logits.numpy()[real], expected.logits.numpy()[real], atol=1e-12)
    assert function.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("tied", [False, True])
def test_logits_to_keep(tied):
    model = make(config=CONFIG.replace(tie_word_embeddings=tied))
    logits = model(IDS, MASK).logits
    np.testing.assert_allclose(model(IDS, MASK, logits_to_keep=2).logits, logits[:, -2:], atol=1e-5)
    np.testing.assert_allclose(model(IDS, MASK, logits_to_keep=np.int64(2)).logits, logits[:, -2:], atol=1e-5)
    kept = model(IDS, MASK, num_logits_to_keep=np.array([8, 3])).logits
    np.testing.assert_allclose(kept, tf.gather(logits, [8, 3], axis=1), atol=1e-5)


def test_a_narrower_cache_serves(model):
    cache = model.init_cache(len(IDS), 12, dtype="bfloat16")
    first = model(IDS[:, :5], MASK[:, :5], past_key_values=cache)
    assert first.past_key_values.keys[0].dtype == tf.bfloat16
    logits = model(IDS[:, 5:], MASK, past_key_values=first.past_key_values).logits.numpy()
    expected = model(IDS, MASK).logits.numpy()[:, 5:]
    assert logits.dtype == expected.dtype
    assert 0 < abs(logits - expected).max() < 0.02 * abs(expected).max()


@pytest.mark.parametrize("kind", ["tuple", "object"])
@pytest.mark.parametrize("compiled", [False, True])
def test_cached_decoding_equals_the_whole_call(model, kind, compiled):
    expected = model(IDS, MASK).logits.numpy()
    past = None if kind == "tuple" else model.init_cache(len(IDS), 12)
    step = tf.function(lambda ids, mask, past: model(ids, mask, past_key_values=past)) if compiled else model
    logits = []
    for start, end in [(0, 5), *((i, i + 1) for i in range(5, IDS.shape[1]))]:
        mask = tf.constant(MASK[:, :end])
        if compiled and kind == "object":  # of one shape at every step
            mask = tf.pad(mask, [[0, 0], [0, 12 - end]])
        ids = tf.constant(IDS[:, start:end])
        output = step(ids, mask, past) if compiled else model(ids, mask, past_key_values=past)
        past = output.past_key_values
        assert isinstance(past, zoo.KVCache) == (kind == "object")
        assert isinstance(past, tuple)
        logits.append(output.logits.numpy())
    np.testing.assert_allclose(np.concatenate(logits, 1)[REAL], expected[REAL], atol=1e-12)
    if kind == "object":
        assert past.length == IDS.shape[1]
        assert not compiled or step.experimental_get_tracing_count() == 2  # one for the prefill, one for all steps
    else:
        assert past[0][0].shape == (4, 2, 9, 8)


def test_arguments_that_do_not_fit_are_named(model):
    with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds"):
        model(attention_mask=MASK)
    with pytest.raises(InputError, match=r"attention_mask has shape \(4, 8\), expected \(4, 9\): 0 cached and 9 new"):
        model(IDS, MASK[:, 1:])
    with pytest.raises(InputError, match=r"position_ids has shape \(9,\), expected \(batch or 1, seq\)"):
        model(IDS, position_ids=np.arange(9))
    with pytest.raises(InputError, match=r"attention_mask has shape \(3, 9\)"):
        model(IDS, MASK[1:])
    with pytest.raises(InputError, match="the cache has room for 8 positions, 9 are needed"):
        model(IDS, past_key_values=model.init_cache(4, 8))
    with pytest.raises(InputError, match="the cache has 6 rows times heads, expected 4 times 2"):
        model(IDS, past_key_values=model.init_cache(3, 12))
    with pytest.raises(InputError, match="past_key_values has 1 layers, expected 2"):
        model(IDS, past_key_values=model(IDS).past_key_values[:1])
    with pytest.raises(InputError, match="past_key_values is a str"):
        model(IDS, past_key_values="cache")
    with pytest.raises(InputError, match="labels need the logits at every position"):
        model(IDS, labels=IDS, logits_to_keep=1)
    with pytest.raises(InputError, match=r"shape \(9,\), expected \(batch, seq\)"):
        model(IDS[0])
    with pytest.raises(InputError, match=r"shape \(4, 9, 1\), expected \(batch, seq\)"):
        model(IDS[..., None])


# -- training ---------------------------------------------------------------------------------------------------------


def dataset(*parts):
    return tf.data.Dataset.from_tensor_slices(parts[0] if len(parts) == 1 else parts).batch(4)


def test_fit_evaluate_and_predict_with_the_models_own_loss():
    model = make()
    model.compile(keras.optimizers.Adam(1e-2))
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    logits, targets = model(IDS, MASK).logits.numpy()[:, :-1], LABELS[:, 1:]
    log_sum = np.log(np.exp(logits).sum(-1))
    losses = log_sum - np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    loss = losses[targets != -100].mean()
    np.testing.assert_allclose(model(IDS, MASK, labels=LABELS).loss, loss, rtol=1e-5)
    within, beside = dataset({**inputs, "labels": LABELS}), dataset(inputs, LABELS)
    for data in (within, beside):
        np.testing.assert_allclose(model.evaluate(data, verbose=0), loss, rtol=1e-5)
    np.testing.assert_allclose(model.evaluate(inputs, LABELS, verbose=0), loss, rtol=1e-5)
    for data in (within, beside):
        losses = model.fit(data, epochs=3, verbose=0).history["loss"]
        assert losses == sorted(losses, reverse=True)
    with pytest.raises(InputError, match="no labels"):
        model.evaluate(inputs, verbose=0)
    with pytest.raises(InputError, match="takes no sample_weight"):
        model.evaluate(inputs, LABELS, sample_weight=np.ones(4), verbose=0)

    expected = model(IDS, MASK).logits.numpy()
    for data in (within.rebatch(3), inputs, [IDS, MASK]):
        output = model.predict(data, verbose=0)
        assert output.keys() == ["logits"]
        assert isinstance(output.logits, np.ndarray)
        np.testing.assert_allclose(output["logits"][REAL], expected[REAL], atol=1e-5)
    assert model.model.predict(IDS, verbose=0).keys() == ["last_hidden_state"]


def test_fit_with_a_users_loss_and_metrics():
    model = make()
    logits = model(IDS).logits
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss=loss, metrics=[keras.metrics.SparseCategoricalAccuracy(name="hits")])
    targets = np.roll(IDS, -1, axis=1)
    for data in (dataset({"input_ids": IDS}, targets), dataset({"input_ids": IDS, "labels": targets})):
        found = model.evaluate(data, verbose=0, return_dict=True)
        np.testing.assert_allclose(found["loss"], loss(targets, logits), rtol=1e-5)
        np.testing.assert_allclose(found["hits"], (np.argmax(logits, -1) == targets).mean(), rtol=1e-5)
    assert set(model.fit(IDS, targets, verbose=0).history) == {"loss", "hits"}


def test_loss_with_nothing_to_learn_is_zero(model):
    assert model(IDS, labels=np.full_like(IDS, -100)).loss == 0


def test_attention_dropout_is_alive_in_training_alone():
    model = make(config=CONFIG.replace(attention_dropout=0.3))
    np.testing.assert_array_equal(model(IDS).logits, make()(IDS).logits)
    first, second = (model(IDS, training=True, output_attentions=True) for _ in range(2))
    assert np.any(first.logits != second.logits)
    longer = np.tile(IDS, (1, 12))
    weights = model(longer, training=True, output_attentions=True).attentions[0].numpy()
    kept = model(longer, output_attentions=True).attentions[0].numpy()
    seen = kept > 0
    assert abs((weights[seen] == 0).mean() - 0.3) < 0.01
    survivors = seen & (weights != 0)
    np.testing.assert_allclose(weights[survivors], kept[survivors] / 0.7, rtol=1e-4)
    dropped = [seen & (layer.numpy() == 0) for layer in model(longer, training=True, output_attentions=True).attentions]
    assert np.any(dropped[0] != dropped[1])


def test_recomputing_gives_the_same_gradients():
    model = make("float64", CONFIG.replace(attention_dropout=0.3))

    def gradients():
        with tf.GradientTape() as tape:
            loss = model(IDS, MASK, labels=LABELS, training=True).loss
        return [tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_weights)]

    def seeded(function):
        model.model.seeds.state.assign([3, 0])
        return [g.numpy() for g in function()]

    plain = seeded(gradients)
    calls = []
    for block in model.model.blocks:
        block.mlp.act = lambda x, act=block.mlp.act: (calls.append(None), act(x))[1]
    model.gradient_checkpointing_enable()
    for function in (gradients, tf.function(gradients)):
        calls.clear()
        for ours, theirs in zip(seeded(function), plain, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-13)
        assert len(calls) == 4  # each of two blocks forward, and once more backward
    model.gradient_checkpointing_disable()
    calls.clear()
    seeded(gradients)
    assert len(calls) == 2


# -- generating -------------------------------------------------------------------------------------------------------


def test_generate_traces_once_per_bucket_and_reads_the_weights_as_they_are():
    model = make("float64")
    for length, new in ((4, 5), (9, 12), (1, 1)):
        np.testing.assert_array_equal(model.generate(IDS[3:, -length:], max_new_tokens=new).shape, (1, length + new))
    first = model.generate(IDS[:1], max_new_tokens=12)
    np.testing.assert_array_equal(first, greedy(model, IDS[:1], 12))
    model.generate(IDS[:1], max_new_tokens=3, eos_token_id=[3, 4, 5], pad_token_id=7)
    assert model.trace_count == 2  # the prompt and the answer

    for variable in model.weights:
        variable.assign(variable * 1.5 if "norm" in variable.path else variable + 0.1)
    second = model.generate(IDS[:1], max_new_tokens=12)
    assert np.any(second != first)
    np.testing.assert_array_equal(second, greedy(model, IDS[:1], 12))
    assert model.trace_count == 2  # the prompt and the answer

    stream = np.random.default_rng(0)
    for block in model.model.blocks:
        block.self_attn.v_proj.enable_lora(4)
        for variable in (block.self_attn.v_proj.lora_kernel_a, block.self_attn.v_proj.lora_kernel_b):
            variable.assign(5 * stream.standard_normal(variable.shape))
    third = model.generate(IDS[:1], max_new_tokens=12)
    assert np.any(third != second)
    np.testing.assert_array_equal(third, greedy(model, IDS[:1], 12))


def test_generate_left_padded_and_ending(model):
    answer = greedy(model, IDS, 8, MASK)
    np.testing.assert_array_equal(model.generate(IDS, MASK, max_new_tokens=8), answer)
    np.testing.assert_array_equal(model.generate(tf.constant(IDS), max_new_tokens=8), answer)  # pads are seen as such
    embeds = model.get_input_embeddings()(IDS)
    np.testing.assert_array_equal(model.generate(None, MASK, inputs_embeds=embeds, max_new_tokens=8), answer[:, 9:])

    new = answer[:, 9:]
    ends = [int(new[0, 2]), int(new[1, 4]), int(new[2, 1]), int(new[3, 3])]
    ended = model.generate(IDS, MASK, max_new_tokens=8, eos_token_id=ends, pad_token_id=1).numpy()[:, 9:]
    stops = [next(step for step, token in enumerate(row) if token in ends) for row in new]
    assert ended.shape[1] == max(stops) + 1 < 8
    for row, stop in enumerate(stops):
        np.testing.assert_array_equal(ended[row, : stop + 1], new[row, : stop + 1])
        assert (ended[row, stop + 1 :] == 1).all()


def test_generate_writes_the_cache_in_place(model):
    call = prepare(model.generation_config, CONFIG, {}, input_ids=IDS[:1], attention_mask=MASK[:1], compiled=True)
    values, state = tf.nest.map_structure(lambda x: from_numpy(x, "float64"), (call.values, call.state))
    arguments = (tf.constant(call.mask), state, model.init_cache(*call.mask.shape), values, tf.constant(20))
    answer = model._compiled_decoding(call.options)[1]
    program = answer.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
    loops = [part for part in program.split("\n\n") if "while_body" in part.split("\n")[0] and " dot(" in part]
    assert len(loops) == 1
    assert "f64[2,128,8]" in loops[0]
    assert not [line for line in loops[0].split("\n") if " copy(" in line and "f64[" in line]
