"""What `import flamingo_export` gives stays what it is, whichever modules have been imported."""

from __future__ import annotations

import pkgutil

import flamingo_export


def test_no_module_hides_a_public_name() -> None:
    """Importing a submodule sets an attribute of its name on the package."""
    modules = {module.name for module in pkgutil.iter_modules(flamingo_export.__path__)}
    assert modules.isdisjoint(flamingo_export.__all__)
