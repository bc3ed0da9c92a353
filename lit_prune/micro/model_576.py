"""micro-LLaVA with 576 visual tokens and 32 decoder layers: LLaVA-1.5's geometry, 128 wide.

The same classes, prompt and processor as the model of 144 tokens; sizes and vocabulary differ.
"""

from pathlib import Path

import torch
from tokenizers import models

from lit_prune.micro import model as micro
from lit_prune.micro.model import (
    BOS,
    EOS,
    PAD,
    SPECIAL,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from lit_prune.micro.questions_576 import WORDS
from lit_prune.micro.scenes_576 import GRID, IMAGE_SIZE, PATCH_SIZE

WEIGHTS = Path(__file__).parent / "weights_576"
VISUAL_TOKENS = GRID * GRID
LAYERS = 32
TOWER_LAYERS = 6
WIDTH = micro.WIDTH
INNER = 192  # width of the decoder's MLP: thin, so that 32 layers cost what 24 usual ones would


def build(seed: int = 0, layers: int = LAYERS) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained model in float32 and eval mode, and its processor."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(layers)).eval()
    _place(model)
    torch.random.set_rng_state(state)
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=8)
    return model, build_processor()


def _place(model: LlavaForConditionalGeneration) -> None:
    """Begin the tower's position embeddings as waves over rows and columns, so that tokens say where they are."""
    quarter = WIDTH // 4
    angles = torch.arange(GRID)[:, None] / GRID ** (torch.arange(quarter) / quarter)  # place, wave
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = waves.repeat_interleave(GRID, 0), waves.repeat(GRID, 1)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = 0.5 * torch.cat([rows, columns], -1)


def build_config(layers: int = LAYERS) -> LlavaConfig:
    """CLIP with 24 x 24 patches and 6 layers; Llama with 32 thin layers, as many as LLaVA-1.5-7B has.

    Depth is geometry, as in the small model: layer 0 sees all 576 tokens, which is 18 tokens of an average budget.
    """
    config = micro.build_config()
    config.vision_config.update({"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_hidden_layers": TOWER_LAYERS})
    config.text_config.update(
        {"vocab_size": len(SPECIAL) + len(WORDS), "num_hidden_layers": layers, "intermediate_size": INNER}
    )
    config.image_seq_length = VISUAL_TOKENS
    return config


def build_processor() -> LlavaProcessor:
    """The image processor (192 x 192 images pass unchanged), the tokenizer, and LLaVA-1.5's prompt."""
    processor = micro.build_processor()
    processor.image_processor.size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor.patch_size = PATCH_SIZE
    processor.tokenizer = build_tokenizer()
    return processor


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The small model's tokenizer with the words of this world."""
    tokenizer = micro.build_tokenizer()
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")
    return tokenizer
