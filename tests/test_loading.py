"""Every way to come by a model: shipped shapes, random weights, objects, folders, and what is said without one."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from lit_prune.errors import LitPruneError
from lit_prune.shapes import FOLDER, names, shipped_config

# Parameters of the published checkpoints, in billions.
PUBLISHED = {
    "OpenGVLab/InternVL3-8B-hf": 7.94,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
    "llava-hf/llava-1.5-13b-hf": 13.35,
    "llava-hf/llava-1.5-7b-hf": 7.06,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8.03,
    "llava-hf/llava-v1.6-mistral-7b-hf": 7.57,
    "llava-hf/llava-v1.6-vicuna-7b-hf": 7.06,
}
SHAPES = pytest.mark.parametrize("name", names())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -- shipped shapes -------------------------------------------------------------------------------------------------


@SHAPES
def test_a_shipped_shape_has_the_size_of_its_checkpoint(name):
    config = shipped_config(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert type(model).__name__ == config.architectures[0]
    assert round(count(model) / 1e9, 2) == PUBLISHED[name]
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@SHAPES
def test_a_shipped_shape_says_what_it_means(name):
    """Whatever the file says is what the library reads; nothing is renamed or dropped on the way."""
    written, read = json.loads((FOLDER / f"{name}.json").read_text()), shipped_config(name).to_dict()

    def compare(part: dict, found: dict, where: str = "") -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                compare(value, found[key], f"{where}{key}.")
            else:
                given = list(found[key]) if isinstance(found[key], tuple) else found[key]
                assert given == value, f"{where}{key}"

    compare(written, read)


def test_every_family_is_shipped_once():
    assert set(names()) == set(PUBLISHED)
    assert len({shipped_config(name).model_type for name in names()}) == 6


def test_two_calls_share_no_configuration():
    shipped_config(names()[0]).text_config.num_hidden_layers = 1
    assert shipped_config(names()[0]).text_config.num_hidden_layers != 1


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(LitPruneError, match=r"someone/else is not shipped; shipped are: .*llava-hf/llava-1\.5-7b-hf"):
        shipped_config("someone/else")
