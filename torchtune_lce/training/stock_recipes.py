"""torchtune's own recipes, which are scripts beside its package and no part of it, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torchtune


def load_stock_recipe(name: str) -> ModuleType:
    """The installed torchtune's recipe ``name``, such as ``lora_finetune_single_device``, loaded once.

    Raises ImportError if that torchtune has no such recipe.
    """
    module_name = f"torchtune_stock_{name}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    path = Path(torchtune.__file__).parent.parent / "recipes" / f"{name}.py"
    if not path.exists():
        raise ImportError(f"the installed torchtune has no recipe {name}: {path} does not exist")
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    # Before it runs, as an import does: whatever pickles the recipe's classes looks them up there.
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
