"""Files that are only read run no code, whoever wrote them: options, templates, adapters, GGUF, and
modules that lie where a command is started."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.engine.conftest import CONFIG

from fusedrl.engine.base.errors import ConfigError, DataError
from fusedrl.engine.cli.main import main, parse_config
from fusedrl.engine.data.records import Dialogue
from fusedrl.engine.data.tokenize import encode_dialogue, encode_prompt
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.lora_files import load_adapter
from fusedrl.engine.model.weights import load_tokenizer

pytestmark = pytest.mark.cpu_only("files")


# ---- YAML ----------------------------------------------------------------------------------------
def tags(marker):
    return {
        "a call": f'!!python/object/apply:os.system ["touch {marker}"]',
        "a call with new": f'!!python/object/new:os.system ["touch {marker}"]',
        "a name": "!!python/name:os.system",
        "a module": "!!python/module:os",
        "an object": "!!python/object:os.system {}",
        "a tuple": "!!python/tuple [1, 2]",
        "its own": "!mine 3",
        "a call as a text": f"'!!python/object/apply:os.system [\"touch {marker}\"]'",
    }


@pytest.mark.parametrize("key", ["optim.lr", "model", "lora", "optim"])
@pytest.mark.parametrize("what", tags(""))
def test_tags_of_yaml_run_nothing(tmp_path, what, key):
    marker = tmp_path / "ran"
    file = tmp_path / "run.yaml"
    group, _, name = key.rpartition(".")
    text = tags(marker)[what]
    file.write_text(f"data: d\n{f'{group}: {{{name}: {text}}}' if group else f'{key}: {text}'}\n")
    try:
        config = parse_config("sft", [f"--config={file}", "--run.dir=x"], {"model": "m"})
    except ConfigError:
        pass
    else:  # a text stays a text
        assert what == "a call as a text"
        assert config.model.startswith("!!python")
    assert not marker.exists()


def bomb(levels: int, of: str) -> str:
    lines = [f"a0: &a0 {of}"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines) + f"\ntargets: *a{levels - 1}\n"


BOMBS = {
    "lists": bomb(9, "[x, x, x]"),
    "mappings": "\n".join(
        ["a0: &a0 {x: 1}"]
        + [
            f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}"
            for i in range(1, 9)
        ]
    ),
    "merges": "\n".join(
        ["a0: &a0 {x: 1}"]
        + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)]
    ),
    "deep": "a: " + "[" * 50_000 + "]" * 50_000,
    "itself": "a: &a {b: *a}",
    "itself, as a key": "a: &a {? *a : 1}",
    "long": "model: " + "x" * 300_000,
    "digits": "steps: " + "1:" * 80_000 + "1",
    "in a text": "lora: {targets: '" + bomb(9, "[x, x]").replace("\n", "\\n") + "'}",
}
LIMITED = (
    "import resource, sys, time\n"
    "from fusedrl.engine.cli.main import parse_config\n"
    "parse_config('sft', [], {'model': 'm', 'data': 'd'})\n"
    "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    "for path in sys.argv[1:]:\n"
    "    began = time.process_time()\n"
    "    try: parse_config('sft', [f'--config={path}'], {'model': 'm', 'data': 'd'})\n"
    "    except ValueError as error: print(len(str(error)), type(error).__name__, end=' ')\n"
    "    else: print('0 parsed', end=' ')\n"
    "    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
    "    print(grown // 1024, round(time.process_time() - began, 1))\n"
)


def test_bombs_of_yaml_take_neither_memory_nor_time(tmp_path):
    paths = []
    for index, (_, text) in enumerate(BOMBS.items()):
        paths.append(tmp_path / f"{index}.yaml")
        paths[-1].write_text(text)

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=limited,
    )
    told = [line.split() for line in done.stdout.splitlines()]
    assert len(told) == len(BOMBS), done.stdout + done.stderr
    for name, (length, kind, grown, seconds) in zip(BOMBS, told, strict=True):
        assert kind == "ConfigError", name
        assert int(length) < 1000, name
        assert int(grown) < 100, (name, grown)  # MiB
        assert float(seconds) < 5, (name, seconds)


def test_aliases_that_people_write_are_read(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: &m some/model\ndata: d\noptim: &o {lr: 0.5}\nrun: {dir: *m}\n")
    config = parse_config("sft", [f"--config={file}"])
    assert (config.run.dir, config.optim.lr) == ("some/model", 0.5)


# ---- chat templates ------------------------------------------------------------------------------
EMPTY = ("globals", "attr filter")  # what the sandbox hides is nothing, which prints as nothing
TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "builtins": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "self": "{{ self._TemplateReference__context }}{{ self.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__base__') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': messages}) }}",
    "messages": "{{ messages.append('x') }}",
    "include": "{% include 'MARKER' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "extends": "{% extends '/etc/passwd' %}",
    "range": "{% for i in range(1000000000) %}x{% endfor %}",
    "strftime": "{{ strftime_now.__globals__['os'].system('touch MARKER') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "config": "{{ config.__class__.__init__.__globals__ }}",
    "joiner": "{{ joiner.__init__.__globals__.__builtins__.eval('1') }}",
    "generator": "{% set g = (x for x in []) %}{{ g.gi_frame }}",
    "no template": "{% for %}",
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_chat_template_runs_in_its_sandbox(tiny_model, tmp_path, what):
    marker = tmp_path / "ran"
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    text = TEMPLATES[what].replace("MARKER", str(marker))
    (directory / "chat_template.jinja").write_text(text)
    tokenizer = load_tokenizer(directory)
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    if what in EMPTY:
        assert tokenizer.apply_chat_template(messages, tokenize=False) == ""
        return
    with pytest.raises(DataError, match=r"chat template") as told:
        encode_prompt(tokenizer, messages[:1])
    assert len(str(told.value)) < 1000
    with pytest.raises(DataError, match=r"chat template"):
        encode_dialogue(tokenizer, Dialogue(messages), 2)
    assert not marker.exists()
    assert messages[0] == {"role": "user", "content": "w1"}


# ---- adapters, GGUF, and other files of a model --------------------------------------------------
EVIL = "from pathlib import Path\nPath({marker!r}).write_text('it ran')\n"
ADAPTERS = {
    "another library": {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
    "a type of its own": {"peft_type": "evil.Evil"},
    "a rank that is infinite": {"r": float("inf")},
    "a rank that is NaN": {"r": float("nan")},
    "a rank of a list": {"r": [8]},
    "a rank of 0": {"r": 0},
    "a negative rank": {"r": -1},
    "a huge rank": {"r": 10**30},
    "a fraction": {"r": 1.5},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "alpha of 0": {"lora_alpha": 0},
    "alpha a text": {"lora_alpha": "x"},
    "rslora a text": {"use_rslora": "yes"},
    "patterns": {"rank_pattern": {".*": 10**9}},
    "code beside it": {"auto_map": {"x": "evil.Evil"}, "peft_type": {"a": 1}},
}


@pytest.fixture
def adapter(tmp_path, tiny_model, monkeypatch):
    """An adapter with modules beside it; fails where one of them ran."""
    from fusedrl.engine.config import LoRAConfig
    from fusedrl.engine.model.lora import add_adapter
    from fusedrl.engine.model.lora_files import save_adapter

    decoder = Decoder.random(model_config(CONFIG), seed=0)
    add_adapter(decoder, LoRAConfig(rank=2))
    directory, marker = tmp_path / "adapter", tmp_path / "ran"
    save_adapter(decoder, directory)
    for name in ("evil.py", "torch.py", "peft.py", "__init__.py"):
        (directory / name).write_text(EVIL.format(marker=str(marker)))
    monkeypatch.chdir(directory)
    yield directory
    assert not marker.exists()


@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_configuration_runs_nothing_and_is_named(adapter, what):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ADAPTERS[what]))
    decoder = Decoder.random(model_config(CONFIG), seed=0)
    if what == "another library":  # PEFT would import it; here nothing asks for it
        load_adapter(decoder, adapter)
        return
    with pytest.raises(ValueError) as told:
        load_adapter(decoder, adapter)
    assert str(adapter) in str(told.value)
    assert len(str(told.value)) < 3000
    assert decoder.lora is None


GGUFS = {
    "an empty one": b"GGUF",
    "absurd counts": b"GGUF" + b"\3\0\0\0" + b"\xff" * 16,
    "cut": b"GGUF\3\0\0\0\1\0\0\0\0\0\0\0\1\0",
    "a long key": b"GGUF\3\0\0\0" + (1).to_bytes(8, "little") * 2 + (2**62).to_bytes(8, "little"),
}


@pytest.mark.parametrize("what", GGUFS)
@pytest.mark.parametrize("inside", [True, False])
def test_a_gguf_is_refused_unread(tmp_path, what, inside, capsys):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model/evil.gguf"
    file.write_bytes(GGUFS[what])
    given = str(file.parent if inside else file)
    assert main(["generate", "--model", given, "--prompt", "w1"]) == 2
    said = capsys.readouterr().err
    assert str(file.parent) in said
    assert "GGUF file" in said
    assert "Traceback" not in said


BESIDE = {
    "generation_config.json": {
        "custom_generate": "evil",
        "trust_remote_code": True,
        "auto_map": {"AutoModel": "evil.Evil"},
        "transformers_version": {"a": [1]},
        "max_new_tokens": 10**30,
    },
    "processor_config.json": {
        "processor_class": "Evil",
        "auto_map": {"AutoProcessor": "evil.Evil"},
    },
    "preprocessor_config.json": {
        "image_processor_type": "Evil",
        "auto_map": {"AutoImageProcessor": "evil.Evil"},
    },
    "video_preprocessor_config.json": {"auto_map": {"AutoVideoProcessor": "evil.Evil"}},
}


# ---- modules where a command is started ----------------------------------------------------------
PLANTED = ("torch", "json", "numpy", "transformers", "yaml", "jinja2", "fusedrl", "sitecustomize")
CONSOLE = (
    "import sys\nfrom fusedrl.engine.cli.main import main\n"
    "if __name__ == '__main__':\n    sys.exit(main())\n"
)


@pytest.fixture
def planted(tmp_path, tiny_model):
    """A model directory full of modules that common names lead to, and with configurations that
    name code."""
    directory, marker = tmp_path / "planted", tmp_path / "ran"
    shutil.copytree(tiny_model, directory)
    code = EVIL.format(marker=str(marker))
    for name in (*PLANTED, "evil", "tokenizer", "modeling_llama", "usercustomize"):
        (directory / f"{name}.py").write_text(code)
    for name, content in BESIDE.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate/generate.py").write_text(code)
    rows = "".join(json.dumps({"prompt": f"w{i}", "completion": "w2"}) + "\n" for i in range(4))
    (directory / "data.jsonl").write_text(rows)
    yield directory
    assert not marker.exists(), marker.read_text()


def run_in(directory: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as pip's console script of it does."""
    script = tmp_path / "bin" / "fusedrl"
    script.parent.mkdir(exist_ok=True)
    script.write_text(CONSOLE)
    path = os.pathsep.join(
        str(Path(one).resolve())
        for one in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if one
    )
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=directory,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", ".", "--prompt", "w1", "--max_new_tokens", "2"],
        ["train", "sft", "--model=.", "--data=data.jsonl", "--epochs=1", "--run.dir=../run"],
        ["plan", "sft", "--model", "."],
    ],
    ids=lambda given: given[0],
)
def test_the_command_in_a_directory_of_planted_modules(planted, tmp_path, arguments):
    done = run_in(planted, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_its_processes_there_too(planted, tmp_path):
    options = ["--model=.", "--data=data.jsonl", "--epochs=1", "--run.dir=../run", "--devices=2"]
    done = run_in(planted, tmp_path, "train", "sft", *options)
    assert done.returncode == 0, done.stderr


def test_a_program_that_is_tried_sees_no_planted_modules(planted, monkeypatch):
    from fusedrl.engine.rewards.ready import ready

    monkeypatch.chdir(planted)
    reward = ready("code")
    began = time.monotonic()
    scores = reward.function(
        ["```python\nimport json\ndef f(x):\n    return json.dumps(x)\n```"],
        tests=[["assert f(1) == '1'"]],
    )
    assert scores == [1.0], scores
    assert time.monotonic() - began < 120
