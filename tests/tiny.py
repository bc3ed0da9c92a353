"""A tiny random LLaVA, prompts for it, and ways to prune it; shared by the tests.

36 visual tokens, 8 decoder layers, grouped heads, logits of standard deviation 1.6, so that a wrong token shows.
"""

import os
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lit_prune.host import Record, Session
from lit_prune.host.options import HostOptions
from lit_prune.plugin import Plugin
from lit_prune.pruners.base import Context, Kept, Pruner, PruningMethod
from lit_prune.pruners.rcp import RCP
from lit_prune.repair import RepairAdapter
from lit_prune.vlm import VLM, plugin_from_yaml

ROOT = Path(__file__).parent.parent
FREE = ROOT / "configs" / "pruners" / "rcp_published.yaml"  # whose counts follow no budget before it is trained
PRUNERS = sorted(set((ROOT / "configs" / "pruners").glob("*.yaml")) - {FREE})
VISUAL, DEPTH, WIDTH, KEEP = 36, 8, 64, 12
PAD, VIDEO, IMAGE, VOCABULARY = 0, 58, 59, 60
SILENT = [IMAGE, VIDEO, PAD]  # tokens that no answer has
LENGTHS = (45, 52, 49)
TOLERANCE = 1e-4

Sample = tuple[Tensor, Tensor | None]  # ids with the image's columns, pixels


def build_model(
    attention: str = "sdpa", seed: int = 0, depth: int = DEPTH, width: int = WIDTH, grid: int = 6
) -> nn.Module:
    """The random LLaVA, in fp32 and evaluation mode; `grid` patches a side, so grid**2 visual tokens.

    Frozen, as `lit_prune.load` gives it: PyTorch's matmul takes another path for weights that require gradients, which
    costs a last bit here and there.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * grid,
        patch_size=4,
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=grid**2,
        vision_feature_layer=-1,
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def samples(
    lengths: tuple[int, ...] = LENGTHS, pictured: tuple[bool, ...] | None = None, seed: int = 1
) -> list[Sample]:
    """Prompts: two words, an image (unless `pictured` says no), a question."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length, has_image in zip(lengths, pictured or [True] * len(lengths), strict=True):
        ids = torch.randint(2, 50, (length,), generator=generator)
        pixels = torch.randn(3, 24, 24, generator=generator)
        if has_image:
            ids[2 : 2 + VISUAL] = IMAGE
        found.append((ids, pixels if has_image else None))
    return found


def batch(prompts: list[Sample], side: str = "left", answers: int = 0) -> dict[str, Tensor]:
    """Model inputs, padded on one side; the last `answers` tokens of each sample are labelled."""
    length = max(len(ids) for ids, _ in prompts)
    inputs = {name: torch.full((len(prompts), length), PAD) for name in ("input_ids", "attention_mask")}
    labels = torch.full((len(prompts), length), -100)
    for row, (ids, _) in enumerate(prompts):
        start = length - len(ids) if side == "left" else 0
        inputs["input_ids"][row, start : start + len(ids)] = ids
        inputs["attention_mask"][row, start : start + len(ids)] = 1
        labels[row, start + len(ids) - answers : start + len(ids)] = ids[len(ids) - answers :]
    pixels = [image for _, image in prompts if image is not None]
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels)
    return {**inputs, "labels": labels} if answers else inputs


def padded(inputs: dict[str, Tensor], columns: int) -> dict[str, Tensor]:
    """The inputs with so many columns of padding more on the left of every row."""
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    names = fill.keys() & inputs
    return {**inputs, **{name: nn.functional.pad(inputs[name], (columns, 0), value=fill[name]) for name in names}}


def real_text(inputs: dict[str, Tensor]) -> Tensor:
    """Positions that are neither padding nor image."""
    return inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)


def hints(count: int) -> dict[str, Tensor]:
    """What the oracle is told: two regions a sample, drawn once per sample."""
    regions = torch.rand(8, 2, VISUAL, generator=torch.Generator().manual_seed(5))
    return {"regions": (regions - 0.7).clamp(min=0)[:count]}


def shake(module: nn.Module, scale: float = 0.2, seed: int = 2) -> None:
    """Move every parameter, as training would: nothing that starts at zero stays there."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


described = cache(plugin_from_yaml)


def attach(
    model: nn.Module,
    pruner: Path | PruningMethod,
    keep: int = KEEP,
    repair: RepairAdapter | None = None,
    shaken: bool = True,
    **options,
) -> VLM:
    """A pruner with a repair adapter (of the file, else one at layer 6), moved away from its start.

    Positions and proportional attention are the file's, unless given.
    """
    plugin = None if isinstance(pruner, PruningMethod) else deepcopy(described(pruner))
    if plugin is not None:
        pruner, repair = plugin.pruner, plugin.repair or repair
    repair = repair or RepairAdapter([6], [0], bottleneck=16, condition=8, code=4)
    torch.manual_seed(3)
    made = Plugin(pruner, repair, options=HostOptions() if plugin is None else plugin.options).eval()
    vlm = VLM(model, None, "tiny").attach(made, keep=keep, **options)
    if shaken:
        shake(vlm.plugin)
    return vlm


def forward(vlm: VLM, inputs: dict[str, Tensor], **session) -> tuple[Tensor, Record]:
    """Logits of one forward and what it recorded."""
    record = Record(keep_hidden=True)
    size = inputs["input_ids"].shape[0]
    session = Session(**{"hints": hints(size), "record": record, **session})
    with torch.no_grad(), vlm.using(session):
        return vlm.model(**inputs).logits, record


def generate(vlm: VLM, inputs: dict[str, Tensor], tokens: int = 8, rows: Tensor | None = None, **options):
    """Stock `generate()`; gives the output with `.sequences`, `.logits` (one tensor) and the cache."""
    size = inputs["input_ids"].shape[0]
    chosen = hints(8)["regions"][:size] if rows is None else hints(8)["regions"][rows]
    fixed = {"do_sample": False, "suppress_tokens": SILENT, "pad_token_id": PAD, **options}
    with vlm.using(Session(hints={"regions": chosen})):
        out = vlm.model.generate(
            **inputs, max_new_tokens=tokens, output_logits=True, return_dict_in_generate=True, **fixed
        )
    out.logits = torch.stack(out.logits, 1)
    return out


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference."""
    return (a - b).abs().max().item()


class Chosen(Pruner):
    """Keeps the tokens it is told to keep, with gates that the test owns: one row per stage."""

    def __init__(self, layers: list[int], keep: Tensor, gate: Tensor | None = None) -> None:
        super().__init__(layers)
        self.kept, self.gates = keep, gate

    def prune(self, context: Context) -> Kept:
        keep = self.kept[context.stage][context.ordinal] & context.alive
        gate = None if self.gates is None else self.gates[context.stage][context.ordinal]
        return Kept(keep, gate)


def small_rcp(select: str = "topk", **options) -> RCP:
    """RCP for the tiny model: three stages."""
    return RCP(layers=[1, 3, 5], stage_ratios=[4.0, 2.0, 1.0], select=select, inner=16, **options)


def small_repair() -> RepairAdapter:
    """Two adapters behind the second and third stage of `small_rcp`."""
    return RepairAdapter([5, 7], [1, 2], bottleneck=16, condition=8, code=4)


def trainer(folder, callbacks=(), **options) -> Trainer:
    """A quiet trainer on the CPU that logs every step and validates only where that is asked."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fixed = {"accelerator": "cpu", "limit_val_batches": 0, "num_sanity_val_steps": 0, "default_root_dir": str(folder)}
    fixed["log_every_n_steps"] = 1
    saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(**{**silent, **fixed, "enable_checkpointing": saving, "callbacks": list(callbacks), **options})


def slurm_task(state: Path) -> dict[str, str]:
    """The environment of a Slurm job's only task; the stand-in for `scontrol` notes its calls in `state`/requeue."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train"}
    task = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    path = os.pathsep.join([str(ROOT / "tests" / "slurm"), os.environ["PATH"]])
    return {**job, **task, "PATH": path, "STANDIN_STATE": str(state)}


def same(a, b) -> bool:
    """Equal bit for bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_ends(*checkpoints: Path) -> dict:
    """The first of two checkpoints, having checked that both are of one and the same training."""
    ends = [torch.load(path, weights_only=True) for path in checkpoints]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "MicroData", "global_step"):
        assert key in ends[0]
        assert same(ends[0][key], ends[1][key]), key
    return ends[0]
