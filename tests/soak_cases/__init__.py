"""Randomised cases of the soak, by category."""

from .assisted import Assisted
from .case import Case
from .chunks import FedInChunks, GeneratedInChunks
from .compiled import Compiled
from .copies import Copies, Interleaved, Threads
from .generating import CoveringBudget, SmallBudget
from .images import Images, Questions
from .interrupts import Interrupts
from .machine import Machine
from .methods import OtherMethod
from .precision import HalfPrecision
from .refusals import Masks, Refusals
from .rows import OneRowForAll, RowAlone, RowChanges
from .selection import Kernels, SelectTokens, WholeSelection
from .turns import PaddedTurns, Turns

CATEGORIES: dict[str, type[Case]] = {
    "generate": SmallBudget,
    "covering": CoveringBudget,
    "row_alone": RowAlone,
    "row_changes": RowChanges,
    "one_row_for_all": OneRowForAll,
    "turns": Turns,
    "padded_turns": PaddedTurns,
    "assisted": Assisted,
    "generated_in_chunks": GeneratedInChunks,
    "fed_in_chunks": FedInChunks,
    "machine": Machine,
    "refusals": Refusals,
    "masks": Masks,
    "copies": Copies,
    "interleaved": Interleaved,
    "threads": Threads,
    "interrupts": Interrupts,
    "half_precision": HalfPrecision,
    "other_methods": OtherMethod,
    "images": Images,
    "questions": Questions,
    "compiled": Compiled,
    "select_tokens": SelectTokens,
    "whole_selection": WholeSelection,
    "kernels": Kernels,
}
