"""OLMo 3: OLMo 2 with a window in three of four layers, and YaRN in the fourth."""

import dataclasses

from convert.families.family import FULL, SLIDING
from convert.families.layers import periodic
from convert.families.llama import SILU, WHOLE_HEAD
from convert.families.olmo2 import OLMO2

OLMO3 = dataclasses.replace(
    OLMO2,
    name="OLMo 3",
    covers="OLMo 3",
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    heads=("Olmo3ForSequenceClassification",),
    # The base of transformers 5 and of the released models; to transformers 4 an absent one is 10000.
    defaults={**OLMO2.defaults, "rope_theta": 500000.0, "layer_types": None, "sliding_window": 4096},
    only={**SILU, **WHOLE_HEAD},
    layer_types={FULL: FULL, SLIDING: SLIDING},
    layer_kinds=periodic(4),
    thetas={FULL: "rope_theta", SLIDING: "rope_theta"},
)
