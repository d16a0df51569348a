"""Memory traffic of programs: known counts of programs written by hand and of compiled programs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("step_traffic", SCRIPTS / "step_traffic.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_traffic"] = module
    spec.loader.exec_module(module)
    return module


KIB = 1024
LOOP = """\
HloModule step, is_scheduled=true

FileNames
1 "/a/gpt2_flax/training/step.py"
2 "/a/gpt2_flax/model/loss.py"
3 "/a/gpt2_flax/model/gpt2.py"

FunctionNames
1 "make_train_step.<locals>.train_step"
2 "cross_entropy"
3 "GPT2.hidden"

FileLocations
1 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}

%take_one (stack: f32[8,256], place: s32[]) -> f32[1,256] {
  %stack = f32[8,256]{1,0} parameter(0)
  %place = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,256]{1,0} dynamic-slice(%stack, %place, %zero), dynamic_slice_sizes={1,256}
}

%put_one (stack.1: f32[8,256], row: f32[1,256], place.1: s32[]) -> f32[8,256] {
  %stack.1 = f32[8,256]{1,0} parameter(0)
  %row = f32[1,256]{1,0} parameter(1)
  %place.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %put = f32[8,256]{1,0} dynamic-update-slice(%stack.1, %row, %place.1, %zero.1)
}

%multiply (left: f32[256,256], right: f32[1,256]) -> f32[1,256] {
  %left = f32[256,256]{1,0} parameter(0)
  %right = f32[1,256]{1,0} parameter(1)
  ROOT %dot = f32[1,256]{1,0} dot(%right, %left), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,256], f32[256,256])) -> (s32[], f32[8,256], f32[256,256]) {
  %state = (s32[], f32[8,256]{1,0}, f32[256,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %rows = f32[8,256]{1,0} get-tuple-element(%state), index=1
  %matrix = f32[256,256]{1,0} get-tuple-element(%state), index=2
  %fusion.1 = f32[1,256]{1,0} fusion(%rows, %i), kind=kLoop, calls=%take_one, metadata={op_name="a" stack_frame_id=3}
  %fusion.2 = f32[1,256]{1,0} fusion(%matrix, %fusion.1), kind=kCustom, calls=%multiply, metadata={stack_frame_id=3}
  %fusion.3 = f32[8,256]{1,0} fusion(%rows, %fusion.2, %i), kind=kLoop, calls=%put_one, metadata={stack_frame_id=3}
  ROOT %next = (s32[], f32[8,256]{1,0}, f32[256,256]{1,0}) tuple(%i, %fusion.3, %matrix)
}

%condition (state.1: (s32[], f32[8,256], f32[256,256])) -> pred[] {
  %state.1 = (s32[], f32[8,256]{1,0}, f32[256,256]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (rows.1: f32[8,256], matrix.1: f32[256,256]) -> f32[8,256] {
  %rows.1 = f32[8,256]{1,0} parameter(0)
  %matrix.1 = f32[256,256]{1,0} parameter(1)
  %start = s32[] constant(0)
  %tuple = (s32[], f32[8,256]{1,0}, f32[256,256]{1,0}) tuple(%start, %rows.1, %matrix.1)
  %while = (s32[], f32[8,256]{1,0}, f32[256,256]{1,0}) while(%tuple), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"8"}}
  %result = f32[8,256]{1,0} get-tuple-element(%while), index=1
  %cublas = (f32[8,256]{1,0}, s8[4194304]{0}) custom-call(%result, %matrix.1), \
custom_call_target="__cublas$lt$matmul", metadata={stack_frame_id=2}
  %product = f32[8,256]{1,0} get-tuple-element(%cublas), index=0
  %all-reduce-start = f32[8,256]{1,0} all-reduce-start(%product), replica_groups={{0,1}}, to_apply=%add
  %all-reduce-done = f32[8,256]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %new = f32[8,256]{1,0} add(%all-reduce-done, %rows.1), metadata={op_name="b" stack_frame_id=1}
}
"""


def test_a_program_written_by_hand_has_its_bytes_by_group(script):
    groups = script.total(LOOP).groups
    assert groups["copies"] == (16, 8 * (2 + 2) * KIB + 16 * 4)  # a row read and written, and its position
    assert groups["products of layers"] == (8, 8 * (256 + 1 + 1) * KIB)
    assert groups["products of the loss"] == (1, (8 + 256 + 8) * KIB)  # without the scratch memory
    assert groups["collectives"] == (1, 16 * KIB)
    assert groups["optimizer"] == (1, 24 * KIB)
    assert groups["attention"] == groups["elementwise of layers"] == groups["elementwise of the loss"] == (0, 0)


def test_a_compiled_program_has_its_bytes(script):
    """Measure a matrix product in a loop of 5, and one pass over an array."""

    def function(x_ND, matrix_DD, y_M):
        x_ND = jax.lax.fori_loop(0, 5, lambda _, x_ND: x_ND @ matrix_DD, x_ND)
        return x_ND, y_M * 2 + 1

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 128), (100_000,))]
    found = script.total(jax.jit(function).lower(*shapes).compile().as_text()).groups
    launches, size = found["products of layers"]
    assert (launches, size) == (5, 5 * 4 * (2 * 64 * 128 + 128 * 128))
    assert found["elementwise of layers"][1] == pytest.approx(2 * 4 * 100_000, rel=0.01)


@pytest.mark.multiprocess
@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="no JAX for GPUs, of any CUDA")
def test_the_command_shows_variants_side_by_side(tmp_path):
    for name in ("before", "after"):
        (tmp_path / f"{name}.txt").write_text(LOOP, encoding="utf-8")
    command = [sys.executable, SCRIPTS / "step_traffic.py", "--hlo", tmp_path / "before.txt", tmp_path / "after.txt"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].split() == ["before", "after"]
    total = (8 * 4 + 8 * 258 + 272 + 16 + 24) * KIB + 64
    assert f"all 27 {total / 1e9:.2f}" in " ".join(lines[-2].split())
    assert lines[-1].split()[:4] == ["ms", "at", "4.80", "TB/s"]
