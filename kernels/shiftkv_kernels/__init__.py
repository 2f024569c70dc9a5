"""The operations of a prompt-token selection; knows torch alone.

Every operation is stated in `reference` in plain torch.
"""

from .reference import gather, group_mass, keep_best, vote

__all__ = ["gather", "group_mass", "keep_best", "vote"]
