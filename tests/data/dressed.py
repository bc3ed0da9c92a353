"""Random conversations in random dress: what a record says, and the many ways in which people write it down."""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

COLOURS = {"a.png": (200, 30, 30), "b.png": (30, 200, 30), "c.png": (30, 30, 200)}
USERS = ("human", "user", "Human", "USER", " User ")
ASSISTANTS = ("gpt", "assistant", "GPT", "Assistant", "model", "bot", "ChatGPT")
SPECIAL = ("<|", "|>", "<image>", "<video>", "<audio>", "<img>", "<s>", "</s>", "<pad>", "<unk>")


def plain(text: str) -> bool:
    """True if a text holds no token that a tokenizer or this project takes for something else."""
    return not any(mark in text for mark in SPECIAL)


# Stripped, as turns come out, and without null characters, which no tokenizer's text form keeps.
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12)
texts = texts.map(str.strip).filter(bool).filter(plain)
words = st.sampled_from(
    ["what is it ?", "red", "a cat", "7", "{{ x }}", "日本", "é", "new\nline", "user", "assistant\n:"]
)
texts = st.one_of(words, texts)


@dataclass
class Said:
    """A conversation: `turns` are (images, question, answer, trained); `asked` is a last question without an answer."""

    turns: list[tuple[list[str], str, str, bool]]
    system: str = ""
    asked: str = ""
    images: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.images = [name for images, *_ in self.turns for name in images]


@st.composite
def conversations(draw) -> Said:
    turns = [
        (draw(st.lists(st.sampled_from(sorted(COLOURS)), max_size=2)), draw(texts), draw(texts), draw(st.booleans()))
        for _ in range(draw(st.integers(1, 3)))
    ]
    if not any(trained for *_, trained in turns):
        turns[-1] = (*turns[-1][:3], True)
    return Said(turns, draw(st.sampled_from(["", "", "Be brief."])), draw(st.sampled_from(["", "", "and ?"])))


def write_images(folder: Path) -> Path:
    """The images that references name, each of one colour."""
    folder.mkdir(exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(folder / name)
    return folder


def encoded(folder: Path, name: str) -> str:
    return base64.b64encode((folder / name).read_bytes()).decode()


def references(folder: Path, name: str) -> dict[str, Any]:
    """Every form in which a record may refer to an image."""
    data = encoded(folder, name)
    return {
        "path": name,
        "dotted": f"./{name}",
        "absolute": str(folder / name),
        "file url": f"file://{folder}/{name}",
        "file url of this host": f"file://localhost{folder}/{name}",
        "data url": f"data:image/png;base64,{data}",
        "base64": data,
        "base64 in lines": "\n".join(data[start : start + 76] for start in range(0, len(data), 76)),
        "base64 without padding": data.rstrip("="),
        "url-safe base64": data.replace("+", "-").replace("/", "_"),
        "object of a path": {"path": name},
        "object as datasets has it": {"bytes": None, "path": name},
        "object of base64": {"bytes": data, "path": None},
        "object of a url": {"url": name},
        "object of an object": {"image_url": {"url": f"data:image/png;base64,{data}", "detail": "auto"}},
        "source": {"type": "base64", "media_type": "image/png", "data": data},
    }


@st.composite
def reference(draw, folder: Path, name: str) -> Any:
    forms = references(folder, name)
    return forms[draw(st.sampled_from(sorted(forms)))]


@st.composite
def image_part(draw, folder: Path, name: str) -> dict:
    held = draw(reference(folder, name))
    kind = draw(st.sampled_from(["image", "image_url", "input_image"]))
    form = draw(st.sampled_from(["own key", "image", "path", "url", "struct", "untyped", "source"]))
    if form == "struct":
        return {"type": "image", "bytes": None, "path": name, "text": None}
    if form == "untyped":
        return {"image": held}
    if form == "source":
        return {"type": "image", "source": references(folder, name)["source"]}
    if form in ("path", "url") and isinstance(held, str):
        return {"type": kind, form: held, "text": None}
    return {"type": kind, (kind if form == "own key" and kind != "input_image" else "image"): held, "text": ""}


@st.composite
def dressed(draw, said: Said, folder: Path) -> dict:
    """A record that says this."""
    place = draw(st.sampled_from(["beside", "beside, bare parts", "in turns", "in parts", "by index"]))
    left = dict.fromkeys(["id", "skill", "boxes"][: draw(st.integers(0, 3))])
    record: dict[str, Any] = {**left, **draw(st.sampled_from([{}, {"videos": []}, {"tools": "[]"}, {"source": "x"}]))}
    keys = draw(st.sampled_from([("from", "value"), ("role", "content")]))
    weight = draw(st.sampled_from([("weight", 1, 0), ("weight", 1.0, 0.0), ("loss", True, False), ("train", 1, False)]))
    turns = []
    if said.system:
        if draw(st.booleans()):
            record["system"] = said.system
        else:
            turns.append(dict(zip(keys, ("system", said.system), strict=True)))
    unique = sorted(set(said.images))
    for images, question, answer, trained in said.turns:
        marks = "<image>" * len(images)
        user = {keys[0]: draw(st.sampled_from(USERS))}
        content: Any = draw(st.sampled_from([f"{marks}{question}", f"{marks}\n {question} ", f"\n{marks} {question}"]))
        text = {"type": "text", "text": question}
        if place == "beside, bare parts" and images:
            content = [*({"type": "image"} for _ in images), text]
        elif place == "by index" and images:
            content = [*({"type": "image", "index": unique.index(name), "text": None} for name in images), text]
        elif place == "in parts" and images:
            content = [*(draw(image_part(folder, name)) for name in images), draw(st.sampled_from([text, question]))]
        elif place == "in turns" and images:
            held = [draw(reference(folder, name)) for name in images]
            user |= {"image": held[0]} if len(held) == 1 and draw(st.booleans()) else {"images": held}
            content = draw(st.sampled_from([content, question]))
        turns.append({**user, keys[1]: content})
        told = (
            [{"type": "text", "text": answer}]
            if draw(st.booleans())
            else draw(st.sampled_from([answer, f" {answer}\n"]))
        )
        marked = {weight[0]: weight[1 if trained else 2]} if not trained or draw(st.booleans()) else {}
        turns.append({keys[0]: draw(st.sampled_from(ASSISTANTS)), keys[1]: told, **marked})
    if said.asked:
        turns.append({keys[0]: "user", keys[1]: said.asked})
    record[draw(st.sampled_from(["conversations", "messages", "conversation"]))] = turns
    if place == "by index":
        record["images"] = [draw(reference(folder, name)) for name in unique]
    elif place.startswith("beside") and said.images:
        held = [draw(reference(folder, name)) for name in said.images]
        record["image" if draw(st.booleans()) else "images"] = (
            held[0] if len(held) == 1 and draw(st.booleans()) else held
        )
    elif not said.images or place == "in parts":
        record |= draw(
            st.sampled_from([{}, {"image": ""}, {"images": [""]}, {"images": [None]}, {"image": None}, {"images": []}])
        )
    return dict(draw(st.permutations(sorted(record.items(), key=lambda item: item[0]))))


# JSON close to records and far from them

KEYS = (
    *("id", "image", "images", "conversations", "messages", "from", "value", "role", "content", "type", "text"),
    *("system", "weight", "loss", "video", "audio", "tools", "index", "bytes", "path", "url", "instruction", "output"),
    *("input", "history", "question", "answer", "skill", "boxes"),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**63, 2**200),
    st.floats(),
    st.text(st.characters(), max_size=10),  # halves of characters too
    st.sampled_from(
        ["human", "gpt", "user", "assistant", "system", "image", "text", "<image>", "a.png", "", " ", "x" * 300]
    ),
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), inner, max_size=5)
    ),
    max_leaves=12,
)
objects = st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), anything, max_size=6)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The way to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


@st.composite
def spoilt(draw, record: dict) -> dict:
    """The record with one to three of its values replaced, removed, doubled or given another key."""
    for _ in range(draw(st.integers(1, 3))):
        ways = [place for place in places(record) if place]
        if not ways:
            break
        *way, last = draw(st.sampled_from(ways))
        holder = record
        for key in way:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "remove", "double", "rename"]))
        if action == "replace":
            holder[last] = draw(anything)
        elif action == "remove":
            del holder[last]
        elif isinstance(holder, list):
            holder.insert(draw(st.integers(0, len(holder))), holder[last])
        else:
            holder[draw(st.sampled_from(KEYS))] = holder.pop(last) if action == "rename" else holder[last]
    return record


def file_of(name: str) -> bytes:
    """An image's bytes in memory."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[name]).save(out, "PNG")
    return out.getvalue()
