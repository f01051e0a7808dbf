"""torchtune's command line parser with this package's names and subcommands."""

import argparse
import re
from collections.abc import Callable
from functools import partial

from torchtune._cli.tune import TuneCLIParser

from torchtune_lce.commands import registry
from torchtune_lce.commands.accuracy import command as accuracy
from torchtune_lce.commands.bench import command as bench
from torchtune_lce.commands.compare import command as compare
from torchtune_lce.commands.demo import command as demo
from torchtune_lce.commands.doctor import command as doctor
from torchtune_lce.commands.plan import command as plan
from torchtune_lce.commands.shared import config_reading
from torchtune_lce.commands.shared.errors import CommandError

DESCRIPTION = """\
torchtune's command line with the recipes and configs of torchtune-lce, which train without holding the logits.
Every subcommand of `tune` is here, takes the same arguments and also these names (`tune-lce ls` lists them last):

    recipes  lce_<method>                  e.g. lce_lora_finetune_single_device
    configs  lce/<model>/<size>_<method>   e.g. lce/llama3_2/1B_lora_single_device
"""
EPILOG = """\
examples:

    $ tune-lce demo
    $ tune-lce bench --model llama3_1_8b --data trained --data random
    $ tune-lce compare --config lce/gemma2/2B_lora_single_device --trained-weights --demo-data
    $ tune-lce plan --config lce/llama3_2/1B_lora_single_device --memory 24GiB
    $ tune-lce run lce_lora_finetune_single_device --config lce/llama3_2/1B_lora_single_device
    $ tune-lce run lce_full_finetune_single_device --config mine.yaml loss=torchtune_lce.LinearCrossEntropyLoss
    $ tune-lce cp lce/llama3_2/1B_lora_single_device mine.yaml
    $ tune-lce validate lce/llama3_2/1B_lora_single_device
"""


class TuneLCEParser(TuneCLIParser):
    """torchtune's parser with this package's names and subcommands."""

    def __init__(self):
        registry.register()
        super().__init__()
        self._parser.prog = "tune-lce"
        self._parser.description = DESCRIPTION
        self._parser.epilog = EPILOG
        self._parser.formatter_class = argparse.RawDescriptionHelpFormatter
        subparsers = next(action for action in self._parser._actions if isinstance(action, argparse._SubParsersAction))
        for parser in subparsers.choices.values():
            _rename_command(parser)
        validate, run = subparsers.choices["validate"], subparsers.choices["run"]
        validate.set_defaults(func=partial(_validate, validate))
        run.set_defaults(func=partial(_run, run, run.get_default("func")))
        # Beyond torchtune's. Each module must be quick to import: all are, whatever the subcommand that runs.
        demo.add_parser(subparsers)
        bench.add_parser(subparsers)
        compare.add_parser(subparsers)
        plan.add_parser(subparsers)
        accuracy.add_parser(subparsers)
        doctor.add_parser(subparsers)


def _rename_command(parser: argparse.ArgumentParser) -> None:
    """torchtune's help and errors say ``tune run``; typed like that, our names are unknown."""
    subcommand = re.compile(r"\btune (?=cat|cp|download|ls|run|validate)")
    texts = [(parser, field) for field in ("prog", "usage", "description", "epilog")]
    for holder, field in texts + [(action, "help") for action in parser._actions]:
        text = getattr(holder, field)
        if text:
            setattr(holder, field, subcommand.sub("tune-lce ", text))


def _validate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """torchtune's ``validate``, which takes the name of a registered config too, and looks at losses' settings."""
    try:
        config_reading.validate(config_reading.read(args.config.as_posix(), [], "config"))
    except CommandError as error:
        parser.error(str(error))
    print("Config is well-formed!")


def _run(parser: argparse.ArgumentParser, run: Callable, args: argparse.Namespace) -> None:
    """torchtune's ``run``, once the config has been read: what is none ends in a sentence, not in a traceback."""
    before, option, after = _split(args.recipe_args, "--config")
    if option and not after:
        parser.error("--config takes a name that `tune-lce ls` lists or the path of a YAML file, got nothing")
    if option:
        try:
            config_reading.read(after[0], [*before, *after[1:]])
        except CommandError as error:
            parser.error(str(error))
    run(args)


def _split(words: list[str], word: str) -> tuple[list[str], bool, list[str]]:
    """What stands before ``word``, whether it is there, and what stands after it."""
    place = words.index(word) if word in words else len(words)
    return words[:place], place < len(words), words[place + 1 :]
