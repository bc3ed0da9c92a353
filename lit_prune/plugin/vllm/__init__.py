"""Methods before the decoder as models of vLLM, which finds them by an entry point.

    LLM(MODEL, hf_overrides={"architectures": ["LitPruneLlava"], "lit_prune": {"pruner": "divprune", "keep": 64}})

vLLM keeps its decoder, scheduler and caches. Images run through transformers' own vision tower and this project's
pruner; kept tokens keep their positions.
"""

ARCHITECTURES = {"LitPruneLlava": "llava:LitPruneLlava", "LitPruneQwen2_5_VL": "qwen:LitPruneQwen2_5_VL"}


def register() -> None:
    """Add this package's architectures to vLLM. Entry point of the group `vllm.general_plugins`.

    vLLM calls it in each of its processes, for other models too, so it imports nothing of ours.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Prepared(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config) -> None:
            from lit_prune.plugin.vllm.settings import prepare

            prepare(model_config)

    for name, place in ARCHITECTURES.items():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"{__name__}.{place}")
        MODELS_CONFIG_MAP[name] = Prepared
