"""deploy: what the operator writes, and whether it can work.

    spec.py      DeploymentSpec: the one schema of a deployment file
    pipelines.py which of diffusers' pipelines can be served
    check.py     does it fit the model and the machine? what each replica takes
    *.yaml       deployments that ship with spray; local.yaml is the demo

Needs pydantic and yaml only. This file imports nothing.
"""
