"""A tiny processor of LLaVA-1.5's kind, and instruction files to read with it."""

import json

from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from lit_prune.data.instruct import InstructData

# llava-hf/llava-1.5-7b-hf
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
UNMARKED = LLAVA.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}{{ '<image>' if content['type'] == 'image' else content['text'] }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = 4  # image tokens an image


def llama_tokenizer(eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Letters with SentencePiece's handling of spaces: the space before a word is part of its first token."""
    letters = [chr(i) for i in range(33, 127)] + ["\n", "▁"] + ["▁" + chr(i) for i in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate(["<s>", eos, "<pad>", "<unk>", *letters])}
    merges = [("▁", chr(i)) for i in range(33, 127)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]*"), "isolated")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>"]})
    return fast


def make_processor(template: str = LLAVA, eos: str = "</s>") -> LlavaProcessor:
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=llama_tokenizer(eos),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def conversation(*turns: str) -> list[dict]:
    """human and gpt in turn."""
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def write_samples(folder, count: int, bad: tuple[int, ...] = (), name: str = "data.json"):
    """Instruction data of one shared image; the samples in `bad` name a missing one. Answers are the index."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    samples = [
        {
            "id": f"s{i}",
            "image": "missing.png" if i in bad else "red.png",
            "conversations": conversation("<image>\nQ" + "?" * (i % 3), str(i)),
        }
        for i in range(count)
    ]
    path = folder / name
    path.write_text("\n".join(map(json.dumps, samples)) if name.endswith("l") else json.dumps(samples))
    return path


def make_data(processor, **options) -> InstructData:
    """A data module of small batches with this processor."""
    data = InstructData(base="unused", **{"batch_size": 4, "eval_batch_size": 4, **options})
    data.processor = processor
    return data
