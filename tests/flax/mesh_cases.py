"""What `test_sharding.py` asserts, measured in a process with 8 devices."""

import math
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType

from olmozoo import InputError
from olmozoo.flax import FlaxAutoModelForCausalLM
from olmozoo.flax.sharding import batch_sharding, make_mesh, optimizer_shardings
from olmozoo.memory import plan
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import CONFIGS
from tests.helpers.processes import CountedFile, run

MESHES = {
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2},
    "both": {"fsdp": 4, "tensor": 2},
    "experts": {"experts": 4},
    "experts-fsdp": {"experts": 2, "fsdp": 2},
    "experts-tensor": {"experts": 2, "tensor": 2},
    "all": {"fsdp": 2, "tensor": 2, "experts": 2},
}
SIZES = {"vocab_size": 64, "eos_token_id": None, "max_position_embeddings": 64}
FAMILIES = {
    "olmo": CONFIGS["olmo-clip-tied"].replace(**SIZES),
    "olmo2": CONFIGS["olmo2"].replace(**SIZES, attention_bias=True),
    "opt": CONFIGS["opt-projected-post-norm"].replace(**SIZES, dropout=0.0),
    "olmoe": CONFIGS["olmoe"].replace(**SIZES, num_experts=8, num_experts_per_tok=3, output_router_logits=True),
    "flexolmo": CONFIGS["flexolmo-all"].replace(**SIZES, num_experts=6, output_router_logits=True),
}
EQUAL = {  # the meshes of each family
    **dict.fromkeys(("olmo", "olmo2", "opt"), ("fsdp", "tensor", "both")),
    "olmoe": ("both", "experts", "experts-fsdp", "experts-tensor"),
    "flexolmo": ("all",),
}
TOKENS = {"olmo": "both", "olmo2": "both", "opt": "both", "olmoe": "experts-fsdp", "flexolmo": "all"}
SETTINGS = {"max_new_tokens": 5}


def mesh_of(name):
    sizes = MESHES[name]
    return make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


def difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


def step(model, ids, mask, params):
    return jax.value_and_grad(lambda p: model(ids, mask, labels=ids, params=p).loss)(params)


@cache
def on_one_device(folder, family):
    """A batch, and its loss and gradients."""
    ids, mask = left_padded(FAMILIES[family], batch=8, length=9)
    whole = FlaxAutoModelForCausalLM.from_pretrained(folder / family)
    return ids, mask, step(whole, ids, mask, whole.params)


def equal(folder, family, name):
    """The largest difference of loss and gradients, and how logits and parameters are split."""
    ids, mask, expected = on_one_device(folder, family)
    mesh = mesh_of(name)
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / family, mesh=mesh)
    ids, mask = (jax.device_put(x, batch_sharding(mesh)) for x in (ids, mask))
    found = jax.jit(partial(step, model))(ids, mask, model.params)
    logits = jax.jit(lambda p: model(ids, mask, params=p).logits)(model.params)
    return {
        "difference": difference(expected, found),
        "rows": logits.addressable_shards[0].data.shape[0],
        "whole": [
            "/".join(path) for path, leaf in flatten_dict(model.params).items() if leaf.sharding.is_fully_replicated
        ],
        "experts": [
            leaf.addressable_shards[0].data.shape
            for path, leaf in flatten_dict(model.params).items()
            if "experts" in path and "0" in path
        ],
        "as said": model.shardings() == jax.tree.map(lambda x: x.sharding, model.params),
    }


def tokens(folder, family):
    """Whether greedy, beam and sampled tokens are those of one device, and how the cache is split."""
    ids, mask = left_padded(FAMILIES[family], batch=4, length=7)
    whole = FlaxAutoModelForCausalLM.from_pretrained(folder / family)
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / family, mesh=mesh_of(TOKENS[family]))
    ways = [{}, {"num_beams": 3}, {"do_sample": True, "seed": 3, "temperature": 0.7}][: 3 if family == "olmo2" else 1]
    same = [
        bool(
            (
                whole.generate(ids, mask, **SETTINGS, **way).sequences
                == model.generate(ids, mask, **SETTINGS, **way).sequences
            ).all()
        )
        for way in ways
    ]
    cache = jax.jit(lambda: model.init_cache(4, 16))()
    return {"same": same, "cache": cache.keys[0].addressable_shards[0].data.shape}


def bytes_read(folder, family, **sizes):
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    with CountedFile() as counted:
        model = FlaxAutoModelForCausalLM.from_pretrained(folder / family, mesh=mesh)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model.params))
    return {"read": counted.nbytes, "all": sum(x.nbytes for x in jax.tree.leaves(model.params)), "held": held}


def planned(family, name):
    """The bytes of a training step's arguments on a device by XLA, and by the plan."""
    config, mesh, tx = FAMILIES[family], mesh_of(name), optax.adamw(1e-3)
    model = FlaxAutoModelForCausalLM.from_config(config, mesh=mesh, _do_init=False)
    shardings = optimizer_shardings(tx, model)

    def train(params, state, ids):
        loss, grads = jax.value_and_grad(lambda p: model(ids, labels=ids, params=p).loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    split = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.params_shape_tree, model.shardings()
    )
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, model.params_shape_tree),
        shardings,
    )
    ids = jax.ShapeDtypeStruct((8, 12), jnp.int32, sharding=batch_sharding(mesh))
    compiled = jax.jit(train).lower(split, state, ids).compile()
    rows = 8 // MESHES[name]["fsdp"]
    found = plan(config, batch=rows, length=12, mesh=MESHES[name], train=True, backend="flax")
    return {
        "xla": compiled.memory_analysis().argument_size_in_bytes,
        "plan": found.weights + found.optimizer + rows * 12 * 4,
    }


def state_is_split(folder):
    mesh, tx = mesh_of("both"), optax.adamw(1e-3)
    model = FlaxAutoModelForCausalLM.from_pretrained(folder / "olmo2", mesh=mesh)
    state = jax.jit(tx.init, out_shardings=optimizer_shardings(tx, model))(model.params)
    moments = optax.tree_utils.tree_get(state, "mu")
    return jax.tree.leaves(
        jax.tree.map(lambda m, p: m.sharding.is_equivalent_to(p.sharding, p.ndim), moments, model.params)
    )


def saved(folder):
    """Whether a folder that is saved from a mesh has the bytes of one saved from one device, for each family."""
    same = {}
    for family, name in (("olmo2", "both"), ("olmoe", "all")):
        one, many = folder / f"one-{family}", folder / f"many-{family}"
        for target, mesh in ((one, None), (many, mesh_of(name))):
            FlaxAutoModelForCausalLM.from_pretrained(folder / family, mesh=mesh).save_pretrained(target)
        same[family] = [path.read_bytes() == (many / path.name).read_bytes() for path in one.iterdir()]
    return same


def initial(folder):
    """The difference of initial values from those of one device, and the shape of a part, for each family."""
    found = {}
    for family, name, path in (
        ("opt", "both", "model/decoder/layers/0/fc1/kernel"),
        ("olmoe", "all", "model/layers/0/mlp/experts/up_proj/kernel"),
    ):
        whole = FlaxAutoModelForCausalLM.from_config(FAMILIES[family], seed=3)
        model = FlaxAutoModelForCausalLM.from_config(FAMILIES[family], seed=3, mesh=mesh_of(name))
        kernel = flatten_dict(model.params, sep="/")[path]
        found[family] = difference(whole.params, model.params), kernel.addressable_shards[0].data.shape
    return found


def refused(folder):
    """The errors of an Explicit mesh, of one that does not divide, of a wrong number of devices, and of none."""
    explicit = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    messages = []
    for function in (
        lambda: FlaxAutoModelForCausalLM.from_pretrained(folder / "olmo2", mesh=explicit),
        lambda: FlaxAutoModelForCausalLM.from_pretrained(folder / "config_alone", mesh=make_mesh(1, 8)),
        lambda: make_mesh(3, 2),
        lambda: FlaxAutoModelForCausalLM.from_config(FAMILIES["olmo2"], _do_init=False).shardings(),
        lambda: FlaxAutoModelForCausalLM.from_config(FAMILIES["olmo2"], _do_init=False, mesh=mesh_of("experts")),
        lambda: FlaxAutoModelForCausalLM.from_config(FAMILIES["flexolmo"], _do_init=False, mesh=mesh_of("experts")),
    ):
        try:
            function()
        except InputError as error:
            messages.append(str(error))
    return messages


if __name__ == "__main__":
    work, rank = Path(sys.argv[1]), int(sys.argv[2])
    jax.config.update("jax_enable_x64", True)
    for each, config in FAMILIES.items():
        write_checkpoint(work / each, config)
    FAMILIES["olmo2"].save_pretrained(work / "config_alone")
    cases = {f"equal-{f}-{m}": partial(equal, work, f, m) for f, meshes in EQUAL.items() for m in meshes}
    cases |= {f"tokens-{f}": partial(tokens, work, f) for f in FAMILIES}
    cases["bytes-2"] = partial(bytes_read, work, "olmo2", tensor=2)
    cases["bytes-8"] = partial(bytes_read, work, "olmo2", fsdp=4, tensor=2)
    cases["bytes-4"] = partial(bytes_read, work, "olmoe", fsdp=2, experts=2)
    cases["planned-olmo2"] = partial(planned, "olmo2", "both")
    cases["planned-olmoe"] = partial(planned, "olmoe", "all")
    others = (state_is_split, saved, initial, refused)
    run(cases | {case.__name__: partial(case, work) for case in others}, work, rank)
