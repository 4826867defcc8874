"""Gemma 1: Llama's block with norms of one plus the weight, a scaled embedding and a gate of gelu."""

from convert.families import llama_cpp, tensors
from convert.families.family import ATTENTION_BIAS, Family, GGUFTable, Number
from convert.families.llama import NO_WINDOW, WHOLE_HEAD

# Of all generations of Gemma.
FIELDS = {"norm": "float32_plus_one", "activation": "gelu_tanh"}
EMBEDDING = {"embedding_scale": Number("hidden_size", power=0.5)}
CAUSAL_AND_TIED = {"tie_word_embeddings": (False, True), "use_bidirectional_attention": (False, None)}

GEMMA = Family(
    name="Gemma",
    covers="Gemma 1",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    heads=("GemmaForSequenceClassification", "GemmaForTokenClassification"),
    defaults={
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    # Official files say "gelu" and mean the approximation, which transformers 5 takes; transformers 4 takes the word.
    only={
        **CAUSAL_AND_TIED,
        **NO_WINDOW,
        **WHOLE_HEAD,
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
        "hidden_activation": ("gelu_pytorch_tanh", None),
    },
    written={"hidden_act": "gelu_pytorch_tanh"},
    needs_bos=True,
    tensors=tensors.LLAMA,
    fields=FIELDS,
    flags=ATTENTION_BIAS,
    numbers=EMBEDDING,
    gguf=GGUFTable("gemma", llama_cpp.scaled, llama_cpp.write_scaled, norm_offset=1, output="never"),
)
