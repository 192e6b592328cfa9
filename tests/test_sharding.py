"""The split of every parameter over a mesh."""

import itertools

import numpy as np
import pytest

from olmozoo import InputError
from olmozoo.families.config import ModelConfig
from olmozoo.sharding import layout
from tests.helpers.configs import CONFIGS

OPT_350M = "opt-projected-post-norm"


def test_axes_split_what_the_rules_say():
    config = CONFIGS["olmo2"].replace(vocab_size=62)
    places = layout(config, mesh={"fsdp": 4, "tensor": 2})
    block = "model.layers.1."
    assert {name: places[name].split for name in places if name.startswith(block) or ".layers." not in name} == {
        "model.embed_tokens.weight": (("tensor",), ("fsdp",)),
        f"{block}self_attn.q_proj.weight": (("tensor",), ("fsdp",)),
        f"{block}self_attn.k_proj.weight": (("tensor",), ("fsdp",)),
        f"{block}self_attn.v_proj.weight": (("tensor",), ("fsdp",)),
        f"{block}self_attn.o_proj.weight": (("fsdp",), ("tensor",)),
        f"{block}self_attn.q_norm.weight": (("tensor",),),
        f"{block}self_attn.k_norm.weight": (("tensor",),),
        f"{block}mlp.gate_proj.weight": (("tensor",), ("fsdp",)),
        f"{block}mlp.up_proj.weight": (("tensor",), ("fsdp",)),
        f"{block}mlp.down_proj.weight": (("fsdp",), ("tensor",)),
        f"{block}post_attention_layernorm.weight": (("fsdp",),),
        f"{block}post_feedforward_layernorm.weight": (("fsdp",),),
        "model.norm.weight": (("fsdp",),),
        "lm_head.weight": (("tensor",), ("fsdp",)),
    }


def test_fsdp2_splits_the_first_dimension_whatever_it_is():
    places = layout(CONFIGS["olmo2"].replace(vocab_size=62), mesh={"fsdp": 4, "tensor": 2}, style="pt")
    assert places["lm_head.weight"].split == (("tensor", "fsdp"), ())
    assert places["lm_head.weight"].local_shape == (8, 40)  # 62 / 2 = 31, of which the first three parts are 8
    assert places["model.layers.0.mlp.down_proj.weight"].split == (("fsdp",), ("tensor",))


def test_a_mesh_axis_splits_one_dimension_of_a_parameter():
    places = layout(CONFIGS[OPT_350M], mesh={"fsdp": 2})
    assert places["model.decoder.project_in.weight"].split == (("fsdp",), ())


@pytest.mark.parametrize("style", ["pt", "flax"])
def test_experts_are_on_their_devices_alone(style):
    config = CONFIGS["olmoe"].replace(num_experts=6, vocab_size=62)
    places = layout(config, mesh={"fsdp": 2, "tensor": 2, "experts": 3}, style=style)
    block = "model.layers.0.mlp."
    assert [places[f"{block}experts.{n}.up_proj.weight"].owner for n in range(6)] == [0, 0, 1, 1, 2, 2]
    assert places[f"{block}gate.weight"].owner is None
    assert places[f"{block}gate.weight"].split == (((), ("fsdp",)) if style == "flax" else (("fsdp",), ()))
    down = places[f"{block}experts.4.down_proj.weight"]
    assert down.split == (("fsdp",), ("tensor",))
    assert down.local_size == 0
    assert down.slices({"fsdp": 1, "tensor": 0, "experts": 2}) == (slice(20, 40), slice(0, 18))
    sizes = [sum(p.parameter.size if whole else p.local_size for p in places.values()) for whole in (True, False)]
    experts = 2 * 6 * 3 * 40 * 36
    assert sizes[1] < (sizes[0] - experts) * 0.51 + experts / 12


@pytest.mark.parametrize("style", ["pt", "flax"])
@pytest.mark.parametrize("name", ["olmo2", "olmo-clip-tied", "opt", OPT_350M])
def test_parts_are_the_whole(name, style):
    config = CONFIGS[name].replace(vocab_size=62)
    mesh = {"fsdp": 4, "tensor": 2}
    for place in layout(config, mesh=mesh, style=style).values():
        seen = np.zeros(place.parameter.shape, int)
        for fsdp, tensor in itertools.product(range(4), range(2)):
            part = place.slices({"fsdp": fsdp, "tensor": tensor})
            seen[part] += 1
            assert all(a <= b for a, b in zip(seen[part].shape, place.local_shape, strict=True))
        copies = 8 // np.prod([mesh[axis] for axes in place.split for axis in axes], dtype=int)
        assert (seen == copies).all(), place.parameter.name
        first = place.slices({"fsdp": 0, "tensor": 0})
        assert seen[first].shape == place.local_shape


def test_all_that_does_not_divide_is_named_at_once():
    with pytest.raises(InputError) as caught:
        layout(CONFIGS["olmo2"], mesh={"fsdp": 3, "tensor": 8}, style="flax")
    assert str(caught.value).splitlines() == [
        "Olmo2Config does not fit the mesh {'fsdp': 3, 'tensor': 8}: 4 problem(s)",
        "  - vocab is 61, which tensor = 8 does not divide",
        "  - embed is 40, which fsdp = 3 does not divide",
        "  - kv_heads is 20, which tensor = 8 does not divide",
        "  - mlp is 36, which tensor = 8 does not divide",
    ]
    with pytest.raises(InputError) as caught:
        layout(CONFIGS["olmoe"], mesh={"fsdp": 3, "experts": 2}, style="pt")
    assert str(caught.value).splitlines() == [
        "OlmoeConfig does not fit the mesh {'fsdp': 3, 'experts': 2}: 2 problem(s)",
        "  - experts is 5, which experts = 2 does not divide",
        "  - embed is 40, which fsdp = 3 does not divide",  # in PyTorch where experts are split, not without
    ]
    with pytest.raises(InputError, match="the model has no experts, for experts = 2"):
        layout(CONFIGS["olmo2"], mesh={"experts": 2})
    with pytest.raises(InputError, match="kv_heads is 2, which tensor = 4"):  # PyTorch's attention is on whole heads
        layout(CONFIGS["olmo2"], mesh={"tensor": 4}, style="pt")


@pytest.mark.parametrize(
    ("mesh", "message"), [({"data": 2}, "an axis 'data', expected fsdp, tensor"), ({"fsdp": 0}, "fsdp is 0")]
)
def test_a_wrong_mesh_is_refused(mesh, message):
    with pytest.raises(InputError, match=message):
        layout(CONFIGS["olmo2"], mesh=mesh)


def test_published_models_fit_eight_devices():
    for preset in ("olmo-7b", "olmo2-1b", "olmo2-32b", "opt-350m", "opt-66b"):
        config = ModelConfig.from_preset(preset)
        for tensor in (1, 2, 4, 8):
            places = layout(config, mesh={"fsdp": 8 // tensor, "tensor": tensor})
            table = config.parameters("causal_lm")
            assert sum(places[p.name].local_size for p in table) < 1.01 * sum(p.size for p in table) / 8 + 5e6 * tensor
