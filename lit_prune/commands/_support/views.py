"""The image as a model sees it, for pictures of what a method keeps."""

from PIL import Image

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.pictures import Pixels, as_seen
from lit_prune.vlm import VLM


def view(vlm: VLM, image: Image.Image) -> Pixels:
    """The image after resizing and cropping; raises `LitPruneError` for a model that sees more than one square."""
    processor = vlm.processor.image_processor
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    if pixels.ndim != 4 or pixels.shape[0] != 1 or pixels.shape[2] != pixels.shape[3]:
        does = "keeps an image's shape" if pixels.ndim < 4 else "cuts an image into tiles"
        raise LitPruneError(f"{vlm.name} {does}; only models that see one square image can be drawn")
    return as_seen(pixels[0], processor.image_mean, processor.image_std)
