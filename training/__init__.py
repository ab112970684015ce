"""From a recipe to a registered version: data, steps, checkpoints, export, gate.

Reads in this order: recipe, facts, dataset, plan, loader, task, loop, checkpoint, worker, trainer,
export, evaluate, gate, finish, run. torch is imported nowhere else in Tandem; Ray only in `trainer`.
"""
