"""From a registered version to an answer over HTTP: admission, batches, runtimes, replicas.

Knows no model code: a replica runs a graph and a signature.
"""
