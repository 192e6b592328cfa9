"""What `test_sharding.py` asserts of two processes with two devices each."""

import os
import sys
from pathlib import Path

import jax
import numpy as np

from olmozoo import CheckpointError
from olmozoo.flax import FlaxAutoModelForCausalLM, canonical_state
from olmozoo.flax.sharding import make_mesh
from tests.flax.mesh_cases import FAMILIES, SETTINGS
from tests.helpers.checkpoints import left_padded
from tests.helpers.processes import Allocated, CountedFile, run

if __name__ == "__main__":
    work, rank = Path(sys.argv[1]), int(sys.argv[2])
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"localhost:{os.environ['OLMOZOO_PORT']}", 2, rank)
    with CountedFile() as counted:
        model = FlaxAutoModelForCausalLM.from_pretrained(work / "olmo2", mesh=make_mesh(fsdp=2, tensor=2))

    def loaded():
        return {"read": counted.nbytes, "all": sum(x.nbytes for x in jax.tree.leaves(model.params))}

    def allocated():
        """The peak of allocations while a model is loaded in another dtype, and the bytes of its parts here."""
        with Allocated() as memory:
            wide = FlaxAutoModelForCausalLM.from_pretrained(work / "wide", mesh=make_mesh(fsdp=4), dtype="float64")
        parts = [part.data.nbytes for leaf in jax.tree.leaves(wide.params) for part in leaf.addressable_shards]
        return {"peak": memory.peak, "held": sum(parts)}

    def tokens():
        ids, mask = left_padded(FAMILIES["olmo2"], batch=4, length=7)
        return np.asarray(model.generate(ids, mask, **SETTINGS).sequences)

    def saved():
        model.save_pretrained(work / "two")
        return sorted(path.name for path in (work / "two").iterdir())

    def not_saved():
        """A file is where the folder should be: both processes say so, and neither waits for the other."""
        if rank == 0:
            (work / "file").write_text("")
        try:
            model.save_pretrained(work / "file" / "folder")
        except CheckpointError as error:
            return str(error)

    def state():
        return {name: array.shape for name, array in canonical_state(model).items()}

    def experts():
        """A mixture, whose experts are saved one by one: the tokens."""
        mixture = FlaxAutoModelForCausalLM.from_pretrained(work / "olmoe", mesh=make_mesh(fsdp=2, experts=2))
        mixture.save_pretrained(work / "two-olmoe")
        ids, mask = left_padded(FAMILIES["olmoe"], batch=4, length=7)
        return np.asarray(mixture.generate(ids, mask, max_new_tokens=2).sequences)

    cases = (loaded, allocated, tokens, saved, not_saved, state, experts)
    run({case.__name__: case for case in cases}, work, rank)
