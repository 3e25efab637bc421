"""Merge fine-tuned language models with a separate weight for every submodule of every expert.

    import mergekit_slta

    mergekit_slta.check("recipe.yml")                     # models, rows, memory, time; reads no weights
    alphas = mergekit_slta.merge("recipe.yml", "merged")  # what `mergekit-yaml recipe.yml merged` does
    alphas["model.layers.3.mlp"].alpha                    # the weight of each expert
    alphas.to_frame()                                     # all weights, as a pandas table

    check(recipe, options=None)                   check a recipe and estimate its cost; the plan as a dict
    merge(recipe, out, options=None)              calibrate and merge; the Alphas
    calibrate(recipe, options=None)               compute the weights alone; the Alphas
    solve(statistics, ridge=..., without=...)     new Alphas from saved statistics, in seconds
    compare(recipe, output, methods=..., rows=N)  merge by several methods and score them; a Comparison

    Alphas              the weights: load, save, alphas[name], to_frame, evaluation
    Statistics          what the weights are solved from: load, save
    Linearity           a linearity file: load, save
    Comparison          the results of compare: load, save, verdict
    Recipe              a recipe that was read and checked
    Solution            a solved submodule

    load_config(path), read_recipe(config)        a recipe file -> mergekit's configuration -> Recipe
    non_linearity_score(features)                 the paper's measure (Eq. 19)
    register()                                    make `submodule_linear` known to mergekit; importing the package does

A recipe is a file's path, its content as a mapping, or mergekit's `MergeConfiguration`. `options` are mergekit's
`MergeOptions` (device, caches, ...).

Every error is a SltaError with a one-line message and a `code`: RecipeError, DataError, ModelError, AlphasError,
OutputError, RegistrationError, RunError, InterruptionError. `help(mergekit_slta.merge)` has the details of `merge`.
"""

from mergekit_slta import _autoload

TYPE_CHECKING = False  # `typing` is not imported: a .pth imports this file at every start of Python
if TYPE_CHECKING:  # for editors and the documentation
    from mergekit_slta.calibration.calibrate import calibrate as calibrate
    from mergekit_slta.calibration.resolve import solve as solve
    from mergekit_slta.comparison.compare import compare as compare
    from mergekit_slta.errors import AlphasError as AlphasError
    from mergekit_slta.errors import DataError as DataError
    from mergekit_slta.errors import InterruptionError as InterruptionError
    from mergekit_slta.errors import ModelError as ModelError
    from mergekit_slta.errors import OutputError as OutputError
    from mergekit_slta.errors import RecipeError as RecipeError
    from mergekit_slta.errors import RegistrationError as RegistrationError
    from mergekit_slta.errors import RunError as RunError
    from mergekit_slta.errors import SltaError as SltaError
    from mergekit_slta.files.alphas_file import Alphas as Alphas
    from mergekit_slta.files.comparison_file import Comparison as Comparison
    from mergekit_slta.files.linearity_file import Linearity as Linearity
    from mergekit_slta.files.statistics_file import Statistics as Statistics
    from mergekit_slta.host.api import check as check
    from mergekit_slta.host.api import merge as merge
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
    "check": "mergekit_slta.host.api",
    "compare": "mergekit_slta.comparison.compare",
    "load_config": "mergekit_slta.recipe.load",
    "merge": "mergekit_slta.host.api",
    "non_linearity_score": "mergekit_slta.maths.linearity",
    "read_recipe": "mergekit_slta.recipe.read",
    "register": "mergekit_slta.host.method",
    "solve": "mergekit_slta.calibration.resolve",
}
_ERRORS = ("Alphas", "Data", "Interruption", "Model", "Output", "Recipe", "Registration", "Run", "Slta")
_PUBLIC |= {f"{name}Error": "mergekit_slta.errors" for name in _ERRORS}


def __getattr__(name: str):  # PEP 562
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:  # there is no `__all__`, with which `help` prints every method of every class
    return sorted([*_PUBLIC, "__version__"])


_autoload.install()
