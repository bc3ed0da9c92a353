"""Names that differ between versions of transformers, and what the hooks rely on, checked when a plug-in attaches.

Everything here is found by looking at the installed library and the attached model, never by comparing version numbers:
a version in between, a fork, or a model with code of its own may use either name.
"""

import inspect
from functools import cache as memoize
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from lit_prune.errors import LitPruneError

TESTED = "5.18 to 5.24"  # versions of transformers that pyproject.toml admits: jobs/test_versions.sh tests both ends
CACHE_NAMES = ("cache", "past_key_values")  # the KV cache as a keyword and in outputs: since 5.24, and before


def cache_of(arguments: Any) -> Any:
    """The KV cache among keyword arguments, or in the output of a model or of `generate()`; None if there is none."""
    for name in CACHE_NAMES:
        # An output's own get() warns about the older name, which it also answers to.
        found = dict.get(arguments, name) if isinstance(arguments, dict) else getattr(arguments, name, None)
        if found is not None:
            return found
    return None


def cache_keyword(module: nn.Module) -> str:
    """Keyword under which a model, a decoder or a layer takes the KV cache.

    Raises:
        LitPruneError: it takes none under a known name.
    """
    return _cache_keyword(type(module).forward, type(module).__name__)


@memoize
def _cache_keyword(function: Any, owner: str) -> str:
    found = next((name for name in CACHE_NAMES if name in _parameters(function)), None)
    if found is None:
        raise unsupported(f"{owner} takes no KV cache as {' or '.join(map(repr, CACHE_NAMES))}")
    return found


@memoize
def _parameters(function: Any) -> frozenset[str]:
    """Names of a function's parameters, seen through decorators."""
    return frozenset(inspect.signature(function).parameters)


def causal_mask(
    config: Any, hidden: Tensor, valid: Tensor | None, cache: Any, layer: int, skip: bool
) -> Tensor | BlockMask | None:
    """Causal mask in the form that the model's attention takes, sized by one layer's own cache; None: not needed.

    Args:
        config: the decoder's.
        hidden: states at the layer's input (batch, seq, width).
        valid: real columns (batch, cached + seq), or None if all are.
        cache: the KV cache, or None.
        layer: the layer whose cached columns count.
        skip: whether attention may be causal without a mask.
    """
    from transformers.masking_utils import create_causal_mask  # slow to import

    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        position_ids=None,  # ids with gaps would be read as packed sequences
        layer_idx=layer,
        allow_is_causal_skip=skip,
        **{_cache_keyword(create_causal_mask, "create_causal_mask"): cache},
    )


def bidirectional_mask(config: Any, hidden: Tensor, valid: Tensor) -> Tensor | BlockMask | None:
    """Mask of an encoder's layer, in the form that its attention takes; None: not needed."""
    from transformers.masking_utils import create_bidirectional_mask  # slow to import

    return create_bidirectional_mask(config, hidden, valid)


def unsupported(missing: str) -> LitPruneError:
    """The error for an installed library that lacks what the hooks rely on."""
    import transformers

    return LitPruneError(
        f"transformers {transformers.__version__}: {missing}, which pruning relies on; known to work: transformers "
        f"{TESTED} (pip install 'transformers>=5.18,<5.25')"
    )
