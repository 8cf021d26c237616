"""deploy: what the operator writes, and whether it can work.

    spec.py       DeploymentSpec: the one schema of a deployment file; model_spec.py, model_sections.py, gateway_spec.py
                  and storage_spec.py its parts, section.py what they derive from
    schema.py     the same as JSON schema, for editors
    load.py       file < environment < command line, into one DeploymentSpec that knows where each value comes from
    overrides.py  how the three are merged before they are validated
    keys.py       which keys the schema has, and where
    tasks.py      what a request asks for, by what it begins with
    api_keys.py   the file of API keys: who may call, for what, and how much
    yaml_text.py  YAML that rejects duplicate keys and remembers lines
    families/     one file per served family: facts that need no torch
    support.py    which pipelines of diffusers are served, and why the others are not
    model_folder.py  where a model's files are on this machine, and what its configs say
    components.py    does the folder have what its pipeline needs? tokenizer_files.py the vocabularies
    safetensors_headers.py  what weight files say of themselves, and whether they are whole
    check.py      does it fit the model and the machine? what does each replica take?
    memory.py     bytes of the largest rank; activations.py what a request adds to the weights
    *.yaml        deployments that ship with spray: local.yaml is the demo, multi-model.yaml a cluster of four models

No torch. This file imports nothing.
"""
