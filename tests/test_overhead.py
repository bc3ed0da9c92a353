"""Overhead of the hooks, by counts that no busy machine changes: Python calls and tensor operations."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lit_prune.evaluation.timing.prompts import random_prompt
from lit_prune.host.cut import cut_to
from lit_prune.vlm import VLM, load

ADDED = (0.0424, 0.4604, 0.1602)  # shares of the pruned prefill: FLOPs, operations, numbers written

# In a process of its own, where shapes aren't checked: what a decoding step takes is the difference between a longer
# and a shorter answer. {method: [calls of Python functions, operations that reach PyTorch's dispatcher]}.
COUNT = """
import json, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import lit_prune
from lit_prune.micro.world import VALIDATION_SEED, choose_questions, make_scene

class Operations(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))

def operations(run):
    with Operations() as seen:
        run()
    return seen.count

def calls(run):
    count = 0
    def see(frame, event, argument):
        nonlocal count
        count += event == "call"
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count

vlm, scene, found = lit_prune.load("micro"), make_scene(VALIDATION_SEED), {}
inputs = vlm.encode(scene.image(), choose_questions(scene, 1)[0].text)

def answer(tokens):
    return lambda: vlm.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

with torch.no_grad():
    for method in (None, "fastv", "rcp"):
        if method:
            vlm.attach(method, keep=16)
        answer(2)()  # lazy imports
        found[method or "full"] = [(count(answer(8)) - count(answer(3))) / 5 for count in (calls, operations)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counts() -> dict[str, list[float]]:
    ran = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


# RCP has three stages, whose layers each have cached columns of their own, and two adapters of five linear layers.
@pytest.mark.parametrize(("method", "calls", "operations"), [("fastv", 0.14, 0.02), ("rcp", 0.21, 0.08)])
def test_a_decoding_step_takes_little_more_than_the_full_models(counts, method, calls, operations):
    """Whatever the width and the batch, which change neither count."""
    full, pruned = counts["full"], counts[method]
    assert pruned[0] < full[0] * (1 + calls), counts
    assert pruned[1] < full[1] * (1 + operations), counts


class Work(TorchDispatchMode):
    """Operations that reach PyTorch's dispatcher, and numbers that they write: views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, inputs = function(*args, **(kwargs or {})), tree_leaves((args, kwargs))
        given = {part.untyped_storage().data_ptr() for part in inputs if isinstance(part, torch.Tensor)}
        in_place = function.overloadpacket.__name__.endswith("_")
        made = [part for part in tree_leaves(out) if isinstance(part, torch.Tensor)]
        self.written += sum(part.numel() for part in made if in_place or part.untyped_storage().data_ptr() not in given)
        self.operations += 1
        return out


def prefill_work(vlm: VLM, inputs: dict) -> tuple[int, int, int]:
    """FLOPs, operations and numbers written of a prefill."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={fused: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)})
    with torch.no_grad(), counter, Work() as work:
        vlm.model(**inputs, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops(), work.operations, work.written


def test_three_stages_of_rcp_add_no_more_to_a_prefill_than_they_did(tmp_path):
    """Beside the plain model on sequences cut to the same lengths, at the width and depth of configs/bench/cpu.yaml.

    The counts are exact; each may exceed what it was by a fiftieth, for other versions of the libraries.
    """
    described = yaml.safe_load((ROOT / "configs/bench/cpu.yaml").read_text())["model"]
    described["text_config"]["vocab_size"], described["image_token_index"] = 1000, 999
    described["vision_config"].update(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(described))
    vlm = load(str(tmp_path), torch.float32, random_weights=True)
    inputs, lengths = random_prompt(vlm, 1, 64).features, [640] * 2 + [256] * 2 + [128] * 4 + [80] * 4
    with cut_to(vlm.model, lengths, 640):
        plain = prefill_work(vlm, inputs)
    vlm.attach(ROOT / "configs/bench/pruners/rcp_three_stages.yaml", keep="2:192,4:64,8:16")
    added = [(ours - theirs) / ours for ours, theirs in zip(prefill_work(vlm, inputs), plain, strict=True)]
    assert all(0 < now < then * 1.02 for now, then in zip(added, ADDED, strict=True)), added
