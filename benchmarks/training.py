"""Tokens per second and peak memory of training, beside the loop that users of each framework have otherwise.

    python benchmarks/training.py [--model olmo2-190m] [--batch 4] [--length 256] [--steps 1] [--rounds 3]

For each wing: the loop of `olmozoo train`; a bare loop over the same compiled step on the same batches, in the same
process, right after it; and the peer: Transformers' Trainer with its own model in PyTorch, `fit` of the same model in
Keras, and a loop over a jitted step of the same model and `optax.adamw` in JAX. The bare loop computes gradients and
updates: it has no data to read, no norm and no clipping, no metrics.

With `--peer-python`, the model is OPT, whose classes Transformers 4 has for TensorFlow and Flax, and the peers in these
are a jitted step of those. That interpreter needs transformers 4.57, tensorflow, tf-keras, jax, flax and optax.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    HERE,
    Turns,
    Worker,
    arguments,
    bars,
    peak_memory,
    ratio,
    report,
    reset_peak,
    spread,
    table,
    take_turns,
    workers,
    write_model,
)

PEERS = {"pt": "Trainer", "tf": "fit", "flax": "optax"}
PEERS_4 = {"pt": "Trainer", "tf": "transformers4-tf", "flax": "transformers4-flax"}
TITLES = {
    "Trainer": "Transformers' Trainer",
    "fit": "Keras fit, the same model",
    "optax": "loop over optax, the same model",
    "transformers4-tf": "Transformers 4, TensorFlow",
    "transformers4-flax": "Transformers 4, Flax",
}
RATE, DECAY, BETAS = 1e-5, 0.01, (0.9, 0.95)
NAME = "Training"


def main() -> None:
    """Measure each wing beside its peer and print tables."""
    parser = arguments(__doc__, NAME)
    parser.add_argument(
        "--model", help="a name of `harness.MODELS`; default olmo2-190m, and opt-125m for Transformers 4"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1, help="in a round")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    if options.serve:
        settings = json.loads(options.serve)
        SERVERS[settings["name"]](Turns(), **settings)
        return

    from olmozoo.backends import installed

    if options.tiny:
        options.length = 16
    rounds = options.rounds or (1 if options.tiny else 7 if options.full else 3)
    wings = options.only.split(",") if options.only else installed()
    olmo2, opt = ("olmo2-tiny", "opt-tiny") if options.tiny else ("olmo2-190m", "opt-125m")
    jobs = {olmo2: PEERS, **({opt: PEERS_4} if options.peer_python else {})}
    jobs = {model: peers for model, peers in jobs.items() if options.model in (None, model)}
    panels: dict[str, Any] = {}
    parts = [f"Batch {options.batch} x {options.length}, float32, AdamW; {rounds} rounds of {options.steps} steps."]
    for model, peers in jobs.items():
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            parameters = write_model(model, folder / "model")
            vocabulary = json.loads((folder / "model/config.json").read_text())["vocab_size"]
            tokens = np.random.default_rng(0).integers(5, vocabulary, 1024 * options.batch * options.length)
            tokens.astype(np.uint16).tofile(folder / "tokens.npy")
            rows, speeds = [], {}
            for wing in wings:
                rows += measure(wing, peers[wing], folder, rounds, options, speeds)
        columns = ["", "tokens/s", "loop / bare, time", "beside the peer", "peak memory, GB"]
        parts.append(f"### {model} ({parameters / 1e6:.0f} million parameters)\n\n{table(columns, rows)}")
        panels[model] = ("tokens/s", speeds)
    if options.write:
        titles = {name: title_of(name) for _, speeds in panels.values() for name in speeds}
        parts.insert(1, bars(HERE / "plots/training.png", panels, titles))
    report(NAME, "\n\n".join(parts), options)


def title_of(name: str) -> str:
    """The title of a contestant: a wing, its bare loop, or a peer."""
    wing, *bare = name.split()
    return TITLES.get(name) or (f"bare loop over its step, {wing}" if bare else f"olmozoo train, {wing}")


def measure(
    wing: str, peer: str, folder: Path, rounds: int, options: Any, speeds: dict[str, list[float]]
) -> list[list[str]]:
    """The rows of a wing, its bare loop and its peer, whose tokens/s go to `speeds`."""
    settings = {"folder": str(folder), "batch": options.batch, "length": options.length}
    python = options.peer_python if peer.startswith("transformers4") else sys.executable
    made = {
        "own": lambda: Worker(__file__, name=wing, **settings),
        "peer": lambda: Worker(__file__, python, name=peer, **settings),
    }
    with workers(made) as running:
        found = take_turns(running, rounds, steps=options.steps)
    tokens = options.batch * options.length * options.steps
    own, theirs = ([answer["seconds"] for answer in found[name]] for name in ("own", "peer"))
    bare = [answer["bare"] for answer in found["own"]]
    own_memory, peer_memory = (f"{max(answer['memory'] for answer in found[name]) / 1e9:.2f}" for name in found)
    rows = []
    for name, seconds, more in (
        (wing, own, (ratio(own, bare), ratio(theirs, own), own_memory)),
        (f"{wing} bare", bare, ("", ratio(theirs, bare), "")),
        (peer, theirs, ("", "", peer_memory)),
    ):
        speeds[name] = [tokens / taken for taken in seconds]
        rows.append([title_of(name), spread(speeds[name], ",.0f"), *more])
    return rows


# -- the contestants, each in a process of its own --------------------------------------------------------------------


def own(turns: Turns, name: str, folder: str, batch: int, length: int) -> None:
    """The loop of `olmozoo train`, and in each turn a bare loop over its step on the same batches."""
    from rich.console import Console

    from olmozoo.backends import backend_class
    from olmozoo.training import loop
    from olmozoo.training.config import from_dict
    from olmozoo.training.data import Batch, open_data
    from olmozoo.training.start import open_start

    class Interrupted(loop.Run):
        """A run that waits for its turn, does some steps, and then does them again without the loop."""

        def _batches(self) -> Iterator[Batch]:
            batches = super()._batches()
            while True:
                steps = turns.next()["steps"]
                reset_peak()
                seen = []
                start = time.perf_counter()
                for batch in itertools.islice(batches, steps):
                    seen.append(batch)
                    yield batch
                self.wait()
                seconds, memory = time.perf_counter() - start, peak_memory()
                start = time.perf_counter()
                for batch in seen:
                    self.step.gradients(batch, float(batch.num_targets), 0)
                    self.step.update(RATE, None)
                self.wait()
                turns.answer(seconds=seconds, bare=time.perf_counter() - start, memory=memory)

        def wait(self) -> None:
            """Wait until the parameters are updated."""
            if name == "flax":
                import jax

                jax.block_until_ready(self.step.params)

    config = from_dict(
        {
            "backend": name,
            "load_path": f"{folder}/model",
            "save_folder": f"{folder}/run-{name}",
            "data": {"paths": [f"{folder}/tokens.npy"], "memmap_dtype": "uint16"},
            "max_sequence_length": length,
            "max_duration": 1000,
            "global_train_batch_size": batch,
            "save_interval": None,
            "optimizer": {"learning_rate": RATE, "weight_decay": DECAY, "betas": list(BETAS)},
        }
    )
    backend = backend_class(config.backend)
    with (
        open(os.devnull, "w") as nowhere,
        backend.training().scope(config, lambda: backend.choose_device("float32", config.device)) as world,
    ):
        start = open_start(config)
        console = Console(file=nowhere, force_terminal=True)
        Interrupted(config, start, open_data(config, start.model), console, world).train()


def read_tokens(folder: str, length: int) -> np.ndarray:
    """The tokens of the training data, (instances, length)."""
    return np.fromfile(f"{folder}/tokens.npy", np.uint16).astype(np.int64).reshape(-1, length)


def trainer(turns: Turns, name: str, folder: str, batch: int, length: int) -> None:
    """Transformers' Trainer, with the model of Transformers."""
    import torch
    import transformers

    ids = torch.from_numpy(read_tokens(folder, length))

    class Wait(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin()

        def begin(self) -> None:
            self.left = turns.next()["steps"]
            reset_peak()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.left -= 1
            if not self.left:
                turns.answer(seconds=time.perf_counter() - self.start, memory=peak_memory())
                self.begin()

    settings = transformers.TrainingArguments(
        f"{folder}/trainer",
        per_device_train_batch_size=batch,
        max_steps=1000,
        learning_rate=RATE,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    data = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model, settings, train_dataset=data, callbacks=[Wait()]).train()


def fit(turns: Turns, name: str, folder: str, batch: int, length: int) -> None:
    """Keras `fit` with the model of olmozoo."""
    import keras

    from olmozoo.tf import TFAutoModelForCausalLM

    model = TFAutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype="float32")
    model.compile(keras.optimizers.AdamW(RATE, DECAY, *BETAS))
    ids = read_tokens(folder, length).astype(np.int32)

    def work(job: dict[str, Any]) -> dict[str, Any]:
        rows = ids[: batch * job["steps"]]
        reset_peak()
        start = time.perf_counter()
        model.fit({"input_ids": rows, "labels": rows}, batch_size=batch, verbose=0, shuffle=False)
        return {"seconds": time.perf_counter() - start, "memory": peak_memory()}

    turns.serve(work)


def steps_of_jax(turns: Turns, step: Any, params: Any, optimizer: Any, ids: np.ndarray, batch: int) -> None:
    """Turns of a jitted step `(params, state, ids) -> (params, state, loss)`."""
    import jax

    kept = {"params": params, "state": optimizer.init(params)}
    parts = itertools.cycle(ids[: len(ids) // batch * batch].reshape(-1, batch, ids.shape[1]))

    def work(job: dict[str, Any]) -> dict[str, Any]:
        reset_peak()
        start = time.perf_counter()
        for rows in itertools.islice(parts, job["steps"]):
            kept["params"], kept["state"], _ = step(kept["params"], kept["state"], rows)
        jax.block_until_ready(kept)
        return {"seconds": time.perf_counter() - start, "memory": peak_memory()}

    turns.serve(work)


def optax_loop(turns: Turns, name: str, folder: str, batch: int, length: int) -> None:
    """A loop over a jitted step of optax with the model of olmozoo."""
    from functools import partial

    import jax
    import optax

    from olmozoo.flax import FlaxAutoModelForCausalLM

    model, params = FlaxAutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype="float32", _do_init=False)
    optimizer = optax.adamw(RATE, *BETAS, weight_decay=DECAY)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, ids: Any) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(
            lambda params: model(ids, params=params, labels=ids, deterministic=False).loss
        )(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    steps_of_jax(turns, step, params, optimizer, read_tokens(folder, length).astype(np.int32), batch)


def transformers4_flax(turns: Turns, name: str, folder: str, batch: int, length: int) -> None:
    """A loop over a jitted step of optax with the model of Transformers 4."""
    from functools import partial

    import jax
    import optax
    from contestants import load_flax

    model = load_flax(f"{folder}/model")
    optimizer = optax.adamw(RATE, *BETAS, weight_decay=DECAY)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, ids: Any) -> tuple[Any, Any, Any]:
        def loss_of(params: Any) -> Any:
            logits = model(ids, params=params, deterministic=False, dropout_rng=jax.random.key(0)).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    steps_of_jax(turns, step, model.params, optimizer, read_tokens(folder, length).astype(np.int32), batch)


def transformers4_tf(turns: Turns, name: str, folder: str, batch: int, length: int) -> None:
    """A loop over a step compiled by XLA with the model of Transformers 4."""
    import tensorflow as tf
    import tf_keras
    from contestants import load_tf

    model = load_tf(f"{folder}/model")
    optimizer = tf_keras.optimizers.AdamW(RATE, DECAY, *BETAS)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True, autograph=False)
    def step(ids: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True).loss
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )
        return loss

    parts = itertools.cycle(read_tokens(folder, length).astype(np.int32).reshape(-1, batch, length))

    def work(job: dict[str, Any]) -> dict[str, Any]:
        reset_peak()
        start = time.perf_counter()
        for rows in itertools.islice(parts, job["steps"]):
            loss = step(tf.constant(rows))
        loss.numpy()
        return {"seconds": time.perf_counter() - start, "memory": peak_memory()}

    turns.serve(work)


SERVERS = {
    **dict.fromkeys(("pt", "tf", "flax"), own),
    "Trainer": trainer,
    "fit": fit,
    "optax": optax_loop,
    "transformers4-tf": transformers4_tf,
    "transformers4-flax": transformers4_flax,
}

if __name__ == "__main__":
    main()
