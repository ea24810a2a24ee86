"""Models that share an actor's storage, saved and loaded by everyone else's code: nothing is lost,
and what is loaded the actor generates from."""

import gc

import pytest
import torch
from tests.engine.model.test_sharing import KINDS, SIZES, completed, greedy, model, train
from torch import nn
from transformers import AutoModelForCausalLM

from fusedrl.engine import HybridActor
from fusedrl.engine.model.weights import hf_views

pytestmark = [
    pytest.mark.cpu_only("files and the host's storages: test_sharing.py has the numbers on a card")
]


def accelerator():
    accelerate = pytest.importorskip(
        "accelerate", reason="accelerate is not installed: pip install accelerate"
    )
    return accelerate.Accelerator(cpu=True)


def safetensors_file(module, directory):
    from safetensors.torch import save_model

    directory.mkdir()
    save_model(module, str(directory / "model.safetensors"))


def from_safetensors_file(module, directory):
    from safetensors.torch import load_model

    load_model(module, str(directory / "model.safetensors"))


def accelerate_model(module, directory):
    accelerator().save_model(module, str(directory), max_shard_size="9KB")  # several shards


def from_accelerate_model(module, directory):
    from accelerate import load_checkpoint_in_model

    load_checkpoint_in_model(module, str(directory))


def accelerate_state(module, directory):
    one = accelerator()
    one.prepare(module)
    one.save_state(str(directory))


def from_accelerate_state(module, directory):
    one = accelerator()
    one.prepare(module)
    one.load_state(str(directory))


def transformers_files(module, directory):
    module.save_pretrained(directory, max_shard_size="9KB")


def from_transformers_files(module, directory):
    module.load_state_dict(
        AutoModelForCausalLM.from_pretrained(directory, dtype=module.dtype).state_dict()
    )


def pickled(module, directory):
    directory.mkdir()
    torch.save(module.state_dict(), directory / "model.pt")


def from_pickled(module, directory):
    module.load_state_dict(torch.load(directory / "model.pt", weights_only=True))


def distributed_checkpoint(module, directory):
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": module.state_dict()}, checkpoint_id=str(directory))


def from_distributed_checkpoint(module, directory):
    import torch.distributed.checkpoint as dcp

    # into the tensors that are there
    dcp.load({"model": module.state_dict()}, checkpoint_id=str(directory))


WAYS = {
    "safetensors": (safetensors_file, from_safetensors_file),
    "accelerate, save_model": (accelerate_model, from_accelerate_model),
    "accelerate, save_state": (accelerate_state, from_accelerate_state),
    "transformers": (transformers_files, from_transformers_files),
    "torch.save": (pickled, from_pickled),
    "torch.distributed.checkpoint": (distributed_checkpoint, from_distributed_checkpoint),
}


EVERY_DAY = {"qwen3, tied": (torch.float32, torch.bfloat16), "gpt2": (torch.float32,)}


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def size(directory) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "kind, dtype, way",
    [
        pytest.param(
            kind,
            dtype,
            way,
            id=f"{kind}, {dtype}, {way}".replace("torch.", "", 1),
            marks=()
            if (kind in EVERY_DAY and dtype in EVERY_DAY[kind])
            or (dtype == torch.float32 and way == "accelerate, save_state")
            else pytest.mark.full,
        )
        for kind in KINDS
        for dtype in (torch.float32, torch.bfloat16)
        for way in WAYS
    ],
)
def test_what_others_save_is_whole_and_what_they_load_the_actor_follows(kind, dtype, way, tmp_path):
    write, read = WAYS[way]
    module = model(kind, dtype)
    actor = HybridActor.from_module(module)
    train(module, 1)
    saved, said = values(module), completed(actor)
    write(module, tmp_path / "files")
    fresh = model(kind, dtype)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    read(fresh, tmp_path / "files")
    assert fresh.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in fresh.state_dict().items())
    assert (
        fresh.get_input_embeddings().weight is fresh.get_output_embeddings().weight
    ) == fresh.config.tie_word_embeddings
    write(fresh, tmp_path / "plain")
    assert size(tmp_path / "files") == pytest.approx(size(tmp_path / "plain"), rel=0.005), (
        "a parameter's storage is as large as the parameter"
    )

    train(module, 2)
    assert completed(actor) != said, "training must have changed something"
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.5)
    version, addresses = actor.weights_version, [p.data_ptr() for p in module.parameters()]
    read(module, tmp_path / "files")
    assert [p.data_ptr() for p in module.parameters()] == addresses
    assert completed(actor) == said
    assert dtype != torch.float32 or said == greedy(module)
    assert actor.weights_version > version
    assert all(torch.equal(view, saved[name]) for name, view in hf_views(actor.decoder).items())


def test_trainers_checkpoints_are_whole_and_resume_into_the_shared_storage(tmp_path):
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainingArguments

    class Rows(Dataset):
        rows = torch.randint(
            0, SIZES["vocab_size"], (16, 12), generator=torch.Generator().manual_seed(2)
        )

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return {"input_ids": self.rows[index], "labels": self.rows[index]}

    def trainer(module):
        return Trainer(
            model=module,
            train_dataset=Rows(),
            args=TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                max_steps=4,
                save_steps=2,
                learning_rate=3e-2,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                seed=0,
            ),
        )

    through, resumed = model(), model()
    trainer(through).train()
    plain = values(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"))
    assert plain.keys() == values(resumed).keys()
    shared = model()
    actor = HybridActor.from_module(shared)
    trainer(shared).train()
    assert values(shared).keys() == values(through).keys()
    assert all(torch.equal(value, values(through)[name]) for name, value in values(shared).items())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(value, plain[name]) for name, value in written.state_dict().items())
    assert completed(actor) == greedy(through)

    actor, addresses = (
        HybridActor.from_module(resumed),
        [p.data_ptr() for p in resumed.parameters()],
    )
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [p.data_ptr() for p in resumed.parameters()] == addresses
    assert all(torch.equal(value, values(through)[name]) for name, value in values(resumed).items())
    assert completed(actor) == greedy(through)


def test_peft_writes_its_adapter_and_a_merged_model_whole(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    module = model()
    HybridActor.from_module(module)
    before = values(module)
    wrapped = peft.get_peft_model(
        module,
        peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
        ),
    )
    train(wrapped, 1)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter")
    assert greedy(again) == greedy(wrapped)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found = values(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert found.keys() == before.keys()
    assert all(torch.equal(value, found[name]) for name, value in values(merged).items())
    assert (
        sorted(name.split(".")[-2] for name in found if not torch.equal(found[name], before[name]))
        == ["down_proj"] * 2 + ["q_proj"] * 2 + ["v_proj"] * 2
    )


@pytest.mark.parametrize("kind", ["qwen3, tied", "gpt2", "llama, untied, biases"])
def test_the_actors_own_parameters_are_saved_and_loaded_too(kind, tmp_path):
    from safetensors.torch import load_model, save_model

    model(kind).save_pretrained(tmp_path / "model")
    actor = HybridActor.from_pretrained(tmp_path / "model")
    before, said = values(actor.decoder), completed(actor)
    save_model(actor.decoder, str(tmp_path / "decoder.safetensors"))
    torch.save(actor.decoder.state_dict(), tmp_path / "decoder.pt")
    for read in (
        lambda: load_model(actor.decoder, str(tmp_path / "decoder.safetensors")),
        lambda: actor.decoder.load_state_dict(
            torch.load(tmp_path / "decoder.pt", weights_only=True)
        ),
    ):
        with torch.no_grad():
            for p in actor.decoder.parameters():
                p.zero_()
        read()
        actor.mark_updated()
        assert before.keys() == actor.decoder.state_dict().keys()
        assert all(
            torch.equal(value, before[name]) for name, value in actor.decoder.state_dict().items()
        )
        assert completed(actor) == said


def test_fused_storage_lives_as_long_as_a_parameter_of_it():
    module = model()
    expected = greedy(module)
    HybridActor.from_module(module)
    gc.collect()
    torch.empty(100_000).fill_(9.0)  # whoever is given the memory that is free
    assert greedy(module) == expected


def test_what_moves_a_storage_is_refused():
    module = model()
    actor = HybridActor.from_module(module)
    completed(actor)
    module.share_memory()
    with pytest.raises(RuntimeError, match="build a new actor with from_module"):
        completed(actor)
    assert completed(HybridActor.from_module(module)) == greedy(module)
