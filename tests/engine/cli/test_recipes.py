"""Recipes and `fusedrl init`: every file parses, says what its run takes of memory, and trains a
step on a tiny model of its family."""

import json
import re

import pytest
import yaml
from tests.support.chat import write_chat_model
from tests.support.recipes import RECIPES, memory_lines, model_of, stage_of, written_lines

from fusedrl.engine.cli.fields import docs_of
from fusedrl.engine.cli.init import recipes
from fusedrl.engine.cli.main import STAGES, main, parse_config
from fusedrl.engine.cli.values import group_of, keys_of
from fusedrl.engine.runs.metrics import read_rows

pytestmark = pytest.mark.cpu_only("recipes are files, and a step of each is one of its stage")
NAMES = [recipe.stem for recipe in RECIPES]
REWARD = (
    "def short(prompts, completions, **columns):\n"
    "    return [float(len(str(c)) % 7) for c in completions]\n"
)
ROWS = [
    {"prompt": f"Say {word}, 12 times. \U0001f642", "completion": f"{word} it is", "answer": "12"}
    for word in ("yes", "no", "\u0645\u0631\u062d\u0628\u0627", "the end", "an ant", "7", "x", "hm")
]
SMALL = {  # options that hold for any size, made small
    "policy": [
        "--steps=1",
        "--prompts_per_step=4",
        "--max_prompt_length=64",
        "--generation.max_new_tokens=8",
    ],
    "texts": ["--max_length=64", "--eval_fraction=0.25"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for family in ("llama", "qwen2"):
        write_chat_model(folder / family, family)
    (folder / "rules.py").write_text(REWARD)
    files = {
        "prompts.jsonl": [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": "12"} for row in ROWS
        ],
        "sft.jsonl": [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS],
        "pairs.jsonl": [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "well"}
            for row in ROWS
        ],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_there_is_a_recipe_of_each_stage_for_each_model():
    stages = ("sft", "reward", "dpo", "ppo", "grpo", "rejection")
    models = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-7b-lora")
    expected = [f"{model}-{stage}" for model in models for stage in stages]
    assert sorted(NAMES) == sorted([*expected, "smollm2-135m-distill"])
    assert sorted(recipes()) == sorted(NAMES)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_the_memory_in_the_first_lines_is_that_of_plan(recipe):
    """`python -m tests.support.recipes` writes the lines anew."""
    numbers = re.compile(r"[\d.,]*\d")
    found, expected = written_lines(recipe), memory_lines(recipe)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert numbers.sub("", ours) == numbers.sub("", theirs)
        got, want = (
            [float(number.replace(",", "")) for number in numbers.findall(line)]
            for line in (ours, theirs)
        )
        # a CPU's workspace depends on its vectors
        assert got == pytest.approx(want, rel=0.001 if "card" in ours else 0.1)
        assert got[0] < 0.95 * got[1], "it does not fit beside what allocators and contexts take"


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_every_recipe_says_how_it_is_run_and_gives_reasons(recipe):
    text = recipe.read_text(encoding="utf-8")
    stage = stage_of(recipe)
    assert f"fusedrl train {stage} --config {recipe.name}" in text
    head = text.partition("\n\n")[0]
    ready = "Runs as it is" in head
    assert ready or re.search(r"^# Fill in: data", head, re.MULTILINE)
    config = parse_config(stage, ["--config", str(recipe)])
    if ready:
        root = recipe.parents[2]
        assert (root / config.data).is_file()
        given = [spec for spec in getattr(config, "reward", ()) if spec != "none"]
        assert all((root / spec.partition(":")[0]).is_file() for spec in given)
    options = [line for line in text.splitlines() if re.match(r"\s*\w+: \S", line)]
    reasons = [line for line in text.partition("\n\n")[2].splitlines() if re.match(r"\s*# ", line)]
    assert len(reasons) >= len(options) / 3


LIGHT = [  # one of each stage, family and kind of weights; the others in make test-full
    recipe
    for recipe in RECIPES
    if recipe.stem.startswith(("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-7b-lora"))
]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=recipe.stem, marks=[] if recipe in LIGHT else [pytest.mark.full])
        for recipe in RECIPES
    ],
)
def test_every_recipe_trains_a_step(recipe, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    stage = stage_of(recipe)
    family = "llama" if model_of(recipe).startswith("smollm2") else "qwen2"
    data = {"sft": "sft.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl"}
    kind = "texts" if stage in data else "policy"
    options = [f"--model={family}", f"--data={data.get(stage, 'prompts.jsonl')}", *SMALL[kind]]
    if stage == "distill":
        options += [f"--reference_model={family}"]
    elif kind == "policy":
        options += ["--reward=rules.py:short"]
    options += ["--evaluation.data=prompts.jsonl"] if stage in ("ppo", "grpo") else []
    run = tmp_path / "run"
    options += [f"--run.dir={run}", "--run.progress=false", "--device=cpu"]
    assert main(["train", stage, f"--config={recipe}", *options]) == 0, capsys.readouterr().err
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] > 0]
    assert rows
    assert all(row["grad_norm"] is not None for row in rows)
    assert (run / "model" / "config.json").is_file()
    best = parse_config(stage, [f"--config={recipe}"]).run.keep_best
    said = capsys.readouterr().err
    assert (f"the best {best}," in said) if best else ("the best" not in said)


# ---- fusedrl init --------------------------------------------------------------------------------
STAGED = ("sft", "reward", "dpo", "rejection", "ppo", "grpo", "trpo", "distill")


@pytest.mark.parametrize("stage", STAGED)
def test_what_init_writes_is_the_defaults(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", stage]) == 0
    text = (tmp_path / f"{stage}.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    needed = ("model", "data", *(["reference_model"] if stage == "distill" else []))
    given = [f"--{name}={tree[name]}" for name in needed]
    given += [f"--reward={one}" for one in tree.get("reward", [])]
    assert parse_config(stage, ["--config", f"{stage}.yaml"]) == parse_config(stage, given)
    assert f"# fusedrl train {stage} --config {stage}.yaml" in text
    assert "Fill in: model, data" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_init_trains_once_it_is_filled_in(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    path = tmp_path / "mine.yaml"
    assert main(["init", "sft", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    text = text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "llama")
    text = text.replace("demonstrations.jsonl", "sft.jsonl")
    path.write_text(text.replace("runs/latest", str(tmp_path / "run")), encoding="utf-8")
    assert main(["train", "sft", "--config", str(path)]) == 0
    assert (tmp_path / "run" / "model").is_dir()


def test_init_turns_groups_on_where_they_are_no_comments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "ppo"]) == 0
    text = (tmp_path / "ppo.yaml").read_text(encoding="utf-8")
    begin = text.index("# lora:")
    block = text[begin:].partition("\n\n")[0]
    assert "rank of an adapter" in block
    on = "\n".join(line.removeprefix("# ") for line in block.splitlines())
    (tmp_path / "ppo.yaml").write_text(text.replace(block, on), encoding="utf-8")
    config = parse_config("ppo", ["--config", "ppo.yaml"])
    assert (config.lora.rank, config.lora.targets) == (16, ("all-linear",))


def test_init_copies_a_recipe_and_writes_over_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "qwen2.5-0.5b-grpo"
    assert main(["init", name]) == 0
    assert f"fusedrl train grpo --config {name}.yaml" in capsys.readouterr().out
    source = next(recipe for recipe in RECIPES if recipe.stem == name)
    assert (tmp_path / f"{name}.yaml").read_bytes() == source.read_bytes()
    assert main(["init", name]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["init", "qwen2.5-0.5b-grop"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["init", "sft", "nowhere/sft.yaml"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_is_documented(stage):
    cls = STAGES[stage][0]
    options = [key for key, kind in keys_of(cls) if group_of(kind) is None]
    assert [key for key in options if not docs_of(cls).get(key)] == []
