"""What the parity suite asks of a wing beyond `olmozoo.backends`: gradients and cached decoding, in NumPy."""

import contextlib
import gc
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from olmozoo import InputError, convert
from olmozoo.backends import BACKENDS, installed, load

WINGS = [
    pytest.param(
        name,
        marks=[
            getattr(pytest.mark, name),
            pytest.mark.skipif(name not in installed(), reason=f"olmozoo[{name}] is not installed"),
        ],
    )
    for name in BACKENDS
]
PRESENT = installed()


def needs(*names: str):
    """Mark a test that needs these wings at once, and skip it where one of them is not installed."""

    def mark(test):
        missing = [name for name in names if name not in PRESENT]
        for name in names:
            test = getattr(pytest.mark, name)(test)
        return pytest.mark.skipif(bool(missing), reason=f"olmozoo[{','.join(missing)}] is not installed")(test)

    return mark


def several(test):
    """Mark a test that compares all wings that are installed, and skip it where there is only one."""
    for name in BACKENDS:
        test = getattr(pytest.mark, name)(test)
    return pytest.mark.skipif(len(PRESENT) < 2, reason="fewer than two frameworks are installed")(test)


def model_class(wing: str, name: str, head: str) -> type:
    """The class of a family and a head by the end of its name, as "OPT" and "ForCausalLM"."""
    prefix = {"pt": "", "tf": "TF", "flax": "Flax"}[wing]
    return getattr(import_module(f"olmozoo.{wing}"), f"{prefix}{name}{head}")


def scope(wing: str):
    """Float64 enabled where a wing has to be told."""
    if wing == "flax":
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


def gradients(wing: str, model, ids, mask, **labels) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and its gradient by canonical name, each in the shape of the parameter table."""
    if wing == "pt":
        import torch

        labels = {name: torch.from_numpy(value) for name, value in labels.items()}
        loss = model(torch.from_numpy(ids), torch.from_numpy(mask), **labels).loss
        loss.backward()
        return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    if wing == "tf":
        import tensorflow as tf

        from olmozoo.tf import canonical_state

        with tf.GradientTape() as tape:
            loss = model(input_ids=ids, attention_mask=mask, **labels).loss
        found = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        values = model.get_weights()
        for variable, gradient in zip(model.trainable_variables, found, strict=True):
            variable.assign(tf.convert_to_tensor(gradient))
        named = canonical_state(model)  # of a model whose values are its gradients
        model.set_weights(values)
        return float(loss), named
    import jax

    from olmozoo.flax import canonical_state

    with jax.enable_x64(True):
        loss, tree = jax.value_and_grad(lambda params: model(ids, mask, params=params, **labels).loss)(model.params)
        return float(loss), canonical_state(model, tree)


def step_by_step(wing: str, folder, ids, mask, cache: str) -> np.ndarray:
    """Float64 logits of a prefill of 4 positions and then one position at a time; cache is "tuple" or "object"."""
    model = load(folder, wing, "float64").model
    scope = contextlib.nullcontext()
    convert = np.asarray
    if wing == "pt":
        import torch

        scope, convert = torch.inference_mode(), torch.from_numpy
    elif wing == "flax":
        import jax

        scope = jax.enable_x64(True)
    logits = []
    with scope:
        past = None if cache == "tuple" else model.init_cache(len(ids), ids.shape[1] + 3)
        start = 0
        for end in range(4, ids.shape[1] + 1):
            output = model(
                input_ids=convert(ids[:, start:end].copy()),
                attention_mask=convert(mask[:, :end].copy()),
                past_key_values=past,
                use_cache=True,
            )
            past = output.past_key_values
            assert type(past).__name__ == ("tuple" if cache == "tuple" else "KVCache")
            logits.append(np.asarray(output.logits))
            start = end
    return np.concatenate(logits, axis=1)


def call(wing: str, cls, folder, ids, mask, **inputs) -> dict:
    """What a class loaded in float64 answers, in NumPy."""
    if wing == "pt":
        import torch

        tensors = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in inputs.items()}
        with torch.inference_mode():
            output = cls.from_pretrained(folder)(torch.from_numpy(ids), torch.from_numpy(mask), **tensors)
        return to_numpy(output)
    if wing == "tf":
        return to_numpy(cls.from_pretrained(folder)(input_ids=ids, attention_mask=mask, **inputs))
    import jax

    with jax.enable_x64(True):
        return to_numpy(cls.from_pretrained(folder)(ids, mask, **inputs))


def to_numpy(output) -> dict:
    """An output's fields as arrays, those that are tuples as tuples of arrays; without the cache."""
    return {
        name: tuple(np.asarray(part) for part in value) if isinstance(value, tuple) else np.asarray(value)
        for name, value in output.items()
        if name != "past_key_values"
    }


def let_programs_go() -> None:
    """Free what frameworks have compiled and nothing uses any more."""
    gc.collect()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def refusal(model, keep: str, folder: Path) -> str:
    """What a model says that must not be saved (`keep` is "save"), or converted to that wing; nothing is written."""
    with pytest.raises(InputError) as caught:
        model.save_pretrained(folder / "new") if keep == "save" else convert(model, to=keep)
    assert not (folder / "new").exists()
    return str(caught.value)
