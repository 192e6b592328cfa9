"""Classes that pick the model class by the `model_type` of a config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from olmozoo.checkpoint.adapters import config_alone, locate, open_merged
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Head
from olmozoo.families.registry import model_class
from olmozoo.modeling import given_dtype, given_quantization, own_config, split_options
from olmozoo.pt.base import PreTrainedModel, given_devices
from olmozoo.pt.decoder import Decoder
from olmozoo.pt.heads import CausalLM, QuestionAnswerer, SequenceClassifier
from olmozoo.pt.parallel import mesh_sizes
from olmozoo.quantization import GROUP_SIZE
from olmozoo.sharding import layout
from olmozoo.typing import StrPath

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=PreTrainedModel)


class AutoClass(Generic[Model]):
    """What the classes below share; there are no instances of them."""

    head: ClassVar[Head | None] = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: StrPath,
        *,
        dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        device: torch.device | str | None = None,
        device_mesh: DeviceMesh | None = None,
        device_map: Any = None,
        max_memory: dict[Any, Any] | None = None,
        offload_folder: StrPath | None = None,
        adapter: StrPath | None = None,
        quantization: str | None = None,
        group_size: int = GROUP_SIZE,
        **options: Any,
    ) -> Model:
        """A model of the checkpoint's family with its weights.

        Arguments, return value and errors are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ConfigError: the family has no such head.
        """
        dtype = given_dtype(dtype, options)
        devices = given_devices(device, device_mesh, device_map, max_memory, offload_folder)
        how = given_quantization(quantization, group_size, options)
        hub, overrides = split_options(options)
        if device_mesh is not None:
            config = config_alone(path_or_repo, adapter=adapter, hub=hub, **overrides)
            layout(config, cls.head, mesh_sizes(device_mesh), style="pt")
        location = locate(path_or_repo, need="weights", adapter=adapter, **hub)
        source = open_merged(location, quantization=how, **overrides)
        found: type[Model] = model_class("pt", source.config, cls.head)
        model = found._from_checkpoint(source, dtype=dtype, ignore_mismatched_sizes=ignore_mismatched_sizes, **devices)
        model.note_source(path_or_repo, location)
        return model

    @classmethod
    def from_config(cls, config: ModelConfig, **options: Any) -> Model:
        """A model of the config's family with initial weights; `options` as in `PreTrainedModel`.

        Raises:
            ConfigError: the family has no such head.
        """
        config = own_config(config)
        found: type[Model] = model_class("pt", config, cls.head)
        return found(config, **options)


class AutoModel(AutoClass[Decoder]):
    """The decoder without a head, of whatever family."""


class AutoModelForCausalLM(AutoClass[CausalLM]):
    """The causal language model, of whatever family."""

    head = "causal_lm"


class AutoModelForSequenceClassification(AutoClass[SequenceClassifier]):
    """The decoder with a classification head, of whatever family."""

    head = "sequence_classification"


class AutoModelForQuestionAnswering(AutoClass[QuestionAnswerer]):
    """The decoder with a question-answering head, of a family that has one."""

    head = "question_answering"
