"""Laws of pruning on tiny random models of the classes in transformers' image-text-to-text list."""

import pytest

from lit_prune.evaluation.laws import measure
from lit_prune.host.zoo.shrink import listed

# One class for each thing that a decoder may do with its tokens.
SAMPLE = {
    "aria": "experts, and attention that is read through the layer",
    "cohere2_vision": "windows, and layers without positions",
    "ernie4_5_vl_moe": "types of tokens beside the states, M-RoPE",
    "exaone4_5": "no norm at a layer's input",
    "gemma3": "images whose tokens see each other both ways, beside windows",
    "gemma4": "inputs of each layer, given by place",
    "kimi_k25": "latent attention",
    "lfm2_vl": "convolutions",
    "molmo2": "masks of its own, norms of another place",
    "muse_glimmer": "gates on queries, layers without rotary embeddings",
    "nemotron_h_omni": "recurrences and layers that mix nothing",
    "qwen3_5": "linear attention",
    "unlimited_ocr": "a window over the answer alone",
    "video_llava": "pixels under another name",
    "mistral_large4": "layers that choose their keys",
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_laws_hold(kind):
    found = measure(kind)
    assert (found.verdict, found.error, found.refused, found.broken) == ("works", None, None, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", listed())
def test_every_class_works_or_is_refused_in_a_sentence(kind):
    found = measure(kind)
    assert found.verdict in ("works", "refused", "library"), (found.error, found.broken)
    if found.refused is not None:
        assert "\n" not in found.refused
