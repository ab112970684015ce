"""What every Tandem process must agree on: names, files, storage, manifests, the registry.

Knows neither how a model is trained nor how it is served.
"""
