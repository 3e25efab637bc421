"""Lets a stock mergekit find `submodule_linear`: an import hook that runs right after two of mergekit's modules load.

mergekit has no entry points. The wheel's `mergekit_slta.pth` imports this file at every start of Python, so it imports
nothing (not even importlib.abc), costs well under 2 ms, and never raises. `MERGEKIT_SLTA_AUTOLOAD=0` turns it off.
"""

import os
import sys

ENVIRONMENT_SWITCH = "MERGEKIT_SLTA_AUTOLOAD"


def _methods_loaded(module):
    from mergekit_slta.host.method import register

    register()


def _merge_loaded(module):
    from mergekit_slta.host.wrap import wrap_run_merge

    wrap_run_merge(module)


HOOKS = {"mergekit.merge_methods": _methods_loaded, "mergekit.merge": _merge_loaded}


def _run_hook(name, module):
    try:
        HOOKS[name](module)
    except Exception as error:  # an error here must not break a merge with another method
        print(f"mergekit-slta: {getattr(error, 'message', None) or repr(error)}", file=sys.stderr)


class _Loader:
    """Loads a module with its own loader, then runs the hook."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _run_hook(module.__name__, module)


class Finder:
    """Asks the other finders for mergekit's two modules, and wraps the loaders that they return."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in HOOKS:
            return None
        for finder in sys.meta_path:
            if finder is not Finder and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader)
                    return spec
        return None


def install():
    """Put the finder first, and run the hooks of modules that are loaded already.

    Does nothing if the finder is installed, or if `MERGEKIT_SLTA_AUTOLOAD` is 0.
    """
    if os.environ.get(ENVIRONMENT_SWITCH) == "0" or Finder in sys.meta_path:
        return
    sys.meta_path.insert(0, Finder)
    for name in HOOKS:
        module = sys.modules.get(name)
        # A module that is still being executed has no `run_merge` or `register` yet.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _run_hook(name, module)
