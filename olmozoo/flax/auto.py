"""Classes that pick the model class by the `model_type` of a config."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

from jax.sharding import Mesh

from olmozoo.checkpoint.adapters import config_alone, locate, open_merged
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import Head
from olmozoo.families.registry import model_class
from olmozoo.flax.base import PreTrainedModel
from olmozoo.flax.decoder import Decoder
from olmozoo.flax.heads import CausalLM, QuestionAnswerer, SequenceClassifier
from olmozoo.flax.sharding import parameter_shardings
from olmozoo.modeling import given_dtype, given_quantization, own_config, split_options
from olmozoo.quantization import GROUP_SIZE
from olmozoo.typing import StrPath

Model = TypeVar("Model", bound=PreTrainedModel)


class AutoClass(Generic[Model]):
    """What the classes below share; there are no instances of them."""

    head: ClassVar[Head | None] = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: StrPath,
        *,
        dtype: Any = None,
        ignore_mismatched_sizes: bool = False,
        _do_init: bool = True,
        adapter: StrPath | None = None,
        mesh: Mesh | None = None,
        quantization: str | None = None,
        group_size: int = GROUP_SIZE,
        **options: Any,
    ) -> Model | tuple[Model, dict[str, Any]]:
        """A model of the checkpoint's family with its weights.

        Arguments, return value and errors are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ConfigError: the family has no such head.
        """
        dtype = given_dtype(dtype, options)
        how = given_quantization(quantization, group_size, options)
        hub, overrides = split_options(options)
        if mesh is not None:
            config = config_alone(path_or_repo, adapter=adapter, hub=hub, **overrides)
            parameter_shardings(config, cls.head, mesh)
        source = open_merged(
            locate(path_or_repo, need="weights", adapter=adapter, **hub), quantization=how, **overrides
        )
        found: type[Model] = model_class("flax", source.config, cls.head)
        return found._from_checkpoint(
            source, dtype=dtype, ignore_mismatched_sizes=ignore_mismatched_sizes, _do_init=_do_init, mesh=mesh
        )

    @classmethod
    def from_config(cls, config: ModelConfig, **options: Any) -> Model:
        """A model of the config's family with initial weights; `options` as in `PreTrainedModel`.

        Raises:
            ConfigError: the family has no such head.
        """
        config = own_config(config)
        found: type[Model] = model_class("flax", config, cls.head)
        return found(config, **options)


class FlaxAutoModel(AutoClass[Decoder]):
    """The decoder without a head, of whatever family."""


class FlaxAutoModelForCausalLM(AutoClass[CausalLM]):
    """The causal language model, of whatever family."""

    head = "causal_lm"


class FlaxAutoModelForSequenceClassification(AutoClass[SequenceClassifier]):
    """The decoder with a classification head, of whatever family."""

    head = "sequence_classification"


class FlaxAutoModelForQuestionAnswering(AutoClass[QuestionAnswerer]):
    """The decoder with a question-answering head, of a family that has one."""

    head = "question_answering"
