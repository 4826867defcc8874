"""Granite 4, its dense models without Mamba layers. Mixtures of experts and hybrids are refused."""

from convert.families import tensors
from convert.families.family import ATTENTION_BIAS, FULL, Family
from convert.families.granite import DEFAULTS, GRANITE, MULTIPLIERS
from convert.families.layers import POSITION_EMBEDDING_TYPE
from convert.families.llama import NO_WINDOW, SILU, WHOLE_HEAD

GRANITE_HYBRID = Family(
    name="Granite 4",
    covers="dense Granite 4",
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    heads=(),
    defaults={
        **DEFAULTS,
        "layer_types": None,
        "num_local_experts": 8,
        "position_embedding_type": None,
        "shared_intermediate_size": 1024,
    },
    only={
        **SILU,
        **NO_WINDOW,
        **WHOLE_HEAD,
        "layers_block_type": (None,),
        "num_local_experts": (0,),
        "position_embedding_type": ("rope", "nope", None),
    },
    written={"hidden_act": "silu", "num_local_experts": 0},
    tensors=tensors.GRANITE_HYBRID,
    widths=("shared_intermediate_size", "intermediate_size"),
    flags=ATTENTION_BIAS,
    numbers=MULTIPLIERS,
    inert=frozenset(
        """
        mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_state mamba_expand mamba_n_groups
        mamba_n_heads mamba_proj_bias normalization_function num_experts_per_tok output_router_logits
        router_aux_loss_coef time_step_limit time_step_max time_step_min
        """.split()
    ),
    # transformers 4 takes the first name alone, and transformers 5 writes the second.
    layer_types={"attention": FULL, FULL: FULL},
    layer_kinds=lambda config, layers, where: ["mamba"] * layers,
    rotation=POSITION_EMBEDDING_TYPE,
    gguf=GRANITE.gguf,
)
