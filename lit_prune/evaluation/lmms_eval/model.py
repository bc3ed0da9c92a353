"""The model that lmms-eval calls: `lit_prune.VLM`, plain or pruned, in batches."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from PIL import Image
from tqdm import tqdm

from lit_prune.errors import LitPruneError, check_number
from lit_prune.evaluation.measuring import now
from lit_prune.files.inputs import as_image
from lit_prune.host import Record, Session
from lit_prune.host.parts import find
from lit_prune.ops.budget import parse_budget
from lit_prune.vlm import as_plugin, load

DTYPES = ("auto", "float32", "bfloat16", "float16")
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Prompt:
    """A request: its place among all, chat, images, and the settings of its generation."""

    place: int
    chat: list[dict[str, Any]]
    images: list[Image.Image]
    context: str
    settings: dict[str, Any]


@dataclass
class Spent:
    """Cost of answering: seconds and tokens of all batches, visual tokens of each sample."""

    seconds: float = 0.0
    generated: int = 0
    visual: list[float] = field(default_factory=list)  # averaged over the decoder layers' inputs
    total: list[int] = field(default_factory=list)  # of the prompt

    def figures(self) -> dict[str, float]:
        """Means per answer, for lmms-eval's log."""
        return {
            "visual_tokens": fmean(self.visual),
            "visual_tokens_of": fmean(self.total),
            "ms_per_answer": 1e3 * self.seconds / len(self.total),
        }


class LitPrune(lmms):
    """`lmms_eval --model lit_prune --model_args pretrained=BASE,pruner=METHOD,keep=BUDGET`.

    Answers equal those of `VLM.answer` where a task decodes greedily. Images only; several in a prompt are allowed.

    Args:
        pretrained: the base model: "micro", a folder, or a hub id. By default the one that a plug-in folder names.
        pruner: a shipped method, a YAML file, or a plug-in folder; without one the plain model answers.
        keep: budget as elsewhere, 64 or 11.1%; by default the plug-in's own. Counts by layer belong into its YAML file.
        batch_size: prompts at once, `--batch_size`.
        device: of the model, `--device`; by default the GPU if there is one, with several processes one each.
        dtype: of the weights; auto is what the checkpoint says.
        system_prompt: of every chat, where the task brings none.
        max_batch_size: given by lmms-eval, and not used.

    Raises:
        LitPruneError: what can't be loaded or attached, or a batch size that is no number.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        pruner: str | None = None,
        keep: Any = None,
        batch_size: int | str | None = 1,
        device: str | None = None,
        dtype: str = "auto",
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        try:
            self.batch_size = int(batch_size or 1)
        except ValueError as error:
            raise LitPruneError(f"--batch_size {batch_size}: give a number of prompts") from error
        check_number("--batch_size", self.batch_size, least=1, whole=True)
        if dtype not in DTYPES:
            raise LitPruneError(f"--model_args dtype={dtype}: it is one of {', '.join(DTYPES)}")
        if keep is not None and pruner is None:
            raise LitPruneError("--model_args keep needs a method: give pruner too")
        plugin = None if pruner is None else as_plugin(str(pruner))
        budget = None if keep is None else parse_budget(keep, "--model_args keep")
        base = pretrained or (plugin.base if plugin is not None else None) or "micro"
        self.accelerator = Accelerator()
        place = device if device and self.accelerator.num_processes == 1 else self.accelerator.device
        self.vlm = load(base, None if dtype == "auto" else getattr(torch, dtype), device=place)
        if plugin is not None:
            self.vlm.attach(plugin, keep=budget)
        logger.info(repr(self.vlm))
        self.system_prompt = system_prompt

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests, batch by batch; those of one batch share the settings of their generation."""
        results: dict[int, GenerationResult] = {}
        spent = Spent()
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        for batch in self._batches(requests):
            for prompt, result in zip(batch, self._answer(batch, spent), strict=True):
                results[prompt.place] = result
                self.cache_hook.add_partial("generate_until", (prompt.context, prompt.settings), result.text)
            bar.update(len(batch))
        bar.close()
        if spent.seconds:
            log_metrics(
                total_elapsed_time=spent.seconds,
                total_gen_tokens=spent.generated,
                avg_speed=spent.generated / spent.seconds,
                additional_metrics={**spent.figures(), "batch_size": self.batch_size, "rank": self.rank},
            )
        return [results[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raises `NotImplementedError`: pruning is for answers that are generated."""
        raise NotImplementedError("lit_prune answers tasks of output type generate_until, not loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises `NotImplementedError`."""
        raise NotImplementedError("lit_prune answers tasks of output type generate_until, not of several rounds")

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[Prompt]]:
        """Requests with the same settings, in order, `batch_size` at a time; images are read when their turn comes."""
        groups: dict[str, list[tuple[int, Instance]]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append((place, request))
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield [self._prompt(*each) for each in group[start : start + self.batch_size]]

    def _prompt(self, place: int, request: Instance) -> Prompt:
        context, doc_to_messages, settings, doc_id, task, split = request.args
        name = f"{task}, document {doc_id}"
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        pictures, videos, audios = messages.extract_media()
        if videos or audios:
            raise LitPruneError(f"{name}: lit_prune answers questions about images, not about videos or sound")
        chat = [_without_media(message) for message in messages.to_hf_messages()]
        if self.system_prompt and chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        images = [as_image(picture, f"{number} of {name}") for number, picture in enumerate(pictures, 1)]
        return Prompt(place, chat, images, context, dict(settings))

    @torch.inference_mode()
    def _answer(self, batch: Sequence[Prompt], spent: Spent) -> list[GenerationResult]:
        """Answers to prompts with the same settings; adds what they took to `spent`."""
        vlm, settings = self.vlm, batch[0].settings
        processor = vlm.processor
        texts = [processor.apply_chat_template(prompt.chat, add_generation_prompt=True) for prompt in batch]
        images = [image for prompt in batch for image in prompt.images]
        pictures = {"images": images} if images else {}
        inputs = processor(text=texts, **pictures, return_tensors="pt", padding=True, padding_side="left")
        inputs = inputs.to(vlm.model.device)
        record, config = Record(), self._config(settings)
        start = now(vlm.model.device)
        if vlm.plugin is None:
            tokens = vlm.model.generate(**inputs, generation_config=config)
        else:
            with vlm.using(Session(record=record)):
                tokens = vlm.model.generate(**inputs, generation_config=config)
        spent.seconds += now(vlm.model.device) - start
        length = inputs["input_ids"].shape[1]
        total = find(vlm.model).image_columns(inputs["input_ids"]).sum(1).tolist()
        spent.total += total
        spent.visual += total if vlm.plugin is None else record.trace.average_visual().tolist()
        counts = self._counts(tokens[:, length:])
        spent.generated += sum(counts)
        read = inputs["attention_mask"].sum(1).tolist()
        answers = [_until(text, settings.get("until")) for text in vlm.decode(tokens, length)]
        return [
            GenerationResult(text, TokenCounts(input_tokens=prompt, output_tokens=count))
            for text, prompt, count in zip(answers, read, counts, strict=True)
        ]

    def _config(self, settings: Mapping[str, Any]) -> Any:
        """Generation settings of a task, without those unknown to transformers, such as `until`."""
        config = copy.copy(self.vlm.model.generation_config)
        asked = {name: value for name, value in settings.items() if hasattr(config, name)}
        sampled = asked.get("do_sample", bool(asked.get("temperature"))) and asked.get("temperature") != 0
        config.update(**{**asked, "do_sample": True} if sampled else {**asked, **GREEDY})
        return config

    def _counts(self, tokens: torch.Tensor) -> list[int]:
        """Tokens of each answer up to its end, that included."""
        ends = self.vlm.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends], device=tokens.device)
        ended = torch.isin(tokens, ends).long().cumsum(1)
        return (ended - torch.isin(tokens, ends).long() == 0).sum(1).tolist()


def _without_media(message: dict[str, Any]) -> dict[str, Any]:
    """A message for a chat template, where an image is but a place."""
    kept = ("type", "text")
    parts = [{key: value for key, value in part.items() if key in kept} for part in message["content"]]
    return {"role": message["role"], "content": parts}


def _until(text: str, stops: Any) -> str:
    """An answer up to the first of the task's stop texts."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.partition(stop)[0]
    return text.strip()
