"""One model in one rank: from its files to its pictures.

files.py                where a model's files are on this node: fetched once, checked once
digests.py              what a deployment's files are, by content
loader.py               loads a model folder; weights.py reads a transformer's share, components.py all others
staging.py              copies tensors from a file's memory to a GPU's
compiler.py             compiles blocks into a folder of the node; compile_cache.py keeps it for the next process
torch_internals.py      the private names of torch
out_of_tree.py          imports what a deployment names as package.module:NAME: a transformer's class, its plan
adapters/               the peculiarities of each pipeline
denoising.py            one request in progress, step by step; workflow.py the blocks that it runs
classic_denoising.py    the same through a classic pipeline's call: stepped_call.py stops it, classic_parts.py builds it
shared_encoders.py      the encoders of a classic call, which run once, on one rank
controlnets.py          ControlNets beside the transformer, whole on every rank
picture_inputs.py       encodes and samples the pictures that a request begins with
clip_inputs.py          the frames of the clip that a classic pipeline's call begins with
sample_inputs.py        sample pictures, for self-test and warm-up
request_scheduler.py    a request's own scheduler; handover.py the state that it takes to other ranks
guidance.py             whether a request's branches share a forward, take one each, or have ranks of their own
step_ends.py            when steps end on the device, and whether their latents are finite
previews.py             previews of the clean latents; latent_colors.py fits their colors to the VAE
picture_shares.py       several pictures, each decoded on one rank
fixed_tiles.py          VAEs that decode only tiles of one size
positions.py            sizes for which a transformer has no positions
step_counts.py          how few steps a classic pipeline can take
extra_ranges.py         extra parameters that would fail inside a call
own_draws.py            calls that draw with torch.randn, from seeds on the CPU onto a GPU
decoder_noise.py        the noise that some decoders add, the same each time
prompts.py              refuses prompts that a classic pipeline cannot read
guardrail.py            the checker of prompts and pictures that a license requires
out_of_memory.py        recognizes a lack of memory, and says which size would fit
truncation.py           notices prompts that are longer than what is read
lora.py                 reads LoRA files for sp_core.lora; lora_strength.py computes their strength
media.py                pictures to PNG, JPEG, WebP; videos to MP4; stills.py pictures of a finished video
embedded_parameters.py  the parameters of a request, as a file has them
diffusers_internals.py  the private names of diffusers
"""
