"""What every test session needs: quiet frameworks, an order of the files, and programs shared and freed."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and tests run side by side
# Almost all of the time goes into XLA's compiler, and next to none into what it compiles. Without LLVM's optimization,
# with the older way to emit fusions and without a split into modules, a program compiles in a tenth of the time.
# `XLA_FLAGS= make test` compiles as users do.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("XLA_FLAGS", " ".join(FAST_COMPILATION))

import tempfile
from pathlib import Path

import pytest

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # in the first process of all: the others get it from that one
    PROGRAMS = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from tests.helpers.wings import let_programs_go

# The files that take longest, by CPU time. They run first: a worker takes whole files, and is not to begin a long one
# when the other has none left.
LONGEST = (
    "generation/test_generate.py",
    "parity/test_parity.py",
    "test_fuzz.py",
    "checkpoint/test_convert.py",
    "test_readme.py",
    "test_docs.py",
    "parity/test_heads.py",
    "parity/test_oracle.py",
    "cli/test_chat.py",
    "checkpoint/test_atomic.py",
    "tf/test_training.py",
    "parity/test_training.py",
    "parity/test_masks.py",
    "checkpoint/formats/test_keras.py",
)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Put the longest files first, and mark the tests in tests/pt, tests/tf and tests/flax with the wing."""
    order = {name: position for position, name in enumerate(LONGEST)}
    names = {item: item.path.relative_to(Path(__file__).parent).as_posix() for item in items}
    items.sort(key=lambda item: order.get(names[item], len(order)))
    for item in items:
        folder = names[item].partition("/")[0]
        if folder in ("pt", "tf", "flax"):
            item.add_marker(folder)


@pytest.fixture(autouse=True, scope="module")
def memory_given_back():
    """After each file, let go of what frameworks have compiled: programs pile up to gigabytes otherwise."""
    yield
    let_programs_go()
