"""Models that generate, each in a process of its own: olmozoo's wings and the classes of Transformers 5 and 4.

Transformers 4.57 is the last release with classes for TensorFlow and Flax, of OPT and not of OLMo. It needs an
environment of its own, whose interpreter is named by `--peer-python`; nothing of olmozoo is imported there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Turns, Worker, peak_memory, reset_peak

TITLES = {
    "pt": "olmozoo, PyTorch",
    "tf": "olmozoo, Keras",
    "flax": "olmozoo, Flax",
    "transformers": "Transformers 5, PyTorch",
    "transformers4-tf": "Transformers 4, TensorFlow (XLA)",
    "transformers4-flax": "Transformers 4, Flax (jitted)",
}
PEERS = {"pt": "transformers", "tf": "transformers4-tf", "flax": "transformers4-flax"}
Generate = Callable[[np.ndarray, int], Any]


def names(options: argparse.Namespace, model: str) -> list[str]:
    """The contestants that can be measured here with a model."""
    from importlib.util import find_spec

    from olmozoo.backends import installed

    found = list(installed())
    if "pt" in found and find_spec("transformers"):
        found.append("transformers")
    if options.peer_python and model.startswith("opt"):
        found += [name for name in TITLES if name.startswith("transformers4")]
    return [name for name in found if not options.only or name in options.only.split(",")]


def worker(name: str, options: argparse.Namespace, folder: Path, **settings: Any) -> Callable[[], Worker]:
    """What starts a contestant with the model in a folder; see `open_model` for settings."""
    python = options.peer_python if name.startswith("transformers4") else sys.executable
    return lambda: Worker(__file__, python, name=name, folder=str(folder), **settings)


def open_model(name: str, folder: str, dtype: str | None = None, quantization: str | None = None) -> Generate:
    """A function of ids (batch, seq) and a number of new tokens, which are all generated, greedily."""
    if name == "transformers":
        return load_transformers(folder, dtype)
    if name == "transformers4-tf":
        return generate_tf(folder)
    if name == "transformers4-flax":
        return generate_flax(folder)
    from olmozoo.backends import load

    backend = load(folder, name, dtype, quantization=quantization)
    return lambda ids, new: backend.generate(ids, np.ones_like(ids), max_new_tokens=new, eos_token_id=[])


def load_transformers(folder: str, dtype: str | None) -> Generate:
    """The PyTorch class of Transformers 5."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype or "float32"))
    model.generation_config.eos_token_id = None

    def generate(ids: np.ndarray, new: int) -> Any:
        tensor = torch.from_numpy(ids)
        return model.generate(tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=new, do_sample=False)

    return generate


def load_tf(folder: str) -> Any:
    """The TensorFlow OPT of Transformers 4, with weights of its own in the file that it reads fastest."""
    import transformers

    own = Path(folder, "tf")
    if not own.exists():  # it cannot read the files of safetensors 0.8
        made = transformers.TFOPTForCausalLM(transformers.AutoConfig.from_pretrained(folder))
        made.build_in_name_scope()
        made.save_pretrained(own)
    model = transformers.TFOPTForCausalLM.from_pretrained(own)
    model.generation_config.eos_token_id = None
    return model


def generate_tf(folder: str) -> Generate:
    """`load_tf`, with `generate` compiled by XLA."""
    import tensorflow as tf

    compiled = tf.function(load_tf(folder).generate, jit_compile=True)

    def generate(ids: np.ndarray, new: int) -> Any:
        tensor = tf.constant(ids, tf.int32)
        return compiled(tensor, attention_mask=tf.ones_like(tensor), max_new_tokens=new, do_sample=False).numpy()

    return generate


def load_flax(folder: str) -> Any:
    """The Flax OPT of Transformers 4."""
    import transformers

    model = transformers.FlaxOPTForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = model.generation_config.min_length = -1  # None is an error
    return model


def generate_flax(folder: str) -> Generate:
    """`load_flax`, with `generate` jitted."""
    from functools import partial

    import jax

    model = load_flax(folder)

    @partial(jax.jit, static_argnums=2)
    def compiled(params: Any, ids: Any, new: int) -> Any:
        mask = jax.numpy.ones_like(ids)
        return model.generate(ids, attention_mask=mask, params=params, max_new_tokens=new, do_sample=False).sequences

    return lambda ids, new: np.asarray(compiled(model.params, ids.astype(np.int32), new))


def main() -> None:
    """Load a model and generate what each job asks for, as `Worker` has it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", required=True)
    settings = json.loads(parser.parse_args().serve)
    turns = Turns()
    vocabulary = json.loads(Path(settings["folder"], "config.json").read_text())["vocab_size"]
    start = time.perf_counter()
    generate = open_model(**settings)
    loaded = {"load": time.perf_counter() - start, "loaded_memory": peak_memory()}

    def work(job: dict[str, Any]) -> dict[str, Any]:
        ids = np.random.default_rng(0).integers(5, vocabulary, (job["batch"], job["prompt"]))
        reset_peak()
        start = time.perf_counter()
        generate(ids, job["new"])
        return {"seconds": time.perf_counter() - start, "memory": peak_memory(), **loaded}

    turns.serve(work)


if __name__ == "__main__":
    main()
