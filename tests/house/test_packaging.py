"""What is installed: the package alone, with its kernels, recipes and configs, from the tree and by way of an sdist."""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from project import ROOT

from torchtune_lce.commands.tune_parser import TuneLCEParser

LINKED = ("kernels", "recipes", "configs")
PACKAGED = (".py", ".yaml", ".typed")
RECIPES = ("lora_finetune_single_device", "full_finetune_single_device")


def packaged_files() -> set[str]:
    """Paths from the root, through the links, of all that the package consists of."""
    found = {
        str(path.relative_to(ROOT))
        for folder in ("torchtune_lce", *(f"torchtune_lce/{name}" for name in LINKED))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in PACKAGED
    }
    assert {f"torchtune_lce/recipes/{name}.py" for name in RECIPES} < found
    assert {"torchtune_lce/kernels/autograd.py", "torchtune_lce/functional.py", "torchtune_lce/py.typed"} < found
    assert len([name for name in found if name.endswith(".yaml")]) > 20
    return found


def test_the_version_is_the_same_everywhere():
    """In the project's file, the package, and the changelog, which begins with the newest."""
    said = {
        "pyproject.toml": r'^version = "(.+)"$',
        "torchtune_lce/__init__.py": r'^__version__ = "(.+)"$',
        "docs/changelog.md": r"^## (.+)$",
    }
    found = [re.search(how, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)[1] for name, how in said.items()]
    assert len(set(found)) == 1, dict(zip(said, found, strict=True))


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """One built from the tree and one from its sdist, in a copy that holds no leftovers of other builds."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("build")
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tune-lce-*")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=leftovers)
    built = {}
    # Without --wheel it makes an sdist, and the wheel out of that.
    for way, options in {"tree": ["--wheel"], "sdist": []}.items():
        command = [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            *options,
            "--outdir",
            folder / way,
            folder / "source",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        (built[way],) = (folder / way).glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheels, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
    done = subprocess.run([*pip, wheels["tree"]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


# What a user starts, one after the other in one process: torchtune's import alone takes seconds.
ELSEWHERE = f"""
import contextlib, importlib.resources, importlib.util, io, json, os, runpy, sys

def told(run, where, *arguments):
    sys.argv = [where, *arguments]
    printed, complained = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        try:
            run(where, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return [status, printed.getvalue(), complained.getvalue()]

import torch, torchtune_lce
device, script = sys.argv[1:]
found = {{"file": torchtune_lce.__file__}}
with torch.device(device):
    hidden, weight, targets = torch.randn(3, 8), torch.randn(11, 8), torch.arange(3)
found["losses"] = [
    torchtune_lce.linear_cross_entropy(hidden, weight, targets, impl=impl).item() for impl in ("cce", "chunked")
]
found["recipes"] = [importlib.util.find_spec("torchtune_lce.recipes." + name).origin for name in {RECIPES}]
configs = importlib.resources.files("torchtune_lce.configs")
found["read"] = len((configs / "llama3_2" / "1B_lora_single_device.yaml").read_text())
found |= {{name: told(runpy.run_module, "torchtune_lce.recipes." + name) for name in {RECIPES}}}
found["script"] = told(runpy.run_path, script, "ls")
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def elsewhere(installed, tmp_path_factory) -> dict:
    """What :data:`ELSEWHERE` finds in an empty folder, the installed wheel before all else."""
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    script = installed / "bin" / "tune-lce"
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, device, script],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tree", "sdist"])
def test_wheel_holds_the_package_alone(wheels, way):
    with zipfile.ZipFile(wheels[way]) as wheel:
        names = wheel.namelist()
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
        said = wheel.read(f"{info}/METADATA").decode().partition("\n\n")[0].splitlines()
        licence = wheel.read(f"{info}/licenses/LICENSE")
    assert {name.split("/")[0] for name in names} == {"torchtune_lce", info}
    assert {name for name in names if name.startswith("torchtune_lce/")} == packaged_files()
    assert "tune-lce = torchtune_lce.commands.cli:main" in entry_points
    assert {"License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(said)
    assert licence == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_both_wheels_are_equal(wheels):
    """Files' checksums, and those of the metadata but for the list of them."""
    sums = []
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as opened:
            sums.append({entry.filename: entry.CRC for entry in opened.infolist() if not entry.is_dir()})
    assert sums[0] == sums[1]


@pytest.mark.slow
def test_installed_top_level(installed):
    """PyPI has a package called kernels, and torchtune installs recipes."""
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"torchtune_lce", "bin"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["tune-lce"]


@pytest.mark.slow
def test_installed_package_runs_from_another_folder(installed, elsewhere):
    """Its kernels too; recipes and configs are found where they were installed."""
    package = installed / "torchtune_lce"
    assert elsewhere["file"] == str(package / "__init__.py")
    assert elsewhere["losses"][0] == pytest.approx(elsewhere["losses"][1], rel=1e-5)
    assert elsewhere["recipes"] == [str(package / "recipes" / f"{name}.py") for name in RECIPES]
    assert elsewhere["read"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_installed_recipe_starts_from_another_folder(elsewhere, recipe):
    """As far as torchtune's own complaint that no config was named."""
    status, _, complained = elsewhere[recipe]
    assert status == 2, complained
    assert "the following arguments are required: --config" in complained


@pytest.mark.slow
def test_installed_console_script_runs_from_another_folder(elsewhere):
    status, printed, complained = elsewhere["script"]
    assert status == 0, complained
    assert "lce_lora_finetune_single_device" in printed
    assert "lce/llama3_2/1B_lora_single_device" in printed


@pytest.mark.parametrize("name", LINKED)
def test_folder_is_linked_into_the_package(name):
    """A copy would be installed and not edited; an __init__.py would shadow other packages of that name in the root."""
    link = ROOT / "torchtune_lce" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir()
    assert not list((ROOT / name).rglob("__init__.py"))


def test_licence_is_unaltered():
    """The text of apache.org/licenses/LICENSE-2.0.txt, its appendix included."""
    known = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == known


def test_tests_are_no_package():
    """Either file would put the root on the path of the tests, and its folders before installed packages."""
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_no_import_in_the_short_form():
    """`kernels.x` and `torchtune_lce.kernels.x` would be two modules, and `recipes` is torchtune's."""
    folders = ("torchtune_lce", *LINKED[:2], "tests", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 30
    short = [f"{path.relative_to(ROOT)}: {name}" for path in files for name in imported(path) if is_short(name)]
    assert not short


def imported(path: Path) -> list[str]:
    """Absolute names of the modules that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]


def is_short(module: str) -> bool:
    return module.partition(".")[0] in LINKED


def test_git_ignores_what_the_commands_write_by_default():
    parser = TuneLCEParser()._parser
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    helps = [action.help for command in commands.values() for action in command._actions if action.dest == "output"]
    folders = [re.search(r"default: \./(\S+)$", text)[1] for text in helps]
    assert len(folders) >= 4
    ignored = (ROOT / ".gitignore").read_text().split()
    assert not [folder for folder in folders if f"{folder}/" not in ignored]
