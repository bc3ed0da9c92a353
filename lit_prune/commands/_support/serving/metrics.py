"""Counters of a server, in Prometheus's text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server since its start."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "lit_prune_requests", "Chat completions that ended, by HTTP status.", ["code"], registry=registry
        )
        self.errors = Counter(
            "lit_prune_request_errors",
            "Chat completions that failed: status of 400 or more, or an error in the middle of a stream.",
            registry=registry,
        )
        self.in_progress = Gauge(
            "lit_prune_requests_in_progress", "Chat completions that run or wait.", registry=registry
        )
        self.visual = Counter("lit_prune_visual_tokens", "Visual tokens of all prompts.", registry=registry)
        self.kept = Counter(
            "lit_prune_visual_tokens_kept",
            "Visual tokens of all prompts after pruning, averaged over the decoder layers' inputs.",
            registry=registry,
        )
        self.prompt = Counter("lit_prune_prompt_tokens", "Tokens of all prompts before pruning.", registry=registry)
        self.generated = Counter("lit_prune_generated_tokens", "Tokens of all answers.", registry=registry)
        self.first_token = Histogram(
            "lit_prune_time_to_first_token_seconds",
            "Seconds from the arrival of a request to its first token, waiting included.",
            buckets=SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "lit_prune_request_duration_seconds",
            "Seconds from the arrival of a request to the end of its answer.",
            buckets=SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        """All counters in the text format."""
        return generate_latest(self.registry)
