"""mergekit-slta: merge fine-tuned language models submodule by submodule, with weights in closed form.

Importing the package makes `submodule_linear` known to mergekit; everything else is loaded when it is first used.
"""

from mergekit_slta import _autoload

TYPE_CHECKING = False  # `typing` is not imported: a .pth imports this file at every start of Python
if TYPE_CHECKING:  # for editors and the documentation
    from mergekit_slta.calibration.calibrate import calibrate as calibrate
    from mergekit_slta.files.alphas_file import Alphas as Alphas
    from mergekit_slta.files.linearity_file import Linearity as Linearity
    from mergekit_slta.files.statistics_file import Statistics as Statistics
    from mergekit_slta.host.method import register as register
    from mergekit_slta.maths.closed_form import Solution as Solution
    from mergekit_slta.maths.linearity import non_linearity_score as non_linearity_score
    from mergekit_slta.recipe.load import load_config as load_config
    from mergekit_slta.recipe.read import read_recipe as read_recipe
    from mergekit_slta.recipe.recipe import Recipe as Recipe

__version__ = "0.1.0"

_PUBLIC = {
    "Alphas": "mergekit_slta.files.alphas_file",
    "Comparison": "mergekit_slta.files.comparison_file",
    "Linearity": "mergekit_slta.files.linearity_file",
    "Recipe": "mergekit_slta.recipe.recipe",
    "Solution": "mergekit_slta.maths.closed_form",
    "Statistics": "mergekit_slta.files.statistics_file",
    "calibrate": "mergekit_slta.calibration.calibrate",
    "compare": "mergekit_slta.comparison.compare",
    "load_config": "mergekit_slta.recipe.load",
    "non_linearity_score": "mergekit_slta.maths.linearity",
    "read_recipe": "mergekit_slta.recipe.read",
    "register": "mergekit_slta.host.method",
}
__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str):  # PEP 562
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


_autoload.install()
