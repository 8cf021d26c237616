"""Bria 3 and FIBO: like Flux. Each block of FIBO gets a layer of the text encoder, as long as the text."""

from typing import Any

from sp_core.models.family import Example, ModelFamily, Tokens
from sp_core.models.planned import as_flux
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput

BRIA = ModelFamily(
    transformer_classes=("BriaTransformer2DModel",),
    sp_plan=as_flux.SP_PLAN,
    pipelines=("BriaPipeline",),
    examples={"bria": Example("BriaTransformer2DModel", as_flux.TINY, as_flux.inputs, as_flux.GAINS)},
)


def _fibo_inputs(tokens: Tokens) -> dict[str, Any]:
    layers = [tokens.normal(tokens.batch, tokens.text, 8, seed=30 + i) for i in range(4)]
    return as_flux.inputs(tokens) | {"text_encoder_layers": layers}


BRIA_FIBO = ModelFamily(
    transformer_classes=("BriaFiboTransformer2DModel",),
    pipelines=("BriaFiboPipeline", "BriaFiboEditPipeline"),
    sp_plan=as_flux.SP_PLAN
    | {
        "": {
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "text_encoder_layers": SequenceParallelCompanion(split_dim=1, expected_dims=3),
            "img_ids": SequenceParallelCompanion(split_dim=-2),
            "txt_ids": SequenceParallelCompanion(split_dim=-2),
        },
    },
    examples={
        "bria fibo": Example(
            "BriaFiboTransformer2DModel", as_flux.TINY | {"text_encoder_dim": 8}, _fibo_inputs, as_flux.GAINS
        ),
    },
)
