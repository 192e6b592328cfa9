"""OPT (arXiv:2205.01068): learned positions, LayerNorms before or after each sublayer, a plain MLP, biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from olmozoo.errors import ConfigError
from olmozoo.families.config import ModelConfig
from olmozoo.families.parameter import ACTIVATIONS, Head, Parameter
from olmozoo.families.registry import register

POSITION_OFFSET = 2  # the first two rows of the position table belong to no position


def _preset(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
    }


@register
@dataclass(kw_only=True)
class OPTConfig(ModelConfig):
    """Configuration of OPT models.

    Attributes:
        vocab_size: rows of the token embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of decoder blocks.
        ffn_dim: width of the MLP.
        max_position_embeddings: the longest sequence, in tokens; the position table has two rows more.
        do_layer_norm_before: norms before the sublayers; False (350m) after the residual sum.
        _remove_final_layer_norm: no norm after the last block (some early fine-tuned checkpoints).
        word_embed_proj_dim: width of the token embedding; default `hidden_size`. Where they differ, projections.
        dropout: of what sublayers put out, in training.
        attention_dropout: of attention weights, in training.
        num_attention_heads: heads.
        activation_function: the MLP's activation.
        layerdrop: probability of skipping a block, in training (arXiv:1909.11556).
        init_std: standard deviation of initial weights.
        use_cache: whether a call returns keys and values by default.
        pad_token_id, bos_token_id, eos_token_id: special tokens; eos may be a list.
        enable_bias: whether q, k, v, out, fc1 and fc2 have biases.
        layer_norm_elementwise_affine: whether the norms have parameters.
        tie_word_embeddings: whether the head is the token embedding.

    A `pruned_heads` in the config.json, {layer: [heads]}, names heads that are gone from the weights.
    """

    model_type: ClassVar[str] = "opt"
    name: ClassVar[str] = "OPT"
    heads: ClassVar[tuple[Head, ...]] = ("causal_lm", "sequence_classification", "question_answering")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "opt-125m": _preset(768, 12, 12),
        "opt-350m": _preset(1024, 24, 16) | {"word_embed_proj_dim": 512, "do_layer_norm_before": False},
        "opt-1.3b": _preset(2048, 24, 32),
        "opt-2.7b": _preset(2560, 32, 32),
        "opt-6.7b": _preset(4096, 32, 32),
        "opt-13b": _preset(5120, 40, 40),
        "opt-30b": _preset(7168, 48, 56),
        "opt-66b": _preset(9216, 64, 72),
    }

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.word_embed_proj_dim is None:
            self._set("word_embed_proj_dim", self.hidden_size)
        super().__post_init__()
        self._check_int("ffn_dim", "word_embed_proj_dim")
        self._check_bool("do_layer_norm_before", "_remove_final_layer_norm")
        self._check_bool("enable_bias", "layer_norm_elementwise_affine")
        self._check_number("dropout", "attention_dropout", "layerdrop", below=1.0)
        self._check_number("init_std")
        self._check_choice("activation_function", ACTIVATIONS)
        try:
            pruned = {layer: set(heads) for layer, heads in self.pruned_heads.items()}
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            given = self.extra["pruned_heads"]
            raise ConfigError(f"OPTConfig.pruned_heads is {given!r}, expected lists of heads by layer") from error
        for layer, heads in pruned.items():
            if not heads < set(range(self.num_attention_heads)) or not 0 <= layer < self.num_hidden_layers:
                found = f"prunes {sorted(heads)} of layer {layer}"
                raise ConfigError(f"OPTConfig.pruned_heads {found}: expected some of its heads")

    @property
    def pruned_heads(self) -> dict[int, list[int]]:
        """The heads that are gone from each layer's weights; empty unless the config.json has some."""
        return {int(layer): list(heads) for layer, heads in (self.extra.get("pruned_heads") or {}).items()}

    def kv_heads_in(self, layer: int) -> int:
        """See `ModelConfig.kv_heads_in`."""
        return self.num_attention_heads - len(self.pruned_heads.get(layer, ()))

    @property
    def projects(self) -> bool:
        """Whether embeddings are projected to the width of the residual stream and back."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def has_final_norm(self) -> bool:
        """Whether there is a norm after the last block."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @property
    def position_limit(self) -> int:
        """See `ModelConfig.position_limit`: positions are rows of a table."""
        return self.max_position_embeddings

    @property
    def init_deviation(self) -> float:
        """`init_std`."""
        return self.init_std

    @property
    def embedding(self) -> Parameter:
        """The token embedding."""
        shape = (self.vocab_size, self.word_embed_proj_dim or self.hidden_size)
        return Parameter("model.decoder.embed_tokens.weight", shape, ("vocab", "embed"), "embedding", self.init_std)

    def backbone(self) -> Iterator[Parameter]:
        """See `ModelConfig.backbone`."""
        hidden, width = self.hidden_size, self.embedding.shape[1]
        rows = self.max_position_embeddings + POSITION_OFFSET
        decoder = "model.decoder"
        yield self.embedding
        yield Parameter(
            f"{decoder}.embed_positions.weight", (rows, hidden), ("positions", "embed"), "embedding", self.init_std
        )
        if self.projects:
            yield from self._linear(f"{decoder}.project_in", (hidden, width), ("embed", "embed"), bias=False)
            yield from self._linear(f"{decoder}.project_out", (width, hidden), ("embed", "embed"), bias=False)
        for layer in range(self.num_hidden_layers):
            block = f"{decoder}.layers.{layer}"
            heads = self.kv_heads_in(layer) * self.head_dim
            for letter in ("q", "k", "v"):
                yield from self._linear(f"{block}.self_attn.{letter}_proj", (heads, hidden), ("heads", "embed"))
            yield from self._linear(f"{block}.self_attn.out_proj", (hidden, heads), ("embed", "heads"))
            yield from self._norm(f"{block}.self_attn_layer_norm")
            yield from self._linear(f"{block}.fc1", (self.ffn_dim, hidden), ("mlp", "embed"))
            yield from self._linear(f"{block}.fc2", (hidden, self.ffn_dim), ("embed", "mlp"))
            yield from self._norm(f"{block}.final_layer_norm")
        if self.has_final_norm:
            yield from self._norm(f"{decoder}.final_layer_norm")

    def _linear(
        self, name: str, shape: tuple[int, int], axes: tuple[str, str], bias: bool | None = None
    ) -> Iterator[Parameter]:
        yield Parameter(f"{name}.weight", shape, axes, "linear", self.init_std)
        if self.enable_bias if bias is None else bias:
            yield Parameter(f"{name}.bias", shape[:1], axes[:1], "bias")

    def _norm(self, name: str) -> Iterator[Parameter]:
        if self.layer_norm_elementwise_affine:
            yield Parameter(f"{name}.weight", (self.hidden_size,), ("embed",), "norm")
            yield Parameter(f"{name}.bias", (self.hidden_size,), ("embed",), "bias")
