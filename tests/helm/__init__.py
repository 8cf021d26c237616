"""The chart, the image and the wheel, without a cluster: helm's own engine renders, schemas of Kubernetes judge."""
