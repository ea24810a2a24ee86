"""fusedrl doctor: what is here is named, what is missing has a reason, a remedy and exit code 3."""

import json
from importlib import metadata

import pytest
import torch

from fusedrl.engine.cli.main import main
from fusedrl.engine.tools import doctor
from fusedrl.kernels import attention, logprob
from fusedrl.kernels.attention import _trial as attention_verify
from fusedrl.kernels.runtime import dispatch, native


def told(capsys, *options, code=0):
    assert main(["doctor", "--output-json", "-", *options]) == code
    return json.loads(capsys.readouterr().out)


def test_a_sound_machine(capsys, tmp_path):
    found = told(capsys)
    assert found["missing"] == []
    assert found["packages"]["torch"] == torch.__version__
    assert {"system", "python", "processor", "memory", "C++ compiler", "GPU driver"} <= set(
        found["machine"]
    )
    for device in ("cpu", "cuda"):
        assert list(found["ops"]["logprob"][device]) == list(getattr(logprob._IMPLS, device)), (
            "best first, as the op's own table has it"
        )
    assert found["ops"]["logprob"]["cpu"]["torch"] is None
    assert len(found["ops"]) > 20
    assert main(["doctor", "--output-json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert all(
        word in shown
        for word in ("machine", "packages", "linear_policy_loss", "everything required is here")
    )
    assert json.loads((tmp_path / "found.json").read_text()) == found


@pytest.mark.parametrize(
    "absent, version, message",
    [
        ("safetensors", None, r"safetensors>=0.5, found none: pip install 'safetensors>=0.5'"),
        ("transformers", "4.9", r"transformers>=5, found 4.9: pip install 'transformers>=5'"),
    ],
)
def test_a_missing_package_and_an_old_one(absent, version, message, capsys, monkeypatch):
    real = metadata.version

    def fake(name):
        if name != absent:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor.metadata, "version", fake)
    monkeypatch.setattr(
        doctor.metadata,
        "requires",
        lambda name: [
            "torch>=2.11",
            "transformers>=5",
            "safetensors>=0.5",
            "pywin32; sys_platform == 'win32'",
            "ruff; extra == 'test'",
        ],
    )
    assert told(capsys, code=3)["missing"] == [message]
    assert main(["doctor"]) == 3
    shown = capsys.readouterr().out
    assert f"missing: {message}" in shown
    assert "something required is missing" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there(capsys):
    assert "sees 0 GPUs" in told(capsys, "--device", "cuda", code=3)["missing"][0]
    assert told(capsys, "--device", "cpu")["missing"] == []
    assert main(["doctor", "--device", "gpu"]) == 2


def test_notes_on_what_would_help(capsys, monkeypatch):
    monkeypatch.setattr(native, "capability", None)
    monkeypatch.setattr(native, "reason", "_C_default: not found")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_output", lambda *command: "570.1")
    notes = " ".join(told(capsys)["notes"])
    assert "not built (_C_default: not found)" in notes
    assert "no C++ compiler" in notes
    if not torch.cuda.is_available():
        assert "there is a GPU driver, but torch sees no GPU" in notes


def test_attention_of_others_is_tried(capsys, monkeypatch):
    monkeypatch.setattr(attention_verify, "_found", {})
    for name in ("flash_attn", "torch_varlen"):
        monkeypatch.setitem(dispatch._WHY_NOT, (name, "cpu"), None)
    monkeypatch.setitem(
        attention.ROUTES, "flash_attn", lambda q, k, v, *rest: q * (k.mean() + v.mean())
    )
    monkeypatch.setitem(
        attention.ROUTES,
        "torch_varlen",
        lambda q, k, v, e, m, causal, window, softcap, scale: attention.varlen_attention_reference(
            q, k, v, e, causal=causal, window=window, scale=scale
        ),
    )
    found = told(capsys)
    assert found["attention"]["cpu"]["torch_varlen"] == "verified"
    assert "the output is off by" in found["attention"]["cpu"]["flash_attn"]
    assert "flash_attn is installed and not used on cpu: on a small problem" in found["notes"][0]
