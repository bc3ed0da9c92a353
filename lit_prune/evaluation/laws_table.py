"""Results of the laws for each class, as lines and as the table of docs/models.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.laws import Findings
from lit_prune.host.zoo.shrink import listed

BEGIN, END = "<!-- classes -->\n", "<!-- end of classes -->"
HEADER = ("model type", "class", "pruned", "training", "reads attention", "trained by `fit`", "remark")
TRAINED = HEADER.index("trained by `fit`")


def as_text(found: Findings) -> str:
    """One class in a line."""
    verdict = {"works": "yes", "refused": "no", "library": "not here"}.get(found.verdict, found.verdict)
    return f"{found.kind:<24}{verdict:<10}{_remark(found)}"


def as_rows(found: Sequence[Findings]) -> list[tuple[str, ...]]:
    """Cells of the table, one row a class, without what was trained."""
    return [_row(one) for one in found]


def write_markdown(path: Path, rows: Sequence[tuple[str, ...]], trained: Mapping[str, str]) -> None:
    """Write the table between its marks in a page; what was not measured now stays as it is.

    Args:
        path: the page.
        rows: cells of classes whose laws were measured.
        trained: what was trained, by model type, of classes on which the verbs ran.

    Raises:
        LitPruneError: a file without the marks.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else BEGIN + END + "\n"
    before, mark, rest = text.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not mark or not end:
        raise LitPruneError(f"{path} has no marks {BEGIN.strip()} and {END} to write the table between")
    written = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line.startswith("| ")]
    known = {cells[0]: cells for cells in written if len(cells) == len(HEADER)}
    for cells in rows:
        before_now = known.get(cells[0], [""] * len(HEADER))[TRAINED]
        known[cells[0]] = [*cells[:TRAINED], before_now, *cells[TRAINED:]]
    for kind, text in trained.items():
        if kind in known:
            known[kind][TRAINED] = text
    body = (HEADER, ["---"] * len(HEADER), *(known[kind] for kind in listed() if kind in known))
    lines = ["| " + " | ".join(cells) + " |" for cells in body]
    path.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


def _row(found: Findings) -> tuple[str, ...]:
    works = found.verdict == "works"
    pruned = {"works": "yes", "refused": "no", "library": "not measured"}.get(found.verdict, found.verdict)
    soft = "soft" if found.laws.get("train, soft") is True else ""
    drop = "drop" if found.laws.get("train, drop") is True else ""
    training = ", ".join(part for part in (soft, drop) if part) if works else ""
    unread = isinstance(found.laws.get("rcp"), str)
    reads = ("no" if unread else "yes") if works else ""
    return found.kind, f"`{listed()[found.kind]}`", pruned, training, reads, _remark(found)


def _remark(found: Findings) -> str:
    if found.verdict == "works":
        notes = [f"{law.partition(',')[0]}: {note}" for law, note in found.laws.items() if law.endswith(", plain")]
        if isinstance(note := found.laws.get("soft"), str) and "rcp" not in found.laws:
            notes.append("soft masks: recurrent or convolutional layers" if "recurrent" in note else note)
        if "rcp" in found.laws:
            notes.append("the class has no attention function that can be read: methods without attention only")
        return "; ".join(notes)
    return (found.refused or found.error or ", ".join(found.broken)).replace("|", "/").replace("\n", " ")
