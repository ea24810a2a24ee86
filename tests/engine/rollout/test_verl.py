"""verl's own manager, load balancer and client, over Ray, with our replica and a worker that trains
a transformers model. It needs an environment with verl 0.9 and ray (docs/inside-others.md)."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

ray = pytest.importorskip("ray", reason="ray is not installed")
pytest.importorskip("verl", reason="verl is not installed: pip install verl")
pytestmark = pytest.mark.cpu_only("verl's processes are Ray actors, which have no GPU here")
PLUGIN = "fusedrl.engine.rollout.verl_plugin"


def worker_class():
    """A class of its own, which Ray sends along: its processes do not find the tests."""

    class Worker:
        """The part of verl's worker that a rollout needs: a model that trains, and the adapter."""

        def __init__(self, directory, config):
            from transformers import AutoModelForCausalLM
            from verl.workers.rollout.base import get_rollout_class

            from fusedrl.engine.rollout import verl

            torch.set_num_threads(1)
            verl.register()
            self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            self.adapter = get_rollout_class("fusedrl", "async")(
                config=config, model_config=None, device_mesh=SimpleNamespace(get_rank=lambda: 0)
            )
            assert (self.adapter.replica_rank, self.adapter.is_leader_rank) == (0, True)

        def train(self, scale):
            with torch.no_grad():
                for p in self.model.parameters():
                    p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))

        async def send(self, step, without=(), **options):
            named = {n: p for n, p in self.model.state_dict().items() if n not in without}
            await self.adapter.update_weights(iter(named.items()), global_steps=step, **options)
            return sum(p.nbytes for n, p in named.items() if n != "lm_head.weight")

        async def around(self):
            await self.adapter.release()
            await self.adapter.resume(tags=["weights"])

        def score(self, prompt, completion):
            with torch.no_grad():
                logp = self.model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            return [float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(completion)]

    return Worker


@pytest.fixture(scope="module")
def cluster():
    roots = os.pathsep.join(path for path in sys.path if path)
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": roots, "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


def configured(directory, **rollout):
    from omegaconf import OmegaConf
    from verl.workers.config import RolloutConfig

    options = {"dtype": "float32", "prompt_length": 16, "response_length": 12, "max_num_seqs": 64}
    config = RolloutConfig(
        name="fusedrl", tensor_model_parallel_size=1, n_gpus_per_node=1, **{**options, **rollout}
    )
    model = OmegaConf.create({"path": str(directory)})
    return SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=config, model=model))


def test_verl_finds_the_rollout_in_every_process_that_names_the_plugin():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import verl\n"
            "from verl.workers.rollout.replica import RolloutReplica, get_rollout_replica_class\n"
            "from verl.workers.rollout.base import get_rollout_class\n"
            "kind = get_rollout_replica_class('fusedrl')\n"
            "assert issubclass(kind, RolloutReplica) and not kind.__abstractmethods__\n"
            "print(kind.__name__, get_rollout_class('fusedrl').__name__)",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VERL_USE_EXTERNAL_MODULES": PLUGIN, "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.split() == ["FusedRLReplica", "ServerAdapter"], done.stderr[-2000:]


def test_a_replica_of_several_devices_is_refused():
    from fusedrl.engine.rollout.verl import ServerAdapter, replica_class

    config = configured("x").actor_rollout_ref.rollout
    wide = replace(config, tensor_model_parallel_size=2)
    for make in (
        lambda: replica_class()(0, wide, None),
        lambda: ServerAdapter(wide, None, replica_rank=0),
    ):
        with pytest.raises(ValueError, match=r"tensor_model_parallel_size=1, got 2"):
            make()


@pytest.mark.full
def test_verls_client_gets_completions_of_the_weights_that_its_worker_trains(cluster, tiny_model):
    asyncio.run(_session(tiny_model))


class Session:
    """verl's manager with one replica, beside one worker that trains."""

    asked = {  # noqa: RUF012 (copied for each request)
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "repetition_penalty": 1.0,
        "logprobs": True,
    }
    prompts = tuple([1, 4 + i % 3] for i in range(24))

    async def begin(self, directory):
        from verl.workers.rollout.llm_server import LLMServerManager

        from fusedrl.engine.rollout import verl

        verl.register()
        config = configured(directory)
        self.worker = ray.remote(worker_class()).remote(directory, config.actor_rollout_ref.rollout)
        group = SimpleNamespace(workers=[self.worker], world_size=1)
        manager = await LLMServerManager.create(config, worker_group=group)
        (self.replica,) = manager.get_replicas()
        self.client, (self.server,) = manager.get_client(), self.replica.servers
        return self

    async def ask(self, name, prompt, **options):
        sampling = {**self.asked, **options}
        return await self.client.generate(name, prompt_ids=prompt, sampling_params=sampling)

    async def generate(self):
        return await asyncio.gather(*[self.ask(f"{i}", p) for i, p in enumerate(self.prompts)])

    async def check(self, outs, step):
        """Completions with log-probabilities by the weights that the worker has now."""
        for prompt, out in zip(self.prompts, outs, strict=True):
            assert 0 < len(out.token_ids) == len(out.log_probs) <= 12
            assert out.stop_reason == "completed"
            assert out.extra_fields["global_steps"] == step
            expected = await self.worker.score.remote(prompt, out.token_ids)
            assert out.log_probs == pytest.approx(expected, abs=1e-4)


async def _session(directory):
    s = await Session().begin(directory)
    first = await s.generate()
    await s.check(first, None)
    assert len({tuple(out.token_ids) for out in first}) > 12
    # the worker trains, and sends what it has
    await s.worker.train.remote(0.1)
    sent = await s.worker.send.remote(7)
    assert (await s.server.stats.remote())["bytes"] == sent
    await s.check(await s.generate(), 7)
    # sleeping frees the cache and keeps the weights
    await s.worker.around.remote()
    await s.replica.sleep()
    await s.replica.wake_up()
    await s.check(await s.generate(), 7)
    await _broken_updates(s)
    await _held_requests(s)
    for options in ({"repetition_penalty": 1.2}, {"temperature": -1.0}):
        with pytest.raises((TypeError, ValueError), match=r"cannot be followed|expected temp"):
            await s.ask("x", [1], **options)
    long = await s.ask("l", [1] * 40)
    assert (long.token_ids, long.stop_reason) == ([], "completed")
    short = await s.ask("s", [1, 4], max_tokens=1, logprobs=False)
    assert (len(short.token_ids), short.log_probs) == (1, None)


async def _broken_updates(s):
    """Weights of two versions are never drawn from."""
    await s.worker.train.remote(0.1)
    with pytest.raises(ValueError, match="1 tensors are missing, such as model"):
        await s.worker.send.remote(8, without=("model.norm.weight",))
    pending = asyncio.ensure_future(s.generate())
    await asyncio.sleep(0.2)
    assert not pending.done(), "requests wait for the update to end"
    await s.worker.send.remote(8)
    await s.check(await pending, 8)
    for options, message in (
        ({"wire_format": "delta_flush"}, "takes whole weights, got wire format delta_flush"),
        ({"peft_config": {"r": 4}}, "got a LoRA adapter; set actor_rollout_ref.model.lora.merge"),
    ):
        with pytest.raises(ValueError, match=message):
            await s.worker.send.remote(9, **options)


async def _held_requests(s):
    """Requests are refused, or wait."""
    await s.replica.abort_all_requests(reject_request=True)
    refused = await s.ask("a", [1, 5])
    assert (refused.token_ids, refused.stop_reason) == ([], "aborted")
    under_way = asyncio.ensure_future(s.generate())
    await asyncio.sleep(0.01)
    await s.replica.abort_all_requests()
    held = asyncio.ensure_future(s.generate())
    await asyncio.sleep(0.2)
    assert not held.done()
    await s.replica.resume_generation()
    await s.check(await held, 8)
    for out in await under_way:  # each with what it had when it was told to end
        assert out.stop_reason in ("completed", "aborted")
        assert len(out.token_ids) == len(out.log_probs) <= 12
