"""LoRA adapters of PEFT (arXiv:2106.09685), merged into a checkpoint's tensors while they are read, in NumPy.

A linear weight W (out, in) with the factors A (r, in) and B (out, r) becomes

    W' = W + s B A                              s = lora_alpha / r, with rslora lora_alpha / sqrt(r)
    W' = m (W + s B A) / |W + s B A|            DoRA (arXiv:2402.09353): norms of rows, m (out,)

and an embedding (rows, width), with A (r, rows) and B (width, r), the transpose of that. Adapters of other kinds, and
tensors that do not fit, are refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np

from olmozoo.checkpoint import bounded
from olmozoo.checkpoint.files import GENERATION_CONFIG
from olmozoo.checkpoint.formats import ALL_WEIGHTS, pytorch, safetensors
from olmozoo.checkpoint.quantized import Wanted, quantized_tensors
from olmozoo.checkpoint.reader import Checkpoint, OpenCheckpoint, open_checkpoint
from olmozoo.checkpoint.tensors import LazyTensor
from olmozoo.errors import CheckpointError, HubError, raise_problems
from olmozoo.families.config import ModelConfig, is_number, read_json
from olmozoo.families.parameter import BASE_PREFIX, HEAD_MODULES, Parameter
from olmozoo.hub import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Need, resolve
from olmozoo.typing import Array, HubOptions, StrPath

# Fields that are read here, and fields that say nothing of the function that was learned.
READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("trainable_token_indices", "ensure_weight_tying", "peft_type", "init_lora_weights", "base_model_name_or_path"),
)
HARMLESS = (
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "runtime_config"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    "fan_in_fan_out",  # PEFT ignores it for the layers of these models
)
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the weights that are adapted
LAYER = r".*?\.[^.]*\.(\d+)\."  # the number of a layer in a module's name
MOST_PATTERNS = 10_000  # in one adapter
HEAD = f"{HEAD_MODULES['causal_lm']}.weight"
FACTORS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "tokens",
    "trainable_tokens_delta": "tokens",
}


class Source(NamedTuple):
    """Where a model comes from.

    Attributes:
        folder: the local folder of its config and weights.
        adapter: that of the adapter to merge into them, or None.
    """

    folder: Path
    adapter: Path | None

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer: the adapter's where there is one, since it may have more tokens."""
        own = self.adapter is not None and any((self.adapter / n).is_file() for n in ("tokenizer.json", "merges.txt"))
        return self.adapter if own and self.adapter else self.folder

    @property
    def generation(self) -> Path:
        """The folder of generation_config.json: the adapter's where it has one, since it may stop at other tokens."""
        has_own = self.adapter is not None and (self.adapter / GENERATION_CONFIG).is_file()
        return self.adapter if has_own and self.adapter else self.folder


def locate(path_or_repo: StrPath, *, need: Need, adapter: StrPath | None = None, **hub: Unpack[HubOptions]) -> Source:
    """The folders of a model and of its adapter, downloaded where necessary.

    The adapter is `adapter`, or one that lies in the model's folder. Where that folder has an adapter and no weights,
    the model is the one that adapter_config.json names.

    Args:
        path_or_repo: a folder, or a repository on the hub.
        need: as of `hub.resolve`.
        adapter: the folder or the repository of an adapter.
        **hub: as of `hub.resolve`; `revision` and `subfolder` are of `path_or_repo`.

    Raises:
        HubError: the model, the adapter, or the model that an adapter is of cannot be found.
        CheckpointError: there are two adapters.
    """
    folder = resolve(path_or_repo, need=need, **hub)
    shared: Any = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    found = folder if (folder / ADAPTER_CONFIG).is_file() else None
    if adapter is not None:
        given = resolve(adapter, need="adapter", **shared)
        if not (given / ADAPTER_CONFIG).is_file():
            raise HubError(f"{given} has no {ADAPTER_CONFIG}: expected the folder of a PEFT adapter")
        if found not in (None, given):
            raise _two_adapters(found, given)
        found = given
    if found is None or _has_model(folder, need):
        return Source(folder, found)
    settings = read_json(found / ADAPTER_CONFIG)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise HubError(
            f"{folder} has an adapter and no model, and {ADAPTER_CONFIG} names none: load the model that it is of, "
            "with adapter= (--adapter) this folder"
        )
    try:
        model = resolve(base, need=need, **shared, revision=settings.get("revision"))
    except HubError as error:
        raise HubError(f"{folder} is an adapter of {base!r}, which cannot be loaded: {error}") from error
    if (model / ADAPTER_CONFIG).is_file() and not model.samefile(found):
        raise _two_adapters(model, found)
    return Source(model, found)


def config_alone(
    path_or_repo: StrPath,
    config_class: type[ModelConfig] = ModelConfig,
    *,
    adapter: StrPath | None = None,
    hub: HubOptions,
    config: Any = None,
    **overrides: Any,
) -> ModelConfig:
    """The config of a model whose weights are not downloaded yet; arguments as of `locate` and `open_merged`."""
    if config is not None:
        return config_class.from_dict(config.to_dict(), **overrides)
    return config_class.from_folder(locate(path_or_repo, need="config", adapter=adapter, **hub).folder, **overrides)


def _has_model(folder: Path, need: Need) -> bool:
    names = {path.name for path in folder.iterdir()}
    return "config.json" in names and (need == "config" or any(ALL_WEIGHTS.fullmatch(name) for name in names))


def _two_adapters(model: Path | None, other: Path) -> CheckpointError:
    return CheckpointError(f"{model} has an adapter of its own, besides {other}: merge it first by `olmozoo convert`")


def open_merged(
    source: Source,
    config_class: type[ModelConfig] = ModelConfig,
    *,
    quantization: Wanted = None,
    **overrides: Any,
) -> OpenCheckpoint:
    """`open_checkpoint` of a model's folder, with its adapter merged, and then quantized where that is wanted.

    The config differs where the adapter brings more rows of the vocabulary or another number of labels, or where it
    changes one of two tied matrices alone.

    Raises:
        CheckpointError: the weights or the adapter are broken, or it cannot be merged; every problem is named.
        InputError: the weights cannot be quantized so.
    """
    opened = open_checkpoint(source.folder, config_class, **overrides)
    if source.adapter is not None:
        opened = dataclasses.replace(opened, config=Adapter(source.adapter).merge(opened.checkpoint, opened.config))
    if source.generation != source.folder:
        opened = dataclasses.replace(opened, generation=read_json(source.generation / GENERATION_CONFIG))
    checkpoint = opened.checkpoint
    checkpoint.tensors = quantized_tensors(checkpoint.tensors, opened.config, quantization)
    return opened


class Adapter:
    """A LoRA adapter of PEFT.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors (or .bin).

    Attributes:
        settings: the contents of adapter_config.json.
        tensors: the adapter's tensors, by names without the prefix that PEFT adds.

    Raises:
        CheckpointError: it is broken, or of a kind that cannot be merged; every problem is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.settings = read_json(folder / ADAPTER_CONFIG)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        raise_problems(f"{folder} has an adapter that cannot be merged", self._setting_problems())
        self.tensors: dict[str, LazyTensor] = {}
        for file, read in zip(ADAPTER_WEIGHTS, (safetensors.read_tensors, pytorch.read), strict=True):
            if (folder / file).is_file():
                for name, tensor in read(folder / file).items():
                    name = re.sub(r"^(base_model\.model\.|_orig_mod\.|module\.)+", "", name)
                    if ".original_module." not in name:  # what a saved module replaces
                        self.tensors[name.replace(".modules_to_save.", ".")] = tensor
                break
        else:
            raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS[0]}, which {ADAPTER_CONFIG} is of")

    def _setting_problems(self) -> Iterator[str]:
        """What the settings ask for that cannot be merged, or is not what it has to be."""
        get = self.settings.get
        if get("peft_type") != "LORA":
            yield f"peft_type is {get('peft_type')!r}, expected 'LORA': other kinds are no change of weights"
            return
        for name, value in self.settings.items():
            if name not in (*READ, *HARMLESS) and value not in (None, False, [], {}):
                yield f"{name} is {value!r}, which changes what the adapter means and is not supported"
        start = get("init_lora_weights")
        if not any(start is plain or (isinstance(plain, str) and start == plain) for plain in PLAIN_STARTS):
            yield f"init_lora_weights is {start!r}, which changed the model's own weights: save it as plain LoRA"
        if get("bias", "none") not in ("none", "all", "lora_only"):
            yield f"bias is {get('bias')!r}, expected none, all or lora_only"
        for name, default in (("r", 8), ("lora_alpha", 8)):
            if not _is_number(get(name, default)):
                yield f"{name} is {get(name)!r}, expected a positive number"
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = {} if get(name) is None else get(name)
            if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
                yield f"{name} is {pattern!r}, expected an object from module names to positive numbers"
        for name in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
            if get(name) not in (None, True, False):
                yield f"{name} is {get(name)!r}, expected true or false"
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            if not all(isinstance(text, str) for text in _listed(get(name))):
                yield f"{name} is {get(name)!r}, expected a text or a list of texts"
        if not all(isinstance(layer, int) for layer in _listed(get("layers_to_transform"))):
            yield f"layers_to_transform is {get('layers_to_transform')!r}, expected an integer or a list of integers"
        tokens = get("trainable_token_indices") or []
        for rows in tokens.values() if isinstance(tokens, dict) else [tokens]:
            if not isinstance(rows, list) or not all(isinstance(row, int) for row in rows):
                yield f"trainable_token_indices is {tokens!r}, expected lists of integers"
        yield from _pattern_problems(list(self._patterns()))

    def _patterns(self) -> Iterator[str]:
        """The regular expressions among the settings."""
        get = self.settings.get
        for name in ("rank_pattern", "alpha_pattern"):
            yield from pattern if isinstance(pattern := get(name), dict) else ()
        values = [*_listed(get("modules_to_save")), *_listed(get("layers_pattern"))]
        values += [get("target_modules"), get("exclude_modules")]
        yield from (value for value in values if isinstance(value, str))

    # -- merging --------------------------------------------------------------------------------------------------

    def merge(self, checkpoint: Checkpoint, config: ModelConfig) -> ModelConfig:
        """Replace the tensors of a checkpoint by merged ones, which are computed when they are read.

        Returns:
            The config of the merged model.

        Raises:
            CheckpointError: tensors of the adapter do not fit the model; every problem is named.
        """
        self._try_patterns(checkpoint)
        problems: list[str] = []
        plain, factors = self._sorted(_table(config), problems)
        config = _fitted(config, plain)
        table = _table(config)
        names = {name if name in table else BASE_PREFIX + name: name for name in checkpoint.tensors}
        tensors = {canonical: checkpoint.tensors[name] for canonical, name in names.items()}
        untied = self._unties(config, factors)
        old_embedding = tensors.get(config.embedding.name)
        if config.embedding.name in plain and not self._is_saved(config.embedding.name.removesuffix(".weight")):
            old_embedding = plain[config.embedding.name]  # of a model whose vocabulary was resized
        if config.tie_word_embeddings:
            tensors.pop(HEAD, None)  # it follows the embedding
        if untied and old_embedding is not None:
            tensors[HEAD] = old_embedding.renamed(HEAD)
        for name, tensor in plain.items():
            if tensor.shape != table[name].shape:
                problems.append(f"wrong shape: {name} is {list(tensor.shape)}, expected {list(table[name].shape)}")
            dtype = tensors[name].dtype if name in tensors else checkpoint.dtype
            tensors[name] = _computed(dataclasses.replace(tensor, name=name, dtype=dtype), tensor.read)
        for module, parts in factors.items():
            self._adapt(module, parts, table[f"{module}.weight"], tensors, problems)
        problems += self._missing(factors, table)
        raise_problems(f"the adapter {self.folder} does not fit the model {checkpoint.folder}", problems)
        checkpoint.tensors = {names.get(canonical, canonical): tensor for canonical, tensor in tensors.items()}
        return config.replace(tie_word_embeddings=False) if untied else config

    def _try_patterns(self, checkpoint: Checkpoint) -> None:
        """Match the regular expressions in a process that can be ended: some would take years.

        Raises:
            CheckpointError: they take too long.
        """
        patterns = [pattern for pattern in self._patterns() if not re.fullmatch(r"(\w|\.|\\\.)*", pattern)]
        if not patterns:
            return
        names = {name.removeprefix(BASE_PREFIX) for name in (*self.tensors, *checkpoint.tensors)}
        names |= {BASE_PREFIX + name for name in names}
        names = {name.rpartition(".")[0] for name in names} | {name.partition(".lora_")[0] for name in names}
        try:
            bounded.run("match_patterns", json.dumps([patterns, sorted(names)]).encode())
        except bounded.BoundError as error:
            raise CheckpointError(
                f"{self.folder / ADAPTER_CONFIG}: its regular expressions cannot be matched: {error}"
            ) from error

    def _unties(self, config: ModelConfig, factors: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether the adapter changes one of the two matrices that a config ties, and not the other."""
        if not config.tie_word_embeddings or self.settings.get("ensure_weight_tying"):
            return False
        modules = (config.embedding.name.removesuffix(".weight"), HEAD.removesuffix(".weight"))
        return any(self._is_saved(module) or "A" in factors.get(module, ()) for module in modules)

    def _sorted(
        self, table: Mapping[str, Parameter], problems: list[str]
    ) -> tuple[dict[str, LazyTensor], dict[str, dict[str, LazyTensor]]]:
        """The tensors that replace others, and the factors by module and part, under canonical names."""
        weights = {name.removesuffix(".weight"): parameter for name, parameter in table.items()}
        plain: dict[str, LazyTensor] = {}
        factors: dict[str, dict[str, LazyTensor]] = {}
        for name, tensor in self.tensors.items():
            ending = next((ending for ending in FACTORS if name.endswith(f".{ending}")), "")
            bare = name.removesuffix(f".{ending}").replace(".base_layer", "")
            known = weights if ending else table
            canonical = bare if bare in known else BASE_PREFIX + bare
            if canonical not in known:
                problems.append(f"unexpected: {name} {list(tensor.shape)}")
            elif not ending:
                plain[canonical] = tensor
            elif FACTORS[ending] == "tokens" or self._is_target(bare, known[canonical]):
                factors.setdefault(canonical, {})[FACTORS[ending]] = tensor
            else:
                problems.append(f"unexpected: {name}, of a module that target_modules does not name")
        return plain, factors

    def _missing(self, factors: Mapping[str, Any], table: Mapping[str, Parameter]) -> Iterator[str]:
        """The modules of the decoder that the settings name, and that have no factors."""
        for name, parameter in table.items():
            module = name.removesuffix(".weight")
            adaptable = parameter.kind in ("linear", "embedding") and module not in HEAD_MODULES.values()
            if adaptable and module not in factors and self._is_target(self._own_name(module), parameter):
                yield f"missing: the factors of {module}, which target_modules names"

    def _own_name(self, module: str) -> str:
        """A module's name in the model that was trained, which may be a base model."""
        is_base = not any(name.startswith((BASE_PREFIX, *HEAD_MODULES.values())) for name in self.tensors)
        return module.removeprefix(BASE_PREFIX) if is_base else module

    def _is_target(self, module: str, parameter: Parameter) -> bool:
        """Whether the settings name a module, as PEFT reads them."""
        get = self.settings.get
        targets, excluded = get("target_modules") or [], get("exclude_modules") or []
        if _matches(excluded, module) or self._is_saved(module):
            return False
        if targets == "all-linear":
            return parameter.kind == "linear" and module not in HEAD_MODULES.values()
        layers = _listed(get("layers_to_transform"))
        if isinstance(targets, str) or not layers or not _matches(targets, module):
            return _matches(targets, module)
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in _listed(get("layers_pattern"))]
        found = next((match for p in patterns or [LAYER] if (match := re.match(p, module))), None)
        return found is not None and int(found[1]) in layers

    def _is_saved(self, module: str) -> bool:
        """Whether `modules_to_save` names a module."""
        saved = _listed(self.settings.get("modules_to_save"))
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved)

    def _adapt(
        self,
        module: str,
        parts: dict[str, LazyTensor],
        parameter: Parameter,
        tensors: dict[str, LazyTensor],
        problems: list[str],
    ) -> None:
        """Put the merged weight (and bias) of a module into `tensors`."""
        weight, bias = tensors.get(f"{module}.weight"), tensors.get(f"{module}.bias")
        is_embedding, dora = parameter.kind == "embedding", bool(self.settings.get("use_dora"))
        if weight is None or parameter.kind not in ("linear", "embedding"):
            problems.append(f"unexpected: factors of {module}, which is no matrix of the model")
            return
        out, into = parameter.shape[::-1] if is_embedding else parameter.shape
        rank, scale = self._rank_and_scale(self._own_name(module))
        rows = self._token_rows(module)
        expected: dict[str, tuple[int, ...]] = {}
        if parts.keys() != {"tokens"}:
            expected |= {"A": (rank, into), "B": (out, rank)}
            expected |= {"magnitude": (out,)} if dora else {}
            expected |= {"bias": (out,)} if self.settings.get("lora_bias") else {}
        if "tokens" in parts:
            expected["tokens"] = (len(rows), parameter.shape[1])
        wrong = [f"missing: {part} of {module} {list(expected[part])}" for part in expected.keys() - parts.keys()]
        wrong += [f"unexpected: {part} of {module}: its settings have none" for part in parts.keys() - expected.keys()]
        wrong += [
            f"wrong shape: {part} of {module} is {list(parts[part].shape)}, expected {list(expected[part])}"
            for part in expected.keys() & parts.keys()
            if parts[part].shape != expected[part]
        ]
        if not all(0 <= row < parameter.shape[0] for row in rows):
            wrong.append(f"trainable_token_indices of {module} are not all from 0 to {parameter.shape[0] - 1}")
        if "bias" in parts and (bias is None or dora):
            wrong.append(f"lora_bias of {module}: {'DoRA has no such bias' if dora else 'the model has no bias there'}")
        if wrong:
            problems += sorted(wrong)
            return
        tensors[f"{module}.weight"] = _computed(weight, partial(_merge, weight, parts, scale, is_embedding, rows))
        if "bias" in parts and bias is not None:
            tensors[f"{module}.bias"] = _computed(bias, partial(_add, bias, parts["bias"], scale))

    def _rank_and_scale(self, module: str) -> tuple[int, float]:
        """The rank of a module's factors, and what multiplies their product."""
        get = self.settings.get
        rank = _by_pattern(get("rank_pattern") or {}, module, get("r", 8))
        alpha = _by_pattern(get("alpha_pattern") or {}, module, get("lora_alpha", 8))
        return int(rank), alpha / (math.sqrt(rank) if get("use_rslora") else rank)

    def _token_rows(self, module: str) -> list[int]:
        """The rows of a module that trainable tokens replace."""
        indices = self.settings.get("trainable_token_indices") or []
        if isinstance(indices, dict):
            return next((rows for name, rows in indices.items() if _matches([name], module)), [])
        return indices if _matches(["embed_tokens"], module) else []


def _table(config: ModelConfig) -> dict[str, Parameter]:
    """The parameters of the model with any of its heads, by name."""
    return {parameter.name: parameter for head in (None, *config.heads) for parameter in config.parameters(head)}


def _merge(
    weight: LazyTensor, parts: dict[str, LazyTensor], scale: float, is_embedding: bool, rows: list[int]
) -> Array:
    """The merged values of a matrix, in at least float32."""
    wide = _wide(weight, *parts.values())
    merged = weight.exact_values().astype(wide)  # a copy
    if "A" in parts:
        matrix = merged.T if is_embedding else merged  # (out, in)
        matrix += (parts["B"].read().astype(wide) @ parts["A"].read().astype(wide)) * wide.type(scale)
        if "magnitude" in parts:
            matrix *= (parts["magnitude"].read().astype(wide) / np.linalg.norm(matrix, axis=1))[:, None]
    if "tokens" in parts:
        merged[rows] = parts["tokens"].read()
    return merged


def _add(bias: LazyTensor, added: LazyTensor, scale: float) -> Array:
    wide = _wide(bias, added)
    values: Array = bias.exact_values().astype(wide) + added.read().astype(wide) * wide.type(scale)
    return values


def _wide(*tensors: LazyTensor) -> np.dtype[Any]:
    return np.result_type(np.float32, *(np.float64 for tensor in tensors if tensor.dtype == np.float64))


def _computed(tensor: LazyTensor, values: Callable[[], Array]) -> LazyTensor:
    """A tensor in the dtype of another, with values that are computed when they are read."""
    read = lambda: values().astype(tensor.dtype, copy=False)  # noqa: E731
    return LazyTensor(tensor.name, tensor.dtype, tensor.shape, read, tensor.file, exact=values)


def _fitted(config: ModelConfig, plain: Mapping[str, LazyTensor]) -> ModelConfig:
    """The config with as many tokens and labels as the adapter has rows for."""
    tokens, labels = plain.get(config.embedding.name), plain.get(f"{HEAD_MODULES['sequence_classification']}.weight")
    if tokens is not None and tokens.shape and tokens.shape[0] not in (0, config.vocab_size):
        config = config.replace(vocab_size=tokens.shape[0])
    if labels is not None and labels.shape and labels.shape[0] not in (0, config.num_labels):
        config = config.replace(num_labels=labels.shape[0], id2label=None, label2id=None)
    return config


def _pattern_problems(patterns: list[str]) -> Iterator[str]:
    if len(patterns) > MOST_PATTERNS:
        yield f"it has {len(patterns):,} patterns, expected at most {MOST_PATTERNS:,}"
        return
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield f"{pattern[:100]!r} is not a regular expression: {error}"


def _matches(names: str | list[str], module: str) -> bool:
    """Whether a regular expression is all of a module's name, or one of several names the end of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is the end of a module's name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _listed(value: Any) -> list[Any]:
    """A list, one value as a list, and None as an empty one."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    return is_number(value) and value > 0
