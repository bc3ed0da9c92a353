"""Price a model's prompt and answer, full and pruned, without weights."""

import json as json_format
from pathlib import Path
from typing import Any, Literal

from lit_prune.commands._support import console
from lit_prune.commands._support.outputs import check_file, check_picture
from lit_prune.cost.plan import Training


def run(
    model: str = "llava-hf/llava-1.5-7b-hf",
    pruner: str | None = None,
    keep: list[Any] | None = None,
    text_tokens: int = 64,
    answer_tokens: int = 32,
    visual_tokens: int | None = None,
    image_size: list[int] | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "bfloat16",
    json: Path | None = None,
    plot: Path | None = None,
    train: Training | None = None,
) -> None:
    """Price a prompt and its answer in FLOPs and bytes of KV cache: the full model and budgets of one method.

    A multiply-add is two FLOPs. The whole prompt counts, text and visual tokens; attention is the full square, SwiGLU
    has three matrices. Prefill and decoding are apart: the prefill gives the answer's first token, each further token
    is one step. A reduction is that of the decoder's prefill with scoring, pruner and repair counted in. Nothing is
    loaded but a configuration: no weights, no network.

    Args:
        model: Hub id whose shape is shipped (a wrong one lists them), "micro", or a model folder with config.json.
        pruner: Shipped method, YAML file or plug-in folder, e.g. --pruner rcp; without it the full model alone.
        keep: Budgets, visual tokens averaged over the decoder layers, e.g. --keep 192 128 11.1%, or counts by layer,
            e.g. --keep 2:64; by default the plug-in's own.
        text_tokens: Text tokens of the prompt, e.g. --text-tokens 64.
        answer_tokens: Tokens of the answer, e.g. --answer-tokens 128.
        visual_tokens: Visual tokens of the prompt, e.g. --visual-tokens 2880; the tower is then priced in proportion.
        image_size: Height and width of the image in pixels, e.g. --image-size 672 1008, for models that cut it into
            crops or take it in its own size; by default 672 672.
        dtype: Of the cached keys and values, and in training of the frozen weights.
        json: File to write the same to: an object, or a list of them for several budgets, e.g. --json cost.json.
        plot: Picture to draw, tokens and FLOPs of every decoder layer, e.g. --plot cost.png.
        train: Estimate a training run too, e.g. --train --train.gpus 8 --train.strategy deepspeed_2; see --train.help.

    Examples:
        lit-prune cost --pruner models/llava-1.5-7b --keep 192 128 64
        lit-prune cost --model Qwen/Qwen2.5-VL-7B-Instruct --image-size 1008 672
        lit-prune cost --pruner models/llava-1.5-7b --keep 64 --train --train.gpus 8
    """
    # With PyTorch, which --help does without.
    from lit_prune.commands._support import cost_report, pricing, training_bill

    check_file("--json", json)
    check_picture("--plot", plot)
    case = pricing.describe(model, pruner, visual_tokens, image_size, text_tokens, answer_tokens, dtype)
    if train is not None:
        training_bill.check(train, case.method)
    full = case.bill()
    bills = {name: case.bill(budget) for name, budget in case.budgets(keep).items()}
    columns = {"full": full} | {f"keep {name}": made for name, made in bills.items()}
    console.out.print(cost_report.as_table(case, columns))
    reports = [cost_report.as_report(case, name, made, full) for name, made in (bills or {"": full}).items()]
    if train is not None:
        for report, training in zip(reports, training_bill.show(train, case, bills), strict=True):
            report["training"] = training
    if json is not None:
        _write(json, reports)
    if plot is not None:
        cost_report.draw(plot, case, columns)


def _write(path: Path, reports: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_format.dumps(reports[0] if len(reports) == 1 else reports, indent=2) + "\n", "utf-8")
