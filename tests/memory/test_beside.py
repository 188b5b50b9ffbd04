"""What is kept beside a parameter, brought to another form: the parameter stays as it is."""

from __future__ import annotations

import pytest
import torch

from fusedopt.memory import parameter

# In units of the last bit of a float32: none where all bits are kept, but for halves; for 8 bits
# less half of what they leave out, and all of it beside halves; for a compensation its last bit.
FORMS = {
    "float32": (torch.float32, 1),
    "remainder": (torch.int16, 1),
    "remainder8": (torch.int8, 256),
    "kahan": (torch.bfloat16, 256),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_master_is_read_from_its_new_form(form: str) -> None:
    # Catches halves, which remainders round up and float32 and compensations to even, and 8 bits
    # that carry into the parameter: what is read then is a unit of the parameter off.
    patterns = torch.tensor([0x3F80, 0x3F81, 0x1000, 0x1001, 0x4000, 0xBF80, 0xBF81, 0x7F00])
    p = patterns.to(torch.int16).view(torch.bfloat16)
    low = torch.arange(-0x8000, 0x8001).to(torch.int32)
    bits = p.float().view(torch.int32)[:, None] + low
    p = p[:, None].expand(bits.shape).contiguous()
    dtype, bound = FORMS[form]
    codec = "remainder" if form.startswith("remainder") else form
    # Whose half above it is an odd number's is the next one.
    odd = (low == 0x8000) & (patterns[:, None] % 2 == 1)
    values = torch.where(odd, bits - 1, bits).view(torch.float32)
    made = parameter.beside(p, values, codec, dtype)
    assert made.dtype == dtype
    found = parameter.load(p, made, codec)
    assert (found.view(torch.int32) - values.view(torch.int32)).abs().max() <= bound
