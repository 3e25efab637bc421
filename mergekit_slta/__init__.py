"""mergekit-slta: merge fine-tuned language models submodule by submodule, with weights in closed form.

Importing the package makes `submodule_linear` known to mergekit; everything else is loaded when it is first used.
"""

from mergekit_slta import _autoload

__version__ = "0.1.0"

_PUBLIC = {
    "Alphas": "mergekit_slta.alphas",
    "Linearity": "mergekit_slta.scores",
    "Recipe": "mergekit_slta.recipe",
    "Solution": "mergekit_slta.solve",
    "Statistics": "mergekit_slta.gram",
    "calibrate": "mergekit_slta.calibration",
    "load_config": "mergekit_slta.recipe",
    "non_linearity_score": "mergekit_slta.linearity",
    "read_recipe": "mergekit_slta.recipe",
    "register": "mergekit_slta.method",
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
