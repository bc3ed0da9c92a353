"""LoRA adapters trained with a plug-in: off in the teacher, saved and resumed with it, and readable by peft."""

import json

import peft
import pytest
import tiny
import torch
from faults import Cut, PowerCut
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import batch, forward, gap, same_ends, samples, shake, trainer

from lit_prune.commands import export
from lit_prune.errors import LitPruneError
from lit_prune.host.lora import LoRA
from lit_prune.plugin import Plugin
from lit_prune.pruners.base import Full
from lit_prune.training.module import PruneModule
from lit_prune.training.step import StepKey
from lit_prune.vlm import VLM

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def adapted(tiny_model):
    """The tiny model with shaken adapters alone: nothing is pruned."""
    vlm = VLM(tiny_model, None, "tiny").attach(Plugin(Full(), lora=LoRA(r=4, target_modules=TARGETS)), keep=36)
    shake(vlm.plugin.lora)
    yield vlm
    vlm.detach()


def test_adapters_off_and_keep_all_is_the_teacher_bit_for_bit(adapted):
    inputs = batch(samples(), answers=3)
    with torch.no_grad():
        vlm = adapted
        on = vlm.model(**inputs).logits
        off, _ = forward(vlm, inputs, adapt=False)
        teacher, _ = forward(vlm, inputs, prune=False, repair=False)
        model = vlm.model
        vlm.detach()
        plain = model(**inputs).logits
    assert torch.equal(off, plain)
    assert torch.equal(teacher, plain)
    assert gap(on, plain) > 0.1


def test_new_adapters_change_nothing(tiny_model):
    inputs = batch(samples())
    with torch.no_grad():
        plain = tiny_model(**inputs).logits
        vlm = VLM(tiny_model, None, "tiny").attach(Plugin(Full(), lora=LoRA()), keep=36)
        new = vlm.model(**inputs).logits
        vlm.detach()
    assert torch.equal(new, plain)


def test_the_folder_attaches_again_and_peft_reads_its_adapters(adapted, tmp_path):
    inputs = batch(samples())
    with torch.no_grad():
        expected = adapted.model(**inputs).logits
    adapted.save_pretrained(tmp_path / "plugin")
    adapted.detach()
    again = VLM(adapted.model, None, "tiny").attach(str(tmp_path / "plugin"))
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, expected)
    again.detach()
    config = json.loads((tmp_path / "plugin/lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    other = peft.PeftModel.from_pretrained(tiny.build_model(), str(tmp_path / "plugin/lora"))
    with torch.no_grad():
        assert gap(other(**inputs).logits, expected) < 1e-4


def test_a_folder_with_adapters_is_exported_and_saved_over_without_them(adapted, tmp_path):
    """No path of this machine in what peft reads; adapters of an earlier save don't stay."""
    adapted.plugin.base = str(tmp_path)
    adapted.save_pretrained(tmp_path / "plugin")
    export.run(tmp_path / "plugin", tmp_path / "exported")
    assert json.loads((tmp_path / "exported/lora/adapter_config.json").read_text())["base_model_name_or_path"] is None
    found = Plugin.from_pretrained(tmp_path / "exported").state_dict()
    assert all(torch.equal(found[name], value) for name, value in adapted.plugin.state_dict().items())
    Plugin(Full(), keep=36).save_pretrained(tmp_path / "exported")
    assert not (tmp_path / "exported/lora").exists()


def test_sizes_are_known_while_zero_3_holds_the_weights(adapted):
    sizes = adapted.plugin.lora.sizes()
    assert len(sizes) == len(adapted.plugin.lora.adapters) > 0
    for parameter in adapted.plugin.lora.parameters():
        parameter.data = parameter.data.new_empty(0)
    assert adapted.plugin.lora.sizes() == sizes


def test_adapters_come_from_the_folder_or_from_the_settings(tmp_path):
    with pytest.raises(LitPruneError, match=r"^either model\.lora or model\.plugin, .*: add --model\.lora=null$"):
        PruneModule("micro", plugin=str(tmp_path), lora=LoRA(), keep=16)


def test_a_wrong_name_is_refused_with_those_that_there_are(tiny_model):
    with pytest.raises(LitPruneError, match="named k_pro; there is down_proj, gate_proj, k_proj, o_proj"):
        VLM(tiny_model, None).attach(Plugin(Full(), lora=LoRA(target_modules=["k_pro"])), keep=36)
    with pytest.raises(LitPruneError, match=r"model\.lora\.r"):
        LoRA(r=0)


@pytest.mark.parametrize("mode", ["soft", "drop"])
def test_gradients_reach_adapters_below_the_first_stage(student, world, mode):
    """Teacher and student no longer share their first layers; the teacher's states stay the plain model's."""
    data = world()
    data.prepare_data()
    data.setup("fit")
    items = next(iter(data.train_dataloader()))
    module = student(train_mode=mode, lora=LoRA(lora_dropout=0.1)).train()
    first = module.step(items, StepKey(0, 0.5))
    first.total.backward()
    grads = {name: p.grad for name, p in module.plugin.lora.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    assert any(grad.abs().max() > 0 for name, grad in grads.items() if "layers/0/" in name and name.endswith("up"))
    assert all(p.grad is None for p in module.model.parameters())
    shake(module.plugin.lora)
    second = module.step(items, StepKey(0, 0.5))
    assert all(torch.equal(first.teacher.hidden[i], second.teacher.hidden[i]) for i in first.teacher.hidden)
    assert any(gap(first.student.hidden[i], second.student.hidden[i]) > 1e-3 for i in first.student.hidden)


@pytest.mark.parametrize(("pack", "backward"), [(False, "all"), (True, "all"), (False, "kept")])
def test_recomputed_layers_draw_the_same_dropout(student, world, pack, backward):
    """Layers run again in backward, outside of the forward's session, packed or not, with rows beside or without."""
    data = world()
    data.prepare_data()
    data.setup("fit")
    items = {**next(iter(data.train_dataloader())), "pack": pack}
    items["inputs"]["attention_mask"][0, -3:] = 0  # a shorter sample
    found = []
    for again in (False, True):
        lora = LoRA(lora_dropout=0.5, target_modules=("q_proj", "v_proj", "o_proj"))
        module = student(lora=lora, checkpoint_activations=again, backward=backward).train()
        torch.manual_seed(3)
        shake(module.plugin.lora)
        module.step(items, StepKey(0, 0.5)).total.backward()
        found.append([p.grad for p in module.plugin.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(grad.abs().max() > 0 for grad in found[0])


def test_a_resumed_run_is_the_uninterrupted_one(student, world, tmp_path):
    def run(folder, *callbacks, **more):
        saver = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=1, save_top_k=0)
        module = student(lora=LoRA(r=2, lora_dropout=0.1))
        trainer(tmp_path, [saver, *callbacks], max_steps=3).fit(module, world(), **more)
        return module

    run("whole")
    with pytest.raises(PowerCut):
        run("cut", Cut(2))
    module = run("cut", ckpt_path=tmp_path / "cut/last.ckpt")
    end = same_ends(tmp_path / "cut/last.ckpt", tmp_path / "whole/last.ckpt")
    assert sum("lora" in name for name in end["state_dict"]) == 2 * len(module.plugin.lora.adapters) > 0
    exported = Plugin.from_checkpoint(tmp_path / "whole/last.ckpt")
    assert exported.lora.sizes() == module.plugin.lora.sizes()
