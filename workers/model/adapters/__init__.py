"""Pipeline adapters: how each diffusers pipeline is run step by step."""
