"""Pick the class from config.json."""

from __future__ import annotations

import os
from typing import Any

from olmozoo.families.config import ModelConfig
from olmozoo.hub import HUB_ARGUMENTS
from olmozoo.pt.heads import CausalLM
from olmozoo.pt.olmo import OlmoForCausalLM
from olmozoo.pt.olmo2 import Olmo2ForCausalLM
from olmozoo.pt.opt import OPTForCausalLM

CAUSAL_LM: dict[str, type[CausalLM]] = {
    cls.config_class.model_type: cls for cls in (OlmoForCausalLM, Olmo2ForCausalLM, OPTForCausalLM)
}


class AutoModelForCausalLM:
    """The causal language model of whatever family a checkpoint is of."""

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **options: Any) -> CausalLM:
        """See `PreTrainedModel.from_pretrained`; the class is picked by `model_type`."""
        where = {name: value for name, value in options.items() if name in HUB_ARGUMENTS}
        config = ModelConfig.from_pretrained(path_or_repo, **where)
        return CAUSAL_LM[config.model_type].from_pretrained(path_or_repo, **options)

    @classmethod
    def from_config(cls, config: ModelConfig, **options: Any) -> CausalLM:
        """A model with initial weights; `options` as in `PreTrainedModel`."""
        return CAUSAL_LM[config.model_type](config, **options)
