"""`lit_prune` as a model of lmms-eval, which finds it by an entry point: a second judge of benchmarks."""

from typing import Any


def manifests() -> list[Any]:
    """The models that this package adds to lmms-eval. Entry point of the group `lmms_eval.models`.

    Imports nothing of ours, so that an installed lit_prune costs lmms-eval's other models no time.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("lit_prune", chat_class_path=f"{__name__}.model.LitPrune")]
