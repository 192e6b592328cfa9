"""Mixtures of experts: the router's logits and loss, which experts are computed, names and stacks of their tensors."""

from pathlib import Path

import numpy as np
import pytest

from olmozoo.backends import load
from olmozoo.verify.compare import verify
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import BOUND, CONFIGS, GRADIENT_BOUND, OTHERS, REFERENCE
from tests.helpers.wings import PRESENT, WINGS, call, gradients, needs, scope, several

FIXTURE = Path(__file__).parents[1] / "fixtures" / "olmoe"
ROUTER = {"output_router_logits": True}


@pytest.fixture(scope="module")
def answers():
    return np.load(FIXTURE / "expected.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("olmoe"), CONFIGS["olmoe"])


def ask(wing, model, ids, mask=None, **inputs):
    """A live model's output for NumPy inputs."""
    if wing == "pt":
        import torch

        inputs = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in inputs.items()}
        with torch.inference_mode():
            return model(torch.from_numpy(ids), None if mask is None else torch.from_numpy(mask), **inputs)
    with scope(wing):
        return model(input_ids=ids, attention_mask=mask, **inputs)


@pytest.mark.parametrize("wing", WINGS)
def test_the_checkpoint_of_transformers_gives_its_answers(answers, wing):
    loaded = load(FIXTURE, wing)
    ids, mask = answers["input_ids"], answers["attention_mask"]
    real = mask.astype(bool)
    output = ask(wing, loaded.model, ids, mask, labels=answers["labels_padded"], output_hidden_states=True, **ROUTER)
    assert np.abs(np.asarray(output.logits) - answers["logits"])[real].max() < 5e-5
    for i, state in enumerate(output.hidden_states):
        assert np.abs(np.asarray(state) - answers[f"hidden_{i}"])[real].max() < 5e-5
    assert len(output.router_logits) == 2
    for i, logits in enumerate(output.router_logits):
        assert np.abs(np.asarray(logits) - answers[f"router_{i}"])[real.flatten()].max() < 5e-5
    assert abs(float(output.aux_loss) - answers["aux_loss_padded"]) < 1e-5
    assert abs(float(output.loss) - answers["loss_padded"]) < 1e-5

    ids = ids[1:2]
    plain, routed = (ask(wing, loaded.model, ids, labels=ids, **options) for options in ({}, ROUTER))
    assert plain.keys() == ["loss", "logits", "past_key_values"]
    assert routed.keys() == ["loss", "aux_loss", "logits", "past_key_values", "router_logits"]
    assert abs(float(plain.loss) - answers["loss"]) < 1e-5
    assert abs(float(routed.loss) - answers["loss_router"]) < 1e-5
    assert abs(float(routed.aux_loss) - answers["aux_loss"]) < 1e-5


@pytest.mark.parametrize("wing", WINGS)
def test_its_greedy_and_beam_tokens(answers, wing):
    ids, mask = answers["input_ids"], answers["attention_mask"]
    for name, beams in (("greedy", 1), ("beam", 3))[: 1 if wing == "tf" else 2]:  # XLA compiles each for long
        new = answers[name].shape[1] - ids.shape[1]
        found = load(FIXTURE, wing).generate(ids, mask, max_new_tokens=new, eos_token_id=None, num_beams=beams)
        assert np.array_equal(found, answers[name]), name


@pytest.mark.parametrize("wing", OTHERS)
def test_router_logits_and_their_loss_agree(folder, wing):
    config = CONFIGS["olmoe"]
    ids, mask = left_padded(config, length=12)
    labels = np.where(mask == 1, ids, -100)
    found, expected = (
        call(each, type(load(folder, each).model), folder, ids, mask, labels=labels, **ROUTER)
        for each in (wing, REFERENCE)
    )
    for ours, theirs in zip(found["router_logits"], expected["router_logits"], strict=True):
        assert ours.shape == (ids.size, config.num_experts)
        assert np.abs(ours - theirs)[mask.flatten().astype(bool)].max() <= BOUND
    for name in ("loss", "aux_loss"):
        assert abs(found[name] - expected[name]) <= BOUND, name


@pytest.mark.parametrize("wing", OTHERS)
def test_gradients_of_the_loss_with_the_routers_agree(tmp_path, wing):
    config = CONFIGS["olmoe"].replace(output_router_logits=True, router_aux_loss_coef=3.0)
    write_checkpoint(tmp_path, config)
    ids, mask = left_padded(config, length=12)
    labels = np.where(mask == 1, ids, -100)
    _, expected = gradients(REFERENCE, load(tmp_path, REFERENCE, "float64").model, ids, mask, labels=labels)
    _, found = gradients(wing, load(tmp_path, wing, "float64").model, ids, mask, labels=labels)
    assert max(np.abs(found[name] - expected[name]).max() for name in expected) <= GRADIENT_BOUND


@pytest.mark.parametrize("wing", WINGS)
def test_padding_a_cache_and_the_config_change_nothing_of_the_router(tmp_path, wing):
    config = CONFIGS["olmoe"].replace(output_router_logits=True)
    model = load(write_checkpoint(tmp_path, config), wing, "float64").model
    ids = np.random.default_rng(1).integers(2, config.vocab_size, (2, 9))
    whole = ask(wing, model, ids)
    padded = np.concatenate([np.zeros((2, 4), ids.dtype), ids], axis=1)
    mask = (np.arange(13) >= 4).astype(ids.dtype)[None].repeat(2, 0)
    left = ask(wing, model, padded, mask)
    assert abs(float(left.aux_loss) - float(whole.aux_loss)) <= BOUND
    expected = np.asarray(whole.router_logits[1]).reshape(2, 9, -1)
    assert np.abs(np.asarray(left.router_logits[1]).reshape(2, 13, -1)[:, 4:] - expected).max() <= BOUND
    with scope(wing):
        preallocated = model.init_cache(2, 16)
    for cache in (None, preallocated):
        first = ask(wing, model, padded[:, :7], mask[:, :7], past_key_values=cache, use_cache=True)
        rest = ask(wing, model, padded[:, 7:], mask, past_key_values=first.past_key_values)
        logits = np.asarray(rest.router_logits[1])
        assert np.abs(logits.reshape(2, 6, -1) - expected[:, 3:]).max() <= BOUND
        alone = [np.asarray(layer).reshape(2, 13, -1)[:, 7:].reshape(12, -1) for layer in left.router_logits]
        assert abs(float(rest.aux_loss) - balance(alone, config.num_experts_per_tok)) <= BOUND


def balance(layers, chosen):
    """The load-balancing loss, as its definition has it."""
    logits = np.concatenate(layers)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    sent = np.zeros_like(logits)
    np.put_along_axis(sent, np.argsort(-logits, -1)[:, :chosen], 1, -1)
    return logits.shape[-1] * float((sent.mean(0) * probabilities.mean(0)).sum())


@pytest.mark.parametrize("wing", WINGS)
def test_experts_that_no_token_is_sent_to_are_not_read(folder, wing):
    """Their weights may be NaN: a product with all experts would spread that."""
    backend = load(folder, wing, "float64")
    ids = np.full((1, 1), 7)
    output = ask(wing, backend.model, ids, **ROUTER)
    before = np.asarray(output.logits)
    used = [set(np.argsort(-np.asarray(layer)[0])[:2]) for layer in output.router_logits]

    def poisoned():
        for parameter, array in backend.model.read_parameters():
            layer = int(parameter.name.split(".")[2]) if parameter.stack else None
            keep = parameter.stack is None or parameter.stack[1] in used[layer]
            yield parameter, np.array(array) if keep else np.full_like(array, np.nan)

    with scope(wing):
        backend.model.bind_parameters(list(poisoned()))
    assert np.array_equal(np.asarray(ask(wing, backend.model, ids).logits), before)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("case", ["gate_up", "one"])
def test_a_checkpoint_with_the_names_of_transformers_5_is_read(folder, tmp_path, wing, case):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    expert = CONFIGS["olmoe"].num_experts
    for layer in range(CONFIGS["olmoe"].num_hidden_layers):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([tensors.pop(f"{stem}.{i}.{name}_proj.weight") for i in range(expert)])
            for name in ("gate", "up", "down")
        )
        tensors[f"{stem}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{stem}.down_proj"] = down
    if case == "one":  # an expert too many is named
        tensors[f"{stem}.down_proj"] = np.concatenate([down, down[:1]])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    if case == "one":
        from olmozoo import CheckpointError

        with pytest.raises(CheckpointError, match=r"unexpected: model.layers.1.mlp.experts.5.down_proj.weight"):
            load(tmp_path, wing)
        return
    ids, mask = left_padded(CONFIGS["olmoe"])
    found, expected = (load(each, wing, "float64").forward(ids, mask)["logits"] for each in (tmp_path, folder))
    assert np.abs(found - expected).max() <= BOUND


@several
def test_verify_agrees(folder):
    report = verify(folder, backends=PRESENT, dtype="float64")
    assert report.ok
    assert [row.name for row in report.rows][:4] == ["embeddings", "layer 1", "layer 2", "logits"]


@needs("flax")
def test_stacks_in_flax_are_one_leaf_and_tiles_give_the_product_of_each_row(folder):
    import jax

    from olmozoo.flax.experts import Tiles, grouped_product, tiled_product

    model = load(folder, "flax", "float64").model
    experts = model.params["model"]["layers"]["0"]["mlp"]["experts"]
    assert experts["up_proj"]["kernel"].shape == (5, 40, 36)
    random = np.random.default_rng(0)
    rows, kernel = random.standard_normal((700, 6)), random.standard_normal((4, 6, 3))
    with jax.enable_x64(True):
        rows, kernel = map(jax.numpy.asarray, (rows, kernel))
        for sizes in ([700, 0, 0, 0], [1, 0, 698, 1], [175, 175, 175, 175], [0, 300, 0, 400]):
            expert = np.repeat(np.arange(4), sizes)
            expected = np.einsum("ni,nio->no", rows, kernel[expert])
            given = jax.numpy.asarray(sizes, "int32")
            found = jax.jit(grouped_product)(rows, kernel, given)
            np.testing.assert_allclose(found, expected, atol=1e-12)
            ragged = jax.lax.ragged_dot(rows, kernel, given)  # what a TPU is given
            np.testing.assert_allclose(found, ragged, atol=1e-12)
            assert Tiles(700, given).count <= 700 // 64 + 4
            weights = random.standard_normal((700, 3))
            grads = jax.grad(lambda r, k, s=given, w=weights: (grouped_product(r, k, s) * w).sum(), (0, 1))(
                rows, kernel
            )
            np.testing.assert_allclose(grads[0], np.einsum("no,nio->ni", weights, kernel[expert]), atol=1e-12)
            totals = np.zeros_like(kernel)
            np.add.at(totals, expert, rows[:, :, None] * weights[:, None])
            np.testing.assert_allclose(grads[1], totals, atol=1e-11)
            np.testing.assert_allclose(
                tiled_product(weights, lambda expert: kernel[expert], 6, given, 1), grads[0], atol=1e-12
            )


@needs("tf")
@pytest.mark.parametrize("compiled", [False, True])
def test_tiles_in_keras_give_the_product_of_each_row(compiled):
    import tensorflow as tf

    from olmozoo.tf.experts import grouped_product

    random = np.random.default_rng(0)
    rows, kernel, weights = (random.standard_normal(shape) for shape in ((700, 6), (4, 6, 3), (700, 3)))

    @tf.function(jit_compile=compiled, autograph=False)
    def run(rows, kernel, sizes):
        with tf.GradientTape() as tape:
            tape.watch((rows, kernel))
            out = grouped_product(rows, kernel, sizes)
            total = tf.reduce_sum(out * weights)
        return out, *tape.gradient(total, (rows, kernel))

    for sizes in ([700, 0, 0, 0], [1, 0, 698, 1], [0, 300, 0, 400]):
        expert = np.repeat(np.arange(4), sizes)
        out, of_rows, of_kernel = run(tf.constant(rows), tf.constant(kernel), tf.constant(sizes))
        np.testing.assert_allclose(out, np.einsum("ni,nio->no", rows, kernel[expert]), atol=1e-12)
        np.testing.assert_allclose(of_rows, np.einsum("no,nio->ni", weights, kernel[expert]), atol=1e-12)
        totals = np.zeros_like(kernel)
        np.add.at(totals, expert, rows[:, :, None] * weights[:, None])
        np.testing.assert_allclose(of_kernel, totals, atol=1e-11)


@needs("tf")
def test_a_program_of_tiles_is_not_compiled_for_each_batch():
    """XLA takes where a slice begins for a constant: of a tensor that depends on the data, it would compile it anew."""
    import tensorflow as tf

    from olmozoo.tf.experts import grouped_product

    @tf.function(autograph=False)
    def run(rows, kernel, sizes):
        with tf.GradientTape() as tape:
            tape.watch((rows, kernel))
            total = tf.reduce_sum(grouped_product(rows, kernel, sizes))
        return tape.gradient(total, (rows, kernel))

    shapes = ((70, 6), tf.float32), ((4, 6, 3), tf.float32), ((4,), tf.int32)
    graph = run.get_concrete_function(*(tf.TensorSpec(*shape) for shape in shapes)).graph.as_graph_def()
    slices = 0
    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        kinds = {node.name: node.op for node in nodes}
        for node in nodes:
            if node.op in ("Slice", "StridedSlice"):
                assert kinds[node.input[1].split(":")[0]] == "Const", node
                slices += 1
    assert slices
