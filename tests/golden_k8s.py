"""The goldens of every overlay, and what renews them: `make k8s-golden`."""

from __future__ import annotations

import sys
from pathlib import Path

from k8s.overlay import kustomize
from k8s.tree import TREE, write_examples

GOLDEN = Path(__file__).parent / "golden" / "k8s"
OVERLAYS = ("dev-cpu", "prod-gpu", "prod-ha", "staging")


def main() -> int:
    """Write the rendered part of the tree, then each overlay as kubectl builds it."""
    write_examples(TREE)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in OVERLAYS:
        (GOLDEN / f"{name}.yaml").write_text(kustomize(TREE / "overlays" / name), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
