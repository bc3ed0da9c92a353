"""A pruned model behind a server: the library's own pipeline, hundreds of requests, several threads."""

import gc
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import tiny
import torch
from PIL import Image
from torch import nn
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, pipeline

import lit_prune
from lit_prune.host import Record, Session
from lit_prune.host.attention import Request, Tap
from lit_prune.host.cache import CacheState
from lit_prune.host.state import Forward
from lit_prune.micro.model import build_config, build_processor
from lit_prune.pruners.rcp import RCP
from lit_prune.repair import RepairAdapter
from lit_prune.vlm import VLM

PROMPTS = [
    "what colour is the circle ?",
    "how many red circles are in the picture ?",
    "is there a star ?",
    "what is left of the blue square in the picture ?",
]
OURS = (Forward, CacheState, Request, Tap, Session, Record, DynamicCache)


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (96, 96, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


IMAGES = [picture(seed) for seed in range(len(PROMPTS))]
CHATS = [
    [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
    for image, prompt in zip(IMAGES, PROMPTS, strict=True)
]


@pytest.fixture(scope="module")
def served() -> VLM:
    """micro-LLaVA as shipped, pruned by RCP with every weight moved from its start."""
    vlm = lit_prune.load("micro").attach(tiny.ROOT / "configs" / "pruners" / "rcp.yaml", keep=24)
    tiny.shake(vlm.plugin, 0.05)
    return vlm


@pytest.fixture(scope="module")
def pipe(served):
    """The stock pipeline around the pruned model."""
    return pipeline("image-text-to-text", model=served.model, processor=served.processor)


def texts(answers: list) -> list[str]:
    """The generated texts of a pipeline's output; a list of chats gives a list for each."""
    return [(a[0] if isinstance(a, list) else a)["generated_text"].strip() for a in answers]


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def alive() -> Counter:
    """Live objects of this project and of the library's cache, and live tensors."""
    gc.collect()
    objects = [type(x) for x in gc.get_objects() if isinstance(x, (*OURS, torch.Tensor))]
    return Counter(kind.__name__ for kind in objects)


# -- pipeline -------------------------------------------------------------------------------------------------------
def test_pipeline_prunes_and_answers_as_we_do(served, pipe):
    """Chats one by one, several at once, and batches of texts of unlike length."""
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}
    expected = served.answer(IMAGES, PROMPTS, max_new_tokens=6)
    record = Record()
    with served.using(Session(record=record)):
        assert texts(pipe(text=CHATS[0], **options)) == expected[:1]
    assert record.trace.average_visual().tolist() == [24]
    assert texts(pipe(text=CHATS, **options)) == expected
    prompts = [served.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in CHATS]
    for size in (1, 2, 4):
        assert texts(pipe(images=IMAGES, text=prompts, batch_size=size, **options)) == expected


def test_pruning_may_be_switched_under_a_pipeline(served, pipe):
    """A pipeline holds the model, so what is attached to it later counts."""
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}
    plugin, pruned = served.plugin, texts(pipe(text=CHATS, **options))
    served.detach()
    plain = texts(pipe(text=CHATS, **options))
    assert plain == served.answer(IMAGES, PROMPTS, max_new_tokens=6)
    assert plain != pruned
    served.attach(plugin)
    assert texts(pipe(text=CHATS, **options)) == pruned


# -- many requests --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("requests", [80, pytest.param(400, marks=pytest.mark.slow)])
def test_requests_leave_nothing_behind(requests):
    """Hooks, our objects, caches and tensors are as many as before; memory stays flat. On a shallow model, for time."""
    config = build_config()
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 4, 1
    served = lit_prune.load(config, random_weights=True, processor=build_processor())
    served.attach(RCP([1, 2], [2.0, 1.0], inner=16), RepairAdapter([3], [1], bottleneck=16), keep=64)
    pipe = pipeline("image-text-to-text", model=served.model, processor=served.processor)
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 2, "do_sample": False}}

    def serve(requests: int) -> None:
        for request in range(requests):
            pipe(text=CHATS[request % len(CHATS)], **options)

    serve(40)  # lazy imports, memoised schedules, the allocator
    process, hooks, before = psutil.Process(), count_hooks(served.model), alive()
    resident = process.memory_info().rss
    serve(requests)
    assert count_hooks(served.model) == hooks
    assert alive() == before
    assert process.memory_info().rss - resident < 8e6


def test_requests_allocate_nothing_for_good(tiny_model):
    """What Python allocated in this package's files is freed again.

    A leaked forward would be several kilobytes a request. The interpreter itself keeps some names of attributes that it
    has looked up (a few hundred bytes a request, up to a bound).
    """
    inputs, vlm = tiny.batch(tiny.samples((45,))), tiny.attach(tiny_model, tiny.small_rcp(), repair=tiny.small_repair())

    def held(requests: int) -> int:
        for _ in range(requests):
            tiny.generate(vlm, inputs, tokens=2)
        gc.collect()
        snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/lit_prune/*")])
        return sum(trace.size for trace in snapshot.traces)

    tracemalloc.start()
    try:
        before = held(5)
        assert before > 0
        assert held(30) - before < 30 * 1_000
    finally:
        tracemalloc.stop()
        vlm.detach()


def test_a_hundred_cycles_of_attaching_and_answering(tiny_model):
    inputs, hooks = tiny.batch(tiny.samples((45,))), count_hooks(tiny_model)
    vlm = tiny.attach(tiny_model, tiny.small_rcp(), repair=tiny.small_repair())
    tiny.generate(vlm, inputs, tokens=2)
    vlm.detach()
    del vlm
    before = alive()
    for cycle in range(100):
        vlm = tiny.attach(tiny_model, tiny.small_rcp(), repair=tiny.small_repair())
        if cycle % 20 == 0:
            tiny.generate(vlm, inputs, tokens=2)
        vlm.detach()
        assert count_hooks(tiny_model) == hooks
    del vlm
    assert alive() == before


# -- threads --------------------------------------------------------------------------------------------------------
def test_threads_share_a_pruned_model(served):
    """What belongs to a request travels with it, so requests that overlap don't meet; each answers as if alone."""
    requests = [(IMAGES[i : i + 2], PROMPTS[i : i + 2]) for i in (0, 1, 2)] * 4

    def answer(request: tuple) -> list[str]:
        return served.answer(*request, max_new_tokens=4)

    alone = [answer(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, requests)) == alone


# -- continuous batching --------------------------------------------------------------------------------------------
def test_continuous_batching_is_refused_with_a_sentence(served):
    """It packs requests into one paged cache for all layers; afterwards the model answers as before."""
    before = served.answer(IMAGES, PROMPTS, max_new_tokens=4)
    ids = served.encode(IMAGES[:1], PROMPTS[:1])["input_ids"][0].tolist()
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=2)
    small = ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=256)  # else as large as memory
    outputs = served.model.generate_batch(
        [ids], generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    (output,) = outputs.values()
    assert output.error.startswith("continuous batching can't be pruned")
    assert served.answer(IMAGES, PROMPTS, max_new_tokens=4) == before
