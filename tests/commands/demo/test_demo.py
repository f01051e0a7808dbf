"""tune-lce demo: what it makes, how it compares, what it says to bad arguments, and one short run of the whole."""

import argparse
import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torchtune import config
from torchtune.models.qwen2 import Qwen2Tokenizer

from torchtune_lce.commands.demo import command, demonstration, folder, model, runs
from torchtune_lce.commands.demo.comparison import compare
from torchtune_lce.commands.shared import chats, recipe_runs, tokenizer
from torchtune_lce.commands.shared.errors import CommandError

LIBRARY = {
    "pack/__init__.py": '"""Packs things so that other things can be unpacked."""\n',
    "pack/wrap.py": '''
class Wrapper:
    """Wraps whatever it is given into something larger."""

    def __init__(self):
        """Nothing that a user should have to read about here."""

    async def wrap(self, thing):
        """Wraps one thing and waits until that thing is wrapped."""

        def inner():
            """A function inside another one has no public name."""

def short():
    """Too short."""

def again():
    """Wraps one thing and waits until that thing is wrapped."""
''',
    "pack/_private.py": '"""Private modules are nobody\'s business, as documented here."""\n',
    "test/test_pack.py": '"""Tests are left out of the text, whatever they document."""\n',
    "site-packages/other.py": '"""Other packages are no part of the standard library."""\n',
    "template.py": "class {{name}}: pass\n",
    "latin.py": b"# -*- coding: latin-1 -*-\nname = '\xe9'\n",
    "bytes.py": b"name = '\xff\xfe'\n",
}


@pytest.fixture
def library(tmp_path):
    for name, content in LIBRARY.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / "library"


def setting(**changes):
    return runs.Setting(**{"device": "cpu", "dtype": "fp32", "batch_size": 8, "steps": 3, "impl": "auto"} | changes)


def record(loss, **more):
    return {"loss": loss, "lr": 0.1, "tokens_per_second_per_gpu": 100.0, **more}


# --- data ---


def test_sources_are_the_librarys_modules_in_order(library):
    sources = chats.read_sources(library)
    assert list(sources) == ["latin", "pack", "pack._private", "pack.wrap", "template"]
    assert sources["latin"].endswith("'é'\n")


def test_samples_are_public_documentation_once(library):
    assert chats.questions_and_answers(chats.read_sources(library)) == [
        {"input": "What does `pack` do?", "output": "Packs things so that other things can be unpacked."},
        {
            "input": "What does `pack.wrap.Wrapper` do?",
            "output": "Wraps whatever it is given into something larger.",
        },
        {
            "input": "What does `pack.wrap.Wrapper.wrap` do?",
            "output": "Wraps one thing and waits until that thing is wrapped.",
        },
    ]


def test_library_without_sources_is_named(tmp_path):
    with pytest.raises(CommandError, match=f"standard library, but {tmp_path} holds no .py files"):
        chats.read_sources(tmp_path)


def test_pairs_reject_the_answer_to_another_question():
    found = chats.pairs([{"input": question, "output": question.upper()} for question in "abc"])
    answers = [[pair[kind][1]["content"] for kind in ("chosen", "rejected")] for pair in found]
    assert answers == [["A", "B"], ["B", "C"], ["C", "A"]]
    assert all(pair["chosen"][0] == pair["rejected"][0] for pair in found)
    assert [pair["chosen"][0]["content"] for pair in found] == ["a", "b", "c"]


def test_jsonl_holds_one_sample_a_line(tmp_path):
    samples = [{"input": "a", "output": "b\nc"}, {"input": "d", "output": "é"}]
    chats.write_jsonl(samples, tmp_path / "samples.jsonl")
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == samples


# --- tokenizer and model ---


def test_torchtunes_tokenizer_reads_what_was_trained(tmp_path):
    text = "def wrap(self, café, 123):\n    return self.wrapped  # it's\n\n"
    tokenizer.train([text] * 3, 290, tmp_path)
    trained = Qwen2Tokenizer(
        str(tmp_path / "vocab.json"),
        str(tmp_path / "merges.txt"),
        {"<|endoftext|>": 290, "<|im_start|>": 291, "<|im_end|>": 292},
    )
    assert sorted(trained.encoder.values()) == list(range(290))
    ids = trained.encode(text, add_bos=False, add_eos=False)
    assert trained.decode(ids) == text
    # An entry is of use only if torchtune splits text as the training did: each must come back as itself.
    whole = [entry for entry in range(256, 290) if "\N{REPLACEMENT CHARACTER}" not in trained.decode([entry])]
    assert len(whole) > 30
    for entry in whole:
        assert trained.encode(trained.decode([entry]), add_bos=False, add_eos=False) == [entry]
    assert " self" in map(trained.decode, ([entry] for entry in ids)), "a word goes with the space before it"


def test_too_little_text_for_the_vocabulary_is_named(tmp_path):
    with pytest.raises(CommandError, match=r"needs a vocabulary of 32765 entries, .* give only 25\d"):
        tokenizer.train(["abc abc"], 32765, tmp_path)


def test_checkpoint_fits_both_configs_and_repeats(tmp_path):
    full, lora = (OmegaConf.load(runs.CONFIGS / f"{method}_single_device.yaml").model for method in ("full", "lora"))
    parameters = model.write_checkpoint(full, tmp_path / "first" / "model.pt")
    torch.rand(1)  # the weights must not depend on the state of the global generator
    model.write_checkpoint(full, tmp_path / "second" / "model.pt")
    first, second = (torch.load(tmp_path / run / "model.pt") for run in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert parameters == sum(tensor.numel() for tensor in first.values())
    assert not [name for name in first if name.startswith("output")], "the head must be tied"
    config.instantiate(full).load_state_dict(first)
    missing, unexpected = config.instantiate(lora).load_state_dict(first, strict=False)
    assert not unexpected
    assert all("lora" in name for name in missing)
    # Untrained: about equally likely tokens, as ln(32768) = 10.4 says.
    assert first["tok_embeddings.weight"].std() == pytest.approx(128**-0.5, rel=0.01)


# --- comparison ---


@pytest.mark.parametrize(
    ("dtype", "rounding", "planted"),
    # A difference of float32 rounding must pass, one of bfloat16's must not; and so on for bfloat16.
    [(torch.float32, 2e-6, 2e-3), (torch.bfloat16, 2e-3, 0.2)],
)
def test_one_planted_difference_is_seen(dtype, rounding, planted):
    stock = [11.0, 10.0, 9.0, 8.0]
    assert compare(stock, [loss + rounding for loss in stock], dtype).agrees
    for step in range(len(stock)):
        for sign in (1, -1):
            ours = list(stock)
            ours[step] += sign * planted
            comparison = compare(stock, ours, dtype)
            assert not comparison.agrees
            assert comparison.largest == pytest.approx(planted)


@pytest.mark.parametrize(("dtype", "rounding", "planted"), [(torch.float32, 1e-5, 1e-3), (torch.bfloat16, 3e-3, 0.1)])
def test_one_planted_difference_of_large_numbers_differences_is_seen(dtype, rounding, planted):
    """DPO's losses near ln 2, of log-probabilities that together are 600 nats, by a beta of 0.1."""
    stock, sizes = [0.69, 0.68, 0.7], [60.0, 60.0, 60.0]
    assert compare(stock, [loss + rounding for loss in stock], dtype, sizes).agrees
    assert not compare(stock, [0.69, 0.68 - planted, 0.7], dtype, sizes).agrees


@pytest.mark.parametrize(("stock", "ours"), [([9.0, 8.0], [9.0, math.nan]), ([math.nan, 8.0], [math.nan, 8.0])])
def test_nan_never_agrees(stock, ours):
    comparison = compare(stock, ours, torch.float32)
    assert not comparison.agrees
    assert math.isnan(comparison.largest)


def test_curves_of_different_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        compare([9.0, 8.0], [9.0], torch.float32)


# --- runs ---


def test_commands_differ_by_recipe_and_loss_only():
    ours, stock = (runs.Run("lora", ours).command(setting(impl="cce")) for ours in (True, False))
    assert ours[:3] == ["tune", "run", "torchtune_lce/recipes/lora_finetune_single_device.py"]
    assert stock[:3] == ["tune", "run", "lora_finetune_single_device"]
    assert set(ours[3:]) ^ set(stock[3:]) == {
        "output_dir=runs/lora_lce",
        "output_dir=runs/lora_stock",
        "loss.impl=cce",
        "loss=torchtune.modules.loss.CEWithChunkedOutputLoss",
        "~loss.impl",
    }


def test_commands_of_dpo_differ_by_recipe_and_log_probabilities_only():
    stock, ours = (run.command(setting(impl="cce")) for run in runs.runs("dpo"))
    assert ours[:3] == ["tune", "run", "torchtune_lce/recipes/lora_dpo_single_device.py"]
    assert stock[:3] == ["tune", "run", "lora_dpo_single_device"]
    assert set(ours[3:]) ^ set(stock[3:]) == {
        "output_dir=runs/lora_dpo_lce",
        "output_dir=runs/lora_dpo_stock",
        "logprobs.impl=cce",
    }


def test_log_is_read_up_to_its_last_whole_line(tmp_path):
    log = tmp_path / "log.txt"
    assert recipe_runs.read_log(log) == []
    log.write_text("Step 1 | loss:11.5 lr:2e-05 tokens_per_second_per_gpu:70.5 \nStep 2 | loss:1")
    assert recipe_runs.read_log(log) == [{"loss": 11.5, "lr": 2e-5, "tokens_per_second_per_gpu": 70.5}]


def test_summary_takes_the_cards_memory_where_torchtune_logged_it():
    slow_start = record(11.0) | {"tokens_per_second_per_gpu": 1.0}
    on_cpu = recipe_runs.summarise([slow_start, record(10.0), record(9.0)], resident=700)
    assert on_cpu == recipe_runs.Result(
        [11.0, 10.0, 9.0], tokens_per_second=100.0, spread=0.0, peak_bytes=700, reserved_bytes=None
    )
    first, second = (
        record(11.0, peak_memory_alloc=0.5, peak_memory_reserved=0.5),
        record(10.0, peak_memory_alloc=0.25, peak_memory_reserved=1.0),
    )
    on_gpu = recipe_runs.summarise([first, second], resident=700)
    assert (on_gpu.peak_bytes, on_gpu.reserved_bytes) == (2**29, 2**30)


@pytest.mark.slow
def test_failed_run_shows_its_command_and_what_it_printed(tmp_path):
    # Without a model in the folder torchtune's recipe fails.
    run = runs.Run("full", ours=True)
    with pytest.raises(CommandError) as error:
        runs.execute(run, setting(), tmp_path, lambda done: None, runs.start(run, setting(), tmp_path))
    message = str(error.value)
    assert "ended with status 1 after 0 of 3 steps" in message
    assert "tune run torchtune_lce/recipes/full_finetune_single_device.py" in message
    assert "model.pt" in message.rpartition("It printed")[2] or "checkpoint" in message.rpartition("It printed")[2]


# --- folder ---


def test_folder_of_an_earlier_demo_is_emptied_of_what_is_its_own(tmp_path):
    output = folder.prepare(tmp_path / "new" / "demo")
    (output / "runs" / "lora_lce").mkdir(parents=True)
    (output / "runs" / "lora_lce" / "log.txt").write_text("Step 1 | loss:1.0 \n")
    (output / "curves.png").write_text("old")
    (output / "notes.txt").write_text("the user's")
    assert folder.prepare(output) == output
    assert sorted(path.name for path in output.iterdir()) == [folder.MARKER, "notes.txt"]


def test_relative_folder_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder.prepare(Path("demo")) == (tmp_path / "demo").resolve()


def test_file_as_folder_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CommandError, match=f"--output must be a folder, {file} is a file"):
        folder.prepare(file)
    with pytest.raises(CommandError, match="--output must be a folder that can be written"):
        folder.prepare(file / "below")
    assert file.read_text() == "mine"


def test_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(CommandError, match="--output must be a new folder, an empty one or an earlier demo's"):
        folder.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- command line ---


def demo(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["demo", *arguments])
    with pytest.raises(SystemExit) as exit_:
        args.func(args)
    return exit_.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="cce runs where there is a card")
def test_cce_without_a_card_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert demo("--impl", "cce", "--output", str(tmp_path / "demo")) == 2
    assert "--impl: impl='cce' needs a CUDA card, not cpu; set impl='chunked'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "ccee"], "--impl: impl must be one of auto, cce,"),
        (["--steps", "1"], "--steps must be at least 2, a first and a last one, got 1"),
        (["--steps", "3"], "--steps must be at most 2, got 3: the data set has 19 samples and a step takes 8"),
    ],
)
def test_bad_arguments_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setitem(demonstration._BATCH_SIZE, "cuda", 8)
    monkeypatch.setattr(
        chats, "read_sources", lambda: {f"module{i}": f'"""{"documented " * 5}{i}"""' for i in range(19)}
    )
    assert demo("--output", str(tmp_path / "demo"), *arguments) == 2
    assert capsys.readouterr().err.startswith(f"tune-lce demo: {message}")


@pytest.mark.parametrize(("planted", "status", "verdict"), [(0.0, 0, "full: agree"), (0.5, 1, "full: DIFFER")])
def test_exit_status_tells_whether_the_losses_agree(tmp_path, monkeypatch, capsys, planted, status, verdict):
    def execute(run, setting, output, on_step, process):
        losses = [11.0, 10.0, 9.0 + planted * (run == runs.Run("full", ours=True))]
        return recipe_runs.summarise([record(loss) for loss in losses], resident=None)

    monkeypatch.setattr(demonstration, "start", lambda *args: None)
    monkeypatch.setattr(demonstration, "execute", execute)
    monkeypatch.setattr(demonstration, "prepare_inputs", lambda *args: None)
    assert demo("--output", str(tmp_path / "demo"), "--steps", "3") == status
    printed = capsys.readouterr().out
    assert "LoRA: agree" in printed
    assert verdict in printed
    assert "not counted" in printed
    assert (tmp_path / "demo" / "curves.png").exists()


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", ["inputs", "start 0", "run 0", "start 1", "run 1"]),
        ("cuda", ["start 0", "inputs", "start 1", "run 0", "run 1"]),
    ],
)
def test_on_a_card_processes_are_started_ahead(tmp_path, monkeypatch, device, expected):
    """On a CPU that would slow down what is measured."""
    waiting, happened = runs.runs("dpo"), []
    monkeypatch.setattr(demonstration, "prepare_inputs", lambda *args: happened.append("inputs"))

    def start(run, *args):
        happened.append(f"start {waiting.index(run)}")
        return run

    def execute(run, setting, output, on_step, process):
        assert process is run, "what was started for it"
        happened.append(f"run {waiting.index(run)}")

    monkeypatch.setattr(demonstration, "start", start)
    monkeypatch.setattr(demonstration, "execute", execute)
    demonstration.run_all(Console(quiet=True), waiting, setting(device=device), tmp_path, True)
    assert happened == expected


@pytest.mark.parametrize("status", [130, 143])
def test_interrupt_is_no_traceback(tmp_path, monkeypatch, capsys, status):
    def interrupted(*args):
        if status == 130:
            # As Ctrl-C, which a process in a shell's background ignores.
            raise KeyboardInterrupt
        assert callable(signal.getsignal(signal.SIGTERM)), "or this process ended here"
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(demonstration, "prepare_inputs", interrupted)
    assert demo("--output", str(tmp_path / "demo")) == status
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "tune-lce demo: interrupted\n"


@pytest.mark.slow
def test_demo_end_to_end(tmp_path, monkeypatch, capsys):
    """In a folder of its own, as a user would: real data, tokenizer, model, recipes, both losses, two steps."""
    output = tmp_path / "a demo"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    assert demo("--output", output.name, "--steps", "2") == 0
    printed = capsys.readouterr().out
    assert f"Everything is written to {output}" in printed
    assert "32,768 entries" in printed
    for method in ("lora", "full"):
        assert f"\ntune run torchtune_lce/recipes/{method}_finetune_single_device.py --config " in printed
        assert f"\ntune run {method}_finetune_single_device --config " in printed
    ran = "cce" if torch.cuda.is_available() else "chunked"
    for row in ("LoRA  torchtune's ", f"LoRA  linear, {ran} ", "full  torchtune's ", f"full  linear, {ran} "):
        [line] = [line for line in printed.splitlines() if row in line.replace(" " * 4, "  ")]
        assert "MiB" in line
    assert "LoRA: agree" in printed
    assert "full: agree" in printed
    samples = [json.loads(line) for line in (output / folder.SAMPLES).read_text().splitlines()]
    answers = {sample["input"]: sample["output"] for sample in samples}
    assert answers["What does `textwrap.dedent` do?"].startswith("Remove any common leading whitespace")
    assert len(samples) > command.DEFAULT_STEPS * 32
    # What the tokenizer needs 32,768 entries from.
    assert float(re.search(r"trained on (\S+) million characters", printed)[1]) > 8
    vocabulary = json.loads((output / "tokenizer" / "vocab.json").read_text())
    assert len(vocabulary) == 32765, "and three special tokens"
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    losses = {
        run: [step["loss"] for step in recipe_runs.read_log(output / run.folder / "log.txt")]
        for run in runs.runs("finetune")
    }
    for run, values in losses.items():
        assert len(values) == 2, run
        # An untrained model, whose logits spread by about 1, on 32,768 entries; and it learns.
        assert values[0] == pytest.approx(math.log(32768) + 0.5, abs=0.4), run
        assert values[-1] < values[0], run
    # The right loss ran: the recipe says so.
    assert f"runs impl '{ran}'" in (output / "runs" / "lora_lce" / "output.txt").read_text()
    assert "runs impl" not in (output / "runs" / "lora_stock" / "output.txt").read_text()
    # Nothing lands beside the folder.
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.mark.slow
def test_dpo_end_to_end(tmp_path, capsys):
    """Both recipes and what they log, for a comparison that knows of log-probabilities."""
    output = tmp_path / "demo"
    assert demo("--method", "dpo", "--output", str(output), "--steps", "4") == 0
    printed = capsys.readouterr().out
    ran = "cce" if torch.cuda.is_available() else "chunked"
    for row in ("LoRA DPO torchtune's ", f"LoRA DPO linear, {ran} "):
        assert any(" ".join(line.split()).startswith(row) for line in printed.splitlines()), row
    assert "LoRA DPO: agree" in printed
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    stock, ours = (recipe_runs.read_log(output / run.folder / "log.txt") for run in runs.runs("dpo"))
    # LoRA starts at the reference, and its first step has an effect on the next one's rewards. On a card, bits differ.
    for first in (stock[0], ours[0]):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len({step["loss"] for step in stock}) > 2
    assert "Token log-probabilities run impl" in (output / "runs" / "lora_dpo_lce" / "output.txt").read_text()
    assert "Token log-probabilities" not in (output / "runs" / "lora_dpo_stock" / "output.txt").read_text()
