"""How many rounds of loads come before the data, on machine code made by hand."""

from __future__ import annotations

from fusedopt.kernels.aot.waits import waits_before_data


def _lines(*instructions: str) -> list[str]:
    return [f"        /*{16 * i:04x}*/                   {x} ;" for i, x in enumerate(instructions)]


INDEX = "LDG.E R2, desc[UR4][R8.64]"
DATA = "LDG.E.128 R12, desc[UR4][R6.64]"


def test_loads_that_wait_for_each_other_are_rounds() -> None:
    chain = ["LEA R4, P0, R2, R10, 0x3", "LDG.E.64 R6, desc[UR4][R4.64]"]
    assert waits_before_data(_lines(INDEX, *chain, DATA)) == 2


def test_loads_that_are_under_way_together_are_one() -> None:
    # Catches a count of loads, and of uses.
    others = ["LDG.E.64 R6, desc[UR4][R20.64]", "LDG.E.64 R24, desc[UR4][R22.64]"]
    uses = ["IADD3 R3, R2, R3, RZ", "FMUL R25, R25, R24"]
    assert waits_before_data(_lines(INDEX, *others, *uses, DATA)) == 1
    # Issued after a wait, it is another round, and a use of the first costs nothing any more.
    assert waits_before_data(_lines(INDEX, uses[0], others[0], uses[0], DATA)) == 2


def test_what_is_never_used_is_not_waited_for() -> None:
    assert waits_before_data(_lines(INDEX, DATA)) == 0
    # Overwritten by what is there at once.
    assert waits_before_data(_lines("LDG.E R6, desc[UR4][R8.64]", "MOV R6, RZ", DATA)) == 0


def test_a_condition_and_the_upper_half_are_uses() -> None:
    guarded = ["ISETP.NE.AND P0, PT, R2, RZ, PT", "@P0 EXIT"]
    assert waits_before_data(_lines(INDEX, *guarded, DATA)) == 1
    wide = "LDG.E.64 R2, desc[UR4][R8.64]"
    assert waits_before_data(_lines(wide, "IMAD R5, R3, 0x48, RZ", DATA)) == 1
    assert waits_before_data(_lines(INDEX, "IMAD R5, R3, 0x48, RZ", DATA)) == 0


def test_without_data_there_is_no_count() -> None:
    assert waits_before_data(_lines(INDEX, "EXIT")) is None
