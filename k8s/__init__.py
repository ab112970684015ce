"""From the recipe and the service to Kubernetes manifests for KubeRay."""
