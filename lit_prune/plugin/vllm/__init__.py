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
    _let_cpus_prune()


def _let_cpus_prune() -> None:
    """Have vLLM's CPU runner look whether a model sets positions itself: it has a `load_model` of its own, without."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model
    if getattr(load_model, "lit_prune", False):
        return

    def load_and_look(self, *args, **kwargs) -> None:
        load_model(self, *args, **kwargs)
        config = self.model_config.multimodal_config
        marked = config is not None and config.is_multimodal_pruning_enabled()
        self.is_multimodal_pruning_enabled = marked and supports_multimodal_pruning(self.get_model())

    load_and_look.lit_prune = True
    CPUModelRunner.load_model = load_and_look
