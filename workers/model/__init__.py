"""One model in one rank: from its files to its pictures.

files.py                where a model's files are on this node: fetched once, checked once
digests.py              what a deployment's files are, by content
loader.py               loads a model folder; weights.py reads a transformer's share, components.py all others
staging.py              from a file's memory to a GPU's
compiler.py             compiles blocks into a folder of the node, which the next process finds: compile_cache.py
torch_internals.py      what torch keeps private
out_of_tree.py          what a deployment names as package.module:NAME: a transformer's class, its plan
adapters/               what each pipeline does its own way
denoising.py            one request in progress, step by step; workflow.py the blocks that it runs
classic_denoising.py    the same through a classic pipeline's call: stepped_call.py stops it, classic_parts.py builds it
shared_encoders.py      the encoders of such a call: they work on one rank, once
picture_inputs.py       pictures that a request begins with, encoded and sampled
sample_inputs.py        those of requests that nobody has sent, for self-test and warm-up
request_scheduler.py    its own scheduler; handover.py what it takes along to other ranks
guidance.py             whether its branches share a forward, take one each, or ranks of their own
step_ends.py            when steps end on the device, and whether their latents are finite
previews.py             previews of the clean latents; latent_colors.py fits their colors to the VAE
picture_shares.py       several pictures, each decoded on one rank
positions.py            sizes for which a transformer has no positions
prompts.py              what prompts of a classic pipeline may not hold
truncation.py           notices prompts that are longer than what is read
lora.py                 LoRA files -> what sp_core.lora takes; lora_strength.py how strong they are
media.py                pictures to PNG, JPEG, WebP; videos to MP4; stills.py pictures of a finished video
diffusers_internals.py  what diffusers keeps private
"""
