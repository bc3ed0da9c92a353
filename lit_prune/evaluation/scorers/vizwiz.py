"""VizWiz: scored as VQAv2, with a fourth answer type, "unanswerable"."""

from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.vqa import VQA


class VizWiz(VQA):
    """VQA accuracy over VizWiz's ten answers a question; see `VQA`."""

    title = "VizWiz"

    def frozen(self, case: dict[str, Any]) -> Any:
        raise LitPruneError("VizWiz has no frozen cases; its rule is that of vqa")


RULE = VizWiz
