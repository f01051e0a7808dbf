"""README and docs: the real command lines take every command, those that take seconds and need nothing run, as does
every snippet; every link leads somewhere.
"""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from project import ROOT
from tiny_models import build_model
from torchtune._cli.tune import TuneCLIParser
from torchtune.config._utils import _get_component_from_path

import torchtune_lce
from torchtune_lce.commands import registry
from torchtune_lce.commands.bench import command as bench
from torchtune_lce.commands.compare import runs
from torchtune_lce.commands.compare.session import check_demo_data
from torchtune_lce.commands.shared import config_reading, loss_choices
from torchtune_lce.commands.shared.recipe_choice import recipe_for
from torchtune_lce.commands.tune_parser import TuneLCEParser

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CHECKERS = ("ruff", "pyrefly")
PROGRAMS = ("tune", "tune-lce", "pip", "python", "pytest", "bash", "pre-commit", *CHECKERS)
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
SETTING = re.compile(r"^\w+=\S+ ")


@dataclass(frozen=True)
class Snippet:
    page: str
    language: str
    text: str


def snippets(language: str) -> list[Snippet]:
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Snippet(page.name, found[1], found[2])
        for page in PAGES
        for found in fence.finditer(page.read_text(encoding="utf-8"))
        if found[1] == language
    ]


def commands() -> list[tuple[str, str]]:
    """Each command of a block, and each in a line of text that names no placeholder, with its page."""
    found = []
    for snippet in [*snippets("bash"), *snippets("")]:
        for line in snippet.text.replace("\\\n", " ").splitlines():
            found += [(snippet.page, part) for part in map(_unset, line.split("&&")) if part]
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        inline = (_unset(re.sub(r"\s+", " ", code)) for code in re.findall(r"`([^`]+)`", text))
        found += [(page.name, code) for code in inline if code.split()[0] in PROGRAMS and not re.search("[<…]", code)]
    return [(page, line) for page, line in dict.fromkeys(found) if line.split()[0] in PROGRAMS]


def _unset(line: str) -> str:
    """Without the environment variable that it sets."""
    return SETTING.sub("", line.strip())


COMMANDS = commands()


def test_commands_are_found():
    assert len(COMMANDS) > 40
    assert {line.split()[0] for _, line in COMMANDS} >= set(PROGRAMS) - {"pytest"}
    pages = {"README.md", "CONTRIBUTING.md", "benchmarks.md", "choosing-an-impl.md", "distributed.md"}
    assert pages <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in COMMANDS])
def test_command(page, line, pytestconfig, monkeypatch):
    """Its own parser takes it; see :data:`RUN_FOR_REAL` for those that are run."""
    program, *words = shlex.split(line, comments=True)
    if program == "pip":
        if words:
            check_pip(words)
        return
    if program in ("python", "pytest"):
        check_python(program, words, pytestconfig, monkeypatch)
        return
    if program in CHECKERS:
        assert shlex.join([program, *words]) in CI, "CI does something else"
        return
    if program == "bash":
        assert (ROOT / words[0]).is_file()
        return
    if program == "pre-commit":
        assert words == ["install"]
        return
    parser = (TuneLCEParser if program == "tune-lce" else TuneCLIParser)()._parser
    if not words:
        return
    if words[0] == "run":
        words = [word.replace("<HOST>", "localhost") for word in words]
    subcommands = next(action.choices for action in parser._actions if hasattr(action, "choices") and action.choices)
    assert words[0] in subcommands, f"{program} has {', '.join(subcommands)}"
    if len(words) == 1 and words[0] != "ls":
        return  # named in a sentence; or complete, as `tune-lce doctor` is
    args = parser.parse_args(words)
    check = {"run": check_run, "compare": check_compare, "bench": bench.read_sources}
    check.get(words[0], lambda args: None)(args)


def test_hooks_do_what_ci_does():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    linted = {line.removesuffix(" --check") for line in CI if line.startswith("ruff ")}
    assert {hook["entry"].removesuffix(" --force-exclude") for hook in hooks} == linted


def check_pip(words: list[str]) -> None:
    """Options that the docs use, and packages by names that packaging accepts; of this one, extras that it has."""
    assert words[:1] == ["install"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--no-deps", action="store_true")
    parser.add_argument("--index-url")
    parser.add_argument("-e", "--editable")
    parser.add_argument("packages", nargs="*")
    args = parser.parse_args(words[1:])
    packages = [*args.packages, *([args.editable] if args.editable else [])]
    assert packages
    for package in packages:
        if package.startswith("."):
            asked = set(re.fullmatch(r"\.(?:\[([\w,]+)\])?", package)[1].split(",")) if package != "." else set()
            assert asked <= set(metadata.metadata("torchtune-lce").get_all("Provides-Extra"))
        else:
            Requirement(package)


class ArgumentsTaken(Exception):
    """A script's own parser has taken its arguments."""


def check_python(program: str, words: list[str], pytestconfig, monkeypatch) -> None:
    if program == "pytest" or words[:2] == ["-m", "pytest"]:
        args = pytestconfig._parser.parse(words if program == "pytest" else words[2:])
        assert not [path for path in args.file_or_dir if not (ROOT / path).exists()]
        return
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1])
        return
    script = ROOT / words[0]
    text = script.read_text(encoding="utf-8")
    if "import transformers\n" in text:
        pytest.importorskip("transformers")
    if "ArgumentParser" not in text:
        for word in words[1:]:
            assert f'"{word}"' in text, f"{script.name} knows no {word}"
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser):
        parse_args(parser)
        raise ArgumentsTaken

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
    with pytest.raises(ArgumentsTaken):
        runpy.run_path(str(script), run_name="__main__")


RUN_FOR_REAL = ("doctor", "ls", "plan")


@pytest.mark.parametrize(
    "line",
    dict.fromkeys(
        line
        for _, line in COMMANDS
        for program, *words in [shlex.split(line)]
        # A bare `tune-lce plan` is named in a sentence.
        if program == "tune-lce" and words and words[0] in RUN_FOR_REAL and words != ["plan"]
    ),
)
def test_what_takes_seconds_is_run(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a picture goes
    ends = {"doctor": pytest.raises(SystemExit, match="^0$")}
    words = shlex.split(line)[1:]
    args = TuneLCEParser()._parser.parse_args(words)
    with ends.get(words[0], nullcontext()):
        args.func(args)
    said = {"doctor": "All is well.", "ls": "lce/llama3_2/1B_lora_single_device", "plan": "peak of the"}
    assert said[words[0]] in capsys.readouterr().out


def check_run(args) -> None:
    """Recipe and config exist, and torchtune can merge what follows them."""
    recipes = {recipe.name for recipe in registry._recipe_registry.get_all_recipes()}
    assert args.recipe in recipes or (ROOT / args.recipe).is_file()
    if "--config" in args.recipe_args:
        place = args.recipe_args.index("--config")
        name, overrides = args.recipe_args[place + 1], args.recipe_args[place + 2 :]
        known = registry.find_config(name) or ROOT / name
        config = config_reading.read(str(known), overrides)
        for override in overrides:
            if override.startswith("loss="):
                assert callable(_get_component_from_path(config.loss._component_))


def check_compare(args) -> None:
    config = runs.read_config(args.config, args.overrides)
    assert recipe_for(args.config, config, args.nproc_per_node)
    assert args.losses is None or loss_choices.parse(args.losses)
    assert args.steps > args.warmup
    if args.demo_data:
        check_demo_data(config, args.vocabulary, args.sequence_length)


@pytest.mark.parametrize("snippet", snippets("python"), ids=lambda snippet: snippet.page)
def test_python_runs(snippet, device):
    if 'impl="cce"' in snippet.text:
        pytest.importorskip("triton")
    if "from transformers" in snippet.text:
        pytest.importorskip("transformers")
    if "from trl" in snippet.text:
        pytest.importorskip("trl")
    tokens = torch.randint(40, (2, 8), device=device)
    names = {
        "student": build_model(seed=0).to(device),
        "teacher": build_model(seed=1).to(device),
        "tokens": tokens,
        "labels": tokens,
        "hidden": torch.randn(6, 16, device=device, requires_grad=True),
        "weight": torch.randn(40, 16, device=device, requires_grad=True),
        "targets": torch.randint(40, (6,), device=device),
    }
    # What a snippet makes itself is where its reader's tensors are.
    with device:
        exec(compile(snippet.text, snippet.page, "exec"), names)


@pytest.mark.parametrize("snippet", snippets("yaml"), ids=lambda snippet: snippet.page)
def test_yaml_builds(snippet):
    sections = yaml.safe_load(snippet.text)
    name = "loss" if "loss" in sections else "logprobs"
    section = sections[name]
    component = _get_component_from_path(section.pop("_component_"))
    ours = {"loss": torchtune_lce.LinearCrossEntropyLoss, "logprobs": torchtune_lce.LinearTokenLogprobs}
    assert component is ours[name]
    component(**section)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            assert (page.parent / link).exists(), link


def test_readme_has_the_line_by_which_ci_runs_the_tests():
    """The first that looks like one, as .ci/run finds it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^pip install .*\[test\].* && python -m pytest.*", readme, re.MULTILINE)
    assert line == "pip install -e '.[test]' && python -m pytest -n 2"


def test_what_the_map_names_is_there():
    """Folders and files of the package, by their paths or by their names alone."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])(?!tests/)[a-z_]+(?:/[a-z_]+)*(?:/(?![\w<])|\.py)", text))
    assert len(named) > 12
    folders = [ROOT, ROOT / "kernels", *ROOT.glob("torchtune_lce/**")]
    assert not [name for name in named if not any((folder / name).exists() for folder in folders)]


def figure_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_figure_shows_what_its_page_says(tmp_path):
    figure = figure_script("how_it_works_figure")
    natural, sorted_by_use = figure.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert figure.PICTURE.exists()
    said = re.sub(r"\s+", " ", (ROOT / "docs" / "how-it-works.md").read_text())
    assert f"spread over {natural:.0%} of the tiles; in the order of use they fill {sorted_by_use:.0%}" in said


def test_fine_tune_of_the_readme_is_the_recorded_one(tmp_path):
    figure = figure_script("fine_tune_figure")
    figure.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert figure.PICTURE.exists()
    readme, measured = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/measured.md"))
    for row in figure.rows():
        title = row.title.replace("compile: True", "`compile: True`")
        assert f"| {title} | {row.speed_text} | {row.peak_text} |\n" in readme
        assert re.search(rf"\| {re.escape(row.speed_text.replace(' x)', ')'))} \|.*{row.peak:.2f}", measured)


def test_times_by_workspace_are_the_recorded_ones(tmp_path):
    figure = figure_script("workspace_figure")
    figure.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert figure.PICTURE.exists()
    measured = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    found = figure.milliseconds()
    for impl, tokens in {(impl, tokens) for impl, _, tokens, _ in found}:
        times = [found[impl, is_frozen, tokens, mib] for is_frozen in (False, True) for mib in (128, 512, 1536, 4096)]
        texts = (f"{time:.0f}" if time >= 100 else f"{time:.1f}" for time in times)
        assert f"| `{impl}` | {' | '.join(texts)} |\n" in measured


def test_faq_has_every_complaint():
    text = (ROOT / "docs" / "faq.md").read_text()
    assert [int(number) for number in re.findall(r"^\*\*(\d+)\. ", text, re.MULTILINE)] == list(range(1, 27))
