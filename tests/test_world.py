"""The processes of a run, each a thread here: who writes, who waits, and what all of them learn."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from olmozoo.errors import InputError, TrainingError
from olmozoo.world import World, mesh_of_run


def together(call, size=3):
    """What `call` returns or raises in each process."""
    barrier, arrays = threading.Barrier(size), [None] * size

    def process(rank):
        def gather(array):
            arrays[rank] = array
            barrier.wait(10)
            found = np.stack(arrays)
            barrier.wait(10)
            return found

        try:
            return call(World(rank=rank, size=size, gather=gather))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(process, range(size)))


def test_the_first_process_calls_and_all_learn_whether():
    calls = []
    for answer in (True, False, None, "text"):
        found = together(lambda world, answer=answer: world.by_first(lambda: calls.append(world.rank) or answer))
        others = answer if isinstance(answer, bool) else None
        assert found == [answer, others, others]
    assert calls == [0] * 4


def test_an_error_of_the_first_process_is_one_in_all():
    def fail():
        raise OSError("no room")

    first, *others = together(lambda world: world.by_first(fail))
    assert isinstance(first, OSError)
    for error in others:
        assert isinstance(error, TrainingError)
        assert "the first process failed" in str(error)


@pytest.mark.parametrize("reasons", [[None, "SIGTERM", "time_limit 3.0"], [None, None, None], ["é" * 200, None, None]])
def test_one_reason_stops_all(reasons):
    found = together(lambda world: world.reason(reasons[world.rank]))
    expected = next((reason for reason in reasons if reason), None)
    assert len(set(found)) == 1
    assert found[0] == (expected if expected is None else expected[:64])


def test_the_first_process_keeps_what_all_gather():
    def kept(world):
        gathered = []

        def items():
            for name in "ab":
                gathered.append(name)
                yield name, np.zeros(2)

        return sorted(world.kept(items())), gathered

    first, *others = together(kept)
    assert first == (["a", "b"], ["a", "b"])
    assert others == [([], ["a", "b"])] * 2


@pytest.mark.parametrize(
    ("mesh", "devices", "whole", "expected"),
    [
        (None, 4, True, {"fsdp": 4}),
        (None, 4, False, {}),
        ({"tensor": 2}, 4, True, {"fsdp": 2, "tensor": 2}),
        ({"tensor": 4}, 4, True, {"tensor": 4}),
        ({"fsdp": 2}, 4, False, {"fsdp": 2}),
        ({"fsdp": 1, "tensor": 1}, 1, True, {}),
        ({"experts": 2}, 4, True, {"fsdp": 2, "experts": 2}),
    ],
)
def test_a_mesh_is_completed(mesh, devices, whole, expected):
    assert mesh_of_run(mesh, devices, "", whole=whole) == expected


@pytest.mark.parametrize(
    ("mesh", "whole"),
    [({"fsdp": 2}, True), ({"fsdp": 4, "tensor": 2}, False), ({"tensor": 8}, True), ({"experts": 3}, True)],
)
def test_a_mesh_of_other_devices_is_refused(mesh, whole):
    with pytest.raises(InputError, match=r"mesh is fsdp = \d, tensor = \d, experts = \d: \d devices, and there are 4"):
        mesh_of_run(mesh, 4, "there are 4", whole=whole)
