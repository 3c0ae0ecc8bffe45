"""The state: descriptors under keys, and sections."""

from cprd.state.descriptors import HasFileno, open_descriptor
from cprd.state.sections import InlineSection, MemfdSection
from cprd.state.state import State

__all__ = ["HasFileno", "InlineSection", "MemfdSection", "State", "open_descriptor"]
