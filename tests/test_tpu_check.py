"""What `benchmarks/tpu_check.py` reads out of compiled programs; the TPU's compiler itself is not needed for it."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from gluprune_jax.parallel.mesh import MeshShape, make_mesh, use_mesh

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import tpu_check
from hlo_collectives import Collective, Shape, collectives
from tpu_check import CASES, CI, EXPECTED, Case, largest, unexpected

# As the TPU's compiler writes them, attributes cut.
SYNCHRONOUS = """\
HloModule jit_score_layer, is_scheduled=true

%add.clone (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  ROOT %add = f32[]{:T(128)} add(%x, %y)
}

ENTRY %main.1_spmd (param: bf16[1024,2048]) -> f32[8192] {
  %param = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.3 = (u32[1,1,128]{2,1,0:T(1,128)S(1)}, f32[256]{0}, /*index=2*/pred[3]{0}) all-reduce(%a, %b, %c), \
channel_id=3, to_apply=%add.clone
  %all_to_all.29 = bf16[1024,8,256]{2,0,1:T(8,128)(2,1)S(1)} all-to-all(%fusion), channel_id=1, dimensions={1}
  %all_to_all.33 = bf16[8,615,256]{2,1,0:T(8,128)(2,1)S(1)} all-to-all(%all_to_all.32), channel_id=1
  ROOT %all-gather.5 = f32[8192]{0:T(1024)} all-gather(%fusion), channel_id=1, metadata={op_name="jit(f)/all-reduce("}
}
"""
ASYNCHRONOUS = """\
%async_computation (p: bf16[8,16]) -> bf16[1,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = bf16[1,16]{1,0} reduce-scatter(%p), channel_id=4, to_apply=%add.clone
}

ENTRY %main (param: bf16[16,32]) -> bf16[128,32] {
  %all-gather-start = (bf16[16,32]{1,0}, bf16[128,32]{1,0}) all-gather-start(%param), channel_id=1
  %all-gather-done = bf16[128,32]{1,0} all-gather-done(%all-gather-start)
  %all-gather-start.1 = ((bf16[2]{0}, f32[4]{0}), (bf16[16]{0}, f32[32]{0})) all-gather-start(%a, %b), channel_id=5
  %all-reduce-start = f32[12]{0} all-reduce-start(%x), channel_id=2, to_apply=%add.clone
  %all-reduce-done = f32[12]{0} all-reduce-done(%all-reduce-start)
  %permute = (bf16[7]{0}, bf16[7]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=3
  %permute-done = bf16[7]{0} collective-permute-done(%permute)
  %reduce-scatter-start = ((bf16[8,16]{1,0}), bf16[1,16]{1,0}) async-start(%z), calls=%async_computation
  ROOT %reduce-scatter-done = bf16[1,16]{1,0} async-done(%reduce-scatter-start), calls=%async_computation
}
"""
# A gathered embedding, overlapped with a step of decoding; and a ring of a matrix product within a branch.
LOOP = """\
%async_collective_fusion.1 (param_0: bf16[16032,2048]) -> (bf16[128256,2048], u32[]) {
  %all-gather.6 = bf16[128256,2048]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=7, dimensions={0}
  ROOT %custom-call.9 = (bf16[128256,2048]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.6), custom_call_target="Start"
}

%async_collective_fusion.2 (param_0.1: bf16[16032,2048]) -> bf16[128256,2048] {
  %all-gather.8 = bf16[128256,2048]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=7, dimensions={0}
  ROOT %custom-call.11 = bf16[128256,2048]{1,0} custom-call(%all-gather.8), custom_call_target="Done"
}

%branch_0 (p.0: bf16[4]) -> bf16[4] {
  ROOT %collective-permute.1 = bf16[4]{0} collective-permute(%p.0), channel_id=9, source_target_pairs={{0,1},{1,0}}
}

%branch_1 (p.1: bf16[4]) -> bf16[4] {
  ROOT %p.1 = bf16[4]{0} parameter(0)
}

%body (carry: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %start = (bf16[128256,2048]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%async_collective_fusion.1
  %done = bf16[128256,2048]{1,0} fusion(%start), kind=kCustom, calls=%async_collective_fusion.2
  %chosen = bf16[4]{0} conditional(%i, %x, %x), branch_computations={%branch_0, %branch_1}
  ROOT %tuple = (s32[]{:T(128)}, bf16[4]{0}) tuple(%i, %chosen)
}

ENTRY %main (p: bf16[4]) -> s32[64] {
  %while.1 = (s32[]{:T(128)}, bf16[4]{0}) while(%init), condition=%condition, body=%body
  ROOT %all-reduce.5 = s32[64]{0:T(128)} all-reduce(%out), channel_id=4, to_apply=%add.3
}
"""


def spelled(text: str) -> list[tuple[str, str, bool]]:
    return [(c.kind, " ".join(map(str, c.shapes)), c.in_loop) for c in collectives(text)]


def test_synchronous_collectives() -> None:
    assert spelled(SYNCHRONOUS) == [
        ("all-reduce", "u32[1,1,128] f32[256] pred[3]", False),
        ("all-to-all", "bf16[1024,8,256]", False),
        ("all-to-all", "bf16[8,615,256]", False),  # another one, though the channel is the same
        ("all-gather", "f32[8192]", False),
    ]
    assert [c.nbytes for c in collectives(SYNCHRONOUS)] == [512 + 1024 + 3, 2 * 2**21, 2 * 8 * 615 * 256, 4 * 8192]


def test_asynchronous_collectives_are_counted_once_and_without_their_operands() -> None:
    assert spelled(ASYNCHRONOUS) == [
        ("reduce-scatter", "bf16[1,16]", False),
        ("all-gather", "bf16[128,32]", False),
        ("all-gather", "bf16[16] f32[32]", False),
        ("all-reduce", "f32[12]", False),
        ("collective-permute", "bf16[7]", False),
    ]


def test_collectives_in_loops_and_spread_over_fusions() -> None:
    assert spelled(LOOP) == [
        ("all-gather", "bf16[128256,2048]", True),
        ("collective-permute", "bf16[4]", True),
        ("all-reduce", "s32[64]", False),
    ]


def test_bytes() -> None:
    sizes = {"pred": 6, "s4": 3, "u8": 6, "f8e4m3fn": 6, "bf16": 12, "f32": 24, "c64": 48}
    assert {dtype: Shape(dtype, (2, 3)).nbytes for dtype in sizes} == sizes
    assert Shape("f32", ()).nbytes == 4


def test_a_gathered_weight_is_not_expected() -> None:
    case = CASES["1b-divided"]
    limits = largest(case.config, case.mesh, tokens=8)
    sums = Collective("all-reduce", (Shape("bf16", (8, 1, 2048)),), True)
    logits = Collective("all-gather", (Shape("f32", (8, 16032, 8)),), True)
    embedding = collectives(LOOP)[0]
    assert unexpected([sums, logits], EXPECTED["decode"], limits) == []
    (problem,) = unexpected([sums, embedding, logits, embedding], EXPECTED["decode"], limits)
    assert problem.startswith("all-gather of bf16[128256,2048] (525,336,576 bytes on each chip); expected: all-reduce")


def test_what_is_expected_is_expected_of_its_kind_only() -> None:
    case = CASES["1b-divided"]
    limits = largest(case.config, case.mesh, tokens=512)
    part = Collective("all-gather", (Shape("bf16", (1, 512, 2048)),), False)
    (problem,) = unexpected([part], EXPECTED["forward"], limits)
    assert "expected: all-reduce of hidden states (up to 2,097,152 bytes)" in problem
    (problem,) = unexpected([part], EXPECTED["append"], limits)
    assert problem.endswith("expected: none")


def test_no_weight_and_no_cache_may_be_gathered() -> None:
    """What may move is smaller than a matrix of a layer, except sums of hidden states of many tokens.

    And except in calibration, where each chip multiplies its own neurons' activations by those of all of them, and in
    refitting a layer, which factors its Gram matrix on every chip.
    """
    for case in CASES.values():
        config = case.config
        matrix = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim  # of the keys, the smallest
        limits = largest(config, case.mesh, tokens=tpu_check.SLOTS)
        for expected in (EXPECTED[name] for name in EXPECTED if name not in ("calibration", "least squares")):
            assert all(limits[what] < matrix for kind, what, _ in expected if kind == "all-gather" and what != "logits")
        assert limits["logits"] < matrix * config.num_hidden_layers


@pytest.mark.parametrize("shape", [MeshShape(8, 1), MeshShape(1, 8), MeshShape(2, 4)], ids=str)
def test_every_program_takes_what_it_is_given(shape: MeshShape) -> None:
    case = Case("llama-3.2-1b", "v5e:2x4", shape, layers=1)
    mesh = make_mesh(shape, case.config.num_key_value_heads)
    programs = tpu_check.programs(case, mesh)
    assert set(programs) == set(tpu_check.EVERYTHING)
    with use_mesh(mesh):
        for program in programs.values():
            program.function.lower(*program.args)  # type: ignore[attr-defined]


def test_cases_name_programs_that_there_are() -> None:
    for case in [*CASES.values(), *CI]:
        assert set(case.programs) <= set(tpu_check.EVERYTHING)
    ours = {program for case in CI for program in case.programs}
    assert {*tpu_check.PRUNING, *tpu_check.EVALUATION} - ours == {"admit"}


@pytest.mark.parametrize("chips", [1, 8])
def test_what_programs_need_is_that_of_their_shapes(chips: int) -> None:
    case = CASES["1b-one-chip" if chips == 1 else "1b-divided"]
    mesh = make_mesh(case.mesh, case.config.num_key_value_heads)
    need = tpu_check.needs(case, tpu_check.programs(case, mesh)["rows"].args[1])
    V, D, L, KV = 128256, 2048, 16, 8 * 64
    matrices = L * (2 * D * D + 2 * D * KV + 3 * D * 8192)
    weights = 2 * (matrices + V * D) // chips
    cache = 2 * 2 * L * KV * 8 * (1024 + 16) // chips
    assert need["decode"].nbytes == pytest.approx(weights + cache + 4 * 8 * V // chips, rel=1e-3)
    assert need["score tokens"].flops == 2 * tpu_check.ASKED * V * D // chips
    # Of each product of a token with a matrix two operations a weight; and of the keys and values with heads of 64.
    per_token = need["extend"].flops / 512
    assert per_token == pytest.approx((2 * matrices + 4 * 768 * L * 32 * 64) / chips, rel=1e-3)


def test_a_program_that_takes_more_than_it_must_is_a_problem() -> None:
    result = tpu_check.Result(CASES["1b-one-chip"], "decode", (), 1, 1, times_bytes=1.02, times_flops=1.01)
    need = tpu_check.Need(nbytes=1, flops=1)
    assert tpu_check.excess(result, need) == []
    copied = dataclasses.replace(result, times_bytes=1.31)
    assert tpu_check.excess(copied, need) == ["it takes 1.31 times the bytes that it must; at most 1.10 are allowed"]
    twice = dataclasses.replace(result, times_flops=2)
    (problem,) = tpu_check.excess(twice, need)
    assert "2.00 times the operations" in problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "llama-3.1-8b"}, "--model, --topology and --mesh belong together"),
        ({"model": "llama-3.1-8b", "topology": "v5e:4x4", "mesh": "auto"}, "write sizes such as data=2,model=4"),
        ({"model": "llama-3.1-8b", "topology": "h100", "mesh": "data=1"}, "--topology is 'h100'; known are v4, v5e"),
        ({"scaling": "", "mesh": "data=8"}, "--scaling has its own topologies and meshes"),
        ({"programs": "rows,magic"}, "--programs names magic; known are ppm"),
    ],
)
def test_refusals(arguments: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    command = ["tpu_check.py", *(part for name, value in arguments.items() for part in (f"--{name}", value) if part)]
    monkeypatch.setattr(sys, "argv", command)
    assert tpu_check.main() == 2
    assert message in capsys.readouterr().err


def test_a_cut_model_says_so() -> None:
    case = dataclasses.replace(CASES["70b-v5e"], layers=2)
    assert str(case) == "llama-3.1-70b, 2 layers of it, on v5e:16x16, data=16,model=16"
    assert case.config.num_hidden_layers == 2
