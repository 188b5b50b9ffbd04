"""What a checkpoint of an optimizer holds, and whether it fits: looked at before it is loaded."""

from __future__ import annotations

from .aside import claim, put_aside, saved_form
from .export import export_state_dict
from .flattened import check_flattened
from .initial import initialise, is_initialising
from .kept import kept_states, show_formats
from .loading import unpacked
from .pickled import as_floats, as_patterns
from .present import Present, check_present

__all__ = [
    "Present",
    "as_floats",
    "as_patterns",
    "check_flattened",
    "check_present",
    "claim",
    "export_state_dict",
    "initialise",
    "is_initialising",
    "kept_states",
    "put_aside",
    "saved_form",
    "show_formats",
    "unpacked",
]
