"""What tests know of examples/recipes: the sizes of their models, and the memory that `fusedrl
plan` says. `python -m tests.support.recipes` writes it into their first lines."""

import json
import re
import tempfile
from pathlib import Path

from fusedrl.engine.base.memory import parse_memory
from fusedrl.engine.cli.main import parse_config
from fusedrl.engine.watch.plan import plan

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
MARK = "# memory by fusedrl plan:"
_QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "num_key_value_heads": 2,
}
MODELS = {  # their config.json, as far as it says something about memory
    "smollm2-135m": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "smollm2-360m": {  # a teacher
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": 49152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": _QWEN
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "qwen2.5-1.5b": _QWEN
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "qwen2.5-7b": _QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def stage_of(recipe: Path) -> str:
    return recipe.stem.rsplit("-", 1)[1]


def model_of(recipe: Path) -> str:
    return next(name for name in reversed(MODELS) if recipe.stem.startswith(name))


def places(recipe: Path) -> list[tuple[str, int]]:
    """(words, devices) of each command in the first lines."""
    if recipe.stem.startswith("smollm2"):
        return [("two cores", 1)]
    head = recipe.read_text(encoding="utf-8").partition(MARK)[0]
    found = [("each of eight cards", 8)] if "--devices 8" in head else []
    one = re.search(r"\.yaml *(#.*)?$", head, re.MULTILINE)
    return [("one card", 1), *found] if one else found


def memory_lines(recipe: Path) -> list[str]:
    """What `fusedrl plan` says of a recipe: on cards of 80 GB, or in 8 GiB of a CPU's memory."""
    cpu = recipe.stem.startswith("smollm2")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "config.json"
        model.write_text(json.dumps(MODELS[model_of(recipe)]))
        options = [f"--config={recipe}", f"--model={model}", f"--device={'cpu' if cpu else 'cuda'}"]
        if stage_of(recipe) == "distill":
            teacher = Path(folder) / "teacher"
            teacher.mkdir()
            (teacher / "config.json").write_text(json.dumps(MODELS["smollm2-360m"]))
            options.append(f"--reference_model={teacher}")
        config = parse_config(stage_of(recipe), options)
        for words, devices in places(recipe):
            found = plan(config, memory=parse_memory("8GiB" if cpu else "80GB"), devices=devices)
            fit = found.largest[config.checkpoint_activations]
            lines.append(
                f"#   {words}: {found.parts.peak / 2**30:.1f} GiB of {found.memory / 2**30:.1f}; "
                f"the largest micro-batch that fits has {fit:,} tokens"
            )
    return lines


def written_lines(recipe: Path) -> list[str]:
    text = recipe.read_text(encoding="utf-8")
    return text.partition(f"{MARK}\n")[2].partition("\n\n")[0].splitlines()


def main() -> None:
    for recipe in RECIPES:
        text = recipe.read_text(encoding="utf-8")
        head, _, rest = re.split(f"({MARK}|# memory:)", text, maxsplit=1)
        body = rest.partition("\n\n")[2]
        lines = "\n".join([MARK, *memory_lines(recipe)])
        recipe.write_text(f"{head}{lines}\n\n{body}", encoding="utf-8")
        print(recipe.stem, *memory_lines(recipe), sep="\n  ")


if __name__ == "__main__":
    main()
