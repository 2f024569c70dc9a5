"""The limit: what the full cache's own decoding attends to, as a method."""

from dataclasses import dataclass

from benchmarks.quality.peers.given_scores import GivenScores


@dataclass(frozen=True, eq=False)
class FullAttention(GivenScores):
    """Keeps the tokens that the full cache attends to most while it decodes its own answer.

    Nobody knows that before the answer is there, so this is no method to use but a limit to hold others against: no
    choice of as many tokens per KV head has a higher decode attention recall.  It is a limit of choosing tokens by
    their attention, not of the answers: a choice that counts values may answer better.

    The scores are what `recall.decode_attention` gives for the same prompts.  The last token is kept like in every
    cache.  A row whose answer has no decoding step has no attention, and keeps its first tokens.
    """
