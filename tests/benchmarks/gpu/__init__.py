"""`make gpu`: everything that has to be seen on a GPU, as one command whose rows are on disk as they are measured.

__main__.py    the command: starts each part as a process of its own, ends it after a time
table.py       writes a row to the file and to the screen at once
part.py        what every part shares: its device, its clock, and what becomes of a row that fails
machine.py     the head of the file: card, driver, versions, date, command; what cards can do at most
timing.py      seconds, FLOP, launches and memory of a call

checks.py      part 1: tests that need a GPU, the probe of the groups, the same answer on every layout
pipelines.py   part 2: the demo model of every pipeline, beside the CPU, compiled, and on two ranks
kernels.py     part 3: attention by kernel, shape and mask
steps.py       part 4: steps of full-size transformers, eager, compiled and recorded, beside plain diffusers
serve.py       part 5: cold start, whole requests, cancellation, running out of memory

ranks.py       ranks on GPUs: over NCCL, or several on one GPU over gloo
staged.py      collectives of CUDA tensors over gloo
one_rank.py    one rank of a larger world whose other ranks do not exist
transformers.py  full-size transformers with random weights, and their inputs
model_folder.py  a model folder of real size with random weights
rank_work.py   what part 5 does in the process of a rank
pack.py        a command of its own: packs what a machine without network lacks
"""
