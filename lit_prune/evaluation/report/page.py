"""One HTML file of tables, charts and answers, with everything in it: no network, no other file."""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from lit_prune.evaluation.groups import GROUPS
from lit_prune.evaluation.markdown import literal
from lit_prune.evaluation.plots import draw, shift_per_layer
from lit_prune.evaluation.report import template
from lit_prune.evaluation.report.gallery import KINDS, cards
from lit_prune.evaluation.report.intervals import DRAWS
from lit_prune.evaluation.report.runs import Run
from lit_prune.evaluation.report.table import Table
from lit_prune.evaluation.report.tables import all_tables
from lit_prune.evaluation.rows import Row, caption, means

FEW = 20  # images; percentile intervals of fewer clusters cover clearly less than they say
TITLES = {
    "accuracy_tokens": "Accuracy by visual tokens",
    "accuracy_flops": "Accuracy by FLOPs",
    "shift_accuracy": "Shift and accuracy",
    "tokens_per_layer": "Visual tokens per decoder layer",
    "shift_per_layer": "Shift of the answer states per decoder layer",
}


@dataclass(frozen=True)
class Chart:
    """A picture as a data URI, with its title."""

    title: str
    source: str


@dataclass(frozen=True)
class Findings:
    """What a report says of comparisons: sentences on what was measured and how, and the tables."""

    lines: list[str]
    tables: list[Table]

    @classmethod
    def of(cls, runs: Sequence[Run], baseline: str = "full", draws: int = DRAWS, seed: int = 0) -> "Findings":
        """From the comparisons, with differences to the method `baseline`; `draws` and `seed` of the bootstrap."""
        return cls(_lines(runs, baseline, draws), all_tables(runs, baseline, draws, seed))

    def markdown(self, title: str) -> str:
        """All of it under a title, for a document."""
        lines = "\n".join(f"- {literal(line)}" for line in self.lines)
        return "\n\n".join([f"# {literal(title)}", lines, *(table.markdown() for table in self.tables)]) + "\n"


def make(runs: Sequence[Run], title: str, found: Findings | None = None, most: int = 200) -> str:
    """The page as text. Whatever comes from data or a command line is escaped; no script but the page's own may run.

    Args:
        runs: the comparisons; with several, each line names its folder.
        title: of the page.
        found: what is said of them, if it is known already.
        most: samples to show.
    """
    found = Findings.of(runs) if found is None else found
    shown, samples = cards(runs, most), sum(len(run.records) for run in runs)
    methods = dict.fromkeys(answer.method for card in shown for answer in card.answers)
    several = len(runs) > 1
    page = Environment(autoescape=True).from_string(template.PAGE)
    return page.render(
        title=title,
        lines=found.lines,
        tables=found.tables,
        charts=[chart for run in runs for chart in charts(run, several)],
        cards=shown,
        left_out=samples - len(shown),
        kinds=KINDS,
        methods=list(methods),
        skills=sorted({card.skill for card in shown} - {""}),
        groups=[group for group in GROUPS if any(card.group == group for card in shown)],
        runs=list(dict.fromkeys(run.name for run in runs)) if several else [],
        style=Markup(template.STYLE),
        script=Markup(template.SCRIPT),
        script_hash=_hash(template.SCRIPT),
    )


def _lines(runs: Sequence[Run], baseline: str, draws: int) -> list[str]:
    """Sentences on what was measured, how intervals were made, and what is missing."""
    lines = []
    for run in runs:
        first = f"{run.name}: " if len(runs) > 1 else ""
        images = f", {len(set(run.images))} images" if run.records else ""
        lines += [f"{first}{caption(run.rows)}{images}.", *(f"{first}{remark}." for remark in run.remarks)]
    if any(run.records for run in runs):
        lines.append(
            f"Intervals are 95 % bootstrap intervals ({draws} draws) over images: questions on one image stay "
            f"together. Differences to {baseline} are paired, on the same questions and draws."
        )
    if any(run.records and len(set(run.images)) < FEW for run in runs):
        lines.append(f"With fewer than {FEW} images such intervals are too narrow.")
    return lines


def charts(run: Run, named: bool) -> list[Chart]:
    """The plots of a comparison as SVG; as images, so that nothing in them can act on the page."""
    pruned = [each for each in means(run.rows) if each["runs"] and each["keep"] is not None]
    if not pruned or not all(_drawable(each) for each in run.rows if each["status"] == "measured"):
        return []
    figures = {**draw(run.rows, run.visual), "shift_per_layer": shift_per_layer(pruned, run.visual)}
    first = f"{run.name}: " if named else ""
    return [Chart(first + TITLES.get(name, name), _svg(figure)) for name, figure in figures.items()]


def _drawable(row: Row) -> bool:
    """True if a cell has all that the plots show."""
    numbers, lists = (row.get("w2"), row.get("kappa")), (row.get("tokens_per_layer"), row.get("w2_per_layer"))
    known = all(isinstance(each, int | float) for each in numbers) and all(isinstance(each, list) for each in lists)
    return known and "flops" in row


def _svg(figure: Figure) -> str:
    figure.set_facecolor("white")
    with matplotlib.rc_context({"svg.hashsalt": "lit_prune"}):  # the same file each time
        text = io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue()).decode("ascii")


def _hash(script: str) -> str:
    """A script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
