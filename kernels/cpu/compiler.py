"""Numba's compiler, reduced to the passes that kernels need.

Only kernels call routines. Numba would optimise each routine and compile it to machine code, then the routines that
call it, and then the kernel, at each level again. Here a routine is compiled only to the text of LLVM IR, and only the
whole kernel is parsed, optimised and compiled.

References are not counted: a kernel makes no arrays, and its caller keeps its arguments alive. Numba would make an
object for each argument at every call, which takes a sixth of the time of a short call, and count references even in
innermost loops.

All this uses Numba's own extension mechanism: a pipeline with passes replaced or left out.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

from fastlstm.kernels.cpu.private_numba import (
    CodeLibrary,
    CompilerBase,
    DefaultPassBuilder,
    JITCodeLibrary,
    Lower,
    NativeLowering,
    cgutils,
    make_function,
    register_pass,
)

__all__ = ["HOT", "KernelCompiler", "PartCompiler"]

# --- LLVM ---------------------------------------------------------------------------------------------------

# Names of the functions whose loops are unrolled. Unrolling all loops makes a third more code, and no call faster.
HOT: set[str] = set()


class _Part(CodeLibrary):
    """A module to be linked into others: kept as text, neither parsed nor optimised on its own."""

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self.libraries: dict[Any, None] = {}  # those that it calls
        self.text = ""

    def add_linking_library(self, library: Any) -> None:
        """Note that this module calls another."""
        self.libraries[library] = None

    def add_ir_module(self, ir_module: Any) -> None:
        """Take the one module."""
        for function in ir_module.functions:
            if not function.is_declaration:
                function.linkage = "linkonce_odr"  # left out of the kernel where every call of it is inlined
        self.text = cgutils.normalize_ir_text(str(ir_module))

    def finalize(self) -> None:
        """End the module."""
        self._finalized = True

    def get_function(self, name: str) -> Any:
        """Numba calls this only for whole kernels."""
        raise NotImplementedError

    get_llvm_str = get_asm_str = get_function


class _Whole(JITCodeLibrary):
    """A module with all parts of a kernel, optimised after linking."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def finalize(self) -> None:
        """Link each part once, and compile to machine code."""
        found, waiting = {}, list(self._linking_libraries)
        while waiting:
            library = waiting.pop()
            if library not in found:
                found[library] = None
                waiting.extend(library.libraries)
        for library in found:
            self._final_module.link_in(llvm.parse_assembly(library.text))
        self._linking_libraries = []
        super().finalize()

    def _optimize_final_module(self) -> None:
        # At level 1, and without vectors made of loops: here they are written out. Of what the levels above add, it is
        # the removal of redundant loads that counts (GVN, 4 % of a small batch's time). Numba's own choice, level 3
        # after a first round, takes half as long again, and the kernels are as fast.
        options = llvm.create_pipeline_tuning_options(speed_level=1)
        options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
        builder = llvm.create_pass_builder(self._codegen._tm, options)
        builder.getModulePassManager().run(self._final_module, builder)
        finish = llvm.create_new_module_pass_manager()
        finish.add_new_gvn_pass()
        _add_clean_up(finish)
        finish.run(self._final_module, builder)
        unroll = llvm.create_new_function_pass_manager()
        unroll.add_loop_unroll_pass()
        _add_clean_up(unroll)
        for function in self._final_module.functions:
            if function.name in HOT and not function.is_declaration:
                unroll.run(function, builder)


def _add_clean_up(passes: Any) -> None:
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()


# --- from Numba's intermediate form to LLVM's ---------------------------------------------------------------


def _room(builder: Any, kind: Any, name: str = "") -> Any:
    """Emit memory, without a zero in it; Numba would first set it to zero."""
    with builder.goto_entry_block():
        return builder.alloca(kind, name=name)


def _record(builder: Any, values: list[Any]) -> Any:
    found = ir.Constant(ir.LiteralStructType([value.type for value in values]), ir.Undefined)
    for n, value in enumerate(values):
        found = builder.insert_value(found, value, n)
    return found


def _start_of_range(builder: Any, given: Any) -> Any:
    """Emit the state of a range: pointers to the next number and to the count of numbers left, the stop and the step.

    The step is not 0.
    """
    start, stop, step = getattr(given, "numbers", None) or [builder.extract_value(given, n) for n in range(3)]
    integer = start.type
    zero, one = ir.Constant(integer, 0), ir.Constant(integer, 1)
    place, left = _room(builder, integer), _room(builder, integer)
    span = builder.sub(stop, start)
    if isinstance(step, ir.Constant) and step.constant == 1:
        count = span
    else:
        # Rounded up: of a span and a step of one sign.
        is_upwards = builder.icmp_signed(">", step, zero)
        towards = builder.select(is_upwards, builder.sub(step, one), builder.add(step, one))
        is_empty = builder.xor(is_upwards, builder.icmp_signed(">", span, zero))
        count = builder.select(is_empty, zero, builder.sdiv(builder.add(span, towards), step))
    builder.store(start, place)
    builder.store(count, left)
    return _record(builder, [place, stop, step, left])


def _next_of_range(builder: Any, given: Any) -> Any:
    """Emit the next number, and whether there is one."""
    place, step, left = (builder.extract_value(given, n) for n in (0, 2, 3))
    count, number = builder.load(left), builder.load(place)
    builder.store(builder.sub(count, ir.Constant(count.type, 1), flags=["nsw"]), left)
    builder.store(builder.add(number, step), place)
    return _record(builder, [number, builder.icmp_signed(">", count, ir.Constant(count.type, 0))])


class _Lower(Lower):
    """Numba's lowering, without support for debuggers, reference counts and operators with constants."""

    def lower_block(self, block: Any) -> None:
        """Emit a block, without a message ready for each instruction that might fail."""
        self.pre_block(block)
        for instruction in block.body:
            self.loc = instruction.loc
            self.lower_inst(instruction)
        self.post_block(block)

    def storevar(self, value: Any, name: str, argidx: int | None = None) -> None:
        """Emit the store of a variable, without reference counting."""
        if name in self._singly_assigned_vars:
            self._blk_local_varmap[name] = value
        else:
            self._alloca_var(name, self.typeof(name))
            self.builder.store(value, self.varmap[name])

    def alloca_lltype(self, name: str, lltype: Any, datamodel: Any = None) -> Any:
        """Emit the memory of a variable, without a zero in it."""
        return _room(self.builder, lltype, name)

    def lower_expr(self, resty: Any, expr: Any) -> Any:
        """Emit an expression; loops over integers take a tenth of the instructions that Numba emits."""
        if expr.op == "call" and getattr(self.typeof(expr.func.name), "typing_key", None) is range:
            return self._lower_range(expr)
        if expr.op in {"pair_first", "pair_second"}:
            return self.builder.extract_value(self.loadvar(expr.value.name), int(expr.op == "pair_second"))
        if expr.op == "getiter" and isinstance(self.typeof(expr.value.name), types.RangeType):
            return _start_of_range(self.builder, self.loadvar(expr.value.name))
        if expr.op == "iternext" and isinstance(self.typeof(expr.value.name), types.RangeIteratorType):
            return _next_of_range(self.builder, self.loadvar(expr.value.name))
        return super().lower_expr(resty, expr)

    def _lower_range(self, expr: Any) -> Any:
        """Emit the record of start, stop and step."""
        kinds = self.fndesc.calltypes[expr].args
        numbers = [
            self.context.cast(self.builder, self.loadvar(given.name), self.typeof(given.name), kind)
            for given, kind in zip(expr.args, kinds, strict=True)
        ]
        if len(numbers) == 1:
            numbers.insert(0, ir.Constant(numbers[0].type, 0))
        if len(numbers) == 2:
            numbers.append(ir.Constant(numbers[0].type, 1))
        found = _record(self.builder, numbers)
        found.numbers = numbers  # for `_start_of_range`: that the step is 1 makes its code short
        return found

    def delvar(self, name: str) -> None:
        """Emit nothing after the last use of a variable."""

    def lower_binop(self, resty: Any, expr: Any, op: Any) -> Any:
        """Emit an operation; Numba would first look for an implementation for constants, three times."""
        typing, given = self.context.typing_context, self.fndesc.calltypes[expr]
        operation = typing.resolve_value_type(op)
        values = [
            self.context.cast(self.builder, self.loadvar(operand.name), self.typeof(operand.name), kind)
            for operand, kind in zip((expr.lhs, expr.rhs), given.args, strict=True)
        ]
        signature = operation.get_call_type(typing, given.args, {})
        result = self.context.get_function(operation, signature)(self.builder, values)
        return self.context.cast(self.builder, result, given.return_type, resty)


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerKernel(NativeLowering):
    _name = "lower_kernel"
    lowering_class = _Lower

    def run_pass(self, state: Any) -> bool:
        state.library = _Whole(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return bool(super().run_pass(state))


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerPart(NativeLowering):
    _name = "lower_part"
    lowering_class = _Lower

    def run_pass(self, state: Any) -> bool:
        state.library = _Part(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags = state.flags.copy()
        state.flags.no_compile = True  # no address is asked for
        super().run_pass(state)
        lowered, name = state.cr, state.func_id.func_name
        # Callers find the routine by this object, which has no code to run (0).
        handle = make_function(lowered.fndesc.lookup_module(), name, "", 0, lowered.env, (state.library,))
        state.targetctx.insert_user_function(handle, lowered.fndesc, [state.library])
        state.cr = lowered._replace(cfunc=handle)
        return True


# Closures, array expressions, loops to unroll by types, `with`, exceptions made at run time: looking for them takes a
# tenth of the time. Nor has each assignment to need a variable of its own, whose copies LLVM would have to remove.
_NOT_IN_KERNELS = {
    "annotate_types", "dump_parfor_diagnostics", "find_literally", "inline_closure_likes", "inline_inlinables",
    "inline_overloads", "ir_legalization", "literal_unroll", "LiteralPropagation",
    "make_function_op_code_to_jit_function", "nopython_rewrites", "nopython_supported_feature_validation",
    "reconstruct_ssa", "Rewrite dynamic raises", "strip_phis", "with_lifting",
}  # fmt: skip


class _Compiler(CompilerBase):
    """Numba's for functions without Python objects, with a lowering of our own and without what kernels never need."""

    def define_pipelines(self) -> list[Any]:
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline.passes = [
            (self.lowering if step is NativeLowering else step, why)
            for step, why in pipeline.passes
            if step.name() not in _NOT_IN_KERNELS
        ]
        pipeline.finalize()
        return [pipeline]


class KernelCompiler(_Compiler):
    """The compiler of functions that Python calls, or kernels call by address."""

    lowering = _LowerKernel


class PartCompiler(_Compiler):
    """The compiler of routines."""

    lowering = _LowerPart
