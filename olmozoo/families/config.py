"""What every model family has: a config, a parameter table drawn from it, published presets.

The parameter table is the single source of truth. Checkpoint checks, the binding in each framework, initialization,
parameter counts and test checkpoints all come from it.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import re
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from olmozoo import foreign
from olmozoo.errors import ConfigError, FixedFieldError
from olmozoo.families.parameter import HEAD_MODULES, Head, Parameter
from olmozoo.families.registry import MODEL_TYPES, config_class
from olmozoo.hub import resolve

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Limits that no model comes near. Without them, a config.json could ask for any amount of time or memory.
MOST = 2**31 - 1
MOST_LAYERS, MOST_LABELS, MOST_HEAD_DIM = 10_000, 1_000_000, 1 << 16
MOST_JSON = 1 << 26  # bytes of a JSON file; the largest, a tokenizer.json, has some 30 MB
MOST_YAML = 1 << 20  # bytes of a YAML file, which PyYAML takes its time over
MOST_DEPTH = 100  # levels of a JSON file; what copies and compares values takes a few calls for each
SETTABLE = ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "problem_type", "id2label", "label2id")
CALL_DEFAULTS = ("output_attentions", "output_hidden_states", "return_dict")  # a config.json may set them for each call


@dataclass(kw_only=True)
class ModelConfig(ABC):
    """What all configs share. Subclasses add a family's fields.

    Settings of behaviour (`SETTABLE`, and keys that no field has) can be set, checked as when a config is made. Fields
    that decide which parameters there are and what they compute are fixed: make a new config by `replace`.

    Attributes:
        num_labels: outputs of the classification head; default the length of `id2label`, or 2.
        id2label: label names by index; default `LABEL_0`, `LABEL_1`, ...
        label2id: its inverse.
        problem_type: `regression`, `single_label_classification`, `multi_label_classification` or None (chosen from
            `num_labels` and the labels' dtype).
        extra: keys of a config.json that no field has. They are kept and written back, and read as attributes.

    Raises:
        ConfigError: on a value that no model can have; the message names the field.
    """

    model_type: ClassVar[str]
    name: ClassVar[str]  # the family's name in class names, such as "Olmo2"
    heads: ClassVar[tuple[Head, ...]]
    presets: ClassVar[dict[str, dict[str, Any]]]

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 2048
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    # -- what a family defines ------------------------------------------------------------------------------------

    @abstractmethod
    def backbone(self) -> Iterator[Parameter]:
        """The parameters of the base model, in order, each name with its leading `model.`."""

    @property
    @abstractmethod
    def embedding(self) -> Parameter:
        """The token embedding, to which a tied head is tied."""

    @property
    @abstractmethod
    def init_deviation(self) -> float:
        """The standard deviation of initial weights."""

    @property
    def head_dim(self) -> int:
        """The width of one attention head: a `head_dim` in the config.json, else hidden_size / num_attention_heads."""
        explicit = self.extra.get("head_dim")
        return int(explicit) if explicit else self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads."""
        return int(getattr(self, "num_key_value_heads", None) or self.num_attention_heads)

    def kv_heads_in(self, layer: int) -> int:
        """The number of key/value heads of one layer; where heads were pruned, it may have fewer."""
        return self.kv_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many keys a query sees in each layer, its own and those right before it; None where it sees all."""
        return (None,) * self.num_hidden_layers

    def cache_slots(self, length: int, spare: int) -> list[int]:
        """The positions of each layer that a cache for `length` has room for, where it keeps no more than it needs.

        Of a layer with a window these are as many as a query sees, and `spare` more.
        """
        return [min(length, (window or length) + spare) for window in self.windows]

    @property
    def position_limit(self) -> int | None:
        """The most positions a sequence can have; None where a longer one is computed as well."""
        return None

    # -- the parameter table --------------------------------------------------------------------------------------

    def parameters(self, head: Head | None = None) -> tuple[Parameter, ...]:
        """Every parameter of the base model and of `head`, in order; a tied head is listed with its `tied_to`."""
        return (*self.backbone(), *self.head_parameters(head))

    def head_parameters(self, head: Head | None) -> Iterator[Parameter]:
        """The parameters that `head` adds to the base model."""
        if head is None:
            return
        if head not in self.heads:
            raise ConfigError(f"{self.name} has no {head!r} head; it has {', '.join(self.heads)}")
        module, std, width = HEAD_MODULES[head], self.init_deviation, self.embedding.shape[1]
        if head == "causal_lm":
            tied = self.embedding.name if self.tie_word_embeddings else None
            yield Parameter(f"{module}.weight", (self.vocab_size, width), ("vocab", "embed"), "linear", std, tied)
        elif head == "sequence_classification":
            assert self.num_labels is not None
            yield Parameter(f"{module}.weight", (self.num_labels, width), ("labels", "embed"), "linear", std)
        else:
            yield Parameter(f"{module}.weight", (2, width), ("labels", "embed"), "linear", std)
            yield Parameter(f"{module}.bias", (2,), ("labels",), "bias")

    def head_modules(self, head: Head | None) -> dict[str, list[Parameter]]:
        """The parameters that `head` adds, by the name of the linear module that has them: weight, then bias if any."""
        modules: dict[str, list[Parameter]] = {}
        for parameter in self.head_parameters(head):
            modules.setdefault(parameter.name.split(".")[0], []).append(parameter)
        return modules

    def count_parameters(self, head: Head | None = "causal_lm") -> dict[str, int]:
        """The number of parameters by group; a tied tensor counts once."""
        counts: dict[str, int] = {}
        for parameter in self.parameters(head):
            if parameter.tied_to is None:
                counts[parameter.group] = counts.get(parameter.group, 0) + parameter.size
        return counts

    def count_active(self, head: Head | None = "causal_lm") -> int:
        """The number of parameters that one token is computed with: all, or with experts, fewer."""
        return sum(self.count_parameters(head).values())

    # -- making, reading and writing ------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        self._check_labels()
        labels = self.id2label or {i: f"LABEL_{i}" for i in range(2 if self.num_labels is None else self.num_labels)}
        self._set("id2label", {int(i): str(label) for i, label in labels.items()})
        self._set("label2id", dict(self.label2id or {label: i for i, label in self._labels.items()}))
        self._set("num_labels", len(labels) if self.num_labels is None else self.num_labels)
        if self.num_labels != len(self._labels):
            self._wrong("num_labels", f"{len(self._labels)}, the number of entries in id2label")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            self._wrong("problem_type", f"None or one of {', '.join(PROBLEM_TYPES)}")
        self._check_int("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings")
        self._check_int("num_hidden_layers", most=MOST_LAYERS)
        self._check_int("num_labels")
        self._check_bool("use_cache", "tie_word_embeddings")
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(self, name) is not None:
                self._check_int(name, least=-1)
        ends = self.eos_token_id if isinstance(self.eos_token_id, (list, tuple)) else [self.eos_token_id]
        if any(end is not None and not _is_int(end, most=MOST) for end in ends):
            self._wrong("eos_token_id", "an integer, a list of integers, or None")
        if "head_dim" in self.extra and not (self.extra["head_dim"] is None or _is_int(self.extra["head_dim"], 1)):
            raise ConfigError(f"{self.name}Config.head_dim is {self.extra['head_dim']!r}, expected a positive number")
        if not self.extra.get("head_dim") and self.hidden_size % self.num_attention_heads:
            self._wrong("hidden_size", f"a multiple of num_attention_heads = {self.num_attention_heads}")
        if self.head_dim > MOST_HEAD_DIM:
            raise ConfigError(f"{self.name}Config.head_dim is {self.head_dim}, expected at most {MOST_HEAD_DIM}")

    def _check_labels(self) -> None:
        """Check what the fields of labels are before anything is made of them."""
        if self.num_labels is not None:
            self._check_int("num_labels", most=MOST_LABELS)
        if self.id2label is not None:
            expected = "an object from integers to strings"
            if not isinstance(self.id2label, Mapping):
                self._wrong("id2label", expected)
            try:
                numbers = {int(i) for i in self.id2label}
            except (TypeError, ValueError, OverflowError):
                self._wrong("id2label", expected)
            if len(numbers) != len(self.id2label) or not all(isinstance(v, str) for v in self.id2label.values()):
                self._wrong("id2label", expected)
        if self.label2id is not None and not isinstance(self.label2id, Mapping):
            self._wrong("label2id", "an object from strings to integers")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **overrides: Any) -> Self:
        """A config from the contents of a config.json; `overrides` replace single keys of it.

        Called on `ModelConfig` itself, the family is chosen by `model_type`.

        Raises:
            ConfigError: on a wrong or foreign `model_type`, a bad value, or an override that no field has.
        """
        data = dict(data)
        if foreign.is_ai2_config(data):
            raise ConfigError(
                "this is a config of AI2's own trainer (d_model, n_layers ...): convert the folder with "
                "python -m conversion.olmo_native SRC DST"
            )
        kind = data.pop("model_type", getattr(cls, "model_type", None))
        family = cls if hasattr(cls, "model_type") else config_class(kind)
        if kind != family.model_type:
            raise ConfigError(f"model_type is {kind!r}, expected {family.model_type!r} for {family.__name__}")
        names = {f.name for f in dataclasses.fields(family)} - {"extra"}
        unknown = set(overrides) - names - {"rope_parameters", "head_dim", *CALL_DEFAULTS}
        if unknown:
            raise ConfigError(f"{family.__name__} has no field {', '.join(sorted(unknown))}")
        if "num_labels" in overrides and overrides["num_labels"] != len(data.get("id2label") or ()):
            data.pop("id2label", None)
            data.pop("label2id", None)
        elif (
            isinstance(data.get("id2label"), Mapping) and data["id2label"]
        ):  # the labels in a file are the fuller statement of their number
            data["num_labels"] = len(data["id2label"])
        data = {**family._normalize(data), **family._normalize(dict(overrides))}
        fields = {key: value for key, value in data.items() if key in names}
        return family(**fields, extra={key: value for key, value in data.items() if key not in names})

    @classmethod
    def _normalize(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Other spellings of a family's fields, brought to ours."""
        return data

    def to_dict(self) -> dict[str, Any]:
        """The contents of the config.json that means this config."""
        data = {**self.extra, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}
        del data["extra"], data["num_labels"]
        if self._labels == {0: "LABEL_0", 1: "LABEL_1"}:
            del data["id2label"], data["label2id"]
        else:
            data["id2label"] = {str(i): label for i, label in self._labels.items()}
        if self.problem_type is None:
            del data["problem_type"]
        return {"model_type": self.model_type, **data}

    def to_json(self) -> str:
        """`to_dict` as the text of a config.json."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Self:
        """Read the config.json of a folder or of a repository on the hub.

        Raises:
            HubError: the repository or the file cannot be downloaded and is not in the cache.
            ConfigError: the file is not a config of this family or has a bad value.
        """
        folder = resolve(
            path_or_repo,
            need="config",
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls.from_folder(folder, **overrides)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], **overrides: Any) -> Self:
        """Read the config.json in a local folder; see `from_pretrained`."""
        return cls.from_dict(read_json(Path(folder) / "config.json"), **overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json into `folder`, which is made if need be; an existing file is replaced in one step."""
        path = Path(folder) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        try:
            with part.open("x", encoding="utf-8") as stream:
                stream.write(self.to_json())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """The published config of that name, such as `olmo2-1b`; `cls.presets` lists the names.

        Raises:
            ConfigError: no such preset.
        """
        families = [cls] if hasattr(cls, "presets") else [config_class(name) for name in MODEL_TYPES]
        presets = {name: (family, fields) for family in families for name, fields in family.presets.items()}
        if preset not in presets:
            raise ConfigError(f"no preset {preset!r}; there are {', '.join(sorted(presets))}")
        family, fields = presets[preset]
        return family.from_dict({**fields, **overrides})

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        copy = dataclasses.replace(self, **changes)
        if "name_or_path" in self.__dict__:
            copy.name_or_path = self.name_or_path
        return copy

    def __setattr__(self, name: str, value: Any) -> None:
        fields = self.__dataclass_fields__
        making = name in fields and name not in self.__dict__
        private = name not in fields and name.startswith("_")  # of a library; not part of a config.json
        if making or private or name == "name_or_path":
            self._set(name, value)
        elif name in SETTABLE:
            self._set(name, getattr(self.replace(**{name: value}), name))
        elif name not in fields and not hasattr(type(self), name):
            self._set("extra", self.replace(extra={**self.extra, name: value}).extra)
        elif getattr(self, name) != value:
            raise FixedFieldError(
                f"{type(self).__name__}.{name} is fixed once the config is made: make a new config with replace()"
            )

    def __contains__(self, name: object) -> bool:
        return name in self.__dataclass_fields__ or name in self.extra

    def get_text_config(self, decoder: bool | None = None) -> Self:
        """The config itself, which is of text alone; libraries ask so."""
        return self

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    # -- checking -------------------------------------------------------------------------------------------------

    @property
    def _labels(self) -> dict[int, str]:
        return self.id2label or {}

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _wrong(self, name: str, expected: str) -> None:
        raise ConfigError(f"{type(self).__name__}.{name} is {getattr(self, name)!r}, expected {expected}")

    def _check_int(self, *names: str, least: int = 1, most: int = MOST) -> None:
        for name in names:
            if not _is_int(getattr(self, name), least, most):
                self._wrong(name, f"an integer of at least {least} and at most {most:,}")

    def _check_number(self, *names: str, least: float = 0.0, below: float = float("inf")) -> None:
        for name in names:
            if not is_number(getattr(self, name)) or not least <= getattr(self, name) < below:
                self._wrong(name, f"a number of at least {least}" + (f" and below {below}" if below < 1e300 else ""))

    def _check_bool(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self._wrong(name, "true or false")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            self._wrong(name, f"one of {', '.join(choices)}")


def _is_int(value: Any, least: int | None = None, most: int | None = None) -> bool:
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and (least is None or value >= least)
        and (most is None or value <= most)
    )


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float (a bool is neither)."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond any float
        return False


def read_yaml(path: Path, load: Callable[[Any], Any]) -> Any:
    """What a YAML file holds.

    Args:
        path: the file.
        load: reads an open file.

    Raises:
        ConfigError: the file is absent, is not YAML, is larger than `MOST_YAML`, or is nested deeper than `MOST_DEPTH`.
    """
    if path.exists() and not path.is_file():  # a pipe or a device may never end
        raise ConfigError(f"{path} is not a regular file")
    try:
        if (size := path.stat().st_size) > MOST_YAML:
            raise ConfigError(f"{path} has {size:,} bytes, expected at most {MOST_YAML:,}")
        text = path.read_text(encoding="utf-8")
        # Open brackets take PyYAML time by the square of their number.
        depth = itertools.accumulate((1 if mark in "[{" else -1 for mark in re.findall(r"[\[\]{}]", text)), initial=0)
        if max(depth) > MOST_DEPTH:
            raise ConfigError(f"{path} is nested deeper than {MOST_DEPTH} levels")
        return load(io.StringIO(text))
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}: expected a YAML file") from error
    except Exception as error:  # PyYAML raises almost anything for values that do not fit their tags
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or repr(error)
        raise ConfigError(f"{path} is not readable YAML: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: the file is absent, is not JSON, is larger than `MOST_JSON`, or is something other than an object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise ConfigError(f"{path} is not a regular file")
        if status.st_size > MOST_JSON:
            raise ConfigError(f"{path} has {status.st_size:,} bytes, expected at most {MOST_JSON:,}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(foreign.file_problem(path) or f"{path} is not readable JSON: {error}") from error
    if _depth_exceeds(data, MOST_DEPTH):
        raise ConfigError(f"{path} is nested deeper than {MOST_DEPTH} levels")
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is a JSON {type(data).__name__}, expected an object")
    return data


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def infer_problem_type(num_labels: int, integers: bool) -> str:
    """What a classification head learns where its config does not say: by the number and the dtype of labels."""
    if num_labels == 1:
        return "regression"
    return "single_label_classification" if integers else "multi_label_classification"
