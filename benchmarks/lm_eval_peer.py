"""lm-eval's own `hf` backend (PyTorch), with which ours is compared, and requests that both answer.

Nothing of ours is imported here: the processes whose memory is measured hold one backend, or the other.
"""

import copy
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PEER_BATCH = 8

Instance = Any  # lm_eval.api.instance.Instance: importing lm-eval takes seconds


def peer_lm(
    model: Any,
    *,
    batch_size: int = PEER_BATCH,
    window: int | None = None,
    tokenizer: Any = None,
    dtype: str = "float32",
) -> Any:
    """The `hf` backend on the CPU, set as the paper sets it.

    Args:
      model: a Hugging Face folder, or a loaded model, to which its tokenizer must be given.
      batch_size: of log-likelihoods and of generation.
      window: the most tokens it sees at once, if fewer than the model's.
      tokenizer: of a loaded model.
      dtype: of the weights and of what is computed.
    """
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it has something to say to each context that it cuts
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        dtype=dtype,
        device="cpu",
        batch_size=batch_size,
        max_length=window,
        add_bos_token=False,
    )


def answers(lm: Any, instances: Sequence[Instance]) -> list[Any]:
    """What a backend answers to each request; all of a kind in one call, as lm-eval's evaluator does it."""
    results: list[Any] = [None] * len(instances)
    for kind in dict.fromkeys(instance.request_type for instance in instances):
        chosen = [i for i, instance in enumerate(instances) if instance.request_type == kind]
        # Copies: backends of lm-eval add to the lists of stop strings.
        asked = [dataclasses.replace(instances[i], arguments=copy.deepcopy(instances[i].arguments)) for i in chosen]
        for i, result in zip(chosen, getattr(lm, kind)(asked), strict=True):
            results[i] = result
    return results


def count_items(instances: Sequence[Instance]) -> int:
    return len({(instance.task_name, instance.doc_id) for instance in instances})


def save_requests(path: Path, instances: Sequence[Instance]) -> None:
    """Writes requests without the documents that they were made of."""
    rows = [[i.request_type, list(i.args), i.idx, list(i.metadata)] for i in instances]
    path.write_text(json.dumps(rows), encoding="utf-8")


def load_requests(path: Path) -> list[Instance]:
    from lm_eval.api.instance import Instance as Request

    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Request(kind, {}, tuple(args), number, tuple(metadata)) for kind, args, number, metadata in rows]
