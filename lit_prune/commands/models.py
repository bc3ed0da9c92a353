"""List the vision-language classes of the installed transformers: which of them can be pruned, and why others can't."""

from pathlib import Path

from lit_prune.commands._support import console
from lit_prune.commands._support.outputs import check_file
from lit_prune.errors import LitPruneError


def run(
    kinds: list[str] | None = None,
    laws: bool = False,
    videos: bool = False,
    verbs: bool = False,
    out: Path | None = None,
) -> None:
    """List every image-text-to-text class of the installed transformers, and whether it can be pruned.

    Each is built as a tiny random model from its own default configuration, and RCP with its repair adapter is attached
    to it. Nothing is downloaded.

    Args:
        kinds: Model types, e.g. --kinds gemma3 qwen3_vl; by default all of the list.
        laws: Measure the laws of pruning on each, seconds a class: keep-all = plain model bit for bit, dropping =
            masking, batch = alone, cached = recomputed, a training step, detach, e.g. --laws true.
        videos: Measure the laws on prompts with videos in place of images, e.g. --laws true --videos true.
        verbs: Run every verb on each class that can be pruned, seconds a class, e.g. --verbs true: fit trains RCP with
            its repair adapter for two steps, then validate, test, predict, compare, generate, show and bench.
        out: Markdown file with a table between the marks <!-- classes --> and <!-- end of classes -->, whose rows are
            to be written, e.g. --out docs/models.md.

    Examples:
        lit-prune models
        lit-prune models --kinds gemma3 llama4 --laws true
    """
    from lit_prune.evaluation import laws as measuring  # with transformers, which --help does without
    from lit_prune.evaluation.laws_table import as_rows, as_text, write_markdown
    from lit_prune.host.zoo.shrink import listed

    check_file("--out", out)
    known = listed()
    if unknown := [kind for kind in kinds or () if kind not in known]:
        raise LitPruneError(f"--kinds: {unknown[0]} is not in this transformers' list; it has {', '.join(known)}")
    found, trained = [], {}
    for kind in kinds or known:
        found.append(measuring.measure(kind, laws=laws, videos=videos))
        console.out.print(as_text(found[-1]), highlight=False)
        if verbs and found[-1].verdict == "works":
            trained[kind] = _run_verbs(kind)
    counts = {
        word: sum(one.verdict == word for one in found) for word in ("works", "refused", "library", "wrong", "crash")
    }
    console.out.print(", ".join(f"{count} {WORDS[word]}" for word, count in counts.items() if count), highlight=False)
    if out is not None:
        write_markdown(out, as_rows(found), trained)


def _run_verbs(kind: str) -> str:
    """Run the verbs on one class and say which failed; what was trained, for the table."""
    from lit_prune.commands._support.class_runs import run_all  # with Lightning

    runs = run_all(kind)
    for verb, reason in {**runs.refused, **runs.errors}.items():
        console.out.print(f"  {verb}: {reason}", highlight=False)
    console.out.print(f"  trained: {runs.trained or 'nothing'}", highlight=False)
    return runs.trained


WORDS = {
    "works": "can be pruned",
    "refused": "refused",
    "library": "that can't be built or run here",
    "wrong": "break a law",
    "crash": "crash",
}
