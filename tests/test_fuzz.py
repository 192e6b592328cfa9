"""Malformed files of every kind: they are read, or refused with an error of olmozoo's own, and nothing else happens.

Nothing else means: no other exception, no hang, no memory beyond what the files' own size explains, and nothing run.
"""

import base64
import contextlib
import importlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from olmozoo import (
    CheckpointError,
    ConfigError,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmozooError,
    OPTConfig,
    Tokenizer,
)
from olmozoo.checkpoint import bounded
from olmozoo.checkpoint.convert import convert_checkpoint
from olmozoo.checkpoint.formats.safetensors import read_tensors
from olmozoo.checkpoint.matching import load_weights
from olmozoo.checkpoint.reader import Checkpoint
from olmozoo.families.config import ModelConfig
from olmozoo.generation.config import GenerationConfig
from olmozoo.training import state
from olmozoo.training.sources import Record, find_files, parse, read_batches
from olmozoo.training.state import Progress
from olmozoo.training.templates import TULU_TEMPLATE, Encoder
from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.conversions import FIXTURES, Attack
from tests.helpers.training import write_lines, write_tokenizer

CONFIG = Olmo2Config(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
)
SECONDS = 10  # of any one file
MEMORY = 2 << 30  # bytes more than the process has before

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # of each test, other ones each time; see `make fuzz`

settings.register_profile(
    "fuzz",
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,  # `limits` sees to that
    max_examples=EXAMPLES or 60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
fuzz = settings.get_profile("fuzz")


@pytest.fixture(autouse=True, scope="module")
def limits():
    """A limit on memory for this file's tests; what was there already, such as loaded frameworks, does not count."""
    for library in ("torch", "h5py", "tensorflow", "orbax.checkpoint"):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bounded, "SECONDS", 1.0)  # of the files that would never end
        yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def ours():
    """Let errors of olmozoo's own pass, nothing else, and nothing that takes long."""

    def late(number, frame):
        raise AssertionError(f"it takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.suppress(OlmozooError):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- what files are made of -------------------------------------------------------------------------------------------

texts = st.text(st.characters(categories=None), max_size=8)  # half surrogate pairs are in it
numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63), 10**400, 1e308, float("inf"), float("nan"), 0.5, -1e-300]),
    st.floats(),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=6
)
deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000])


@st.composite
def damaged(draw, data: bytes, start: int = 0, stop: int | None = None):
    """Bytes with some changed, some cut out and some put in, between `start` and `stop`."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(start, max(min(stop or len(result), len(result)) - 1, start)))
        match draw(st.integers(0, 4)):
            case 0 | 1 | 2:
                result[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case 3:
                del result[place : place + draw(st.integers(1, 20))]
            case _:
                result[place:place] = draw(st.binary(min_size=1, max_size=8))
    return bytes(result)


def dump(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


# -- checkpoints ------------------------------------------------------------------------------------------------------

dtypes = st.sampled_from(["F32", "F64", "BF16", "F16", "I8", "f32", "F8_E4M3", ""])
offsets = st.lists(st.one_of(st.integers(-2, 80), numbers), max_size=3)
entries = st.one_of(
    values,
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": dtypes | values,
            "shape": st.lists(st.one_of(st.integers(-1, 5), numbers), max_size=4) | values,
            "data_offsets": offsets | values,
        },
    ),
    st.integers(0, 5).map(lambda n: {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}),
)


@st.composite
def safetensors(draw):
    """A file with a header of almost any kind; keys may come twice."""
    pairs = draw(st.lists(st.tuples(texts | st.just("__metadata__"), entries), max_size=4))
    made = b"{" + b",".join(dump(name) + b":" + dump(entry) for name, entry in pairs) + b"}"
    text = draw(st.one_of(st.just(made), st.just(made), st.just(made), st.binary(max_size=40), deep, values.map(dump)))
    right = len(text)
    length = draw(st.one_of(st.just(right), st.just(right), st.just(right), st.integers(0, 2**64 - 1)))
    return struct.pack("<Q", length) + text + draw(st.binary(max_size=80))


@fuzz
@given(safetensors())
def test_safetensors_headers(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    file.write_bytes(data)
    with ours():
        for info in read_tensors(file).values():
            array = info.read()
            assert array.nbytes <= len(data)
            assert array.shape == info.shape


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b'{"a":{"dtype":"F32","shape":[0,2305843009213693952,4],"data_offsets":[0,0]}}', "too large"),
        (dump({"a": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}), "in 65 dimensions"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
         "has 'a' twice"),
        (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', "not a whole safetensors file"),
        (b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "not a whole safetensors file"),
        (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "not a whole safetensors file"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "not a whole safetensors file"),
    ],
    ids=["empty but huge", "dimensions", "twice", "dtype", "float", "true", "nan"],
)  # fmt: skip
def test_headers_that_chance_rarely_makes(tmp_path, header, named):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + (b"" if b"[0,0]" in header else bytes(4)))
    with pytest.raises(CheckpointError, match=named):
        read_tensors(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("folder"), CONFIG, dtype="float32")


def load(folder) -> None:
    """Read all of a folder, as a wing does."""
    config = ModelConfig.from_folder(folder)
    for _, array in load_weights(Checkpoint(folder), config, "causal_lm", dtype=np.dtype(np.float32)):
        array.sum()


@fuzz
@given(st.data())
def test_a_good_file_with_a_damaged_header(folder, tmp_path_factory, data):
    target = tmp_path_factory.getbasetemp() / "damaged"
    shutil.copytree(folder, target, dirs_exist_ok=True)
    good = (folder / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    (target / "model.safetensors").write_bytes(data.draw(damaged(good, 0, header)))
    with ours(), np.errstate(all="ignore"):
        load(target)


OTHERS = {"flax-msgpack": "flax_model.msgpack", "keras-weights": "model.weights.h5", "keras": "model.keras"}


@pytest.fixture(scope="module")
def others(folder, tmp_path_factory):
    """The same in formats of other frameworks: the folder and its file of weights."""
    pytest.importorskip("h5py")
    root = tmp_path_factory.mktemp("others")
    for to in OTHERS:
        convert_checkpoint(folder, root / to, to=to, dtype="bfloat16")  # half of a file is then not values
    return {to: (root / to / name, (root / to / name).read_bytes()) for to, name in OTHERS.items()}


@pytest.mark.parametrize("to", OTHERS)
@fuzz
@given(st.data())
def test_damaged_files_of_other_frameworks(others, to, data):
    file, good = others[to]
    # Half of the damages to HDF5 are in one of its heaps of texts, where some make the library never return.
    heaps = [heap.start() for heap in re.finditer(b"GCOL", good)]
    start = data.draw(st.sampled_from(heaps)) if heaps and data.draw(st.booleans()) else None
    file.write_bytes(data.draw(damaged(good) if start is None else damaged(good, start, start + 4096)))
    with ours(), np.errstate(all="ignore"):
        load(file.parent)


FOLDERS = {"orbax": "orbax", "orbax-files": "orbax", "savedmodel": "saved_model/variables"}


@pytest.fixture(scope="module")
def weight_folders(folder, tmp_path_factory):
    """The same in formats that are folders. Orbax's arrays are in one store, and in plain files."""
    pytest.importorskip("tensorflow")
    ocp = pytest.importorskip("orbax.checkpoint")
    from flax.serialization import msgpack_restore

    root = tmp_path_factory.mktemp("folders")
    for to in ("orbax", "savedmodel", "flax-msgpack"):
        convert_checkpoint(folder, root / to, to=to)
    plain = root / "flax-msgpack"
    params = msgpack_restore((plain / "flax_model.msgpack").read_bytes())
    (plain / "flax_model.msgpack").unlink()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)) as checkpointer:
        checkpointer.save(plain / "orbax", args=ocp.args.PyTreeSave(params))
    plain.rename(root / "orbax-files")
    for to in FOLDERS:
        load(root / to)  # what is not damaged is read
    return root


@pytest.mark.parametrize("to", FOLDERS)
@settings(fuzz, max_examples=EXAMPLES or 30)
@given(st.data())
def test_damaged_folders_of_other_frameworks(weight_folders, to, data):
    files = [path for path in (weight_folders / to / FOLDERS[to]).rglob("*") if path.is_file()]
    file = data.draw(st.sampled_from(sorted(files, key=lambda path: (path.stat().st_size, path))))
    good = file.read_bytes()
    file.write_bytes(data.draw(damaged(good) | st.just(b"")))
    try:
        with ours(), np.errstate(all="ignore"):
            load(weight_folders / to)
    finally:
        file.write_bytes(good)


names = (
    st.sampled_from(["a", "model.safetensors", "../a", "/etc/passwd", "a/b", "", ".", "..", "a\0b", "C:\\a"]) | texts
)


@fuzz
@given(values | st.fixed_dictionaries({"weight_map": st.dictionaries(texts, names | values, max_size=4) | values}))
@example({"weight_map": {"x": "a" * 5000}})
def test_indexes(tmp_path_factory, index):
    target = tmp_path_factory.getbasetemp() / "index"
    target.mkdir(exist_ok=True)
    (target / "model.safetensors.index.json").write_bytes(dump(index))
    with ours():
        Checkpoint(target)
        raise AssertionError("it was read, and there is no shard")


@fuzz
@given(st.binary(max_size=60) | deep)
def test_indexes_that_are_not_json(tmp_path_factory, data):
    target = tmp_path_factory.getbasetemp() / "index"
    target.mkdir(exist_ok=True)
    (target / "model.safetensors.index.json").write_bytes(data)
    with ours():
        Checkpoint(target)


# -- quantized folders and training state -----------------------------------------------------------------------------

QUANTIZED = "model.layers.0.mlp.down_proj.weight"  # (24, 20)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Folders of compressed-tensors and of bitsandbytes, with their tensors."""
    root = tmp_path_factory.mktemp("quantized")
    write_checkpoint(root / "floats", CONFIG, dtype="float32")
    convert_checkpoint(root / "floats", root / "packed", to="safetensors", quantization="int4", group_size=4)
    write_checkpoint(root / "nf4", CONFIG, dtype="float32")
    tensors = load_file(root / "nf4" / "model.safetensors") | {
        QUANTIZED: np.zeros((240, 1), np.uint8),
        f"{QUANTIZED}.absmax": np.ones(8, np.uint8),
        f"{QUANTIZED}.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        f"{QUANTIZED}.nested_absmax": np.ones(1, np.float32),
        f"{QUANTIZED}.nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
        f"{QUANTIZED}.quant_state.bitsandbytes__nf4": state_of({}),
    }
    save_file(tensors, root / "nf4" / "model.safetensors")
    load(root / "nf4")
    return {name: (root / name, load_file(root / name / "model.safetensors")) for name in ("packed", "nf4")}


def state_of(changes) -> np.ndarray:
    good = {"blocksize": 64, "shape": [24, 20], "nested_blocksize": 256, "nested_offset": 0.5}
    return np.frombuffer(changes if isinstance(changes, bytes) else dump(good | changes), np.uint8)


parts = st.builds(
    lambda dtype, shape, fill: np.full(shape, fill).astype(dtype),
    st.sampled_from(["f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1"]),
    st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 16, 20, 24, 240, 256]), max_size=3).map(tuple),
    st.sampled_from([0, 1, -1, 24, 300, 2**40, 2**62, float("nan"), float("inf")]),
)
sizes = st.sampled_from([2**33, 10**12, 2**62, -24, 24, 20]) | numbers
states = st.dictionaries(
    st.sampled_from(["blocksize", "shape", "nested_blocksize", "nested_offset"]),
    sizes | st.lists(sizes, max_size=3) | values,
    min_size=1,
).map(state_of)


@settings(fuzz, max_examples=EXAMPLES or 150)
@given(st.data())
def test_parts_of_quantized_weights(quantized, data):
    folder, tensors = quantized[data.draw(st.sampled_from(["packed", "nf4"]))]
    changed = dict(tensors)
    for name in data.draw(st.lists(st.sampled_from([n for n in tensors if n.startswith(QUANTIZED)]), max_size=2)):
        kinds = states | deep.map(state_of) if "quant_state" in name else parts | st.none()
        changed[name] = data.draw(kinds)
    save_file({name: array for name, array in changed.items() if array is not None}, folder / "model.safetensors")
    with ours(), np.errstate(all="ignore"):
        for tensor in Checkpoint(folder).tensors.values():
            with contextlib.suppress(OlmozooError):
                tensor.read().sum()


@settings(fuzz, max_examples=EXAMPLES or 100)
@given(
    st.dictionaries(st.sampled_from([*vars(Progress()), "optimizer", "run", "format"]), values, min_size=1), st.data()
)
def test_states_of_runs(tmp_path_factory, changes, data):
    target = tmp_path_factory.getbasetemp() / "state" / "training"
    target.mkdir(exist_ok=True, parents=True)
    settings = data.draw(st.just({}) | st.dictionaries(st.sampled_from(["betas", "eps", "weight_decay"]), values))
    good = {"format": 1, "step": 3, "optimizer": settings, "run": {}}
    (target / "state.json").write_bytes(dump(good | changes))
    save_file({"exp_avg.a": np.ones(3, np.float32)}, target / "optimizer.safetensors")
    with ours():
        progress = state.load(target.parent).progress
        assert all(type(n) is int and n >= 0 for n in (progress.step, progress.epoch, progress.tokens))


@fuzz
@given(st.lists(st.binary(max_size=30) | values.map(dump) | deep, max_size=4))
def test_lines_of_metrics(tmp_path_factory, lines):
    file = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    file.write_bytes(b"\n".join([*lines, b'{"step": 1, "x": 2.5}', b""]))
    state.trim_lines(file, 2, state.step_of_json)
    assert file.read_text().endswith('{"step": 1, "x": 2.5}\n')
    assert all(state.step_of_json(line) <= 2 for line in file.read_text().splitlines())


# -- configs ----------------------------------------------------------------------------------------------------------

ROPE_KEYS = (
    *("rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor"),
    *("rope_theta", "partial_rotary_factor"),
)
rope_values = st.one_of(
    numbers,
    values,
    st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3"]),
    st.lists(numbers, min_size=2, max_size=2),
)
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "dynamic", "yarn", "longrope", "llama3"])},
    optional=dict.fromkeys(ROPE_KEYS[2:], rope_values),
) | st.dictionaries(st.sampled_from(ROPE_KEYS), rope_values, max_size=6)
typed_ropes = st.dictionaries(st.sampled_from(["full_attention", "sliding_attention", "rope_type"]), ropes | values)
FAMILIES = {
    cls.model_type: cls(num_hidden_layers=2).to_dict() for cls in (OlmoConfig, Olmo2Config, Olmo3Config, OPTConfig)
}
EXTRA = ("head_dim", "pruned_heads", "rope_parameters", "id2label", "label2id", "num_labels", "problem_type",
         "architectures", "dtype", "torch_dtype", "model_type", "extra", "name", "heads", "unknown")  # fmt: skip


@st.composite
def configs(draw):
    """A config.json of one of the families, with some fields replaced."""
    data = dict(FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))])
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from([*data, *EXTRA]) | texts)
        data[name] = draw(ropes | typed_ropes if name.startswith("rope_") and draw(st.booleans()) else values)
    return data


def use(config: ModelConfig) -> None:
    """What is done with a config before any tensor is read."""
    counts = config.count_parameters()
    assert all(type(count) is int and count >= 0 for count in counts.values())
    for head in (None, *config.heads):
        assert all(size > 0 for p in config.parameters(head) for size in p.shape)
    json.loads(config.to_json())
    assert type(config).from_dict(config.to_dict()).to_json() == config.to_json()
    if config.model_type != "opt":
        assert config.rope().frequencies(10).shape == (config.head_dim // 2,)
    assert config.head_dim > 0
    assert config.kv_heads_in(0) > 0
    GenerationConfig.from_model(config).check()


@settings(fuzz, max_examples=EXAMPLES or 150)
@given(configs())
def test_configs(tmp_path_factory, data):
    target = tmp_path_factory.getbasetemp() / "config"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes(dump(data))
    with ours(), np.errstate(all="ignore"):
        use(ModelConfig.from_folder(target))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize(
    "value",
    [10**9, 2**63, 10**400, -1, 0, 0.5, "4", None, [], {}, [4], {"a": 1}, True, float("nan"), float("inf"), "\ud800"],
    ids=lambda value: str(value)[:8].encode("ascii", "replace").decode(),
)
def test_each_field_of_a_config(model_type, value):
    for name in [*FAMILIES[model_type], *EXTRA]:
        with ours(), np.errstate(all="ignore"):
            use(ModelConfig.from_dict({**FAMILIES[model_type], name: value}))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("num_hidden_layers", 10**9, "at most 10,000"),
        ("hidden_size", 4 * 10**8, "head_dim"),
        ("head_dim", 10**9, "head_dim"),
        ("num_labels", 10**9, "num_labels"),
        ("vocab_size", 10**30, "vocab_size"),
        ("id2label", {"a": "b"}, "id2label"),
        ("id2label", {"0": "a", "00": "b"}, "id2label"),
        ("model_type", ["olmo2"], "model_type"),
        ("rope_theta", 10**400, "rope_theta"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "beta_slow": 0}, "no finite frequencies"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 10**400},
         "high_freq_factor"),
    ],
)  # fmt: skip
def test_configs_that_ask_for_too_much_are_refused_by_name(field, value, named):
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict({**FAMILIES["olmo2"], field: value})


@settings(fuzz, max_examples=EXAMPLES or 150)
@given(ropes, st.sampled_from([2, 4, 6, 128]), st.sampled_from([1, 7, 2048, 2**31 - 1]), numbers)
def test_rope_scaling(scaling, head_dim, positions, theta):
    data = FAMILIES["olmo2"] | {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "num_key_value_heads": 4}
    data |= {"max_position_embeddings": positions, "rope_scaling": scaling, "rope_theta": theta}
    with ours(), np.errstate(all="ignore"):
        config = Olmo2Config.from_dict(data)
        for length in (1, 5, positions, 2 * positions):
            found = config.rope().frequencies(length)
            assert np.isfinite(found).all(), scaling
        assert np.isfinite(config.rope().scale)


SETTINGS = (*(name for name in GenerationConfig().__dict__ if name != "extra"), "extra", "transformers_version")


@settings(fuzz, max_examples=EXAMPLES or 150)
@given(st.dictionaries(st.sampled_from(SETTINGS) | texts, values, max_size=5) | values)
def test_generation_configs(tmp_path_factory, data):
    target = tmp_path_factory.getbasetemp() / "generation"
    target.mkdir(exist_ok=True)
    (target / "generation_config.json").write_bytes(dump(data))
    with ours():
        found = GenerationConfig.from_folder(target, CONFIG)
        found.check()
        assert GenerationConfig.from_dict(found.to_dict()) == found or "nan" in str(data).lower()
        assert all(isinstance(end, int) for end in found.ends)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "value",
    [10**400, float("nan"), "x", [], {}, [[]], {"a": 1}, [None], True, -1, 0.5],
    ids=lambda value: str(value)[:8],
)
def test_each_generation_setting(name, value):
    with ours():
        found = GenerationConfig.from_dict({name: value})
        found.check()
        assert all(isinstance(end, int) for end in found.ends)


# -- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, "The quick brown fox jumps over the lazy dog. " * 10)
    return folder


TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens", "extra_special_tokens")
token = st.one_of(
    texts,
    st.sampled_from(["<|endoftext|>", "fox", "new"]),
    st.fixed_dictionaries({}, optional={"content": texts | values, "lstrip": values, "special": values}),
)
tokens = st.one_of(
    token, values, st.lists(token | values, max_size=3), st.dictionaries(texts | st.just("298"), token, max_size=3)
)
templates = st.one_of(
    values,
    st.just("{{ messages }}"),
    st.just("{% if"),
    st.lists(
        st.fixed_dictionaries({}, optional={"name": values | st.just("default"), "template": values}) | values,
        max_size=3,
    ),
)
added = st.dictionaries(st.sampled_from(["300", "301", "0", "-1", "x", "1e9"]) | texts, tokens, max_size=3)
side_files = {
    "tokenizer_config.json": st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(TOKENS, tokens),
            "added_tokens_decoder": added | values,
            "chat_template": templates,
            "tokenizer_class": st.just("GPT2Tokenizer") | values,
            "add_bos_token": values,
            "add_prefix_space": values,
        },
    )
    | values,
    "special_tokens_map.json": st.dictionaries(st.sampled_from(TOKENS) | texts, tokens, max_size=4) | values,
    "added_tokens.json": st.dictionaries(texts, st.integers(298, 303) | values, max_size=3) | values,
    "config.json": st.fixed_dictionaries(
        {"model_type": st.sampled_from(["opt", "olmo2"]) | values},
        optional={f"{name}_id": values for name in TOKENS[:4]},
    ),
}


@settings(fuzz, max_examples=EXAMPLES or 150)
@given(st.fixed_dictionaries({}, optional=side_files))
@example({"added_tokens.json": {"x": float("inf")}})
@example({"added_tokens.json": {"\ud800": 298}})
@example({"tokenizer_config.json": {"additional_special_tokens": 1}})
def test_tokenizer_side_files(tokenizer, data):
    for name in side_files:
        (tokenizer / name).unlink(missing_ok=True)
    for name, content in data.items():
        (tokenizer / name).write_bytes(dump(content))
    with ours():
        found = Tokenizer.from_pretrained(tokenizer)
        ids = found.encode("The quick")
        found.decode(ids)
        found.check_ids([i for i in (found.bos_token_id, found.eos_token_id, found.pad_token_id) if i is not None], 999)
        found.batch(["a", "The quick"])
        if found.chat_templates:
            found.apply_chat_template([{"role": "user", "content": "x"}], chat_template=min(found.chat_templates))


@fuzz
@given(st.sampled_from([*side_files, "chat_template.jinja"]), st.binary(max_size=60) | deep)
def test_tokenizer_side_files_that_are_not_json(tokenizer, name, data):
    for other in (*side_files, "chat_template.jinja"):
        (tokenizer / other).unlink(missing_ok=True)
    (tokenizer / name).write_bytes(data)
    try:
        with ours():
            found = Tokenizer.from_pretrained(tokenizer)
            if found.chat_templates:
                found.apply_chat_template([{"role": "user", "content": "x"}])
    finally:
        (tokenizer / name).unlink()


@fuzz
@given(st.data())
def test_damaged_vocabularies(tokenizer, data):
    file = tokenizer / "tokenizer.json"
    good = file.read_bytes()
    file.write_bytes(data.draw(damaged(good)))
    try:
        with ours():
            Tokenizer.from_pretrained(tokenizer).encode("The quick")
    finally:
        file.write_bytes(good)


# -- pickles ----------------------------------------------------------------------------------------------------------

NATIVE = FIXTURES / "native/olmo2-gqa"
CORE = FIXTURES / "olmo_core/model_and_optim"
OPCODES = sorted(pickle._Unpickler.dispatch)
FRAGMENTS = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nTensor\n", b"\x8c\x02os", b"K\x01", b"X\2\0\0\0ab"]
soups = st.lists(
    st.sampled_from(OPCODES).map(lambda code: bytes([code])) | st.binary(max_size=4) | st.sampled_from(FRAGMENTS),
    max_size=30,
).map(b"".join)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """The file that `Attack` makes where it is run."""
    pytest.importorskip("yaml")
    trace = tmp_path_factory.mktemp("trace") / "trace"
    yield trace
    assert not trace.exists()


@st.composite
def planted(draw, data: bytes, trace: Path):
    """A pickle with an attack put in: as a whole, at some place, or among opcodes of any kind."""
    protocol = draw(st.integers(0, 5))
    attack = pickle.dumps(Attack(trace), protocol)
    body = attack.removesuffix(b".") if protocol < 2 else attack[2:-1]
    place = draw(st.integers(0, len(data)))
    return draw(st.sampled_from([attack, data[:place] + body + data[place:], draw(soups) + body + draw(soups) + b"."]))


@settings(fuzz, max_examples=EXAMPLES or 150)
@given(st.data())
def test_pickles(trace, data):
    from conversion import pickles

    good = pickle.dumps({"a": [1, (2, "x"), {3}], "b": np.dtype("f4")}, 2)
    content = data.draw(st.one_of(damaged(good), soups, st.binary(max_size=60), planted(good, trace)))
    with ours():
        pickles.unpickle(content, "x")
    assert not trace.exists()


@settings(fuzz, max_examples=EXAMPLES or 150)
@given(st.data())
def test_encoded_keys(trace, data):
    from conversion import pickles

    good = pickle.dumps((("model", "x"), False), 4)
    content = data.draw(st.one_of(damaged(good), soups, planted(good, trace)))
    key = data.draw(st.just(base64.urlsafe_b64encode(content).decode()) | texts)
    with ours():
        assert isinstance(pickles.decode_key(key, "x"), str)
    assert not trace.exists()


@settings(fuzz, max_examples=EXAMPLES or 100)
@given(st.data())
def test_archives(trace, data):
    from conversion import archives

    good = (NATIVE / "model.pt").read_bytes()
    start = max(good.find(b"data.pkl") - 100, 0) if data.draw(st.booleans()) else max(len(good) - 2500, 0)
    file = trace.with_name("model.pt")
    file.write_bytes(data.draw(damaged(good, start, start + 2500)))
    with ours():
        found = archives.read_archive(file)
        for name, value in found.items() if isinstance(found, dict) else ():
            assert archives.as_tensor(value, str(name)).read().nbytes <= len(good)
    assert not trace.exists()


@settings(fuzz, max_examples=EXAMPLES or 100)
@given(st.data())
def test_metadata_of_distributed_checkpoints(trace, data):
    from conversion import sharded

    folder = trace.with_name("core")
    if not folder.exists():
        shutil.copytree(CORE, folder)
    good = (CORE / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data.draw(damaged(good) | planted(good, trace)))
    with ours():
        for source in sharded.read_distributed(folder, "").values():
            assert source.read().nbytes <= 1 << 24
    assert not trace.exists()


@pytest.fixture(scope="module")
def bin_files():
    """The contents of a `.bin` in each of PyTorch's two formats."""
    torch = pytest.importorskip("torch")
    files = [io.BytesIO(), io.BytesIO()]
    for zipped, file in enumerate(files):
        tensors = {"a": torch.ones(3, 4), "b": torch.zeros(5)}
        torch.save(tensors, file, _use_new_zipfile_serialization=bool(zipped))
    return [file.getvalue() for file in files]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(fuzz, max_examples=EXAMPLES or 50)
@given(st.data(), st.integers(0, 1))
def test_bin_files(bin_files, trace, data, kind):
    folder = trace.with_name("bin")
    folder.mkdir(exist_ok=True)
    good = bin_files[kind]
    (folder / "pytorch_model.bin").write_bytes(data.draw(damaged(good) | planted(good, trace)))
    with ours():
        checkpoint = Checkpoint(folder)
        for name in checkpoint.tensors:
            assert checkpoint[name].nbytes < 1 << 20
    assert not trace.exists()


# -- training data ----------------------------------------------------------------------------------------------------

messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"role": st.sampled_from(["user", "assistant"]) | values, "content": texts | values, "x": values},
    )
    | values,
    max_size=4,
)
documents = st.fixed_dictionaries(
    {},
    optional={"text": texts | values, "prompt": texts | values, "completion": texts | values, "messages": messages},
)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.chat_template = TULU_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return [Encoder(tokenizer), Encoder(tokenizer, "tulu")]


@fuzz
@given(st.lists(st.one_of(documents, documents, values).map(dump), min_size=1, max_size=3))
@example([b"[" * 100_000])
def test_lines_of_training_data(encoders, lines):
    for encoder in encoders:
        with ours():
            encoded = encoder([Record(f"file:{n}", line) for n, line in enumerate(lines)])
            assert len(encoded.ids) == len(encoded.mask) == sum(encoded.lengths)


@fuzz
@given(st.data())
def test_files_of_training_data(tmp_path_factory, data):
    name = data.draw(st.sampled_from(["fuzz.jsonl", "fuzz.jsonl.gz", "fuzz.jsonl.zst", "fuzz.txt", "fuzz.txt.zst"]))
    file = tmp_path_factory.getbasetemp() / name
    whole = write_lines(file, [{"text": "Größe " * 9}, {"prompt": "a", "completion": "b"}] * 9).read_bytes()
    file.write_bytes(data.draw(damaged(whole)))
    with ours():
        for batch, _ in read_batches(find_files([file])):
            for record in batch:
                parse(record)
