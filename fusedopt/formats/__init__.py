"""How parameters and states are kept in memory, as parameter groups ask for it."""

from .group import GroupFormat, StateFormat, format_of, keeps_state, keeps_steps
from .options import OPTIONS, check_options, check_parameters

__all__ = [
    "OPTIONS",
    "GroupFormat",
    "StateFormat",
    "check_options",
    "check_parameters",
    "format_of",
    "keeps_state",
    "keeps_steps",
]
