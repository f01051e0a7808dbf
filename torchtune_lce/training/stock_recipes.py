"""torchtune's own recipes, which are scripts beside its package and no part of it, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torchtune


def load_stock_recipe(name: str) -> ModuleType:
    """The installed torchtune's recipe ``name``, such as ``lora_finetune_single_device``, loaded once.

    Raises ImportError if that torchtune has no such recipe, or not all of its own that the recipe imports.
    """
    module_name = f"torchtune_stock_{name.replace('/', '_')}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    path = Path(torchtune.__file__).parent.parent / "recipes" / f"{name}.py"
    if not path.exists():
        raise ImportError(f"the installed torchtune has no recipe {name}: {path} does not exist")
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    # Before it runs, as an import does: whatever pickles the recipe's classes looks them up there.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        # Whoever asks again is told again.
        del sys.modules[module_name]
        if not (error.name or "").startswith("torchtune."):
            raise
        raise ImportError(
            f"the installed torchtune has the recipe {name}, but not {error.name}, which that imports: it runs with "
            "torchtune's main branch alone, see docs/torchtune-versions.md"
        ) from error
    return module
