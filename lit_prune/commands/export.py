"""Take the plug-in out of a checkpoint: a folder to attach, to publish, or to train on from."""

from pathlib import Path

from lit_prune.commands._support import console
from lit_prune.errors import LitPruneError
from lit_prune.plugin import Plugin
from lit_prune.training.averaging import stored_average
from lit_prune.training.checkpoints import newest, verify


def run(checkpoint: Path, out: Path) -> None:
    """Write the plug-in of a training run's checkpoint as a folder: safetensors and JSON.

    Any strategy's checkpoint will do, and neither the run's configuration nor its base model is needed. What is left
    out is what only training needs: the optimizer's state and the place in the data. Of a run that averaged its weights
    the average is written, as far as the checkpoint has it.

    Args:
        checkpoint: Lightning's file or DeepSpeed's folder, or the newest in a folder of them, e.g. --checkpoint
            runs/rcp/checkpoints.
        out: Folder to write; one that exists is written over.

    Examples:
        lit-prune export runs/try/checkpoints --out plugin
        lit-prune export runs/rcp/checkpoints/last.ckpt --out plugin
    """
    if out.is_file():
        raise LitPruneError(f"--out {out} is a file: a folder is written")
    if any(checkpoint.glob("*.ckpt")):
        checkpoint = newest([checkpoint])
        console.say(f"newest: {checkpoint}")
    else:
        verify(checkpoint)
    plugin = Plugin.from_checkpoint(checkpoint)
    plugin.save_pretrained(out)
    console.say(f"{out}: {plugin.base}, {sum(p.numel() for p in plugin.parameters()):,} parameters")
    if checkpoint.is_file() and (average := stored_average(checkpoint)):
        console.say(average)
