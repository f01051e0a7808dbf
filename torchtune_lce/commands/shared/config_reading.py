"""Configs as torchtune's command line reads them: by name or path, with ``key=value`` on top."""

import inspect
from argparse import Namespace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torchtune import config as torchtune_config
from torchtune.config._errors import ConfigError, InstantiationError
from torchtune.config._utils import _get_component_from_path, _merge_yaml_and_cli_args
from torchtune.training.precision import PRECISION_STR_TO_DTYPE
from yaml import YAMLError

from torchtune_lce.commands import registry
from torchtune_lce.commands.shared.errors import CommandError

# What YAML, omegaconf and torchtune raise for text that they cannot read. Numbers may be too long, merges ill-typed.
_UNREADABLE = (YAMLError, OmegaConfBaseException, ValueError, TypeError)
_KNOWN_PACKAGES = ("torchtune", "torchtune_lce")


def read(name: str, overrides: list[str], argument: str = "--config") -> DictConfig:
    """A registered config or a YAML file, with overrides; ``argument`` is what the command calls it.

    Raises CommandError for a file that is not there or no config, or an override that torchtune does not take.
    """
    path = registry.find_config(name) or Path(name)
    try:
        there = path.is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        raise CommandError(f"{argument} takes a name that `tune-lce ls` lists or the path of a YAML file, got {name!r}")
    written = _load(path, argument)
    config = _merged(written, overrides)
    try:
        _check_components(OmegaConf.to_container(config, resolve=True), f"{argument}: {name}: ")
    except OmegaConfBaseException as error:
        raise CommandError(f"{argument}: {name}: {_in_one_line(error)}") from error
    return config


def _load(path: Path, argument: str) -> dict:
    where = f"{argument}: {path}"
    try:
        written = OmegaConf.to_container(OmegaConf.load(path))
    except UnicodeDecodeError as error:
        raise CommandError(f"{where} must be a text file in UTF-8: {error}; save it in that encoding") from error
    except (OSError, *_UNREADABLE) as error:
        raise CommandError(f"{where} is no YAML file: {_in_one_line(error)}") from error
    if not isinstance(written, dict):
        raise CommandError(f"{where} must hold sections and settings by name, got a {type(written).__name__}")
    if "config" in written:
        raise CommandError(f"{where} must have no setting named config, which torchtune takes for its own option")
    _check_names(written, where)
    return written


def _check_names(section: dict, where: str, inside: str = "") -> None:
    """Raises CommandError for a key that is no argument's name, where torchtune makes arguments of keys."""
    for key, value in section.items():
        if not isinstance(key, str):
            raise CommandError(f"{where} must have names for its settings, got the key {key!r}{inside}; quote it")
        if isinstance(value, dict) and "_component_" in value:
            _check_names(value, where, f" in {key}")


def _merged(written: dict, overrides: list[str]) -> DictConfig:
    try:
        return _merge(written, overrides)
    except _UNREADABLE as error:
        for override in overrides:
            try:
                _merge(written, [override])
            except _UNREADABLE as of_one:
                said = f"{override!r} is no override of the config: {_in_one_line(of_one)}"
                raise CommandError(said) from of_one
        raise CommandError(f"{' '.join(overrides)} are no overrides of the config: {_in_one_line(error)}") from error


def _merge(written: dict, overrides: list[str]) -> DictConfig:
    for override in overrides:
        if "=" in override and not all(override.lstrip("~").partition("=")[0].split(".")):
            raise ValueError("a name is empty")
    # A copy: torchtune takes what ~ removes out of the dictionaries that it is given.
    return _merge_yaml_and_cli_args(Namespace(**OmegaConf.to_container(OmegaConf.create(written))), overrides)


def _check_components(value, where: str, inside: str = "") -> None:
    """Raises CommandError for a ``_component_`` in ``value``, however deep, that is no text."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    elif not isinstance(value, dict):
        return
    component = value.get("_component_", "text")
    if not isinstance(component, str) or not component:
        said = f"{inside}_component_ must be the dotted name of a class or a function, got {component!r}"
        raise CommandError(where + said)
    for key, inner in value.items():
        _check_components(inner, where, f"{inside}{key}.")


def check_sections(name: str, config: DictConfig, keys: tuple[str, ...], takes: str) -> None:
    """Raises CommandError, beginning with what the command ``takes``, for a dotted key that is not in the config."""
    for key in keys:
        section, _, setting = key.rpartition(".")
        if not OmegaConf.is_dict(config.get(section)) or config[section].get(setting) is None:
            raise CommandError(f"{takes}, {name} has no {key}")


def check_positive(key: str, value) -> None:
    """Raises CommandError unless ``value``, of the setting ``key``, is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CommandError(f"{key} must be a whole number of at least 1, got {value!r}")


def check_settings(config: DictConfig, sections: tuple[str, ...]) -> None:
    """Raises CommandError for a setting that the component of a section does not take, or of no value that it takes.

    Values are checked of this package's modules alone; of what is neither theirs nor torchtune's, nothing.
    """
    for section in sections:
        settings = config.get(section)
        if not OmegaConf.is_dict(settings) or "_component_" not in settings:
            continue
        settings = OmegaConf.to_container(settings, resolve=True)
        name = settings.pop("_component_")
        if name.partition(".")[0] not in _KNOWN_PACKAGES:
            continue
        try:
            component = _get_component_from_path(name)
            takes = inspect.signature(component)
        except (InstantiationError, ValueError, TypeError) as error:
            raise CommandError(f"{section}: {_in_one_line(error)}") from error
        try:
            takes.bind_partial(**settings)
        except TypeError as error:
            raise CommandError(f"{section}: {name} {error}; it takes {', '.join(takes.parameters)}") from error
        if inspect.isclass(component) and issubclass(component, nn.Module) and _is_ours(component):
            try:
                component(**settings)
            except (TypeError, ValueError) as error:
                raise CommandError(f"{section}.{error}") from error


def _is_ours(component: type) -> bool:
    return component.__module__.partition(".")[0] == "torchtune_lce"


def validate(config: DictConfig) -> None:
    """Raises CommandError for a config whose components are not there, or do not take their settings."""
    check_settings(config, tuple(config))
    try:
        torchtune_config.validate(config)
    except (ConfigError, InstantiationError, ValueError, TypeError) as error:
        raise CommandError(_in_one_line(error)) from error


def training_device(config: DictConfig) -> torch.device:
    """Raises CommandError for one that torch does not know."""
    try:
        return torch.device(config.get("device"))
    except (RuntimeError, TypeError) as error:
        said = f"the config's device must be one that torch knows, got {config.get('device')!r}"
        raise CommandError(said) from error


def training_dtype(config: DictConfig) -> torch.dtype:
    """Of the weights and what is computed with them; raises CommandError for one that torchtune does not know."""
    dtype = PRECISION_STR_TO_DTYPE.get(config.get("dtype"))
    if dtype is None:
        raise CommandError(f"the config's dtype must be bf16, fp16 or fp32, got {config.get('dtype')}")
    return dtype


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
