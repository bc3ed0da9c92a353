"""Take the plug-in out of a checkpoint: a folder to attach or to train on from, or a repository of the hub."""

from pathlib import Path

from lit_prune.commands._support import console
from lit_prune.errors import LitPruneError
from lit_prune.plugin import SETTINGS, Plugin
from lit_prune.training.averaging import stored_average
from lit_prune.training.checkpoints import SUMS, newest, verify


def run(
    checkpoint: Path,
    out: Path,
    *,
    push: str | None = None,
    private: bool = False,
    license: str | None = None,
) -> None:
    """Write the plug-in of a training run's checkpoint as a folder, with a model card; --push publishes it too.

    Any strategy's checkpoint will do, and neither the run's configuration nor its base model is needed. What is left
    out is what only training needs: the optimizer's state and the place in the data. Of a run that averaged its weights
    the average is written, as far as the checkpoint has it. Publishing takes the account of `hf auth login`, or the
    token in HF_TOKEN.

    Args:
        checkpoint: Lightning's file or DeepSpeed's folder, the newest in a folder of them, or the folder of a plug-in,
            e.g. --checkpoint runs/rcp/checkpoints.
        out: Folder to write; one that exists is written over.
        push: Repository of the hub to publish it in too, created if it doesn't exist, e.g. --push me/rcp-llava.
        private: Create the repository as a private one: --private.
        license: Of the weights, for the model card, e.g. --license mit; by default apache-2.0.

    Examples:
        lit-prune export runs/try/checkpoints --out plugin
        lit-prune export runs/rcp/checkpoints/last.ckpt --out plugin
        lit-prune export runs/try/plugin --out published --push me/rcp-micro --private
    """
    if out.is_file():
        raise LitPruneError(f"--out {out} is a file: a folder is written")
    plugin, checkpoint = _read(checkpoint)
    size = f"{plugin.base or 'no base model'}, {sum(p.numel() for p in plugin.parameters()):,} parameters"
    plugin.save_pretrained(out, license=license)
    console.say(f"{out}: {size}")
    if push is not None:
        console.say(f"published: {plugin.push_to_hub(push, private=private or None, license=license)}")
    if checkpoint.is_file() and (average := stored_average(checkpoint)):
        console.say(average)


def _read(place: Path) -> tuple[Plugin, Path]:
    """The plug-in of a checkpoint or folder, and the checkpoint that was taken."""
    # DeepSpeed's have folders inside; that of a plug-in has its adapters for peft at most.
    alone = place.is_dir() and all(file.is_file() or file.name == "lora" for file in place.iterdir())
    if alone and (place / SETTINGS).is_file() and not (place / SUMS).is_file():
        return Plugin.from_pretrained(place), place
    if any(place.glob("*.ckpt")):
        place = newest([place])
        console.say(f"newest: {place}")
    else:
        verify(place)
    return Plugin.from_checkpoint(place), place
