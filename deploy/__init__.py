"""deploy: the deployment file that the operator writes, and checks whether it can work.

    spec.py       DeploymentSpec: the one schema of a deployment file; model_spec.py, model_sections.py, gateway_spec.py
                  and storage_spec.py its parts, section.py what they derive from
    schema.py     the same as a JSON schema, for editors
    load.py       file < environment < command line, into one DeploymentSpec that knows where each value comes from
    overrides.py  how the three are merged before they are validated
    keys.py       which keys the schema has, and where
    tasks.py      the task of a request, by the pictures and clips that it begins with
    api_keys.py   the file of API keys: who may call, for what, and how much
    yaml_text.py  YAML that rejects duplicate keys and remembers lines
    families/     one file per served family: facts that need no torch
    support.py    which pipelines of diffusers are served, and why others are refused
    model_folder.py  where a model's files are on this machine, and what its configs say
    components.py    checks that a folder has what its pipeline needs; tokenizer_files.py checks vocabularies
    safetensors_headers.py  reads the headers of weight files, and checks that the files are whole
    check.py      checks a deployment against its models and a machine; says what each replica takes
    memory.py     bytes of the largest rank; activations.py the bytes that a request adds to the weights
    grafana/      the dashboards, and the code that writes them
    *.yaml        deployments that ship with spray: local.yaml is the demo, multi-model.yaml a cluster of four models

No torch. This file imports nothing.
"""
