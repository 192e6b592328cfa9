"""Checkpoints that Transformers wrote, in every wing; folders that we wrote, in Transformers."""

import numpy as np
import pytest

from olmozoo.backends import load
from tests.helpers.checkpoints import left_padded
from tests.helpers.wings import PRESENT, WINGS, several

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.pt  # the oracle is in PyTorch

ROTARY = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "pad_token_id": 0,
    "eos_token_id": [5, 7],
}
EXPERTS = ROTARY | {"intermediate_size": 52}  # grouped products of PyTorch take multiples of 16 bytes
OPT = {
    "vocab_size": 99,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": [5, 7],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
CASES = {
    "olmo2-gqa": ("Olmo2", ROTARY | {"num_key_value_heads": 2}),
    "olmo2-mqa-bias-tied": (
        "Olmo2",
        ROTARY | {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmo2-yarn": ("Olmo2", ROTARY | {"max_position_embeddings": 64, "rope_parameters": YARN}),
    "olmo2-llama3": ("Olmo2", ROTARY | {"num_key_value_heads": 3, "rope_parameters": LLAMA3}),
    "olmo3-thetas-yarn": (
        "Olmo3",
        ROTARY
        | {
            "num_key_value_heads": 2,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "max_position_embeddings": 64,
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "olmo3-mqa-bias-tied": (
        "Olmo3",
        ROTARY
        | {
            "num_hidden_layers": 5,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "sliding_window": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
                "sliding_attention": LLAMA3,
            },
        },
    ),
    "olmo-clip-mqa-tied": (
        "Olmo",
        ROTARY | {"clip_qkv": 0.3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "olmo-bias-linear": (
        "Olmo",
        ROTARY
        | {
            "attention_bias": True,
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        },
    ),
    "olmo-dynamic": (
        "Olmo",
        ROTARY
        | {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
        },
    ),
    "olmoe-clip-gqa": (
        "Olmoe",
        EXPERTS | {"num_key_value_heads": 2, "clip_qkv": 0.8, "num_experts": 7, "num_experts_per_tok": 3},
    ),
    "olmoe-normed-one-bias-tied": (
        "Olmoe",
        EXPERTS
        | {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "norm_topk_prob": True,
        },
    ),
    "flexolmo-normed-gqa": (
        "FlexOlmo",
        EXPERTS | {"num_key_value_heads": 3, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "flexolmo-all": ("FlexOlmo", EXPERTS | {"num_experts": 3, "num_experts_per_tok": 3}),
    "opt": ("OPT", OPT),
    "opt-projected-post-norm": ("OPT", OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt-bare": (
        "OPT",
        OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "opt-no-final-norm": ("OPT", OPT | {"_remove_final_layer_norm": True, "activation_function": "gelu"}),
}


def theirs(case: str, head: str = "ForCausalLM", **changes):
    """A Transformers model with random weights, biases and norms away from their initial values."""
    family, fields = CASES[case]
    torch.manual_seed(len(case))
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**fields, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def answers(model, ids, mask):
    with torch.no_grad():
        output = model(torch.from_numpy(ids), torch.from_numpy(mask), output_hidden_states=True)
    return {"logits": output.logits.numpy(), "hidden_states": [h.numpy() for h in output.hidden_states]}


def relative(found, expected, real):
    return float(np.abs(found - expected)[real].max() / np.abs(expected)[real].max())


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_transformers_gives_its_answers(tmp_path, case, wing):
    model = theirs(case)
    model.save_pretrained(tmp_path)
    ids, mask = left_padded(model.config, batch=3, length=21)
    expected = answers(model, ids, mask)
    ours = load(tmp_path, wing)
    found = ours.forward(ids, mask, output_hidden_states=True)
    real = mask.astype(bool)
    assert relative(found["logits"], expected["logits"], real) < 2e-5
    assert len(found["hidden_states"]) == len(expected["hidden_states"])
    for ours_state, their_state in zip(found["hidden_states"], expected["hidden_states"], strict=True):
        assert relative(ours_state, their_state, real) < 2e-5
    with torch.no_grad():
        tokens = model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=14, do_sample=False
        )
    assert np.array_equal(ours.generate(ids, mask, max_new_tokens=14), tokens.numpy())


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize(
    "case",
    [
        "olmo2-gqa",
        "olmo2-mqa-bias-tied",
        "olmo3-thetas-yarn",
        "olmoe-clip-gqa",
        "olmo-clip-mqa-tied",
        "opt-projected-post-norm",
    ],
)
def test_a_folder_we_saved_loads_in_transformers(tmp_path, case, wing):
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    load(tmp_path / "theirs", wing).model.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == model.dtype
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    ids, mask = left_padded(model.config)
    assert np.array_equal(answers(again, ids, mask)["logits"], answers(model, ids, mask)["logits"])
    assert again.generation_config.eos_token_id == [5, 7]


@several
def test_bfloat16_is_no_further_from_float32_than_transformers_is(tmp_path):
    model = theirs("olmo2-gqa")
    model.save_pretrained(tmp_path)
    ids, mask = left_padded(model.config, batch=3, length=21)
    real = mask.astype(bool)
    exact = answers(model, ids, mask)["logits"]
    half = answers(model.bfloat16().float(), ids, mask)["logits"]  # the rounded weights alone
    with torch.no_grad():
        low = model.bfloat16()(torch.from_numpy(ids), torch.from_numpy(mask)).logits.float().numpy()
    allowed = 1.5 * max(relative(low, exact, real), relative(half, exact, real))
    for wing in PRESENT:
        found = load(tmp_path, wing, "bfloat16").forward(ids, mask)["logits"]
        assert relative(found, exact, real) <= allowed, wing
