"""mergekit-slta: merge fine-tuned language models submodule by submodule, with weights in closed form.

Importing the package makes `submodule_linear` known to mergekit; everything else is loaded when it is first used.
"""

from mergekit_slta import _autoload

__version__ = "0.1.0"

_PUBLIC = {
    "Alphas": "mergekit_slta.files.alphas_file",
    "Linearity": "mergekit_slta.files.linearity_file",
    "Recipe": "mergekit_slta.recipe.recipe",
    "Solution": "mergekit_slta.maths.closed_form",
    "Statistics": "mergekit_slta.files.statistics_file",
    "calibrate": "mergekit_slta.calibration.calibrate",
    "load_config": "mergekit_slta.recipe.load",
    "non_linearity_score": "mergekit_slta.maths.linearity",
    "read_recipe": "mergekit_slta.recipe.read",
    "register": "mergekit_slta.host.method",
}
__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str):  # PEP 562: a .pth imports this file at every start of Python
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


_autoload.install()
