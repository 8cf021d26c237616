"""The demo models: tiny pipelines with random weights, one file per family, for `workers.demo_models.__main__` to
write.

    parts.py        what several of them share: gains on weights, the image VAE
    vocabulary.py   tokenizers made on the spot, without files or network
    qwen_image.py, z_image.py, wan.py, flux.py
                    `pipeline()` of the family, the same weights at every call

All have 12 attention heads, so that 1, 2, 3 and 4 ranks can share them, and the real models' reduction of sizes.
"""
