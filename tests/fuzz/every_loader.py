"""All loaders by their names. A loader whose packages are not installed is left out."""

from __future__ import annotations

from importlib.util import find_spec

from fuzz.draft import Loader
from fuzz.loaders import designs, models, runs, trainings

LOADERS: dict[str, Loader] = {
    loader.name: loader
    for loader in (*designs.LOADERS, *models.LOADERS, *trainings.LOADERS, *runs.LOADERS)
    if not loader.package or find_spec(loader.package)
}
