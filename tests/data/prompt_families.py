"""Processors of the supported families, with small tokenizers, for what their prompts read.

The processors are transformers' own; images, tokens for them and special tokens are made as for the real checkpoints.
No checkpoint was loaded from the hub: tokenizers are letters or bytes with the family's special tokens, and templates
are written anew, to render chat conversations as the published ones do. Those were read in

    llava-1.5           llava-hf/llava-1.5-7b-hf (`instruct_samples.LLAVA`)
    llava-next-vicuna   transformers, the conversion script of LLaVA-NeXT
    llava-next-mistral  trl, chat_templates/llava_next.jinja: the one of llava-hf/llava-v1.6-mistral-7b-hf
    llava-onevision     transformers, tests/models/llava_onevision/test_processing_llava_onevision.py
    internvl            transformers, models/internvl/convert_internvl_weights_to_hf.py
    qwen2.5-vl          trl, chat_templates/qwen2_5_vl_training.jinja
    qwen3-vl            trl, chat_templates/qwen3_vl.jinja: the one of Qwen/Qwen3-VL
"""

from collections.abc import Callable
from typing import Any

from instruct_samples import llama_tokenizer, make_processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
)

_IMAGES = "{% for part in message.content if part.type == 'image' %}"
_TEXTS = "{% for part in message.content if part.type == 'text' %}"
VICUNA = (
    "{% for message in messages %}{{ message.role.upper() + ': ' }}"
    f"{_IMAGES}{{{{ '<image>\\n' }}}}{{% endfor %}}{_TEXTS}{{{{ part.text + ' ' }}}}{{% endfor %}}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' }}"
    f"{_IMAGES}{{{{ '<image>\\n' }}}}{{% endfor %}}{_TEXTS}{{{{ part.text }}}}{{% endfor %}}{{{{ ' [/INST]' }}}}"
    "{% else %}{{ ' ' + message.content[0].text + '</s> ' }}{% endif %}{% endfor %}"
)
ONEVISION = (  # "assistant \n" before an answer that is given, "assistant\n" before one that is asked for
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' }}"
    f"{_IMAGES}{{{{ '<image>' }}}}{{% endfor %}}{_TEXTS}{{{{ '\\n' + part.text }}}}{{% endfor %}}{{{{ '<|im_end|>' }}}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chatml(image: str, system: str = "") -> str:
    """ChatML with its parts in their order."""
    return (
        (f"{{% if messages[0].role != 'system' %}}{{{{ {system!r} }}}}{{% endif %}}" if system else "")
        + "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% for part in message.content %}"
        + f"{{% if part.type == 'image' %}}{{{{ {image!r} }}}}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        + "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def byte_tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """Bytes, as Qwen's tokenizer has them before any merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    return made


class WithoutVideos:
    """Lets a processor be built without its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, name: str, value: Any) -> type:
        return type(value) if value is None else super().check_argument_for_proper_class(name, value)


class OneVision(WithoutVideos, LlavaOnevisionProcessor):
    pass


class InternVL(WithoutVideos, InternVLProcessor):
    pass


class Qwen25(WithoutVideos, Qwen2_5_VLProcessor):
    pass


class Qwen3(WithoutVideos, Qwen3VLProcessor):
    pass


def _next(template: str) -> LlavaNextProcessor:
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16]]
    )
    return LlavaNextProcessor(
        images, llama_tokenizer(), 4, "default", chat_template=template, num_additional_image_tokens=1
    )


def _onevision() -> OneVision:
    images = LlavaOnevisionImageProcessor(size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16]])
    tokenizer = byte_tokenizer(["<image>", "<video>"])
    return OneVision(images, tokenizer, None, 16, "full", chat_template=ONEVISION)


def _internvl() -> InternVL:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = byte_tokenizer([], **names, video_token="<video>")
    images = GotOcr2ImageProcessor(size={"height": 16, "width": 16})
    return InternVL(images, tokenizer, image_seq_length=4, chat_template=chatml("<IMG_CONTEXT>\n"))


def _qwen(made: type, system: str = "") -> Any:
    images = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}, min_pixels=64, max_pixels=4096
    )
    tokenizer = byte_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    return made(images, tokenizer, None, chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>", system))


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava-1.5": make_processor,
    "llava-next-vicuna": lambda: _next(VICUNA),
    "llava-next-mistral": lambda: _next(MISTRAL),
    "llava-onevision": _onevision,
    "internvl": _internvl,
    "qwen2.5-vl": lambda: _qwen(Qwen25, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
    "qwen3-vl": lambda: _qwen(Qwen3),
}
