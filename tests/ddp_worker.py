"""One data-parallel worker without Ray: `RANK=0 WORLD_SIZE=2 … python tests/ddp_worker.py RECIPE.json`.

What torchrun would start. Shows that the worker needs no Ray.
"""

import os
import sys
from pathlib import Path

from cluster.runs import Run
from cluster.storage import open_store
from training.facts import DatasetFacts
from training.recipe import Recipe
from training.worker import run_worker


def main(recipe_path: str) -> None:
    recipe = Recipe.model_validate_json(Path(recipe_path).read_bytes())
    assert recipe.run is not None
    facts = Run(open_store(recipe.store), recipe.run).record().facts
    run_worker(recipe, recipe.run, DatasetFacts.model_validate(facts), report=lambda progress: None)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # torch's own threads may still be running, and abort an interpreter that ends
