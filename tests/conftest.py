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

import gc
import re
import signal
import tempfile
from pathlib import Path

import pytest

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # in the first process of all: the others get it from that one
    PROGRAMS = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from tests.helpers.wings import let_programs_go

# A shell ignores Ctrl-C in what it starts in the background, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
    "training/test_wings.py",
    "training/test_distributed.py",
    "parity/test_masks.py",
    "checkpoint/formats/test_keras.py",
)

# Tests that repeat a check on a further config, format or framework, and take seconds: `make test` leaves them out.
NIGHTLY = re.compile(
    "|".join(
        (
            r"checkpoint/test_convert.py::test_a_disk_that_takes_no_more\w*\[keras\]",
            r"checkpoint/test_convert.py::test_every_format_and_back\w*\[float32",
            r"cli/test_train.py::test_a_run_from_start_to_end\[tf",
            r"checkpoint/test_convert.py::test_memory_is_bounded\w*\[[^]]*True",
            r"cli/test_(chat|process).py::\w+\[tf",
            r"evaluation/test_scoring.py::test_(the_command\w*\[opt|(?!perplexity_is)\w*\[olmoe)",
            r"evaluation/test_scoring.py::test_(?!perplexity)\w+\[olmoe",
            r"flax/test_(export|models|dropout).py::test_(modules|jit|gradient)\w*\[Flax(OPT|Olmo(ForSeq|2Model|3))",
            r"flax/test_saving.py::test_parameters_come_back\w*\[bfloat16",
            r"generation/test_generate.py::\w+\[(olmo-clip-tied|opt-projected-post-norm)-(tf|flax)",
            r"parity/test_oracle.py::\w+\[(olmo-bias-linear|olmo-dynamic|opt-bare|opt-no-final-norm)-(tf|flax)",
            r"parity/test_parity.py::test_(cached|greedy|loss|low_precision)\w*\[(olmo2-(mha|linear|dynamic|yarn|llama3)"
            r"|olmo-bias|olmoe-one-normed-tied|opt(?!-projected)[\w-]*?)-(tf|flax|float)",
            r"parity/test_parity.py::test_(cached\w*\[[\w-]+-object|low_precision\w*\[[\w-]+-float16)",
            r"parity/test_windows.py::\w+\[tf",
            r"pt/test_export.py::test_it_(compiles|exports)\w*\[(OPT|Olmo3|\w+(Model|ForSequenceClassification|Answering)\])",
            r"parity/test_query_blocks.py::test_a_cached\w*\[\w+-olmo2|parity/test_query_blocks.py::test_logits\w*\[\w+-olmo-bias",
            r"parity/test_training.py::\w+\[(olmo-bias|opt)",
            r"test_benchmarks.py::test_(training\[(pt|tf)|other_parts\[(growth|quantization))",
            r"test_docs.py::test_the_code_of_every_page_runs\[tf",
            r"tf/test_training.py::test_(a_users_loss|metrics_see|fit_evaluate|lora_learns|mixed_policies)\w*\[OPT",
            r"tf/test_training.py::test_lora_survives\w*\[(frozen|all)|tf/test_training.py::test_lora_learns\w*\[Olmo\]",
            r"tf/test_training.py::test_mirrored",
            r"training/test_ai2.py::test_(masks|a_checkpoint)\w*\[[\w-]+-tf",
            r"training/test_distributed.py::test_(the_command_under|adapters_train|processes_of_jax|\w+\[(\w+_more|four)-)",
            r"training/test_interruptions.py::test_a_run_that_stopped\w*\[(tf|flax)",
            r"training/test_outputs.py::\w+\[tf",
            r"training/test_wings.py::test_\w+_agree\[((opt|olmo-lion|olmoe-lion-parts)-\w+|lora-(olmoe-)?tf)",
            r"training/test_wings.py::test_a_run_goes_through_all_wings\[(olmo-lion|lora|olmoe)",
        )
    )
)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Put the longest files first, and mark the tests of a wing's folder with it, and those of nightly runs."""
    order = {name: position for position, name in enumerate(LONGEST)}
    names = {item: item.path.relative_to(Path(__file__).parent).as_posix() for item in items}
    items.sort(key=lambda item: order.get(names[item], len(order)))
    for item in items:
        folder = names[item].partition("/")[0]
        if folder in ("pt", "tf", "flax"):
            item.add_marker(folder)
        if NIGHTLY.match(f"{names[item]}::{item.name}"):
            item.add_marker("nightly")


def pytest_collection_finish():
    """Keep the garbage collector from the modules and tests that there are: to pass through them takes it a second."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def memory_given_back():
    """After each file, let go of what frameworks have compiled: programs pile up to gigabytes otherwise."""
    yield
    let_programs_go()
    gc.freeze()
