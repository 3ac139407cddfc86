"""The adapted embedding: `nn.Embedding`, a linear layer of one-hot inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rosa.algebra.lowrank import LowRank
from rosa.layers.adapter import Adapter
from rosa.layers.base import RosaLayer
from rosa.layers.changed import check_not_patched, is_patched, with_changed_weight
from rosa.layers.plain import plain_sum
from rosa.layers.tracing import is_traced
from rosa.pretrained.views import MatrixView


class RosaEmbedding(RosaLayer):
    """ROSA on `nn.Embedding`: A is (r, entries), B is (width, r)."""

    adapts = "torch.nn.Embedding"
    lora_names = ("lora_embedding_A", "lora_embedding_B")

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether a module is an embedding."""
        return isinstance(module, nn.Embedding)

    @staticmethod
    def is_plain(base: nn.Module) -> bool:
        """Whether an embedding hands out its rows as they are, and leaves its weight alone."""
        assert isinstance(base, nn.Embedding)
        as_they_are = type(base).forward is nn.Embedding.forward
        return as_they_are and base.max_norm is None and not base.scale_grad_by_freq

    @staticmethod
    def numbers(base: nn.Module) -> int | None:
        """How many numbers the whole weight has."""
        assert isinstance(base, nn.Embedding)
        return base.num_embeddings * base.embedding_dim

    @staticmethod
    def view_of(base: nn.Module, parameter: str) -> MatrixView:
        """The weight as (width, entries), as which it would be multiplied with one-hot inputs."""
        return MatrixView(base, parameter, transposed=True)

    @staticmethod
    def as_lora(base: nn.Module, change: LowRank) -> tuple[Tensor, Tensor]:
        """The factors; ValueError where the module makes something else of its weight by now."""
        check_not_patched(base)
        return change.A, change.B

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The rows of W + s B A, transposed, that indices (...) name: (..., width)."""
        active = self._in_use(x, is_traced())
        if active and is_patched(self.base_layer):
            return with_changed_weight(self, x, *args, **kwargs)
        return plain_sum(self, active, self._product, x, *args, **kwargs)

    def _product(self, adapter: Adapter, x: Tensor) -> Tensor:
        a, b = adapter.factors
        hidden = F.embedding(x, a.T) * adapter.scaling
        # Dropout as of a linear layer's inputs: of whole rows here.
        keep = self.rosa_dropout[adapter.name](hidden.new_ones(*x.shape, 1))
        return F.linear(hidden * keep, b)
