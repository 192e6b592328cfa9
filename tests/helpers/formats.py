"""What the tests of checkpoint formats share: configs, fixtures and whole folders."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from olmozoo import FlexOlmoConfig, Olmo2Config, Olmo3Config, OlmoConfig, OlmoeConfig, OPTConfig
from olmozoo.families.parameter import ARCHITECTURES
from tests.helpers.checkpoints import left_padded
from tests.helpers.wings import scope

FIXTURES = Path(__file__).parents[1] / "fixtures" / "transformers4_opt"


COMMON = {"vocab_size": 51, "num_hidden_layers": 3, "max_position_embeddings": 32, "pad_token_id": 1}


CONFIGS = {
    "olmo": OlmoConfig(
        **COMMON, hidden_size=24, num_attention_heads=4, intermediate_size=20, attention_bias=True, eos_token_id=0
    ),
    "olmo2": Olmo2Config(
        **COMMON, hidden_size=24, num_attention_heads=6, num_key_value_heads=2, intermediate_size=20, eos_token_id=0
    ),
    "olmo3": Olmo3Config(
        **COMMON,
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=20,
        eos_token_id=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=3,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
    "olmoe": OlmoeConfig(
        **COMMON,
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=20,
        eos_token_id=0,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "flexolmo": FlexOlmoConfig(
        **COMMON, hidden_size=24, num_attention_heads=6, intermediate_size=20, eos_token_id=0, num_experts=12
    ),
    "opt": OPTConfig(**COMMON, hidden_size=16, num_attention_heads=4, ffn_dim=24, word_embed_proj_dim=8, dropout=0.0),
}


MODELS = [(family, head) for family, config in CONFIGS.items() for head in (None, *config.heads)]


def needs(to: str) -> None:
    library = {"pt-bin": "torch", "keras": "h5py", "keras-weights": "h5py", "savedmodel": "tensorflow"}
    pytest.importorskip({**library, "orbax": "orbax.checkpoint"}.get(to, "numpy"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_of(wing: str, family: str, head, folder: Path, **options):
    prefix = {"pt": "", "tf": "TF", "flax": "Flax"}[wing]
    rooms = __import__(f"olmozoo.{wing}", fromlist=["x"])
    cls = getattr(rooms, prefix + CONFIGS[family].name + ARCHITECTURES[head])
    with scope(wing):
        return cls.from_pretrained(folder, **options)


def answer(wing: str, model, config) -> np.ndarray:
    """The first of a model's outputs for a left-padded batch, at its real tokens."""
    ids, mask = left_padded(config)
    with scope(wing):
        if wing == "pt":
            import torch

            with torch.inference_mode():
                output = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).to_tuple()[0].numpy()
        else:
            output = np.asarray(model(input_ids=ids, attention_mask=mask).to_tuple()[0])
    return output[mask.astype(bool)] if output.shape[:2] == mask.shape else output


def copy_of(name: str, folder: Path) -> Path:
    shutil.copytree(FIXTURES / name, folder)
    return next(path for path in folder.iterdir() if path.suffix in (".h5", ".msgpack"))
