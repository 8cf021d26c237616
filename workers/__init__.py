"""workers: a gang is one model copy on N devices. README.md shows the path of a request and says what a failure does.

messages.py   what crosses process boundaries: GenerationRequest, StepEvent, GenerationResult, RankStatus
errors.py     the one tree of errors
metrics.py    every metric by name; observing.py: what a rank, a gang, a gateway observes; shapes.py: sizes as a label
exporter.py   shares metrics between the processes of a node, for Prometheus; value_file.py: their files; disk.py: room
tracing.py    the spans of a request; otlp.py: sends them to a collector
clip_decoder.py  a clip that a caller has sent -> its frames, in a process of its own
private_folder.py  folders that belong to one user alone
gang/         the actors: a gang, its ranks, where they are placed, what they cost
model/        one model in one rank: files, loading, denoising, adapters, pictures
demo_models/  tiny models for the demo and the tests; `python -m workers.demo_models` writes one
support_matrix.py  proves which pipelines of diffusers are served, and writes it down; pipeline_proof.py: one proof
small_pictures.py  small pictures for quick proofs; passing_checker.py: a guardrail that passes everything

This file imports nothing, so that `workers.messages` and `workers.gang.gang` load without torch.
"""
