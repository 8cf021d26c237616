"""deploy: what the operator writes, and whether it can work.

    spec.py      DeploymentSpec: the one schema of a deployment file
    schema.py    the same as JSON schema, for editors
    load.py      file < environment < command line, in one DeploymentSpec, with where each value comes from
    layers.py    the three over one another, before they are checked
    keys.py      which keys the schema has, and where
    yaml_text.py YAML without keys given twice, with lines
    pipelines.py which of diffusers' pipelines can be served
    check.py     does it fit the model and the machine? what each replica takes
    memory.py    bytes of the largest rank; activations.py what requests need, tensor_shares.py what ranks share
    safetensors_headers.py  what weight files say of themselves, and whether they are whole
    hub_cache.py where this machine's Hugging Face cache has a model
    *.yaml       deployments that ship with spray: local.yaml is the demo, multi-model.yaml a cluster of four models

Needs pydantic and yaml only. This file imports nothing.
"""
