"""TRL's GRPOTrainer trains a transformers model, and the actor in its storage generates."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine import HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.rollout.trl import rollout_func

PROMPTS = ["w1 w2", "w1 w2", "w3", "w1 w2"]


class Trainer:
    """What rollout_func reads of a trainer."""

    chat_template, chat_template_kwargs, tools = None, {}, None

    def __init__(self, directory, rank=0, step=0, training=True):
        self.args = SimpleNamespace(
            max_completion_length=6,
            temperature=0.9,
            top_p=1.0,
            top_k=0,
            min_p=None,
            seed=5,
            repetition_penalty=1.0,
            generation_kwargs=None,
        )
        self.model, self.processing_class = (
            AutoModelForCausalLM.from_pretrained(directory),
            AutoTokenizer.from_pretrained(directory),
        )
        self.model.train(training)
        self.state = SimpleNamespace(global_step=step)
        self.accelerator = SimpleNamespace(
            process_index=rank, unwrap_model=lambda model, keep_torch_compile: model
        )


def test_one_completion_a_prompt_in_order_and_never_the_same_draw(tiny_model):
    trainer = Trainer(tiny_model)
    call = rollout_func()
    first, second = call(PROMPTS, trainer), call(PROMPTS, trainer)
    assert [len(column) for column in first.values()] == [4, 4, 4]
    assert (
        first["prompt_ids"]
        == second["prompt_ids"]
        == [trainer.processing_class(p)["input_ids"] for p in PROMPTS]
    )
    assert first["completion_ids"] != second["completion_ids"]
    assert len({tuple(ids) for out in (first, second) for ids in out["completion_ids"]}) > 4
    assert all(
        0 < len(ids) <= 6 and len(ids) == len(logp)
        for ids, logp in zip(first["completion_ids"], first["logprobs"], strict=True)
    )
    again = rollout_func()(PROMPTS, trainer)
    assert again == first
    greedy = rollout_func(params=SamplingParams(max_new_tokens=3, temperature=0.0))(
        PROMPTS, trainer
    )
    assert greedy["completion_ids"][0] == greedy["completion_ids"][1] == greedy["completion_ids"][3]


def test_no_two_requests_have_one_number(tiny_model, monkeypatch):
    """Over processes with batches of different sizes, steps, and evaluations between; a run that
    goes on from a step has the numbers that it would have had."""
    asked = []
    monkeypatch.setattr(
        HybridActor,
        "generate",
        lambda self, prompts, params, request_ids: asked.extend(request_ids) or [],
    )

    def run(rank, steps):
        trainer, call = Trainer(tiny_model, rank), rollout_func()
        for step in steps:
            trainer.state.global_step = step
            for training, calls in ((False, 2), (True, 1 + step % 2), (False, 1)):
                trainer.model.train(training)
                for _ in range(calls):
                    call(PROMPTS * (rank + 1), trainer)

    for rank in range(3):
        run(rank, range(4))
    assert len(set(asked)) == len(asked) > 100
    later = [*asked]
    asked.clear()
    run(2, range(2, 4))
    assert asked == later[-len(asked) :]
    asked.clear()
    run(4095, [2**30 - 1])
    assert max(asked) < 2**63
    with pytest.raises(ValueError, match="at most 4096 processes, got 12 on process 4096"):
        trainer = Trainer(tiny_model, 4096)
        rollout_func()(["w1", "w2"] * 6, trainer)


def test_the_actor_is_made_where_the_model_lies_and_again_where_it_went(tiny_model, device):
    trainer = Trainer(tiny_model)
    call = rollout_func(partial(HybridActor.from_module, strict=True))
    assert call.actor is None
    call(PROMPTS, trainer)
    actor = call.actor
    assert actor.strict
    with torch.no_grad():
        trainer.model.model.norm.weight.mul_(0.5)
    call(PROMPTS, trainer)
    assert call.actor is actor
    trainer.model.to(torch.bfloat16)
    out = call(PROMPTS, trainer)
    assert call.actor is not actor
    assert call.actor.decoder.dtype == torch.bfloat16
    trainer.model.load_state_dict(
        {name: value.clone() for name, value in trainer.model.state_dict().items()}, assign=True
    )
    trainer.model.tie_weights()
    assert call(PROMPTS, trainer)["prompt_ids"] == out["prompt_ids"]

    for given in (HybridActor.from_pretrained(tiny_model, dtype="float32", device=device), actor):
        with pytest.raises(
            RuntimeError,
            match=r"not generate from the weights that the trainer trains.*rollout_func\(\) "
            r"makes one",
        ):
            rollout_func(given)(PROMPTS, trainer)
    mine = HybridActor.from_module(trainer.model, trainer.processing_class)
    assert len(rollout_func(mine)(PROMPTS, trainer)["logprobs"]) == 4


def test_what_the_trainer_asks_for_is_followed_or_refused(tiny_model):
    trainer = Trainer(tiny_model)
    template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt "
        "%}{{ last }}{% endif %}"
    )
    trainer.processing_class.chat_template, trainer.chat_template_kwargs = template, {"last": "w9"}
    out = rollout_func()([[{"role": "user", "content": "w4"}]] * 2, trainer)
    assert (
        out["prompt_ids"] == [trainer.processing_class("w4 w9")["input_ids"]] * 2
        or out["prompt_ids"] == [[8, 13]] * 2
    )
    for change in ({"repetition_penalty": 1.1}, {"generation_kwargs": {"num_beams": 2}}):
        vars(trainer.args).update(change)
        with pytest.raises(ValueError, match="give rollout_func the params to draw with"):
            rollout_func()(PROMPTS, trainer)
        assert (
            len(rollout_func(params=SamplingParams(max_new_tokens=3))(PROMPTS, trainer)["logprobs"])
            == 4
        )


def torchrun(count):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]


def accelerate_launch(count):
    """--multi_gpu means a process a device; the script's trainer says that they are CPUs."""
    start = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    return [*start, "--num_processes", str(count), "--mixed_precision", "no"] + [
        *["--dynamo_backend", "no", "--main_process_port", "0"]
    ]


def processes(count, model, out, launcher=torchrun, **options):
    """What each of `count` processes wrote."""
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    script = Path(__file__).with_name("trl_processes.py")
    command = [
        sys.executable,
        *launcher(count),
        str(script),
        str(model),
        str(out),
        json.dumps(options),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(count)]


def check(told, wrapped):
    """Nothing drawn twice, every rollout from the weights of its moment, and these equal in all
    processes."""
    rollouts = [one for each in told for one in each["seen"]]
    long = [tuple(ids) for one in rollouts for ids in one["completions"] if len(ids) >= 6]
    assert len(long) > 20
    assert len(set(long)) == len(long), "equal prompts drew equal completions"
    assert all(one["gap"] < 1e-4 for one in rollouts)
    assert {one["wrapped"] for one in rollouts} == wrapped
    for mine in zip(*(each["seen"] for each in told), strict=True):
        assert len({one["weights"] for one in mine}) == 1
    assert len({each["end"] for each in told}) == 1
    steps = [one for one in told[0]["seen"] if one["training"]]
    assert (
        len({one["weights"] for one in steps}) == len(steps) == len({one["step"] for one in steps})
    ), "a rollout a step, each from other weights"
    versions = [one["version"] for one in steps]
    assert versions == sorted(set(versions))


def test_two_processes_draw_differently_and_train_one_model(tiny_model, tmp_path):
    told = processes(
        2,
        tiny_model,
        tmp_path,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        resume=2,
    )
    assert [each["world"] for each in told] == [2, 2]
    check(told, {"DistributedDataParallel"})
    for each in told:  # what is resumed draws what the run drew, from the same weights
        after = [one for one in each["seen"] if one["training"] and one["step"] >= 2]
        assert [
            (one["completions"], one["weights"]) for one in each["resumed"] if one["training"]
        ] == [(one["completions"], one["weights"]) for one in after]
        assert each["resumed_end"] == each["end"]


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 3])
def test_one_process_under_torchrun_and_three(count, tiny_model, tmp_path):
    told = processes(count, tiny_model, tmp_path, eval_strategy="steps", eval_steps=1)
    check(told, {"DistributedDataParallel"})


@pytest.mark.full
def test_two_processes_of_accelerate_launch(tiny_model, tmp_path):
    """What two processes of torchrun do, to the bit."""
    for launcher in (accelerate_launch, torchrun):
        (tmp_path / launcher.__name__).mkdir()
    first, second = (
        processes(2, tiny_model, tmp_path / launcher.__name__, launcher, max_steps=3)
        for launcher in (accelerate_launch, torchrun)
    )
    check(first, {"DistributedDataParallel"})
    assert first == second


def test_a_sharded_model_is_refused_with_the_remedy(tiny_model, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    trainer = Trainer(tiny_model)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for layer in trainer.model.model.layers:
            fully_shard(layer)
        fully_shard(trainer.model)
        with pytest.raises(ValueError, match=r"FSDP2 has sharded the model.*without fsdp"):
            rollout_func()(PROMPTS, trainer)
    finally:
        distributed.destroy_process_group()
    trainer = Trainer(tiny_model)
    call = rollout_func()
    call(PROMPTS, trainer)
    trainer.model.model.norm.weight.ds_id = 3  # what ZeRO-3 leaves on each parameter
    with pytest.raises(ValueError, match="ZeRO-3 has sharded"):
        call(PROMPTS, trainer)


def grpo_arguments(directory, beta=0.0, **options):
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(directory),
        beta=beta,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **options,
    )


def their_logps(model, prompt, completion):
    ids = torch.tensor([prompt + completion], device=model.device)
    logp = model(ids).logits[0, :-1].log_softmax(-1)
    return logp.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def test_grpo_trainer(tiny_model, tmp_path, device):
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from datasets import Dataset
    from trl import GRPOTrainer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).to(device),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    generate, differences, versions, storages = rollout_func(), [], [], []

    def checked(prompts, trainer):
        out = generate(prompts, trainer)
        versions.append(generate.actor.weights_version)
        storages.append([p.data_ptr() for p in model.parameters()])
        # transformers' own log-probabilities of what was drawn, with the weights of this moment
        with torch.no_grad():
            for prompt, completion, logp in zip(
                out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True
            ):
                expected = their_logps(model, prompt, completion)
                differences.append(
                    float((expected - torch.tensor(logp, device=device)).abs().max())
                )
        return out

    def likes_w5(completions, **_):
        return [float(text.split().count("w5")) for text in completions]

    arguments = grpo_arguments(
        tmp_path,
        per_device_train_batch_size=16,
        num_generations=8,
        max_steps=8,
        max_completion_length=12,
        learning_rate=2e-2,
        bf16=False,
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=likes_w5,
        args=arguments,
        rollout_func=checked,
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(16)]}),
    )
    trainer.train()
    assert trainer.model is model
    assert all(found == storages[0] for found in storages)
    assert max(differences) < 1e-4
    assert versions == list(range(8)), "one weights version a step, noticed without being told"
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-2:]) > 2 * sum(rewards[:2])
    actor = generate.actor
    batch = PackedBatch.from_completions(
        [[1, 4]], actor.generate([[1, 4]], SamplingParams(max_new_tokens=4)), device=device
    )
    assert actor.score(batch).logp.shape == (batch.num_tokens,)


@pytest.mark.parametrize("given", ["peft_config", "a PEFT model"])
def test_grpo_trainer_samples_from_the_adapter_that_it_trains(given, tiny_model, tmp_path, device):
    """With peft_config the reference is the model with its adapter disabled; a PEFT model gets a
    second adapter for it, "ref"."""
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    from datasets import Dataset
    from trl import GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).to(device)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    generate, gaps, versions = rollout_func(), [], []

    def checked(prompts, trainer):
        out = generate(prompts, trainer)
        versions.append(generate.actor.weights_version)
        with torch.no_grad():
            for row in zip(out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True):
                expected = their_logps(trainer.model, *row[:2])
                gaps.append(
                    float((expected.cpu() - torch.tensor(row[2], device="cpu")).abs().max())
                )
        return out

    trainer = GRPOTrainer(
        model=model if given == "peft_config" else peft.get_peft_model(model, settings),
        peft_config=settings if given == "peft_config" else None,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        reward_funcs=lambda completions, **_: [float(text.count("w5")) for text in completions],
        args=grpo_arguments(
            tmp_path,
            beta=0.01,
            per_device_train_batch_size=16,
            num_generations=8,
            max_steps=4,
            max_completion_length=8,
            learning_rate=5e-2,
            bf16=False,
            logging_steps=1,
        ),
        rollout_func=checked,
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]}),
    )
    trainer.train()
    assert ("ref" in trainer.model.peft_config) is (given != "peft_config")
    assert max(gaps) < 1e-4
    assert versions == list(range(4)), "one version a step, noticed without being told"
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(kl[0]) < 1e-6 < kl[-1], "the adapter moved away from the base"
    now = dict(trainer.model.get_base_model().named_parameters())
    assert all(
        torch.equal(value, now.get(name, now.get(name.replace(".weight", ".base_layer.weight"))))
        for name, value in base.items()
    )
    a = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert a.data_ptr() == generate.actor.decoder.layers[0].lora.qkv_a.data_ptr()


def test_a_trainer_under_autocast_is_told_once_with_the_remedy(tiny_model, tmp_path):
    """TRL sets bf16=True by itself: the model then computes in bfloat16 what the actor draws in
    float32."""
    import warnings

    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from trl import GRPOTrainer

    def run(dtype: torch.dtype, **options) -> list[str]:
        AcceleratorState._reset_state(True)  # accelerate keeps its precision for the whole process
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype),
            AutoTokenizer.from_pretrained(tiny_model),
        )
        arguments = grpo_arguments(
            tmp_path,
            per_device_train_batch_size=4,
            num_generations=4,
            max_steps=2,
            max_completion_length=4,
            **options,
        )
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=arguments,
            rollout_func=rollout_func(),
            train_dataset=Dataset.from_dict({"prompt": ["w1 w2", "w2 w3"]}),
        )
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.train()
        AcceleratorState._reset_state(True)
        return [text for one in found if "HybridActor" in (text := str(one.message))]

    (message,) = run(torch.float32)
    assert "load the model in bfloat16" in message
    assert "bf16=False" in message
    assert run(torch.bfloat16) == []
    assert run(torch.float32, bf16=False) == []
