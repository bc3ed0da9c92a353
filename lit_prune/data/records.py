"""Read records in common layouts into turns: role, text and images, and whether an answer is trained on.

`conversations` (LLaVA, ShareGPT) and `messages` (OpenAI, Hugging Face) hold turns, whose keys may be those of either;
`texts` (The Cauldron, FineVision) pairs of them; `instruction`, `input`, `output` (Alpaca) and their relatives one
question and its answer.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from lit_prune.data.parts import IMAGE_MARKER, Part, images_in, joined, kind_of_value, read_parts
from lit_prune.data.references import as_list, is_absent, is_embedded, name_of
from lit_prune.errors import BadSample
from lit_prune.files.images import short

MOST_TURNS = 1000  # the template is rendered once for each answer
Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "ai"), "assistant"),
    "system": "system",
    "developer": "system",
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
TURN_KEYS = ("conversations", "messages", "conversation", "texts")
IMAGE_KEYS = ("image", "images")
SYSTEM_KEYS = ("system", "system_prompt")
PAIRS = (("instruction", "output"), ("query", "response"), ("question", "answer"), ("prompt", "completion"))
BESIDE_PAIRS = ("context", "passage", "choices", "options", "hint")  # without these their questions are others
PAIR_KEYS = (*(key for pair in PAIRS for key in pair), "input", "history", *BESIDE_PAIRS)
WEIGHT_KEYS = ("weight", "loss", "train")  # of an answer: 0 or false leaves it out of the labels
UNREAD = {  # without these a sample would say something else than its record
    **dict.fromkeys(("video", "videos"), "videos are not read"),
    **dict.fromkeys(("audio", "audios"), "audio is not read"),
    **dict.fromkeys(("tools", "functions"), "tools are not read"),
}
UNREAD_IN_TURNS = {
    **UNREAD,
    **dict.fromkeys(("tool_calls", "function_call"), "tools are not read"),
    **dict.fromkeys(("reasoning_content", "thinking"), "reasoning is not read"),
}
KNOWN = ("id", "skill", "boxes", *TURN_KEYS, *IMAGE_KEYS, *SYSTEM_KEYS, *PAIR_KEYS, *UNREAD)


@dataclass
class Turn:
    """One turn of a conversation; `trained`: False for an answer without labels in training."""

    role: Role
    parts: list[Part]
    trained: bool = True


def read_turns(record: dict, answered: bool = True) -> list[Turn]:
    """The turns of a record in any layout, the system prompt first.

    Args:
        record: see `read_conversation`.
        answered: whether a question without an answer is no record.

    Raises:
        BadSample: there are no turns, or they hold what would be lost. File and sample are left open.
    """
    _refuse_unread(record, UNREAD)
    given = {key: record[key] for key in TURN_KEYS if record.get(key) is not None}
    held = [key for key in given if given[key] != []]
    layouts = [_turns(given[key]) for key in held[:1] + [key for key in held[1:] if key == "messages"]]
    if any(turns != layouts[0] for turns in layouts[1:]):
        raise _bad("turns under conversations and messages that differ")
    turns = layouts[0] if layouts else _pair(record, answered)
    if turns is None and not given:
        raise _bad(f"neither a list of conversations nor of messages; its keys are {_keys(record)}")
    return _with_system(record, turns or [])


def image_paths(record: dict) -> list[Any]:
    """The images of a record, as it refers to them: those beside its turns (`image`, `images`), then those in them.

    Raises:
        BadSample: see `own_images` and `read_turns`.
    """
    return number_images(record, read_turns(record, answered=False) if _images_inside(record) else [])


def _images_inside(record: dict) -> bool:
    """True if turns may hold their own image references; much faster than reading the turns."""
    held = (record.get(key) for key in TURN_KEYS)
    turns = [turn for value in held if isinstance(value, list) for turn in value if isinstance(turn, dict)]
    return any(
        isinstance(turn.get("value"), list)
        or isinstance(turn.get("content"), list)
        or "image" in turn
        or "images" in turn
        for turn in turns
    )


def own_images(record: dict) -> list[Any]:
    """The references to images that stand beside the turns, under `image` or `images`.

    Raises:
        BadSample: they are no references, or others under either key. File and sample are left open.
    """
    if record.keys().isdisjoint(IMAGE_KEYS):
        return []
    given = [value for value in (record.get(key) for key in IMAGE_KEYS) if as_list(value)]
    if not all(isinstance(value, str | bytes | dict | list | tuple) for value in given):
        raise _bad("its images are neither a path nor a list of paths")
    if len(given) > 1 and as_list(given[0]) != as_list(given[1]):
        raise _bad(f"images under {' and '.join(IMAGE_KEYS)} that differ")
    return as_list(given[0]) if given else []


def number_images(record: dict, turns: list[Turn]) -> list[Any]:
    """The images of a record, see `image_paths`; the image parts of its turns get their "number" in this list.

    A part without a reference, such as an `<image>` marker, gets none: it stands for the next of the record's own.
    """
    references = own_images(record)
    own = [(reference, name_of(reference, number)) for number, reference in enumerate(references)]
    left = list(range(len(own)))
    for part in (part for turn in turns for part in images_in(turn.parts)):
        index, reference = part.pop("index", None), part.pop("reference", None)
        if index is not None and not 0 <= index < len(own):
            raise _bad(f"a turn shows image {index}, but there are {len(own)}")
        if reference is not None:
            name = name_of(reference, len(references))
            same = [number for number, known in enumerate(own) if reference == known[0] or name == known[1]]
            index = next((number for number in same if number in left), same[0] if same else len(references))
        if index is not None:
            part["number"] = index
            left = [number for number in left if number != index]
        if index == len(references):  # otherwise it repeats an image next to the turns
            references.append(reference)
    return references


def without_images(record: dict) -> dict:
    """Replace the images embedded in a record, next to its turns or in them, by names.

    Its turns become `messages`, whose image parts have the index of their image. Other records stay as they are.

    Raises:
        BadSample: see `image_paths`.
    """
    references = image_paths(record)
    embedded = any(is_embedded(reference, number) for number, reference in enumerate(references))
    if not embedded and len(references) == len(own_images(record)):
        return record
    turns = read_turns(record, answered=False)
    names = [name_of(reference, number) for number, reference in enumerate(number_images(record, turns))]
    messages = []
    for turn in turns:
        for part in images_in(turn.parts):
            if "number" in part:
                part["index"] = part.pop("number")
        weight = {} if turn.trained else {"weight": 0}
        messages.append({"role": turn.role, "content": turn.parts, **weight})
    rest = {
        key: value for key, value in record.items() if key not in (*TURN_KEYS, *SYSTEM_KEYS, *PAIR_KEYS, *IMAGE_KEYS)
    }
    return {**rest, "images": names, "messages": messages}


def similar_keys(record: dict) -> list[str]:
    """Unread keys that look as if they held images."""
    found = []
    for key, value in record.items():
        if key not in KNOWN and isinstance(value, str | list | dict) and as_list(value):
            letters = "".join(filter(str.isalpha, str(key))).lower()
            looks = letters.startswith(("image", "img", "pic", "photo"))
            if looks or get_close_matches(letters, IMAGE_KEYS, 1, 0.75):
                found.append(str(key))
    return found


def _turns(value: Any) -> list[Turn]:
    if not isinstance(value, list):
        raise _bad("neither a list of conversations nor of messages")
    turns = [turn for item in value for turn in _both(item)]
    if len(turns) > MOST_TURNS:
        raise _bad(f"{len(turns)} turns, more than {MOST_TURNS}")
    return [_turn(turn) for turn in turns]


def _both(item: Any) -> list[Any]:
    """Convert an item of a list of turns to one turn, or to a question and its answer (`user`, `assistant`)."""
    if isinstance(item, dict) and {"user", "assistant"} <= item.keys():
        return [{"role": role, "content": item[role]} for role in ("user", "assistant")]
    return [item]


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise _bad(f"a turn of unknown role None: {kind_of_value(turn)}, no object")
    roles = {_role(turn[key]) for key in ("from", "role") if turn.get(key) is not None}
    contents = [turn[key] for key in ("value", "content") if turn.get(key) is not None]
    if len(roles) > 1 or any(content != contents[0] for content in contents[1:]):
        raise _bad(f"a turn that is given twice and differs; its keys are {_keys(turn)}")
    if not roles:
        raise _bad(f"a turn without a role (from or role); its keys are {_keys(turn)}")
    _refuse_unread(turn, UNREAD_IN_TURNS)
    role = roles.pop()
    parts = _with_images(turn, read_parts(contents[0] if contents else None, role))
    if role != "user":
        parts = joined(parts)
    return Turn(role, parts, role != "assistant" or _trained(turn))


def _role(value: Any) -> Role:
    role = ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if role is None:
        hint = ": tools are not read" if value in TOOL_ROLES else ""
        raise _bad(f"a turn of unknown role {short(repr(value))}{hint}")
    return role


def _with_images(turn: dict, parts: list[Part]) -> list[Part]:
    """Insert images given next to a turn's text at its markers, or before the text if it has none."""
    held = own_images(turn)
    markers = [part for part in images_in(parts) if len(part) == 1]
    if not held or not markers:
        return [*({"type": "image", "reference": reference} for reference in held), *parts]
    if len(markers) != len(held):
        raise _bad(f"{len(markers)} {IMAGE_MARKER} markers but {len(held)} images in a turn")
    for part, reference in zip(markers, held, strict=True):
        part["reference"] = reference
    return parts


def _trained(turn: dict) -> bool:
    weights = [turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None]
    for weight in weights:
        if not isinstance(weight, int | float) or weight not in (0, 1):
            raise _bad(f"an answer of weight {short(repr(weight))}: it is trained on (1) or not (0)")
    return all(weights)


def _pair(record: dict, answered: bool) -> list[Turn] | None:
    """Turns of a record that holds one question and its answer; None if it doesn't."""
    for asked, answer in PAIRS:
        if is_absent(record.get(asked)) or (answered and record.get(answer) is None):
            continue
        _refuse_unread(record, dict.fromkeys(BESIDE_PAIRS, "write it into the question"))
        question, more = record[asked], record.get("input") if asked == "instruction" else None
        if not is_absent(more):
            if not isinstance(more, str) or not isinstance(question, str):
                raise _bad("a turn whose content is no text")
            question = f"{question}\n{more}"
        turns = []
        for ask, reply in [*_history(record), (question, record.get(answer))]:
            turns += [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
        return _turns(turns if record.get(answer) is not None else turns[:-1])
    return None


def _history(record: dict) -> list[list[Any]]:
    """Earlier questions and answers of such a record."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise _bad("its history is no list of questions and answers")
    return history


def _with_system(record: dict, turns: list[Turn]) -> list[Turn]:
    """Prepend the system prompt given next to the turns."""
    given = [record[key] for key in SYSTEM_KEYS if not is_absent(record.get(key))]
    if not given:
        return turns
    if any(text != given[0] for text in given[1:]):
        raise _bad(f"{' and '.join(SYSTEM_KEYS)} that differ")
    first = Turn("system", joined(read_parts(given[0], "system")))
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    if len(rest) < len(turns) and turns[0].parts and turns[0] != first:
        raise _bad("a system prompt among its turns and another one beside them")
    return [first, *rest]


def _refuse_unread(holder: dict, keys: dict[str, str]) -> None:
    for key, reason in () if holder.keys().isdisjoint(keys) else keys.items():
        value = holder.get(key)
        if value and value != "[]" and as_list(value):
            raise _bad(f"it has {key}: {reason}")


def _keys(holder: dict) -> str:
    return short(", ".join(map(str, holder)) or "none")


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)
