"""What a command must not import before it needs it: each of these takes seconds."""

import os
import subprocess
import sys

import pytest
from tiny import ROOT

from lit_prune.cli import main

FRAMEWORK = {"torch", "transformers", "lightning"}
# Neither pricing nor help has use for a model's code, and these bring PyTorch's compiler along.
MODELLING = {"transformers.modeling_utils", "transformers.masking_utils", "torch._dynamo", "lightning", "torchmetrics"}


def imported(command: str) -> set[str]:
    """What a process of its own has imported when it has run a command; its output is left out."""
    code = "import sys, lit_prune.cli as c\ntry: c.main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code\n"
    code += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "command", ["--help", "cost --help", "score --help", "sweep --help", "sample --help", "configs"]
)
def test_help_comes_without_any_framework(command):
    assert not FRAMEWORK & imported(command)


@pytest.mark.parametrize("verb", ["generate", "shard"])
def test_help_of_what_does_not_train_comes_without_lightning(verb):
    assert not (MODELLING - {"torch._dynamo"}) & imported(f"{verb} --help")


@pytest.mark.parametrize("model", ["llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"])
def test_pricing_needs_no_models_code(model):
    found = imported(f"cost --model {model} --pruner configs/pruners/rcp.yaml --keep 320")
    assert "lit_prune.cost.flops" in found
    assert not MODELLING & found


WITHOUT_TRAINING = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric", "deepspeed", "wandb"):
    sys.modules[name] = None  # as if it weren't installed
import lit_prune
from lit_prune.cli import main
asked = ["--image", "sample/0.png", "--prompt", "What colour is the tile?"]
main(["sample", "--out", "sample"])
vlm = lit_prune.load("micro").attach("divprune", keep=16)
assert vlm.answer("sample/0.png", "What colour is the tile?") == "blue"
main(["cost", "--pruner", "divprune", "--keep", "64"])
main(["show", *asked, "--pruner", "fastv", "--keep", "16", "--out", "kept.png"])
main(["fit", "-c", "micro.yaml"])
"""


def test_a_plain_install_attaches_answers_shows_and_prices(tmp_path):
    """`fit` says in one sentence what is missing, and the command that installs it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRAINING],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: this verb needs lightning, which is not installed: pip install -e '.[train]'")
    assert (tmp_path / "kept.png").is_file()


def test_a_verb_that_trains_names_a_missing_part_of_the_extra(monkeypatch, capsys):
    """Lightning alone, without W&B: its logger's options in micro.yaml would read as unknown keys."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        main(["fit", "-c", "micro.yaml"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: this verb needs wandb, which is not installed: pip install -e '.[train]'")


def test_importing_the_package_imports_no_framework():
    code = "import sys, time; t = time.process_time(); import lit_prune; print(time.process_time() - t, *sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert not (FRAMEWORK | {"numpy"}) & set(said.split())
    assert float(said.split()[0]) < 0.3
