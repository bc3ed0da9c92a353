"""Overhead of the hooks, by counts that no busy machine changes: Python calls and tensor operations."""

import json
import subprocess
import sys

import pytest

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
