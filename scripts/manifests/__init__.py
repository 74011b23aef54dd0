"""The manifests of cluster/kuberay, rendered and checked without a cluster."""
