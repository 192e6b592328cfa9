"""Instances, their order, their targets, and what is refused."""

import dataclasses
import os

import numpy as np
import pytest

pytest.importorskip("omegaconf", reason="olmozoo[training] is not installed")

from olmozoo import InputError
from olmozoo.training.config import InstanceFilter, from_dict
from olmozoo.training.data import IGNORED, TokenFiles, TrainingData, open_data, repeats
from tests.helpers.ai2_trainer import repeated
from tests.helpers.configs import CONFIGS
from tests.helpers.runs import write_tokens

LENGTH = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files, of 9 and 5 instances and a remainder each."""
    folder = tmp_path_factory.mktemp("data")
    stream = np.random.default_rng(0)
    arrays, masks = [], []
    for number, rows in enumerate((9, 5)):
        arrays.append(stream.integers(0, 300, rows * LENGTH + 3).astype("uint16"))
        masks.append(stream.random(rows * LENGTH + 3) < 0.6)
        arrays[-1].tofile(folder / f"{number}.npy")
        masks[-1].tofile(folder / f"mask-{number}.npy")
    return folder, arrays, masks


def opened(folder, masks=True, **options) -> TokenFiles:
    paths = [folder / "0.npy", folder / "1.npy"]
    mask_paths = [folder / "mask-0.npy", folder / "mask-1.npy"] if masks else [None, None]
    return TokenFiles(paths, mask_paths, "uint16", LENGTH, **{"vocab_size": 300, **options})


def test_instances_are_numbered_through_the_files(files):
    folder, arrays, masks = files
    data = opened(folder)
    assert len(data) == 14
    batch = data.batch(np.array([10, 0, 8, 9]))
    rows = [arrays[1][8:16], arrays[0][:8], arrays[0][64:72], arrays[1][:8]]
    np.testing.assert_array_equal(batch.input_ids, rows)
    assert batch.input_ids.dtype == batch.targets.dtype == np.int32
    learned = np.array([masks[1][8:16], masks[0][:8], masks[0][64:72], masks[1][:8]])
    expected = np.where(learned[:, 1:], np.array(rows, np.int32)[:, 1:], IGNORED)
    np.testing.assert_array_equal(batch.targets[:, :-1], expected)  # the first of a mask is never used
    assert (batch.targets[:, -1] == IGNORED).all()
    assert batch.num_targets == learned[:, 1:].sum()
    assert batch.attention_mask is None


def test_all_is_learned_without_masks(files):
    folder, arrays, _ = files
    batch = opened(folder, masks=False).batch(np.array([1]))
    np.testing.assert_array_equal(batch.targets, [[*arrays[0][9:16], IGNORED]])


def test_tokens_equal_to_the_pad_token_are_neither_seen_nor_learned(files):
    folder, arrays, masks = files
    pad = int(arrays[0][11])
    batch = opened(folder, pad_token_id=pad).batch(np.array([1]))
    row, learned = arrays[0][8:16].astype(int), masks[0][8:16]
    np.testing.assert_array_equal(batch.attention_mask, [(row != pad).astype(int)])
    expected = np.where(learned[1:] & (row[1:] != pad), row[1:], IGNORED)
    np.testing.assert_array_equal(batch.targets[0, :-1], expected)


def test_micro_batches_share_the_tokens_that_are_seen(files):
    folder, arrays, _ = files
    batch = opened(folder, pad_token_id=int(arrays[0][11])).batch(np.arange(5))
    parts = list(batch.split(2))
    assert [len(part.indices) for part in parts] == [2, 2, 1]
    seen = [part.attention_mask.sum() for part in parts]
    assert min(seen) < 16
    np.testing.assert_allclose([part.share for part in parts], np.array(seen) / sum(seen))
    halves = [part.share for part in next(opened(folder).batch(np.arange(8)).split(4)).split(2)]
    assert halves == [0.25, 0.25]
    nothing = dataclasses.replace(batch, attention_mask=np.zeros_like(batch.attention_mask))
    assert [part.share for part in nothing.split(3)] == [0, 0]


def test_scores_are_added_where_a_pad_token_is_first(files):
    folder, arrays, _ = files
    data = opened(folder, pad_token_id=int(arrays[0][8]), leading_pads_see_all=True)
    least = np.finfo(np.float32).min
    mask = data.batch(np.array([1, 2])).attention_mask
    assert mask.shape == (2, 1, LENGTH, LENGTH)
    assert (mask[0, 0, 0] == least).all()
    np.testing.assert_array_equal(mask[1, 0] == 0, np.tri(LENGTH, dtype=bool))
    assert data.batch(np.array([2])).attention_mask.shape == (1, LENGTH)


def test_the_filter_agrees_with_trying_every_start_and_period():
    stream = np.random.default_rng(3)
    found = []
    for trial in range(400):
        row = stream.integers(0, 2 + trial % 3, 30)
        settings = InstanceFilter(int(stream.integers(1, 14)), int(stream.integers(1, 3)), int(stream.integers(1, 8)))
        answer = repeats(row, settings)
        assert answer == repeated(row, vars(settings)), (row, settings)
        found.append(answer)
    assert 0.2 < np.mean(found) < 0.8
    padded = np.concatenate([np.arange(20), np.full(32, 1)])
    assert repeats(padded, InstanceFilter())  # padding is a repeated token
    assert not repeats(padded[:-1], InstanceFilter())


def test_filtered_instances_give_no_loss(files):
    folder, _, _ = files
    data = opened(folder, masks=False, instance_filter=InstanceFilter(1, 1, 3))
    ids = np.array(data.tokens[0][:2])
    ids[1, 2:5] = 7
    ids.tofile(folder / "filtered.npy")
    settings = InstanceFilter(1, 1, 3)
    data = TokenFiles([folder / "filtered.npy"], [None], "uint16", LENGTH, vocab_size=300, instance_filter=settings)
    batch = data.batch(np.array([0, 1]))
    assert (batch.targets[1] == IGNORED).all()
    assert batch.num_targets == LENGTH - 1


def test_micro_batches_are_the_batch(files):
    batch = opened(files[0], pad_token_id=5).batch(np.arange(7))
    parts = list(batch.split(3))
    assert [len(part.indices) for part in parts] == [3, 3, 1]
    for name in ("indices", "input_ids", "targets", "attention_mask"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(batch, name))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_shares_are_the_batch_and_rows_of_which_nothing_is_learned(files, parts):
    folder, arrays, _ = files
    batch = opened(folder, pad_token_id=int(arrays[0][0])).batch(np.array([3, 0, 12, 1, 9]))
    shares = [batch.rows_for(part, parts) for part in range(parts)]
    assert {len(share.indices) for share in shares} == {-(-5 // parts)}
    for name in ("indices", "input_ids", "targets", "attention_mask"):
        found = np.concatenate([getattr(share, name) for share in shares])
        np.testing.assert_array_equal(found[:5], getattr(batch, name))
    assert sum(share.num_targets for share in shares) == batch.num_targets
    counted = np.concatenate([share.counted for share in shares])
    np.testing.assert_array_equal(counted[:5], batch.attention_mask)
    assert not counted[5:].any()  # the copies of rows count in no load-balancing loss


def test_without_a_mask_all_but_copies_count(files):
    batch = opened(files[0]).batch(np.arange(3))
    assert batch.counted is None
    assert batch.rows_for(0, 2).counted is None
    np.testing.assert_array_equal(batch.rows_for(1, 2).counted, np.repeat([[1], [0]], LENGTH, axis=1))


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_order_is_that_of_numpys_generator(files, epoch):
    data = TrainingData(opened(files[0]), 4, 17)
    expected = np.arange(14)
    np.random.Generator(np.random.PCG64(17 + epoch)).shuffle(expected)
    np.testing.assert_array_equal(data.order(epoch), expected)
    batches = [batch.indices.tolist() for batch in data.batches(epoch)]
    assert batches == [expected[i : i + 4].tolist() for i in (0, 4, 8)]
    assert [batch.indices.tolist() for batch in data.batches(epoch, 8)] == batches[2:]
    assert data.batches_per_epoch == 3


def test_the_last_batch_may_be_smaller(files):
    data = TrainingData(opened(files[0]), 4, 17, drop_last=False)
    batches = list(data.batches(0))
    assert [len(batch.indices) for batch in batches] == [4, 4, 4, 2]
    assert data.batches_per_epoch == 4
    assert sorted(np.concatenate([batch.indices for batch in batches])) == list(range(14))
    assert [data.batches_left(seen) for seen in (0, 4, 12, 13, 14)] == [4, 3, 1, 1, 0]
    data = TrainingData(opened(files[0]), 4, 17)
    assert [data.batches_left(seen) for seen in (0, 3, 8, 12, 14)] == [3, 2, 1, 0, 0]


def test_weights_are_how_often_a_source_is_seen(files):
    data = TrainingData(opened(files[0]), 4, 17, weights=[0.34, 2.6])
    drawn = [data.order(epoch) for epoch in range(2)]
    for order in drawn:
        counts = np.bincount(order, minlength=14)
        assert counts[:9].sum() == 3
        assert counts[:9].max() == 1
        assert counts[9:].sum() == 13
        assert sorted(counts[9:]) == [2, 2, 3, 3, 3]
    assert drawn[0].tolist() != drawn[1].tolist()
    assert data.order(0).tolist() == drawn[0].tolist()
    assert data.batches_per_epoch == 4


def test_dtypes(tmp_path):
    for dtype in ("uint16", "uint32", "uint64"):
        data = write_tokens(tmp_path / dtype, 61, 100, dtype=dtype)
        config = from_dict({"save_folder": "run", "load_path": "x", "data": data, "max_sequence_length": 8})
        opened = open_data(config, CONFIGS["olmo2"])
        assert opened.files.batch(np.array([0])).input_ids.max() < 61
        assert len(opened.files) == 24


def refused(path, dtype="uint16", mask=None, vocab_size=300) -> str:
    with pytest.raises(InputError) as caught:
        TokenFiles([path], [mask], dtype, LENGTH, vocab_size=vocab_size)
    return str(caught.value)


def test_files_that_do_not_fit_are_named(files, tmp_path):
    folder, arrays, masks = files
    np.save(tmp_path / "header.npy", arrays[0])
    assert "written by numpy.save" in refused(tmp_path / "header.npy")
    (tmp_path / "empty.npy").touch()
    assert "has 0 bytes, expected 16" in refused(tmp_path / "empty.npy")
    assert "No such file" in refused(tmp_path / "absent.npy")
    masks[0][:64].tofile(tmp_path / "short.npy")
    assert "has 8 rows of 8 bools" in refused(folder / "0.npy", mask=tmp_path / "short.npy")
    np.save(tmp_path / "mask.npy", masks[0])
    assert "mask.npy was written by numpy.save" in refused(folder / "0.npy", mask=tmp_path / "mask.npy")
    arrays[0].astype("uint32").tofile(tmp_path / "wide.npy")
    assert "it is of uint32, and memmap_dtype is uint16" in refused(tmp_path / "wide.npy")
    assert "vocabulary has 200" in refused(folder / "0.npy", vocab_size=200)
    (tmp_path / "odd.npy").write_bytes(bytes(33))
    assert "33 bytes" in refused(tmp_path / "odd.npy")


def test_an_id_outside_of_the_vocabulary_is_found_where_it_is(tmp_path):
    ids = np.ones(LENGTH * 2000, "uint16")
    ids[LENGTH * 701 + 5] = 300
    ids.tofile(tmp_path / "ids.npy")
    data = TokenFiles([tmp_path / "ids.npy"], [None], "uint16", LENGTH, vocab_size=300)
    with pytest.raises(InputError, match=r"instance 701 has the id 300 at 5"):
        data.batch(np.array([701]))


def test_a_pipe_is_no_file_of_tokens(tmp_path):
    os.mkfifo(tmp_path / "ids.npy")
    with pytest.raises(InputError, match=r"ids\.npy is not a regular file"):
        TokenFiles([tmp_path / "ids.npy"], [None], "uint16", 4, vocab_size=9)
