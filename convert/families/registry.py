"""The families that there are; adding one to `_ALL` is all that the rest of the package needs."""

from collections.abc import Mapping

from convert.families.family import Family, GGUFTable, TensorRow
from convert.families.gemma import GEMMA
from convert.families.gemma2 import GEMMA2
from convert.families.gemma3 import GEMMA3
from convert.families.granite import GRANITE
from convert.families.granitemoehybrid import GRANITE_HYBRID
from convert.families.llama import LLAMA
from convert.families.mistral import MISTRAL
from convert.families.olmo2 import OLMO2
from convert.families.olmo3 import OLMO3
from convert.families.phi3 import PHI3
from convert.families.qwen2 import QWEN2
from convert.families.qwen3 import QWEN3
from convert.families.smollm3 import SMOLLM3

_ALL = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GRANITE,
    GRANITE_HYBRID,
    PHI3,
    OLMO2,
    OLMO3,
)

# By the `model_type` of config.json.
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}

# By the `model_type` of multimodal models whose text half is one of them.
WRAPPED: Mapping[str, Family] = {family.wrapper.model_type: family for family in _ALL if family.wrapper is not None}


def _gguf_tables() -> dict[str, tuple[Family, GGUFTable]]:
    tables: dict[str, tuple[Family, GGUFTable]] = {}
    for family in _ALL:
        for table in () if family.gguf is None else (family.gguf, family.gguf.per_layer):
            if table is not None:
                tables.setdefault(table.architecture, (family, table))
    return tables


# By the `general.architecture` of GGUF files. Of families that share a table, a file is one of the first unless its
# metadata say otherwise.
GGUF_TABLES: Mapping[str, tuple[Family, GGUFTable]] = _gguf_tables()

# All tensors of all families, each once.
TENSORS: tuple[TensorRow, ...] = tuple(dict.fromkeys(row for family in FAMILIES.values() for row in family.tensors))
