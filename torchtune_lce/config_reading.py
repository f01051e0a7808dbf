"""Configs as torchtune's command line reads them: by name or path, with ``key=value`` on top."""

from argparse import Namespace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.config._utils import _merge_yaml_and_cli_args
from torchtune.training.precision import PRECISION_STR_TO_DTYPE
from yaml import YAMLError

from torchtune_lce import registry
from torchtune_lce.errors import CommandError


def read(name: str, overrides: list[str]) -> DictConfig:
    """A registered config or a YAML file, with overrides.

    Raises CommandError for a file that is not there or no config, or an override that torchtune does not take.
    """
    path = registry.find_config(name) or Path(name)
    if not path.is_file():
        raise CommandError(f"--config takes a name that `tune-lce ls` lists or the path of a YAML file, got {name!r}")
    try:
        written = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError) as error:
        raise CommandError(f"--config: {path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(written, dict):
        raise CommandError(f"--config: {path} must hold sections and settings by name, got a {type(written).__name__}")
    try:
        return _merge_yaml_and_cli_args(Namespace(**written), overrides)
    except ValueError as error:
        raise CommandError(str(error)) from error


def training_dtype(config: DictConfig) -> torch.dtype:
    """Of the weights and what is computed with them; raises CommandError for one that torchtune does not know."""
    dtype = PRECISION_STR_TO_DTYPE.get(config.get("dtype"))
    if dtype is None:
        raise CommandError(f"the config's dtype must be bf16, fp16 or fp32, got {config.get('dtype')}")
    return dtype
