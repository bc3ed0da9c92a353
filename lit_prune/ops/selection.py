"""Token selection: pure functions from scores to keep masks, gates and packing indices."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Images of each sample: the image index of each token, and the number of tokens of each image before pruning."""

    number: Int[Tensor, "batch visual"]
    sizes: Int[Tensor, "batch images"]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` (batch, visual) over the tokens of each image: (batch, images)."""
        table = torch.zeros_like(self.sizes, dtype=values.dtype)
        return table.scatter_add(1, self.number, values)

    def amin(self, values: Tensor) -> Tensor:
        """Smallest of `values` (batch, visual) in each image, inf for an image without tokens: (batch, images)."""
        table = torch.full(self.sizes.shape, float("inf"), dtype=values.dtype, device=values.device)
        return table.scatter_reduce(1, self.number, values, "amin")

    def spread(self, table: Tensor) -> Tensor:
        """Entry of `table` (batch, images) for each token's image: (batch, visual)."""
        return table.gather(1, self.number)


def rank(
    scores: Float[Tensor, "batch visual"], alive: Bool[Tensor, "batch visual"], images: Images | None = None
) -> Int[Tensor, "batch visual"]:
    """Rank of every token in its sample by descending score, best = 0; tokens that are not alive come last.

    With `images`, the rank within its image. Ties go to the earlier token, independent of the batch.
    """
    order = scores.masked_fill(~alive, float("-inf")).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    if images is not None:
        # Stable sort by image, then subtract each image's first place.
        order = order.gather(1, images.number.gather(1, order).argsort(dim=1, stable=True))
        number = images.number.gather(1, order)
        starts = torch.nn.functional.pad(number[:, 1:] != number[:, :-1], (1, 0))
        places = places - (places * starts).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, places)


def share(count: Int[Tensor, " batch"], sizes: Int[Tensor, "batch images"]) -> Int[Tensor, "batch images"]:
    """Split `count` over images in proportion to their sizes, in whole numbers that don't exceed the sizes.

    The largest remainders are rounded up; ties go to the earlier image. If an image would get none although `count`
    suffices for one each, every image gets one first and the rest is split in proportion to the remaining sizes [ours].
    """
    count = torch.minimum(count, sizes.sum(1))
    first = (sizes > 0).long()
    images = first.sum(1)
    shares = _largest_remainder(count, sizes)
    one_each = first + _largest_remainder((count - images).clamp(min=0), sizes - first)
    some_empty = (shares < first).any(1) & (count >= images)
    return torch.where(some_empty[:, None], one_each, shares)


def _largest_remainder(count: Tensor, sizes: Tensor) -> Tensor:
    total = sizes.sum(1, keepdim=True).clamp(min=1)
    product = count[:, None] * sizes
    shares, remainders = product // total, product % total
    places = remainders.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return shares + (places < (count - shares.sum(1))[:, None]).long()


def top_k(
    scores: Float[Tensor, "batch visual"],
    alive: Bool[Tensor, "batch visual"],
    count: Int[Tensor, " batch"],
    images: Images | None = None,
) -> Bool[Tensor, "batch visual"]:
    """Keep the `count` best alive tokens of each sample (all if fewer are alive).

    The images of one sample share its count in proportion to their alive tokens and are ranked separately.
    """
    limit = count[:, None] if images is None else images.spread(share(count, images.sum(alive.long())))
    return (rank(scores, alive, images) < limit) & alive


def pick(
    gains: Float[Tensor, "batch visual"],
    open_to: Bool[Tensor, "batch visual"],
    order: Int[Tensor, "batch visual"],
    count: Int[Tensor, " batch"],
) -> tuple[Int[Tensor, "batch 1"], Bool[Tensor, "batch 1"], Int[Tensor, "batch visual"]]:
    """One step of a greedy method: the best token not picked yet; ties go to the earlier one.

    `order` is the step at which each token was picked, -1 if it was not. Returns the column of the pick, whether it is
    valid (False if a sample has reached its `count` or no token that is `open_to` picks is left), and the new order.
    """
    steps = order.amax(1, keepdim=True) + 1
    free = open_to & (order < 0)
    best = gains.masked_fill(~free, float("-inf")).argmax(1, keepdim=True)
    valid = (steps < count[:, None]) & free.any(1, keepdim=True)
    return best, valid, order.scatter(1, best, torch.where(valid, steps, order.gather(1, best)))


def threshold(
    logits: Float[Tensor, "batch visual"],
    alive: Bool[Tensor, "batch visual"],
    at_least: int = 1,
    images: Images | None = None,
) -> Bool[Tensor, "batch visual"]:
    """Keep alive tokens with sigmoid(logit) > 0.5, and always the `at_least` best ones (RCP, arXiv 2604.04972).

    If a sample has several images, the best ones of each [ours].
    """
    return ((logits > 0) | (rank(logits, alive, images) < at_least)) & alive


def top_mass(
    logits: Float[Tensor, "batch visual"], alive: Bool[Tensor, "batch visual"], mass: float
) -> Bool[Tensor, "batch visual"]:
    """Keep the fewest alive tokens whose share of softmax(logits) reaches `mass`; confident logits keep few."""
    share = logits.float().masked_fill(~alive, float("-inf")).softmax(1)
    order = share.argsort(dim=1, descending=True, stable=True)
    sorted_share = share.gather(1, order)
    before = sorted_share.cumsum(1) - sorted_share
    return torch.zeros_like(alive).scatter(1, order, before < mass) & alive


def straight_through(hard: Bool[Tensor, "*shape"], soft: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Value of `hard` (0 or 1), gradient of `soft`."""
    return hard.to(soft.dtype) + soft - soft.detach()


def logistic_noise(like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard logistic noise, the difference of two Gumbel variables, from the global generator."""
    uniform = torch.rand_like(like).clamp(1e-6, 1 - 1e-6)
    return uniform.log() - torch.log1p(-uniform)


def log_gate(gate: Float[Tensor, "*shape"], eps: float) -> Float[Tensor, "*shape"]:
    """log(eps + (1 - eps) gate): bias on attention logits equivalent to a gate on attention weights.

    With gate in {0, 1} and the softmax's normalisation, this is the paper's multiplication of visual columns by c. The
    derivative 1/eps of the log cancels the factor eps in the softmax weight, so a dropped token gets the exact gradient
    of adding it again; eps must not underflow: 1e-8 in fp32 or bf16. Of its weight a dropped token keeps the share eps,
    by which soft masking differs from dropping: more where its logit is far above those of the tokens kept.
    """
    return (eps + (1.0 - eps) * gate).log()


def clip_gradient(values: Float[Tensor, "batch visual"], norm: float) -> Float[Tensor, "batch visual"]:
    """Identity in forward; in backward, each sample's gradient is scaled down to a norm of at most `norm`."""
    if not values.requires_grad:
        return values
    values = values * 1.0  # a new tensor, so that the hook doesn't stay on the caller's

    def clip(gradient: Tensor) -> Tensor:
        length = gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return (gradient * (norm / length).clamp(max=1.0)).nan_to_num(0.0, 0.0, 0.0)

    values.register_hook(clip)
    return values


def centre_gradient(
    values: Float[Tensor, "batch visual"],
    among: Bool[Tensor, "batch visual"],
    slope: Float[Tensor, "batch visual"] | None = None,
) -> Float[Tensor, "batch visual"]:
    """Identity in forward; in backward, each sample's gradient less its mean over the tokens in `among`, 0 elsewhere.

    `slope`, the derivative of each value with respect to the score that it was computed from, weighs the mean: then the
    gradients of these scores sum to 0.
    """
    if not values.requires_grad:
        return values
    values = values * 1.0  # a new tensor, so that the hook doesn't stay on the caller's
    weights = among.to(values.dtype) if slope is None else slope.to(values.dtype) * among

    def centre(gradient: Tensor) -> Tensor:
        total = weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        mean = (gradient * weights).sum(1, keepdim=True) / total
        return (gradient - mean).masked_fill(~among, 0.0)

    values.register_hook(centre)
    return values


def pack(
    present: Bool[Tensor, "batch seq"], width: int | None = None
) -> tuple[Int[Tensor, "batch kept"], Bool[Tensor, "batch kept"]]:
    """Kept columns, in order and packed to the right, and the mask of real ones.

    Samples that keep fewer columns than the longest one get filler columns on the left, as with left padding.
    `width`: columns of the longest one, if known; otherwise the device is synchronised.
    """
    counts = present.sum(1)
    width = int(counts.max()) if width is None else width
    columns = present.to(torch.uint8).argsort(dim=1, stable=True)[:, present.shape[1] - width :]
    real = torch.arange(width, device=present.device) >= (width - counts)[:, None]
    return columns, real


def compact(
    flags: Bool[Tensor, "batch seq"], width: int | None = None
) -> tuple[Int[Tensor, "batch found"], Bool[Tensor, "batch found"]]:
    """Columns where `flags` is set, in order and packed to the left, and the mask of real ones.

    `width`: upper bound on the flags set in a sample, if known; otherwise the device is synchronised.
    """
    counts = flags.sum(1)
    width = int(counts.max()) if width is None else width
    columns = (~flags).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    real = torch.arange(width, device=flags.device) < counts[:, None]
    return columns, real


def gather_rows(
    states: Num[Tensor, "batch seq width"], columns: Int[Tensor, "batch some"]
) -> Num[Tensor, "batch some width"]:
    """States, or whatever else has a row per column, at the given columns of each sample.

    `index_select` copies whole rows; `gather` indexes every element, which took 13 times as long on a CPU.
    """
    batch, length, width = states.shape
    rows = states.reshape(batch * length, width).index_select(0, _flat(columns, length))
    return rows.view(*columns.shape, width)


def put_rows(
    states: Float[Tensor, "batch some width"], columns: Int[Tensor, "batch some"], length: int
) -> Float[Tensor, "batch {length} width"]:
    """Inverse of `gather_rows`: a sequence of `length` with these states at their columns, zeros elsewhere."""
    batch, _, width = states.shape
    full = states.new_zeros(batch * length, width)
    return full.index_copy(0, _flat(columns, length), states.flatten(0, 1)).view(batch, length, width)


def _flat(columns: Int[Tensor, "batch some"], length: int) -> Int[Tensor, " all"]:
    """Column indices into the concatenation of all samples' sequences."""
    if columns.shape[0] == 1:
        return columns.flatten()
    return (columns + torch.arange(columns.shape[0], device=columns.device)[:, None] * length).flatten()


def hashed_uniform(seed: Int[Tensor, " batch"], ordinal: Int[Tensor, "batch visual"]) -> Float[Tensor, "batch visual"]:
    """Pseudo-random numbers in [0, 1) that depend on (seed, ordinal) alone, not on generator, batch or worker.

    A 32-bit multiply-and-shift mixer in int64, the same on every device.
    """
    mask = 0xFFFFFFFF
    state = (seed[:, None] * 0x9E3779B1 + ordinal * 0x85EBCA77 + 0x165667B1) & mask
    for multiplier, shift in ((0x7FEB352D, 15), (0x2C1B3C6D, 13)):
        state = state ^ (state >> shift)
        state = (state * multiplier) & mask
    state = state ^ (state >> 16)
    return (state.to(torch.float64) / 2**32).to(torch.float32)


def row_mean(
    probabilities: Float[Tensor, "batch rows seq"], row_mask: Bool[Tensor, "batch rows"]
) -> Float[Tensor, "batch seq"]:
    """Mean over the real rows."""
    weight = row_mask.to(probabilities.dtype)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
    return (weight[:, None] @ probabilities).squeeze(1)
