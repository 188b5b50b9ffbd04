"""Which instructions a whole chunk takes, in three assembly languages, on texts made by hand."""

from __future__ import annotations

import pytest

from fusedopt.kernels.aot import paths

# The chunk that is not whole comes first, in a loop; roots have a rare case; what is behind the
# program's end is a function.
PTX = """
.visible .entry update()
{
	ld.global.b32 { %r1 }, [ %rd1 + 0 ];
	@%p1 bra 	$L__BB0_3;
	bra.uni 	$L__BB0_1;
$L__BB0_3:
	@%p2 ld.global.b8 { %rs1 }, [ %rd2 + 0 ];
	@%p2 bra 	$L__BB0_3;
	bra.uni 	$L__BB0_4;
$L__BB0_1:
	.loc	1 1 1
	ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd3 + 0 ];
	ld.global.v2.b32 { %r6, %r7 }, [ %rd4 + 0 ];
	@%p4 st.global.b32 [ %rd5 + 0 ], { %r8 };
$L__BB0_4:
	ret;
}
"""
SASS = """
        /*0000*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*0010*/               @P0 EXIT ;
        /*0020*/                   BRA.U !UP1, `(.L_x_0) ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/              @!P2 BRA `(.L_x_1) ;
        /*0050*/                   MOV R9, R8 ;
        /*0060*/                   CALL.REL.NOINC `($__internal_0_$__slowpath) ;
        /*0070*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0080*/                   FMUL R9, R8, R8 ;
.L_x_2:
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
.L_x_0:
        /*00b0*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;
        /*00c0*/              @!P3 BRA !P5, `(.L_x_0) ;
        /*00d0*/                   EXIT ;
$__internal_0_$__slowpath:
        /*00e0*/                   RET.REL.NODEC R48 `(update) ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3);
        /*0100*/                   NOP;
"""
AMD = """
update:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_vccnz .LBB0_4
	s_cbranch_scc1 .LBB0_2
	global_load_dwordx4 v[2:5], v[6:7], off
	s_and_saveexec_b64 s[8:9], vcc
	s_cbranch_execz .LBB0_1
	global_store_dword v[6:7], v2, off
.LBB0_1:                                ; %Flow
	s_or_b64 exec, exec, s[8:9]
.LBB0_2:                                ; %Flow2
	s_cbranch_vccz .LBB0_4
.LBB0_3:
	global_load_ubyte v2, v[6:7], off
	s_cbranch_scc1 .LBB0_3
.LBB0_4:
	s_endpgm
"""


def _words(lines: list[str]) -> list[str]:
    words = (line.split("*/")[-1].split() for line in lines)
    return [next(w for w in own if not w.startswith("@")) for own in words]


@pytest.mark.parametrize(
    ("text", "syntax", "before", "behind"),
    [
        (
            PTX, paths.PTX, ["ld.global.b32", "bra", "bra.uni"],
            ["ld.global.v4.b32", "ld.global.v2.b32", "st.global.b32", "ret;"],
        ),
        (
            SASS, paths.SASS, ["LDG.E", "EXIT", "BRA.U"],
            ["LDG.E.128", "BRA", "FMUL", "STG.E.128", "EXIT"],
        ),
        (
            AMD, paths.AMD, ["s_load_dwordx2", "s_cbranch_vccnz", "s_cbranch_scc1"],
            [
                "global_load_dwordx4", "s_and_saveexec_b64", "s_cbranch_execz",
                "global_store_dword", "s_or_b64", "s_cbranch_vccz", "s_endpgm",
            ],
        ),
    ],
    ids=["ptx", "sass", "amd"],
)  # fmt: skip
def test_the_way_of_a_whole_chunk(text, syntax, before, behind):
    first, rest = paths.whole_chunk(text, syntax)
    assert (_words(first), _words(rest)) == (before, behind)


@pytest.mark.parametrize("syntax", [paths.PTX, paths.SASS, paths.AMD])
def test_without_wide_accesses_there_is_none(syntax):
    for text in (PTX, SASS, AMD):
        narrow = text.replace(".v4.b32", ".b32").replace(".128", "").replace("dwordx4", "dword")
        assert paths.whole_chunk(narrow, syntax) == ([], [])
