"""Folders have base and scaling of RoPE in both spellings: whoever reads one of them alone computes the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import LLAMA3_ROPE, hf_config, write_folder

import convert

SCALED = {**LLAMA3_ROPE, "rope_theta": 500000.0}
PLAIN = {"rope_type": "default", "rope_theta": 100000.0}


@pytest.mark.parametrize("rope", [PLAIN, SCALED], ids=["default", "llama3"])
@pytest.mark.parametrize("is_old", [False, True], ids=["of transformers 5", "of transformers 4"])
def test_both_are_written(tmp_path: Path, rope: dict[str, Any], is_old: bool) -> None:
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"} if "factor" in rope else None
    old, new = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}, {"rope_parameters": rope}
    config = {key: value for key, value in hf_config().items() if not key.startswith("rope")}
    write_folder(tmp_path / "model", config | (old if is_old else new))
    convert.save(convert.load(tmp_path / "model"), tmp_path / "written")
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    assert written["rope_theta"] == rope["rope_theta"]
    assert written["rope_parameters"] == rope
    assert (written.get("rope_scaling") or None) == scaling
