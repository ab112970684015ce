"""The same as `tandem train`, from Python: what a program or a notebook does.

python -m tests.bench.trainers.tandem_driver RECIPE.yaml RUN ADDRESS
"""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.config import load_yaml
from training.progress import display
from training.recipe import Recipe
from training.run import train


def main() -> None:
    recipe, run, address = sys.argv[1:]
    with display() as show:
        result = train(load_yaml(Recipe, Path(recipe), [f'run="{run}"']), address=address, show=show)
    sys.stdout.write(result.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
