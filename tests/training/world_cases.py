"""The runs that `test_distributed.py` asks for, in one of several processes or on several devices."""

import contextlib
import os
import pickle
import signal
import sys
from functools import partial
from pathlib import Path

from olmozoo.backends import backend_class
from olmozoo.errors import OlmozooError
from olmozoo.training.config import from_dict
from tests.helpers.processes import CountedFile, run
from tests.helpers.runs import run_config


def one(rank: int, wing: str, fields: dict, interrupted: tuple[int, int] | None) -> dict:
    """A run; `interrupted` is the process that gets a signal, and the step at whose update."""
    step = backend_class(wing).training().TrainStep
    update, calls, held = step.update, [], {}

    def counted(self, *arguments):
        calls.append(1)
        if interrupted == (rank, len(calls)):
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, *arguments)
        held["share"] = share(wing, self)

    step.update = counted
    file = CountedFile()
    try:
        with contextlib.nullcontext() if "lora" in fields else file:  # to merge an adapter, weights are read whole
            outcome = run_config(from_dict({**fields, "backend": wing}))
    except OlmozooError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    else:
        return {"result": outcome.result, "text": outcome.text, "read": file.nbytes, **held}
    finally:
        step.update = update


def share(wing: str, step) -> tuple[int, int]:
    """The bytes of weights and of moments that this process holds on its first device."""
    if wing == "pt":
        from olmozoo.pt.parallel import local

        weights = sum(local(p.data).nbytes for p in step.model.parameters())
        states = (local(x).nbytes for state in step.optimizer.state.values() for x in state.values() if x.ndim)
        return weights, sum(states)
    if wing == "flax":
        import jax

        def size(tree):
            return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)

        return size([step.params, step.frozen]), size(step.state)
    return 0, 0


if __name__ == "__main__":
    work, rank = Path(sys.argv[1]), int(sys.argv[2])
    wing, asked = pickle.loads((work / "cases").read_bytes())
    if wing == "pt":
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    elif wing == "tf":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    elif "JAX_COORDINATOR_ADDRESS" in os.environ:
        import jax

        jax.distributed.initialize(num_processes=int(os.environ["WORLD_SIZE"]), process_id=rank)
    run({name: partial(one, rank, wing, *case) for name, case in asked.items()}, work, rank)
