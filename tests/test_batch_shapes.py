"""A padded batch equals its samples alone, whatever the padding: generated batch shapes through every method.

The samples of a batch are drawn from a few prompts, so that what each gives alone is computed once. hypothesis
generates the same inputs in every run; raise `max_examples` to look further.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from families import FAMILIES, Picture, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE, PAD, PRUNERS, TOLERANCE, gap
from torch import Tensor
from transformers import StaticCache

from lit_prune.host import Record, Session
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.vlm import VLM

EVERY = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda path: path.stem)
LLAVA = FAMILIES["llava-1.5"]
KEEPS = (10, 13, 36)
TOKENS = 3
# (images, words of the question)
SHAPES = [(1, 3), (1, 3), (1, 8), (1, 13), (0, 5), (0, 12), (2, 4), (1, 1)]
PROMPTS = [
    prompt(LLAVA, [Picture((24, 24), 10 * row + n) for n in range(images)], words, 100 + row)
    for row, (images, words) in enumerate(SHAPES)
]
REGIONS = (torch.rand(len(PROMPTS), 2, 72, generator=torch.Generator().manual_seed(5)) - 0.7).clamp(min=0)
QUESTIONS = torch.randint(2, 50, (len(PROMPTS), 5), generator=torch.Generator().manual_seed(7))


def examples(count: int) -> settings:
    """`count` inputs, the same in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Batch:
    """Prompts by number and the padding on the right of each; what a row lacks in width is padded on its left."""

    rows: tuple[int, ...]
    right: tuple[int, ...]
    extra: int = 0
    multiple: int = 1

    def inputs(self) -> dict[str, Tensor]:
        """Model inputs."""
        longest = max(len(PROMPTS[row].ids) + right for row, right in zip(self.rows, self.right, strict=True))
        width = -(-(longest + self.extra) // self.multiple) * self.multiple
        ids, mask = (torch.full((len(self.rows), width), fill) for fill in (PAD, 0))
        for place, (row, right) in enumerate(zip(self.rows, self.right, strict=True)):
            end = width - right
            ids[place, end - len(PROMPTS[row].ids) : end] = PROMPTS[row].ids
            mask[place, end - len(PROMPTS[row].ids) : end] = 1
        pictures = [picture for row in self.rows for picture in PROMPTS[row].pictures]
        return {"input_ids": ids, "attention_mask": mask, **(LLAVA.inputs(pictures) if pictures else {})}


@st.composite
def batches(draw: st.DrawFn, sides: bool = True) -> Batch:
    """Up to four prompts with padding on the left, with `sides` on the right or on both sides too."""
    rows = tuple(draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=4)))
    right = tuple(draw(st.integers(0, 6)) if sides else 0 for _ in rows)
    return Batch(rows, right, draw(st.integers(0, 9)), draw(st.sampled_from([1, 8, 64])))


def alone(row: int) -> Batch:
    return Batch((row,), (0,))


@cache
def model() -> torch.nn.Module:
    return tiny.build_model()


@cache
def plugin(pruner: Path):
    """The method and its repair adapter, moved away from their start; made once."""
    vlm = tiny.attach(model(), pruner, 36)
    made = vlm.plugin
    vlm.detach()
    return made


@pytest.fixture
def vlm(pruner: Path, keep: int) -> Iterator[VLM]:
    made = VLM(model(), None, "tiny").attach(plugin(pruner), keep=keep)
    yield made
    made.detach()


# -- forward --------------------------------------------------------------------------------------------------------
def run(vlm: VLM, batch: Batch, use_cache: bool) -> tuple[Tensor, Record, Tensor]:
    """Logits of one forward, what it recorded, and which columns are real text."""
    inputs, record = batch.inputs(), Record()
    session = Session(hints={"regions": REGIONS[list(batch.rows)]}, record=record)
    with torch.no_grad(), vlm.using(session):
        logits = vlm.model(**inputs, use_cache=use_cache).logits
    return logits, record, inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)


@EVERY
@pytest.mark.parametrize("keep", KEEPS)
def test_forward_of_a_padded_batch_equals_its_samples_alone(vlm):
    own = cache(lambda row: run(vlm, alone(row), False))

    @given(batch=batches(), use_cache=st.booleans())
    @examples(18)
    def check(batch: Batch, use_cache: bool) -> None:
        logits, record, text = run(vlm, batch, use_cache)
        for place, row in enumerate(batch.rows):
            expected, lone, lone_text = own(row)
            assert gap(logits[place][text[place]], expected[0][lone_text[0]]) <= TOLERANCE
            for stage, other in zip(record.stages, lone.stages, strict=False):
                assert stage.kept[place].nonzero().tolist() == other.kept[0].nonzero().tolist()
            assert record.trace.average_visual()[place] == lone.trace.average_visual()[0]

    check()


# -- generation -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Way:
    """How to generate."""

    cache: str = "dynamic"  # or "static", or "none": each step feeds the whole sequence again
    beams: int = 1
    returned: int = 1
    assisted: bool = False
    turns: int = 1


@st.composite
def ways(draw: st.DrawFn) -> Way:
    kind = draw(st.sampled_from(["greedy", "beams", "assisted", "dialogue"]))
    cache = draw(st.sampled_from(["dynamic", "static", "none"]))
    if kind == "beams":
        beams = draw(st.integers(2, 3))
        return Way("dynamic" if cache == "static" else cache, beams, draw(st.integers(1, beams)))
    if kind == "assisted":
        return Way(assisted=True)
    return Way(cache if kind == "greedy" or cache != "none" else "static", turns=1 + (kind == "dialogue"))


def answer(vlm: VLM, batch: Batch, way: Way) -> tuple[Tensor, Tensor]:
    """Tokens (rows, returned, tokens) and, where they are one path, the logits of the last answer."""
    inputs = batch.inputs()
    options = {"max_new_tokens": TOKENS, "do_sample": False, "suppress_tokens": [IMAGE, PAD], "pad_token_id": PAD}
    options |= {"num_beams": way.beams, "num_return_sequences": way.returned, "use_cache": way.cache != "none"}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    if way.assisted:
        options |= {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if way.cache == "static":
        static = StaticCache(config=model().config.get_text_config(), max_cache_len=256)
        options |= {cache_keyword(model()): static, "disable_compile": True}
    with vlm.using(Session(hints={"regions": REGIONS[list(batch.rows)]})):
        out = vlm.model.generate(**inputs, **options)
        if way.turns == 2:
            ids = torch.cat([out.sequences, QUESTIONS[list(batch.rows)]], 1)
            ones = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
            mask = torch.cat([inputs["attention_mask"], ones], 1)
            options[cache_keyword(model())] = cache_of(out)
            out = vlm.model.generate(input_ids=ids, attention_mask=mask, **options)
    return out.sequences[:, -TOKENS:].view(len(batch.rows), way.returned, TOKENS), torch.stack(out.logits, 1)


@EVERY
@pytest.mark.parametrize("keep", [13])
def test_answers_of_a_padded_batch_equal_its_samples_alone(vlm):
    """Alone without padding, by a dynamic cache and without an assistant."""
    own = cache(lambda row, way: answer(vlm, alone(row), way))

    @given(batch=batches(sides=False), way=ways())
    @examples(8)
    def check(batch: Batch, way: Way) -> None:
        if way.assisted:  # the library takes one prompt there
            batch = Batch(batch.rows[:1], batch.right[:1], batch.extra, batch.multiple)
        tokens, logits = answer(vlm, batch, way)
        for place, row in enumerate(batch.rows):
            expected, expected_logits = own(row, Way(beams=way.beams, returned=way.returned, turns=way.turns))
            assert tokens[place].tolist() == expected[0].tolist()
            if way.beams == 1 and not way.assisted:
                assert gap(logits[place], expected_logits[0]) <= TOLERANCE

    check()
