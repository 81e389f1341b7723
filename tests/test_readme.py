"""The documents tell the truth: their commands parse, their Python runs, their numbers come from benchmarks/results.

Run: python -m pytest tests/test_readme.py
"""

import re
import shlex
import subprocess
import sys

import pytest

import train
from benchmarks import render
from sae.config import ChatConfig, CollectConfig, EvalConfig, TrainConfig, UploadConfig, VizConfig, from_cli
from tests.conftest import ROOT

DOCUMENTS = ("README.md", "SAE_README.md", "assets/pygpt/README.md", "CONTRIBUTING.md")
CONFIGS = {
    "sae_train": TrainConfig,
    "sae_eval": EvalConfig,
    "sae_viz": VizConfig,
    "sae_upload": UploadConfig,
    "sae_collect": CollectConfig,
    "chat": ChatConfig,
}


def blocks(language):
    for name in DOCUMENTS:
        for block in re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL):
            yield name, block


COMMANDS = [
    (name, line.split("#")[0].strip())
    for name, block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
]


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[c[1][:60] for c in COMMANDS])
def test_every_command_is_understood(document, command):
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[:2] == ["python", "-m"] and words[2].startswith("scripts."):
        from_cli(CONFIGS[words[2].removeprefix("scripts.")], words[3:])
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file(), command
    elif words[0] == "python" and words[1] == "train.py":
        train.parse_config(words[2:])
    elif words[0] in ("python", "bash"):
        assert (ROOT / words[1]).is_file(), command
    else:
        assert words[0] in ("source", "pip"), f"{document}: nothing checks '{command}'"


@pytest.mark.parametrize(("name", "code"), list(blocks("python")), ids=lambda v: v[:30])
def test_every_python_block_runs(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {})


def test_the_readme_starts_with_two_commands():
    first = next(block for name, block in blocks("bash") if name == "README.md")
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["bash runs/demo.sh", "bash runs/test.sh"]


def test_numbers_come_from_results():
    for name in render.DOCUMENTS:
        text = (ROOT / name).read_text()
        assert text == render.rendered(text), f"{name} differs from benchmarks/results: python -m benchmarks.render"
    assert "<!-- results: quality -->" in (ROOT / "README.md").read_text()


def test_pictures_and_links_exist():
    links = [
        (name, target) for name in DOCUMENTS for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    ]
    assert len(links) >= 4
    for name, target in links:
        assert target.startswith("http") or (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"


def test_files_and_names_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`([\w/]+\.(?:py|js|cpp|md|sh))`", text.split("<!-- end -->")[1]):
        assert (ROOT / name).exists() or (ROOT / "sae" / name).exists(), name
    pairs = re.findall(r"`(\w+)`(?:,? `\w+`)* in `([\w/.]+)`", text)
    assert {name for name, _ in pairs} >= {"auxk_alpha", "COLUMNS", "_made", "PEAK_LR", "FORMAT", "page"}
    for name, file in pairs:
        assert name in (ROOT / "sae" / file).read_text(), f"{name} in {file}"


def test_readme_names_rooms_only():
    for name in ("README.md", "SAE_README.md"):
        files = set(re.findall(r"`sae/(\w+\.py)`", (ROOT / name).read_text()))
        assert len(files) <= 2, f"{name} lists {files}; CONTRIBUTING.md has the list"


def test_the_shell_scripts_are_sound():
    for script in (*sorted((ROOT / "runs").glob("*.sh")), ROOT / ".ci" / "run"):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_public_names():
    import sae

    promised = "SAEConfig TrainConfig create_sae load_sae save_sae load_saes SAETrainer train_sae_from_activations"
    promised += " ActivationCollector load_language_model SAEEvaluator FeatureVisualizer NeuronpediaClient"
    promised += " InterpretableModel"
    for name in promised.split():
        assert hasattr(sae, name), name
        assert name in sae.__all__
    assert sys.modules["sae"].__version__
