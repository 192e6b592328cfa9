"""Orbax checkpoints, read and written."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from olmozoo import CheckpointError
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.formats import orbax
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.checkpoint.tensors import LazyTensor, dtype_of
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.formats import CONFIGS, model_of, tree


@pytest.mark.parametrize("family", CONFIGS)
def test_flax_and_orbax_alone_read_the_wings_own_tree(tmp_path, family):
    serialization = pytest.importorskip("flax.serialization")
    import jax
    import orbax.checkpoint as ocp

    source = write_checkpoint(tmp_path / "source", CONFIGS[family], dtype=dtype_of("bfloat16"))
    params = model_of("flax", family, "causal_lm", source).params
    convert_checkpoint(source, tmp_path / "there", to="flax-msgpack")
    convert_checkpoint(source, tmp_path / "orb", to="orbax")
    from_flax = serialization.msgpack_restore((tmp_path / "there" / "flax_model.msgpack").read_bytes())
    folder = (tmp_path / "orb" / "orbax").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        from_orbax = checkpointer.restore(folder, target=params)
        untold = checkpointer.restore(folder)
    older = ocp.PyTreeCheckpointer().restore(folder)
    for found in (from_flax, from_orbax, untold, older):
        assert jax.tree.structure(found) == jax.tree.structure(params)
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(np.asarray(a), b), params, found)
        assert all(jax.tree.leaves(same))
    # And the reverse: what they write is read.
    for path, write in (
        ("flax_model.msgpack", lambda file: file.write_bytes(serialization.to_bytes(params))),
        *(
            ("orbax", lambda folder, options=options: orbax_save(folder, params, **options))
            for options in (
                {},
                {"use_zarr3": True},
                {"use_ocdbt": False},
                {"use_ocdbt": False, "use_compression": False},
                {"use_ocdbt": False, "use_zarr3": True},
            )
        ),
    ):
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        shutil.copytree(source, tmp_path / "own", ignore=shutil.ignore_patterns("*.safetensors"))
        write(tmp_path / "own" / path)
        convert_checkpoint(tmp_path / "own", tmp_path / "back", to="safetensors", force=True)
        assert tree(tmp_path / "back") == tree(source)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"dtype": ">f4"}, {"order": "F"}, {"chunks": [24, 50]}, {"compressor": {"id": "zlib"}}, {"filters": []}],
)
def test_orbax_arrays_in_folders_are_read_however_they_lie(tmp_path, metadata):
    tensorstore = pytest.importorskip("tensorstore")
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo"], dtype="float32")
    shutil.copytree(source, tmp_path / "there", ignore=shutil.ignore_patterns("*.safetensors"))
    params = model_of("flax", "olmo", "causal_lm", source).params
    orbax_save(tmp_path / "there" / "orbax", params, use_ocdbt=False, use_compression=False)
    expected = Checkpoint(source)["lm_head.weight"]
    place = tmp_path / "there" / "orbax" / "lm_head.kernel"
    shutil.rmtree(place)
    spec = {"driver": "zarr", "kvstore": f"file://{place}/", "metadata": {"compressor": None, **metadata}}
    array = tensorstore.open(spec, create=True, dtype=expected.dtype, shape=expected.T.shape).result()
    array.write(expected.T).result()
    assert np.array_equal(Checkpoint(tmp_path / "there")["lm_head.weight"], expected)


def orbax_save(folder: Path, params, **options) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(params))


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}])
def test_an_orbax_piece_that_is_not_there_is_missed(tmp_path, options):
    tensorstore = pytest.importorskip("tensorstore")
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo"], dtype="float32")
    shutil.copytree(source, tmp_path / "there", ignore=shutil.ignore_patterns("*.safetensors"))
    folder = tmp_path / "there" / "orbax"
    orbax_save(folder, model_of("flax", "olmo", "causal_lm", source).params, **options)
    assert Checkpoint(tmp_path / "there")["lm_head.weight"].any()
    store = f"file://{folder}/" if options else {"driver": "ocdbt", "base": f"file://{folder}/"}
    store = tensorstore.KvStore.open(store).result()
    store.delete_range(tensorstore.KvStore.KeyRange("lm_head.kernel/0", "lm_head.kernel/1")).result()
    with pytest.raises(CheckpointError, match=r"lm_head.kernel has 0 of its 1 pieces"):
        Checkpoint(tmp_path / "there")


def test_an_orbax_checkpoint_is_found_where_a_manager_put_it(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    import orbax.checkpoint as ocp

    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    shutil.copytree(source, tmp_path / "there", ignore=shutil.ignore_patterns("*.safetensors"))
    params = model_of("flax", "olmo2", "causal_lm", source).params
    with ocp.CheckpointManager((tmp_path / "there" / "orbax").absolute()) as manager:
        manager.save(7, args=ocp.args.StandardSave(params))
        manager.wait_until_finished()
        shutil.copytree(tmp_path / "there" / "orbax" / "7", tmp_path / "there" / "orbax" / "8.orbax-checkpoint-tmp")
        convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
        assert tree(tmp_path / "back") == tree(source)
        params["lm_head"]["kernel"] = params["lm_head"]["kernel"] + 1
        manager.save(10, args=ocp.args.StandardSave(params))
    with pytest.warns(UserWarning, match="has steps 7, 10: step 10 is read"):
        last = Checkpoint(tmp_path / "there")
    assert np.array_equal(last["lm_head.weight"].T, params["lm_head"]["kernel"])
    (tmp_path / "there" / "orbax").rename(tmp_path / "there" / "mine")
    (tmp_path / "there" / "mine" / "10" / "default").rename(tmp_path / "there" / "run-10")
    with pytest.raises(CheckpointError, match="run-10 is an Orbax checkpoint: rename it to orbax"):
        Checkpoint(tmp_path / "there")
    shutil.move(tmp_path / "there" / "mine", tmp_path / "there" / "orbax")
    shutil.copytree(tmp_path / "there" / "orbax" / "7" / "default", tmp_path / "there" / "orbax" / "7" / "other")
    with pytest.raises(CheckpointError, match=r"has several Orbax checkpoints, expected one: 7/default, 7/other"):
        Checkpoint(tmp_path / "there")
    shutil.rmtree(tmp_path / "there" / "orbax")
    (tmp_path / "there" / "orbax" / "nothing").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"orbax is not an Orbax checkpoint: it has no manifest.ocdbt"):
        Checkpoint(tmp_path / "there")


def test_of_a_training_state_the_parameters_are_read(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    optax = pytest.importorskip("optax")
    source = write_checkpoint(tmp_path / "source", CONFIGS["olmo2"], dtype="float32")
    params = model_of("flax", "olmo2", "causal_lm", source).params
    shutil.copytree(source, tmp_path / "there", ignore=shutil.ignore_patterns("*.safetensors"))
    state = {"params": params, "opt": optax.adam(1e-3).init(params), "step": np.int32(7)}
    orbax_save(tmp_path / "there" / "orbax", state)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="safetensors")
    assert tree(tmp_path / "back") == tree(source)


def test_an_error_is_raised_after_the_other_arrays_are_written(tmp_path):
    """Else their files are made while the folder of the failed save is removed, and some stay behind."""
    pytest.importorskip("orbax.checkpoint")
    large = np.random.default_rng(0).standard_normal((500, 4000)).astype(np.float32)
    arrays = {"a/kernel": np.zeros(3, "datetime64[s]"), "b/kernel": large, "c/kernel": large}
    tensors = [LazyTensor(name, x.dtype, x.shape, lambda x=x: x, tmp_path) for name, x in arrays.items()]
    with pytest.raises(CheckpointError, match=r"Orbax could not write: .*datetime64"):
        orbax.write(tmp_path / "orbax", tensors)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) > 1.5 * large.nbytes
