"""Vision towers whose FLOPs follow from their configuration by the formulas of `lit_prune.cost.flops`."""

from lit_prune.cost.shapes import Config
from lit_prune.errors import LitPruneError

# Vision towers by their configuration's `model_type`: class tokens a crop, matrices of the MLP (three where gated).
TOWERS = {
    "clip_vision_model": (1, 2),
    "siglip_vision_model": (0, 2),
    "internvl_vision": (1, 2),
    "qwen2_5_vl_vision": (0, 3),
    "qwen3_vl_vision": (0, 2),
    "qwen3_5_vision": (0, 2),
    "glm4v_vision": (0, 3),
    "smolvlm_vision": (0, 2),
    "idefics3_vision": (0, 2),
    "molmo2_vision": (0, 2),
}
# Model types whose tower and projector the formulas describe to the last FLOP. Others have projectors of their own.
FORMULAS = ("llava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "vipllava", "internvl")
FORMULAS += ("gemma3", "paligemma", "idefics3", "smolvlm", "molmo2")
FORMULAS += ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "glm46v", "cosmos3_omni")


def has_formula(config: Config) -> bool:
    """True if the FLOPs of a model's tower and projector follow from its configuration."""
    kind = getattr(getattr(config, "vision_config", None), "model_type", None)
    return kind in TOWERS and config.model_type in FORMULAS


def tower_fields(config: Config) -> tuple[int, int]:
    """The tower's entry in `TOWERS`; raises `LitPruneError` where there is no formula."""
    kind = getattr(getattr(config, "vision_config", None), "model_type", None)
    if not has_formula(config):
        raise LitPruneError(
            f"the price of a vision tower of type {kind} in a model of type {config.model_type} has no formula here; "
            f"towers that have one: {', '.join(TOWERS)}, in models of {', '.join(FORMULAS)}"
        )
    return TOWERS[kind]
