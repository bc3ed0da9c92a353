"""RCP's learned correction of a pruning layer's attention, S_a + S_t + bias, in its two forms.

Values marked [R] were read in drafts of the method, [ours] are this project's choice, [inferred] follows from the
published number of parameters.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Scorer(nn.Module):
    """Base of both forms: learnable queries, shifted by the question, look at the visual tokens kept so far.

    Args:
        width: of the decoder's states. inner: of the scorer. queries: number of learnable queries.
        heads: of the queries' attention. dropout: probability. bias: initial value of the learnable bias.
        relative: S_a in units of the uniform weight 1 / tokens [ours].
    """

    def __init__(
        self, width: int, inner: int, queries: int, heads: int, dropout: float, bias: float, relative: bool
    ) -> None:
        super().__init__()
        self.heads, self.relative = heads, relative

    def forward(
        self,
        visual: Float[Tensor, "batch visual width"],
        alive: Bool[Tensor, "batch visual"],
        text: Float[Tensor, "batch text width"],
        text_mask: Bool[Tensor, "batch text"],
    ) -> Float[Tensor, "batch visual"]:
        """Correction to the log attention of every visual token."""
        raise NotImplementedError

    @staticmethod
    def flops_per_token(width: int, inner: int, queries: int) -> int:
        """FLOPs for each visual token."""
        raise NotImplementedError

    @staticmethod
    def flops_per_sample(width: int, inner: int, queries: int) -> int:
        """FLOPs for each sample, whatever its number of visual tokens."""
        raise NotImplementedError

    def _shifted_queries(self, text: Tensor, text_mask: Tensor) -> Float[Tensor, "batch queries inner"]:
        """Learnable queries plus the projected, normalised mean of the question."""
        weight = text_mask.to(text.dtype)[..., None]
        mean = (text * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return self.queries + self.question_norm(self.question(mean))[:, None]

    def _aggregate(self, weights: Tensor, alive: Tensor) -> Float[Tensor, "batch visual"]:
        """S_a: the queries' weights (batch, queries, visual), combined by a linear layer."""
        score = self.fold(weights.transpose(1, 2)).squeeze(-1)
        return score * alive.sum(1, keepdim=True) if self.relative else score


def attention_weights(
    queries: Float[Tensor, "batch queries inner"],
    keys: Float[Tensor, "batch visual inner"],
    alive: Bool[Tensor, "batch visual"],
    heads: int,
) -> Float[Tensor, "batch heads queries visual"]:
    """Softmax attention over the alive tokens."""
    queries, keys = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    logits = queries @ keys.transpose(2, 3) * keys.shape[-1] ** -0.5
    lowest = torch.finfo(logits.dtype).min  # not -inf, which gives NaN for a sample without an image
    return logits.masked_fill(~alive[:, None, None], lowest).softmax(-1)


class QueryAttention(nn.Module):
    """Attention block of which only the weights are used, averaged over heads [R].

    Three pruners have 16.56 M parameters at a width of 4,096 if the block has value and output projections too, as
    `torch.nn.MultiheadAttention` has [inferred]. They have no effect and take no time: `unused` holds their number.
    """

    def __init__(self, inner: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(inner, inner), nn.Linear(inner, inner)
        self.unused = nn.Parameter(torch.zeros(2, inner, inner + 1))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Float[Tensor, "batch queries inner"],
        visual: Float[Tensor, "batch visual inner"],
        alive: Bool[Tensor, "batch visual"],
    ) -> Float[Tensor, "batch queries visual"]:
        """Weights of the queries over the alive tokens."""
        weights = attention_weights(self.query(queries), self.key(visual), alive, self.heads)
        weights = self.dropout(weights).mean(1)
        return weights + 0.0 * self.unused.sum() if self.training else weights  # DDP waits for every gradient


class PublishedScorer(Scorer):
    """The published form: one projection of the visual states serves the attention and the token MLP [R].

    S_a: the attention block's weights, with dropout of weights and of whole queries, combined by a linear layer that
    starts as the mean. S_t: linear, LayerNorm, GELU, linear [order inferred], whose last layer starts at zero.
    """

    def __init__(
        self, width: int, inner: int, queries: int, heads: int, dropout: float, bias: float, relative: bool
    ) -> None:
        super().__init__(width, inner, queries, heads, dropout, bias, relative)
        self.queries = nn.Parameter(0.02 * torch.randn(queries, inner))
        self.question = nn.Linear(width, inner)
        self.question_norm = nn.LayerNorm(inner)
        self.visual = nn.Linear(width, inner)
        self.attention = QueryAttention(inner, heads, dropout)
        self.query_dropout = nn.Dropout1d(dropout)  # drops whole queries
        self.fold = nn.Linear(queries, 1, bias=False)
        self.token_score = nn.Sequential(nn.Linear(inner, inner), nn.LayerNorm(inner), nn.GELU(), nn.Linear(inner, 1))
        self.bias = nn.Parameter(torch.full((1,), float(bias)))  # DeepSpeed doesn't support 0-d parameters
        _start(self, queries)

    def forward(
        self,
        visual: Float[Tensor, "batch visual width"],
        alive: Bool[Tensor, "batch visual"],
        text: Float[Tensor, "batch text width"],
        text_mask: Bool[Tensor, "batch text"],
    ) -> Float[Tensor, "batch visual"]:
        """Correction to the log attention of every visual token."""
        visual = self.visual(visual)
        weights = self.query_dropout(self.attention(self._shifted_queries(text, text_mask), visual, alive))
        return self._aggregate(weights, alive) + self.token_score(visual).squeeze(-1) + self.bias

    @staticmethod
    def flops_per_token(width: int, inner: int, queries: int) -> int:
        """FLOPs for each visual token: shared projection, keys, weights of the queries, MLP."""
        return 2 * width * inner + 2 * inner * inner + 2 * queries * (inner + 1) + 2 * inner * (inner + 1)

    @staticmethod
    def flops_per_sample(width: int, inner: int, queries: int) -> int:
        """FLOPs for each sample: the question's projection and that of the queries."""
        return 2 * width * inner + 2 * queries * inner * inner


class FirstScorer(Scorer):
    """The form that this project had first, and that plug-ins from then have [ours].

    Projections of their own for keys and token scores, the weights without dropout, an MLP of half the width without
    LayerNorm, queries of unit length: 19.30 M parameters in three pruners at a width of 4,096.
    """

    def __init__(
        self, width: int, inner: int, queries: int, heads: int, dropout: float, bias: float, relative: bool
    ) -> None:
        super().__init__(width, inner, queries, heads, dropout, bias, relative)
        self.queries = nn.Parameter(torch.randn(queries, inner) * inner**-0.5)
        self.question = nn.Linear(width, inner)
        self.question_norm = nn.LayerNorm(inner)
        self.key = nn.Linear(width, inner)
        self.fold = nn.Linear(queries, 1, bias=False)
        self.token = nn.Linear(width, inner)
        self.token_score = nn.Sequential(
            nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, inner // 2), nn.GELU(), nn.Linear(inner // 2, 1)
        )
        self.bias = nn.Parameter(torch.full((1,), float(bias)))
        _start(self, queries)

    def forward(
        self,
        visual: Float[Tensor, "batch visual width"],
        alive: Bool[Tensor, "batch visual"],
        text: Float[Tensor, "batch text width"],
        text_mask: Bool[Tensor, "batch text"],
    ) -> Float[Tensor, "batch visual"]:
        """Correction to the log attention of every visual token."""
        queries = self._shifted_queries(text, text_mask)
        weights = attention_weights(queries, self.key(visual), alive, self.heads).mean(1)
        token_score = self.token_score(self.token(visual)).squeeze(-1) + self.bias
        return self._aggregate(weights, alive) + token_score

    @staticmethod
    def flops_per_token(width: int, inner: int, queries: int) -> int:
        """FLOPs for each visual token: both projections, weights of the queries, MLP."""
        mlp = 2 * inner * (inner // 2) + 2 * (inner // 2)
        return 4 * width * inner + 2 * queries * inner + 2 * queries + mlp

    @staticmethod
    def flops_per_sample(width: int, inner: int, queries: int) -> int:
        """FLOPs for each sample: the question's projection."""
        return 2 * width * inner


def _start(scorer: Scorer, queries: int) -> None:
    """Aggregate the queries by their mean, and score all tokens alike."""
    nn.init.constant_(scorer.fold.weight, 1.0 / queries)
    nn.init.zeros_(scorer.token_score[-1].weight)
    nn.init.zeros_(scorer.token_score[-1].bias)


SCORERS: dict[str, type[Scorer]] = {"published": PublishedScorer, "first": FirstScorer}
