"""What a command must not import before it needs it: each of these takes seconds."""

import subprocess
import sys

import pytest

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
