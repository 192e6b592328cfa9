"""Flax models exported by JAX, and as NNX modules."""

import numpy as np
import pytest

from tests.helpers.checkpoints import left_padded
from tests.helpers.flax_models import (
    all_close,
    answer,
    ask,
    close,
    each,
    labelled,
    make,
)

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
from flax import nnx
from flax.nnx import bridge
from flax.traverse_util import flatten_dict
from jax import export


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
