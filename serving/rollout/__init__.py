"""Canary and shadow on a replica: who gets which version, what is seen of both, and what follows from it.

`split` chooses, `evidence` counts, `judge` decides, `pool` shares evidence between replicas, `tried` runs a
trial on a replica. What is tried stands in the registry's log (`cluster.trial`).
"""
