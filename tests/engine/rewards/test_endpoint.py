"""The reward `judge` against an endpoint that is right, slow, busy, confused, or not there."""

import os
import subprocess
import sys
import time

import pytest
from tests.support.ranks import ROOT

from fusedrl.engine.base.errors import RewardError, SetupError
from fusedrl.engine.rewards.endpoint import judge
from fusedrl.engine.rewards.rewards import RewardSet, load_reward

pytest.importorskip("openai")
pytestmark = pytest.mark.cpu_only("texts alone")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    port = tmp_path_factory.mktemp("endpoint") / "port"
    server = subprocess.Popen([sys.executable, "-m", "tests.support.endpoint", str(port)], cwd=ROOT)
    try:
        last = time.monotonic() + 30
        while not port.exists():
            assert server.poll() is None
            assert time.monotonic() < last
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port.read_text()}/v1"
    finally:
        server.kill()
        server.wait()


def asked(url, model, completions, prompts=None, **options):
    given = {"retries": 0, "timeout": 20} | options
    spec = f"judge:model={model},base_url={url}," + ",".join(f"{k}={v}" for k, v in given.items())
    count = len(completions)
    prompts = prompts or ["p"] * count
    return RewardSet([load_reward(spec)]).score(prompts, completions, [[1]] * count, [[1]] * count)


def test_ratings_are_scaled(url):
    assert asked(url, "stars", ["", "*" * 9, "***"]).total == pytest.approx([0.0, 1.0, 1 / 3])


def test_a_conversation_and_a_rubric(url, tmp_path):
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("{prompt}|{completion}", encoding="utf-8")
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "\u05e9 *"}]
    found = asked(url, "stars", ["**\U0001f600"], prompts=[talk], rubric=rubric)
    assert found.total == pytest.approx([3 / 9])
    rubric.write_text("no place")
    with pytest.raises(RewardError, match=r"expected \{completion\} in the rubric"):
        asked(url, "stars", ["a"], rubric=rubric)
    with pytest.raises(RewardError, match="expected rubric to be a file"):
        asked(url, "stars", ["a"], rubric=tmp_path / "none")


def test_so_many_requests_at_once(url):
    found = asked(url, "crowd", ["a"] * 8, concurrency=4)
    assert max(found.total) == pytest.approx((4 - 1) / 9)


def test_a_request_that_fails_is_repeated(url):
    assert asked(url, "flaky", ["a", "a"], retries=2, concurrency=1).total == [1.0, 1.0]


@pytest.mark.parametrize(
    "model, reason",
    [
        ("busy", "answered 429, 1 times"),
        ("page", "sent no chat completion"),
        ("cut", "sent no chat completion"),
        ("empty", "sent no chat completion"),
        ("null", "no [[rating]] from 1 to 10 in the reply"),
        ("object", "sent no chat completion"),
        ("nested", "sent no chat completion"),
        ("eleven", "no [[rating]] from 1 to 10 in the reply"),
    ],
)
def test_nonsense_makes_a_sample_invalid(url, model, reason):
    ((index, name, said),) = asked(url, model, ["a"]).invalid[:1]
    assert (index, name) == (0, "judge")
    assert reason in said


@pytest.mark.parametrize("model", ["slow", "trickle"])
def test_a_late_answer_makes_a_sample_invalid(url, model):
    began = time.monotonic()
    ((_, _, said),) = asked(url, model, ["a"], timeout=0.5).invalid[:1]
    assert "did not answer within 0.5 s" in said
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "model, message", [("locked", "401"), ("moved", "307"), ("other", "404 .*no such model")]
)
def test_an_endpoint_that_refuses_stops_the_run(url, model, message):
    with pytest.raises(RewardError, match=message):
        asked(url, model, ["a"] * 50)


def test_an_endpoint_that_is_not_there(url):
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"cannot be reached .* 2 times; is it running"):
        asked("http://127.0.0.1:9/v1", "stars", ["a"] * 50, retries=1)
    assert time.monotonic() - began < 20


def test_the_address_of_the_environment(url, tmp_path):
    """As the official client reads it; no key is needed."""
    script = (
        "from fusedrl.engine.rewards.rewards import RewardSet, load_reward\n"
        "r = RewardSet([load_reward('judge:model=stars')])\n"
        "print(r.score(['p'], ['*********'], [[1]], [[1]]).total)"
    )
    env = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=env | {"OPENAI_BASE_URL": url},
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "[1.0]\n", ran.stderr[-2000:]


def test_options_and_the_package(monkeypatch):
    import asyncio

    with pytest.raises(RewardError, match="expected concurrency >= 1"):
        asyncio.run(judge(["p"], ["a"], model="m", concurrency=0))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SetupError, match=r"pip install 'fusedrl\[judge\]'"):
        asyncio.run(judge(["p"], ["a"], model="m"))
