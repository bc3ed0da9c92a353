"""transformers' OpenAI-compatible server around one loaded model: its app, chat handler and inference thread.

Of its routes only chat completions, the list of models and the health check are kept: the others load or unload models,
and a model that is loaded again would answer without the plug-in.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from fastapi import FastAPI, HTTPException
from torch import Tensor, nn
from transformers import StoppingCriteria, StopStringCriteria
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from lit_prune.errors import LitPruneError
from lit_prune.loading.locations import first_line

CHAT = "/v1/chat/completions"
ROUTES = (CHAT, "/v1/models", "/health")


class Generation(Protocol):
    """One `generate()` call, observed."""

    def running(self) -> AbstractContextManager[None]:
        """Context manager around the call, entered in the inference thread."""

    def token(self) -> None:
        """Called in the inference thread after each generated token."""


Observe = Callable[[Mapping[str, Any]], Generation]  # from a prompt's model inputs; may raise LitPruneError
Prepare = Callable[[dict[str, Any]], dict[str, Any]]  # a request's body checked, with images in place of their URLs

GENERATION: ContextVar[Generation | None] = ContextVar("generation", default=None)


def openai_app(model: nn.Module, processor: Any, name: str, prepare: Prepare, observe: Observe) -> FastAPI:
    """Build the app that answers with `model`, as it is at each request.

    Args:
        model: with or without a plug-in. processor: its processor.
        name: that clients know the model by.
        prepare: turns a request's body into one that holds PIL images; runs in a worker thread, raises `LitPruneError`.
        observe: called in the event loop when a prompt is ready to be generated from.
    """
    manager, state = _OneModel(model, processor, name), _OneThread(observe)
    handlers = [key for key in inspect.signature(build_server).parameters if key.endswith("_handler")]
    # Handlers of other routes differ by version, and those routes are removed.
    chosen = {**dict.fromkeys(handlers), "chat_handler": _Chat(manager, state, prepare)}
    app = build_server(model_manager=manager, generation_state=state, **chosen)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    return app


class _OneModel(ModelManager):
    """Gives every request the same model, and never loads or unloads one."""

    def __init__(self, model: nn.Module, processor: Any, name: str) -> None:
        super().__init__()
        self.force_model, self.pair = name, (model, processor)

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        return self.pair

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "lit_prune"}]

    get_gen_models = list_models  # its name in transformers 5.19

    def shutdown(self) -> None:
        """Keep the model: it belongs to the caller."""


class _OneThread(GenerationState):
    """Runs all generations one after the other in one thread, whatever its model is called."""

    def __init__(self, observe: Observe) -> None:
        super().__init__()
        self.manager = _Observed(observe)

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.manager


class _Observed(GenerateManager):
    """Tells an observer of every generation."""

    def __init__(self, observe: Observe) -> None:
        super().__init__()
        self.observe = observe

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().generate_streaming(model, _tokenizer(processor), self._begin(inputs), *args, **kwargs)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tokenizer = _tokenizer(processor)
        return await super().generate_non_streaming(model, tokenizer, self._begin(inputs), *args, **kwargs)

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return super().submit(_inside(GENERATION.get(), fn), *args, **kwargs)

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return super().async_submit(_inside(GENERATION.get(), fn), *args, **kwargs)

    def _begin(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        generation = self.observe(inputs)
        GENERATION.set(generation)
        return {**inputs, "stopping_criteria": [_Tokens(generation)]}


def _tokenizer(processor: Any) -> Any:
    """The tokenizer of a processor: `generate()` looks for stop strings with it, and can't with a processor."""
    return getattr(processor, "tokenizer", processor)


def _inside(generation: Generation, fn: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with generation.running():
            return fn(*args, **kwargs)

    return run


class _Tokens(StoppingCriteria):
    """Never stops: reports that a token was generated."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.generation.token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Chat(ChatCompletionHandler):
    """Checks requests before the library reads them."""

    def __init__(self, manager: ModelManager, state: GenerationState, prepare: Prepare) -> None:
        super().__init__(model_manager=manager, generation_state=state)
        self.prepare = prepare

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        GENERATION.set(None)
        body = await asyncio.to_thread(self.prepare, body)
        try:
            return await super().handle_request(body, request_id)
        except (HTTPException, LitPruneError):
            raise
        except Exception as error:
            if GENERATION.get() is not None:
                raise
            # Chat templates and processors refuse prompts and images with errors of any class.
            raise LitPruneError(f"the model's processor refuses this request: {first_line(error)}") from error

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Sample if a temperature is given; the library does only where the model's own settings say so."""
        config = super()._build_generation_config(body, *args, **kwargs)
        if config.stop_strings:
            self._check_stops(config.stop_strings)
        config.do_sample = bool(body["temperature"]) if body.get("temperature") is not None else config.do_sample
        return config

    def _check_stops(self, stops: list[str]) -> None:
        _, processor = self.model_manager.load_model_and_processor()
        try:
            StopStringCriteria(_tokenizer(processor), stops)
        except Exception as error:  # it takes the vocabulary apart, and some vocabularies not
            raise LitPruneError("`stop`: transformers can't look for stop strings with this tokenizer") from error
