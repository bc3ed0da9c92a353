"""The README.md of a plug-in folder: a model card as the hub reads it, with the facts of `plugin.json` and usage."""

import re
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelCardData

from lit_prune.loading.locations import LOCAL, hub_place, public_name

LICENSE = "apache-2.0"  # this project's; `save_pretrained(..., license=...)` names another
MARK = "<!-- written by lit_prune, and written again when the plug-in is saved; without this line it is yours -->"
TAGS = ["visual-token-pruning"]
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")

CARD = """---
{{ card_data }}
---

{{ mark }}

# {{ title }}

A visual-token pruning plug-in of `lit_prune` for {{ model }}; the model's own weights are not in it.

{{ summary }}

## Usage

```python
import lit_prune

vlm = lit_prune.load("{{ base }}")  # the frozen base model
vlm.attach("{{ place }}")  # {{ both }}
print(vlm.answer("photo.png", "What is in the picture?"))
vlm.detach()  # the plain model again
```
{% if results %}
## Measured

{{ results }}
{% endif %}"""


class Described(Protocol):
    """Attributes of a plug-in that its card is made of."""

    base: str
    results: dict[str, Any] | None


def model_card(plugin: Described, title: str, summary: list[str], place: str, license: str) -> ModelCard:
    """Build the card.

    Args:
        plugin: the plug-in. title: its name. summary: lines about it.
        place: the folder or repository that the card is for.
        license: of the plug-in's weights, as the hub spells it.
    """
    base = public_name(plugin.base) if plugin.base else ""
    repository, _ = hub_place(base)
    named = bool(REPOSITORY.fullmatch(repository))
    relation = {"base_model": repository, "base_model_relation": "adapter"} if named else {}
    data = ModelCardData(
        library_name="lit_prune", license=license, pipeline_tag="image-text-to-text", tags=TAGS, **relation
    )
    known = base not in ("", LOCAL)
    fields = {
        "title": title,
        "mark": MARK,
        "model": base if known else "a model that was a folder on its author's machine" if base else "MODEL",
        "base": base if known else "MODEL",
        "summary": "\n".join(f"- {line}" for line in summary),
        "place": place,
        "both": f'both at once: lit_prune.load("{place}")' if known else "trained ones are refused on other weights",
        "results": None if plugin.results is None else table(plugin.results),
    }
    return ModelCard.from_template(data, template_str=CARD, **fields)


def table(results: dict[str, Any]) -> str:
    """Markdown table of the figures of one test, with what was tested on."""
    rows = "\n".join(f"| {name} | {text} |" for name, text in results["figures"].items())
    return f"`lightning test` on {results['data']}, {results['date']}:\n\n| metric | value |\n|---|---|\n{rows}"
