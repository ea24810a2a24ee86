"""docs/inside-others.md, held to the code: its Python runs where the other package is installed,
its torchrun on two launchers."""

import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/inside-others.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.cpu_only("the page's code chooses its device itself")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def run(title: str, folder: Path, monkeypatch) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)
    script = folder / "page.py"
    script.write_text(code, encoding="utf-8")
    monkeypatch.chdir(folder)
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def folder(tmp_path, tiny_model):
    """Where a reader stands: a model of the page's name, whose tokenizer has a chat template."""
    shutil.copytree(tiny_model, tmp_path / "MODEL")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "<s>{% for m in messages %} {{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "MODEL")
    return tmp_path


def test_trl(folder, monkeypatch, capsys):
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    run("TRL", folder, monkeypatch)
    # the version of the second rollout, which follows one step
    assert capsys.readouterr().out.splitlines()[-1].strip() in ("1", "2")


def test_tinker(folder, monkeypatch):
    pytest.importorskip("tinker", reason="tinker is not installed: pip install tinker")
    run("A loop of Tinker's calls", folder, monkeypatch)
    assert (folder / "runs/tinker/states/last/checkpoints/step_00000000/MANIFEST.json").is_file()


def test_verl(folder, monkeypatch, capsys):
    pytest.importorskip("verl", reason="verl is not installed: pip install verl")
    run("verl", folder, monkeypatch)
    assert "FusedRLReplica" in capsys.readouterr().out


def test_skyrl(folder, monkeypatch, capsys):
    pytest.importorskip("skyrl_gym", reason="skyrl-gym is not installed: pip install skyrl-gym")
    run("SkyRL", folder, monkeypatch)
    assert capsys.readouterr().out.rstrip().endswith(" 0")


def test_the_page_says_what_was_installed():
    """The versions that the table names are those that the tests ran with, where they are here."""
    from importlib import metadata

    for name, pattern in (("trl", r"TRL (\d+\.\d+)"), ("tinker", r"tinker (\d+\.\d+)")):
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        assert re.search(pattern, PAGE)[1] == ".".join(installed.split(".")[:2])


@pytest.mark.full
def test_torchrun_on_two_launchers_has_the_bits_of_one_process(folder):
    """The page's command, smaller, with both launchers here."""
    rows = [json.dumps({"prompt": f"w{i} w2"}) for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    reward = (
        "def helpful(prompts, completions, **columns):\n    return [len(t) for t in completions]"
    )
    (folder / "my_rewards.py").write_text(reward, encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", section("torchrun on two machines"), re.DOTALL)
    command = shlex.split(block.replace("\\\n", " "), comments=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    small = ["--steps", "2", "--prompts_per_step", "4", "--generation.max_new_tokens", "6"]
    changed = {"HOST": "127.0.0.1", "29500": port, "8": "1", "16": "2"}
    words = [changed.get(word, word.replace("/shared", str(folder))) for word in command]
    words += [*small, "--device", "cpu"]
    node, program = words.index("--node-rank") + 1, words.index("-m")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words[1:node], str(rank)]
            + words[node + 1 :],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    for launcher in launchers:
        said, _ = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, said[-3000:]
    alone = [word.replace("runs/two", "runs/one") for word in words[program:]]
    subprocess.run([sys.executable, *alone], cwd=folder, env=environment, check=True)
    runs = [folder / "runs" / name for name in ("one", "two")]
    models = [(path / "model/model.safetensors").read_bytes() for path in runs]
    assert models[0] == models[1]
    first, second = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in runs
    )
    assert len(first) == len(second) == 2
    for one, two in zip(first, second, strict=True):
        here = {name for name in one if not re.match("timing|parallel|mem|perf|time", name)}
        assert {name: one[name] for name in here} == {name: two[name] for name in here}
