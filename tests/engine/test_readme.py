"""README.md and docs/guide.md, held to the code: commands run in the order in which they stand,
Python runs, tables say what the rows are."""

import io
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from tests.support.chat import write_chat_model
from tests.support.import_graph import FLOORS

from fusedrl.engine.cli.main import STAGES, main
from fusedrl.engine.config.algorithms import ALGORITHMS
from fusedrl.engine.data.sources import Source, parse_data
from fusedrl.engine.model.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
README, GUIDE, REWARDS_PAGE, METHODS = (
    (ROOT / page).read_text(encoding="utf-8")
    for page in ("README.md", "docs/guide.md", "docs/rewards.md", "docs/algorithms.md")
)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README + GUIDE + REWARDS_PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("fusedrl ")
]


def python(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


# What makes each command small enough for a test; what the README shows stays as it stands.
SMALL = {
    "sft": [],
    "reward": [],
    "dpo": [],
    "kto": [],
    "report": [],
    "watch": [],
    "rejection": ["--steps", "1", "--prompts_per_step", "4", "--generation.max_new_tokens", "6"],
    "policy": ["--steps", "2", "--prompts_per_step", "4", "--generation.max_new_tokens", "6"],
    "generate": ["--max_new_tokens", "6"],
    "judge": ["--max_new_tokens", "6"],
    "data": [],
    "init": [],
    "runs": [],
    "resume": ["--steps", "3"],
    "export": [],
    "chat": ["--max_new_tokens", "6"],
    "eval": ["--max_new_tokens", "6"],
    "reward-check": ["--max_new_tokens", "6"],
    "samples": [],
}


def table(heading: str) -> list[dict[str, str]]:
    """The rows of the table of docs/algorithms.md whose first column has this heading."""
    lines = METHODS[METHODS.index(f"| {heading} |") :].splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    ]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


REWARDS = """
def helpful(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def short(prompts, completions, completion_ids, **columns):
    return [-float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch):
    """Where a reader stands: files of the names that README uses."""
    files = {
        "demonstrations.jsonl": {"prompt": "WORD", "completion": " w2 w3"},
        "pairs.jsonl": {"prompt": "WORD", "chosen": " w2 w3", "rejected": " w4"},
        "labelled.jsonl": {"prompt": "WORD", "completion": " w2", "label": True},
        "prompts.jsonl": {"prompt": "WORD"},
        "games.jsonl": {"prompt": "WORD", "secret": "WORD"},
        "train.jsonl": {"question": "WORD", "answer": "w1 w2\n#### 5"},
    }
    for name, row in files.items():
        lines = [json.dumps(row).replace("WORD", f"w{i}") for i in range(8)]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "questions.csv").write_text("question,answer\nw1 w2,5\nw3,6\n", encoding="utf-8")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "my_judge.py").write_text(
        "def better(a, b):\n    return ['a' if len(x) >= len(y) else 'b' for x, y in zip(a, b)]\n"
    )
    (game,) = (block for block in python(GUIDE) if "class Game" in block)
    (tmp_path / "my_game.py").write_text(game)
    write_chat_model(tmp_path / "CHAT", "llama", max_position_embeddings=1024)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(tiny_model, tmp_path / "MODEL")
    config = json.loads((tmp_path / "MODEL/config.json").read_text())
    (tmp_path / "MODEL/config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 128})
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_as_they_stand(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\nw3\n"))  # what is said to chat
    assert len(COMMANDS) >= 12
    shown = set()
    for number, command in enumerate(COMMANDS):
        words = command[1:]
        kind = words[1] if words[0] == "train" else words[0]
        shown.add(kind)
        if words[0] == "train" and "--run.dir" not in words:
            words += ["--run.dir", f"runs/{number}"]
        if {"--environment", "--tools"} & {*words}:  # whose observations are messages
            words[words.index("MODEL")] = "CHAT"
        small = SMALL["policy" if kind in ALGORITHMS else kind]
        if "--critic.warmup_steps" in words:  # fewer steps than that would train no policy
            small = [
                *small,
                "--steps",
                str(int(words[words.index("--critic.warmup_steps") + 1]) + 1),
            ]
        code = main([*words, *small])
        said = capsys.readouterr()
        assert code == 0, f"{' '.join(command)}: exit code {code}\n{said.err[-2000:]}"
    assert {
        "sft",
        "reward",
        "ppo",
        "grpo",
        "dpo",
        "rejection",
        "generate",
        "judge",
        "chat",
        "eval",
        "reward-check",
        "report",
        "data",
        "samples",
    } <= shown
    assert (folder / "runs/ppo/model/model.safetensors").is_file()


def test_the_data_of_the_guide_is_written_as_it_is_read():
    section = GUIDE.split("## Data\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    written = [word for row in rows for word in re.findall(r"`([^`]+)`", row)]
    assert len(written) >= 10
    sources = {word: parse_data(word) for word in written}
    assert sources["train.txt:separator=semicolon:header=prompt+completion"] == [
        Source("train.txt", separator=";", header=("prompt", "completion"))
    ]
    (block,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert parse_data(yaml.safe_load(block)["data"]) == [
        Source("a.parquet", columns={"prompt": "question"}, weight=2),
        Source("hf:org/name", split="train", config="main"),
    ]


def test_the_python_of_the_guide_runs_as_it_stands(folder):
    (block,) = [one for one in python(GUIDE) if "scored = " in one]
    (folder / "block.py").write_text(block, encoding="utf-8")
    made = runpy.run_path(str(folder / "block.py"))
    scored, batch = made["scored"], made["batch"]
    assert batch.action_mask.sum() >= 4
    assert (scored.logp - batch.rollout_logp)[batch.action_mask].abs().max() < 1e-5


def test_the_kernel_in_a_loop_of_the_guide_learns(folder):
    (block,) = [one for one in python(GUIDE) if "linear_logprob" in one]
    (folder / "block.py").write_text(block, encoding="utf-8")
    made = runpy.run_path(str(folder / "block.py"))
    assert made["loss"] < 5.0  # ln 1000 = 6.9 at the beginning
    assert made["logp"].shape == (128,)


SIZES = {
    "stories=4096": "stories=256",
    "steps=20": "steps=1, prompts_per_step=4",
    "epochs=2": "epochs=1",
}  # what a test has time for


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """In an empty folder, on the data that it makes."""
    monkeypatch.chdir(tmp_path)
    (block,) = python(README)
    for shown, small in SIZES.items():
        assert block.count(shown) == 1, f"README no longer shows {shown}"
        block = block.replace(shown, small)
    (tmp_path / "block.py").write_text(block, encoding="utf-8")
    made = runpy.run_path(str(tmp_path / "block.py"))
    assert made["gap"] < 1e-5
    assert made["outs"][0][0].text in capsys.readouterr().out
    assert (tmp_path / "runs/first/grpo/model/model.safetensors").is_file()


def test_the_table_of_algorithms_is_the_rows():
    rows = {re.findall(r"`(\w+)`", row["algorithm"])[0]: row for row in table("algorithm")}
    assert rows.keys() == ALGORITHMS.keys()
    for name, algorithm in ALGORITHMS.items():
        row = rows[name]
        assert int(row["samples"]) == algorithm.samples_per_prompt, name
        assert int(re.match(r"\d+", row["epochs"])[0]) == algorithm.epochs, name
        if algorithm.kl_coef:
            placed, coef = re.match(r"(reward|loss) ([.\d]+)", row["KL"]).groups()
            assert (placed, float(coef)) == (algorithm.kl_placement, algorithm.kl_coef), name
        else:
            assert row["KL"] == "none", name


def test_every_stage_of_the_command_line_is_named():
    named = set(re.findall(r"fusedrl train (\w+)", README + GUIDE)) | {
        re.findall(r"`(\w+)`", row["algorithm"])[0] for row in table("algorithm")
    }
    assert named >= STAGES.keys()
    shown = re.search(r"`fusedrl train ppo`, (.*?) and (\d+) other methods", README)
    assert len(re.findall(r"`\w+`", shown[1])) + 1 + int(shown[2]) == len(ALGORITHMS)


SPOKEN = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2/2.5",
    "qwen3": "Qwen3",
    "phi3": "Phi-3",
    "smollm3": "SmolLM 3",
    "olmo2": "OLMo 2",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX/Pythia",
}
NUMBERS = {10: "ten", 11: "eleven", 12: "twelve", 13: "thirteen", 14: "fourteen"}


def test_the_families_are_those_of_the_code():
    assert FAMILIES.keys() == SPOKEN.keys()
    assert all(name in README and name in GUIDE for name in SPOKEN.values())
    assert f"{NUMBERS[len(FAMILIES)]} families of decoders" in README


def test_the_rooms_are_those_of_the_tree():
    (block,) = re.findall(r"## The rooms\n.*?```text\n(.*?)```", README, re.DOTALL)
    assert [line.split()[0] for line in block.splitlines()] == [*FLOORS, "kernels", "csrc"]


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 140
